"""Every limit on what crosses a wire, with its reason. Both sides keep them; ``protocol/SPEC.md`` lists them."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """How long the two parts of a frame may be, in bytes; checked as soon as the frame's prefix is there."""

    header_bytes: int
    payload_bytes: int


# --- frames ---------------------------------------------------------------------------------------------------

HANDSHAKE = FrameLimits(header_bytes=4 * KIB, payload_bytes=0)
"""Until the handshake is through: hellos are short, and whoever speaks is not let in yet."""

CONTROL = FrameLimits(header_bytes=MIB, payload_bytes=0)
"""A `VmDescription` with a thousand snapshots and long paths takes about 300 KiB."""

MAX_PLAIN_BYTES = 8 * MIB
"""Plain bytes of blocks in one `BlockData`: enough to make the cost of a message vanish, small enough that a few in
flight fit into an agent's memory budget."""

MAX_BLOCK_RANGES = 16 * KIB
"""Ranges in one `BlockData`: 512-byte ranges still fill it; each costs 48 bytes of payload."""

MAX_RANGES = 64 * KIB
"""Ranges in one `CompareSpan`, `TrackedSpan` (both kinds together) or `ZeroRanges`: 1 MiB of payload, checked in 16 to
27 ms, those of both kinds in some more."""

MAX_DIGESTS = 256 * KIB
"""Superblocks in one `CompareSpan` or `TrackedSpan`, and details in one `SpanAnswer`: 4 MiB of payload, the pages of
1 GiB."""

BULK = FrameLimits(header_bytes=64 * KIB, payload_bytes=9 * MIB)
"""`MAX_PLAIN_BYTES` of blocks, `MAX_BLOCK_RANGES` ranges and digests behind a small header."""

# --- headers: what msgpack may make of them -------------------------------------------------------------------

MAX_CONTAINERS = 16 * KIB
"""Maps and arrays in one header. An empty map is one byte on the wire and about 70 in memory: a header of nothing else
would take seventy times its size."""

MAX_MAP_KEYS = 256
"""Keys of one map: no message has more than twenty, and facts of a failure are few."""

MAX_ARRAY_ITEMS = 64 * KIB
"""Items of one array: the shortest string costs 2 bytes on the wire and about 60 in memory."""

MAX_TEXT_BYTES = 64 * KIB
"""One string or byte string: sentences, names and paths (4 KiB on Linux)."""

INTEGER_MIN, INTEGER_MAX = -(2**63), 2**64 - 1
"""What msgpack can write: signed or unsigned 64-bit integers."""

MAX_DISK_BYTES = 2**63 - 1
"""Sizes, offsets and sums of them: every language has a type for that, and no disk is larger."""

# --- control --------------------------------------------------------------------------------------------------

MAX_REQUEST_NUMBER = 2**32 - 1
"""Request numbers rise and never come back; four thousand million of them outlast any connection."""

MAX_OUTSTANDING_REQUESTS = 64
"""Unanswered requests on one connection: a coordinator asks a handful at once; each may hold a worker thread."""

MAX_GOODBYE_CHARACTERS = 1000
"""Of the sentence in a `Goodbye`, so that it fits a frame of the handshake whatever its alphabet."""

# --- bulk -----------------------------------------------------------------------------------------------------

BLOCK_BYTES = 64 * KIB
"""What is hashed at once, and what the ranges of a `CompareSpan` are aligned to: a digest of 16 bytes for each costs
0.02 % of a disk, and few guests write less at once."""

MIN_DETAIL_BYTES = 4 * KIB
MAX_SUPERBLOCK_BYTES = 64 * MIB
"""Powers of two: from the page that guests write to the largest run that still makes sense under one digest."""

MAX_LANES = 16
"""Connections of one disk: some fill any link; each costs both ends a window of memory."""

MAX_PROVEN_RANGES = 1024
"""Ranges in one `BulkWelcome`: what is proven lies together but for what was on its way; the largest are told."""

MAX_ATTEMPTS = 2**31 - 1
"""`BulkHello.attempt`: attempts rise, and each costs at least a fraction of a second."""

MIN_WINDOW_BYTES = 1 * MIB
MAX_WINDOW_BYTES = 1024 * MIB
"""`BulkWelcome.window_bytes`: below, a link of any latency starves; above, nobody could mean it."""

MIN_AHEAD_BYTES = 1 * MIB
MAX_AHEAD_BYTES = 2**40
"""`BulkWelcome.ahead_bytes`: bytes of disk asked for and not answered."""

# --- connections (defaults of the drivers' arguments) -----------------------------------------------------------

MAX_CONTROL_CONNECTIONS = 32
"""Open control connections of one agent: a run has one, a command has one for as long as it lasts."""

MAX_HANDSHAKES = 64
"""Control connections that have not shaken hands yet; each costs a file descriptor and a TLS state of about 50 KiB."""
