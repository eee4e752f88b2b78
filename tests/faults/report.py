"""docs/FAULTS.md: what each fault did at each step, written from the results of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.boundaries import Way
from tests.faults.cells import Cell, Outcome

HEAD = """# What happens when something dies

Every fault below struck real libvirt, QEMU, agents and coordinator at the boundary named, while a guest wrote. *Before*
a step: its intent is in the journal and nothing is done; *after*: all is done and in the journal. Then somebody who
reads what the tool says did that, until the pair rested. A cell is green when the pair came to rest in a named state,
original and replica never ran at once, the newest side holds every byte that was written and acknowledged, the sides
are equal where the run was complete, and nothing of ours was left behind. `make faults` writes this page; how,
[tests/faults](../tests/faults/README.md) says.

"""


def line_of(outcome: Outcome) -> dict[str, Any]:
    """A result as it is kept."""
    return {
        "name": outcome.cell.name,
        "happened": [_clean(word) for word in outcome.happened],
        "saw": _clean(outcome.saw),
        "seconds": round(outcome.seconds, 1),
        "error": outcome.error,
    }


def _clean(sentence: str) -> str:
    """Without what differs from run to run."""
    for pattern, word in (
        (r"\bweb\d+\b", "web"),
        (r"\br[0-9a-f]{10}(-\d+(\.\d+)?)?\b", "RUN"),
        (r"\b10\.77\.0\.\d+\b", "ADDRESS"),
        (r"/tmp/fb-\S+?/", "…/"),
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID"),
        (r"\s+", " "),
    ):
        sentence = re.sub(pattern, word, sentence)
    return sentence.strip()


def write(path: Path, lines: Sequence[dict[str, Any]], wanted: Sequence[Cell]) -> None:
    """Write the page, in the matrix' own order."""
    path.write_text(page(lines, wanted, versions()))


def page(lines: Sequence[dict[str, Any]], wanted: Sequence[Cell], about: str) -> str:
    """The page's text. `about`: when, with which versions."""
    known = {line["name"]: line for line in lines}
    done = [cell for cell in wanted if cell.name in known]
    red = sum(bool(known[cell.name]["error"]) for cell in done)
    missing = len(wanted) - len(done)
    left = f"; {missing} {'was' if missing == 1 else 'were'} not come to" if missing else ""
    text = [HEAD, f"{about}\n\n{len(done)} cells, {len(done) - red} green, {red} red{left}.\n"]
    fault = ""
    for cell in done:
        if cell.fault.words != fault:
            fault = cell.fault.words
            text.append(f"\n## {fault[:1].upper()}{fault[1:]}\n\n")
            text.append("| where | what happened | what the user saw first | seconds to recover |\n|---|---|---|---|\n")
        text.append(_row(cell, known[cell.name]))
    return "".join(text)


def _row(cell: Cell, line: dict[str, Any]) -> str:
    way = "" if cell.boundary.way is Way.RUN else f"{cell.boundary.way.value}, "
    happened = " → ".join(line["happened"])
    if line["error"]:
        happened = f"**RED: {_clean(str(line['error']))[:300]}** {happened}"
    words = [f"{way}{cell.boundary.side} `{cell.boundary.step}`", happened, line["saw"], f"{line['seconds']:.1f}"]
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |\n"


def versions() -> str:
    """When, and with what."""
    day = datetime.now(UTC).date().isoformat()
    qemu = _first_line("qemu-system-x86_64", "--version")
    libvirt = _first_line("libvirtd", "--version")
    failback = importlib.metadata.version("failback")
    return (
        f"Written on {day} by failback {failback} with {libvirt}, {qemu}, Python {platform.python_version()}, software "
        "emulation, one machine, hosts in network namespaces. Seconds include the time that the fault lasted."
    )


def _first_line(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
