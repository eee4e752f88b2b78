"""What a VM is to be attached to in its new place, as a person says it: ``--map KIND:OLD=NEW``, or a file of the same.

Pure but for reading and writing the file (TOML: tables ``network``, ``pool`` and ``firmware`` of ``OLD = "NEW"``, and
``name``).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.errors import UsageError

KINDS = ("network", "pool", "firmware")
HOW = "write KIND:OLD=NEW, where KIND is network, pool or firmware, or name=NEW"

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceMapping:
    """(old, new) of each; `name`: the VM's name in its new place, empty: the one the original has.

    Attributes:
        networks: names of networks or bridges; a new one may say which it is, ``bridge:br1``.
        pools: storage pools of the replica's host, or target names of disks, to pools of the new host.
        firmware: files of firmware, kernels and initial RAM disks.
    """

    networks: Pairs = ()
    pools: Pairs = ()
    firmware: Pairs = ()
    name: str = ""

    def with_word(self, word: str) -> PlaceMapping:
        """And what that word of the command line says; a later one for the same thing counts.

        Raises:
            UsageError: it is none.
        """
        left, equals, new = word.partition("=")
        kind, colon, old = left.partition(":")
        if equals and new and left == "name":
            return replace(self, name=new)
        if not (equals and new and colon and old) or kind not in KINDS:
            raise UsageError(f"{word!r} is no mapping: {HOW}", code="bad-mapping")
        match kind:
            case "network":
                return replace(self, networks=_put(self.networks, old, new))
            case "pool":
                return replace(self, pools=_put(self.pools, old, new))
            case _:
                return replace(self, firmware=_put(self.firmware, old, new))

    @property
    def is_empty(self) -> bool:
        """Nothing is said."""
        return self == PlaceMapping()


def mapping_of(words: Sequence[str], file: Path | None) -> PlaceMapping:
    """What the file says, and then the words.

    Raises:
        UsageError: it cannot be read, or says what is no mapping.
    """
    mapping = PlaceMapping() if file is None else read_mapping(file)
    for word in words:
        mapping = mapping.with_word(word)
    return mapping


def read_mapping(file: Path) -> PlaceMapping:
    """What that file says. Raises `UsageError`."""
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the mapping {file} cannot be read: {why}", code="bad-mapping") from error
    mapping = PlaceMapping()
    for kind, value in told.items():
        if kind == "name" and isinstance(value, str) and value:
            mapping = replace(mapping, name=value)
            continue
        if kind not in KINDS or not isinstance(value, dict) or not all(isinstance(new, str) for new in value.values()):
            raise UsageError(
                f'the mapping {file} says {kind} = …: it has tables network, pool and firmware of OLD = "NEW", and '
                'name = "NEW"',
                code="bad-mapping",
            )
        for old, new in value.items():
            if new:  # a draft leaves open what is to be filled in
                mapping = mapping.with_word(f"{kind}:{old}={new}")
    return mapping


def draft(name: str, tables: Mapping[str, Mapping[str, str]], choices: Mapping[str, Sequence[str]]) -> str:
    """The text of a file for a person to complete.

    Args:
        name: the VM's name in its new place.
        tables: by kind, what must be mapped, and to what it would be; empty: to be filled in.
        choices: by kind, what the new host has.
    """
    lines = [
        "# Where the VM is attached in its new place. What is left empty keeps its name, if the host has it.",
        f"name = {_quoted(name)}",
    ]
    for kind in KINDS:
        if tables.get(kind):
            lines += ["", f"# the host has: {', '.join(choices.get(kind, ())) or 'none'}", f"[{kind}]"]
            lines += [f"{_quoted(old)} = {_quoted(new)}" for old, new in sorted(tables[kind].items())]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _put(pairs: Pairs, old: str, new: str) -> Pairs:
    return (*(pair for pair in pairs if pair[0] != old), (old, new))
