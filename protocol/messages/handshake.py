"""How a conversation begins and ends, on control and on bulk connections."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages.words import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of the side that connected, on a control connection."""

    versions: tuple[int, ...]
    software: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The agent's answer: the version chosen and who it is."""

    version: int
    software: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkHello:
    """First message of the source agent on a bulk connection: which grant, which of its disks. A disk may get several
    connections; all carry the same seed.

    `attempt`: 1 for the first connections of the disk. Where they are lost, the source comes again with a number that
    rises; whatever is left of an earlier attempt is over then."""

    versions: tuple[int, ...]
    software: str
    grant: str
    target: str  # name of the disk at the receiving side
    digest_seed: int  # seed of the xxh3-128 digests of this pass, random, 64 bits
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkWelcome:
    """The target agent's answer. `window_bytes`: how much `BlockData` payload may be unacknowledged on this connection;
    `ahead_bytes`: how many bytes of data may be asked for on it with `CompareSpan` and not be answered yet; `lanes`:
    how many connections it takes for this disk.

    `proven`: of so many ranges it is proven that they equal the view of the grant; where it is not 0, `ProvenRanges`
    is what the target says next."""

    version: int
    software: str
    window_bytes: int
    ahead_bytes: int
    lanes: int
    proven: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """Said before closing on purpose; `code` and `sentence` say why. Nothing follows it."""

    code: str
    sentence: str
