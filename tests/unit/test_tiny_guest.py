"""The small guest's bytes are its source's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab import tiny_guest

SOURCE = Path(tiny_guest.__file__).with_name("tiny-guest.s")
CODE = slice(0x200, 0x400)


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("objcopy") is None, reason="there is no assembler here")
def test_the_bytes_are_what_the_source_assembles_to(tmp_path: Path) -> None:
    built, flat = tmp_path / "tiny.o", tmp_path / "tiny.bin"
    subprocess.run(["as", "--32", "-o", str(built), str(SOURCE)], check=True)
    subprocess.run(["objcopy", "-O", "binary", str(built), str(flat)], check=True)
    assert flat.read_bytes()[CODE] == tiny_guest.tiny_kernel(writes=True)[CODE]


def test_one_that_only_reads_differs_in_one_byte() -> None:
    pairs = zip(tiny_guest.tiny_kernel(writes=True), tiny_guest.tiny_kernel(writes=False), strict=True)
    assert [(one, other) for one, other in pairs if one != other] == [(1, 0)]
