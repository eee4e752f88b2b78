"""Choosing how what changed in a batch is sent; `agent.delta.unpack` is the other side.

A *frame* is either ranges that hold only zeroes, which need no bytes, or ranges of data with a BLAKE3 proof of each,
compressed with zstd where that pays.
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES, Ranges, coalesce, owners, split
from agent.delta.compression import Choice
from agent.delta.zeroes import split_zeroes

MAX_FRAME_BYTES = 8 * 1024 * 1024
"""Plain bytes that the wire lets one frame hold (`MAX_PLAIN_BYTES` of the protocol, which this room does not know). At
most one range of a batch is shorter than a page, so the wire's 16384 ranges a frame are never reached: 8 MiB are 2048
pages."""

BLAKE3_BYTES = 32

Buffer = bytes | memoryview

Spans = NDArray[np.int64]
"""Shape (n, 2): where pieces begin and end in a buffer."""

_GATHER_PIECES = 16
"""Raw bytes in more pieces than this, and small ones, are put together: copying runs at 20 GB/s, while each piece by
itself costs a call, and a TLS record of its own, further on."""
_GATHER_PIECE_BYTES = 32 * 1024

_SAMPLES = 6
_SAMPLE_LEVEL = 1
"""Faster levels leave out the entropy coder, and text in base64 would look as if it did not shrink."""

_MOST_SKIPPED = 8
"""Frames that go raw unasked after samples that did not shrink, at most: some MiB sent uncompressed where data changes
its kind, against one sample for each of them."""
_LINK_IS_DEAR = 3
"""From this level on the link is what is waited for: every raw frame was sampled first."""

_KEPT_COMPRESSORS = 3
"""Compressors a thread keeps: for samples, for the level in use and for the one before. At level 9 one holds 15 MiB."""


class Codec(enum.Enum):
    """How the bytes of a frame are stored; the values are those of the protocol."""

    RAW = "raw"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A frame, ready to send.

    Attributes:
        zero: the ranges hold only zeroes; nothing but `ranges` counts then.
        ranges: in rising order; of data, none longer than the frame, of zeroes, adjoining ones joined.
        proofs: BLAKE3 of each range's plain bytes, 32 bytes each.
        codec: how `pieces` are stored.
        level: the zstd level, None for raw.
        plain_bytes: length of the ranges together.
        pieces: the stored bytes, one behind the other. Those of raw frames may be parts of the buffer that was packed:
            they hold until it is reused.
    """

    zero: bool
    ranges: Ranges
    proofs: bytes
    codec: Codec
    level: int | None
    plain_bytes: int
    pieces: tuple[Buffer, ...]

    @property
    def stored_bytes(self) -> int:
        """Length of the pieces together."""
        return sum(len(piece) for piece in self.pieces)


class Packer:
    """Makes frames; may be used by several threads at once. What it learns about the data they share.

    Args:
        min_saving: the share of its bytes that compressing must save, or the frame is sent as it is.
    """

    def __init__(self, *, min_saving: float = 0.05) -> None:
        self._most = 1 - min_saving
        self._threads = _Workshop()
        self._outlook = _Outlook()

    def pack(self, buffer: memoryview, runs: Ranges, starts: NDArray[np.uint64], choice: Choice) -> list[Packed]:
        """Frames of the changed runs of a batch, in rising order. Takes as long as hashing and compressing them.

        Args:
            buffer: the bytes of the batch, contiguous.
            runs: what changed, shape (n, 2), in rising order, not overlapping; the lengths are multiples of 4 KiB, but
                for the last of a disk.
            starts: where each run lies in `buffer`, shape (n,).
            choice: level and size of the frames.

        Raises:
            ValueError: the runs are not such, or do not lie in the buffer.
        """
        if not len(runs):
            return []
        offsets, lengths, places = _joined(runs.astype(np.int64), starts.astype(np.int64))
        _check(buffer, offsets, lengths, places)
        offsets, lengths, places, zero = split_zeroes(buffer, offsets, lengths, places)
        turns = [0, *(np.flatnonzero(zero[1:] != zero[:-1]) + 1).tolist(), len(zero)]
        frames: list[Packed] = []
        for first, end in pairwise(turns):
            these = slice(first, end)
            if zero[first]:
                ranges = coalesce(_as_ranges(offsets[these], lengths[these]))
                frames.append(Packed(True, ranges, b"", Codec.RAW, None, int(lengths[these].sum()), ()))
            else:
                cut = _at_blocks(offsets[these], lengths[these], places[these])
                for piece in _cut(*cut, _frame_bytes(choice)):
                    frames.append(self._frame(buffer, *piece, choice.level))
        return frames

    def _frame(
        self,
        buffer: memoryview,
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        places: NDArray[np.int64],
        level: int | None,
    ) -> Packed:
        bounds = zip(places.tolist(), (places + lengths).tolist(), strict=True)
        proofs = b"".join([blake3(buffer[start:end]).digest() for start, end in bounds])
        ranges, plain_bytes = _as_ranges(offsets, lengths), int(lengths.sum())
        spans = _spans(lengths, places)
        if level is not None and self._promises(buffer, spans, plain_bytes, level):
            stored = self._compressed(buffer, spans, plain_bytes, level)
            shrank = len(stored) <= plain_bytes * self._most
            self._outlook.tried(shrank=shrank)
            if shrank:
                return Packed(False, ranges, proofs, Codec.ZSTD, level, plain_bytes, (stored,))
        pieces = _raw_pieces(buffer, spans, plain_bytes)
        return Packed(False, ranges, proofs, Codec.RAW, None, plain_bytes, pieces)

    def _compressed(self, buffer: memoryview, spans: Spans, plain_bytes: int, level: int) -> bytes:
        if len(spans) == 1:
            start, end = spans[0].tolist()
            plain: Buffer = buffer[start:end]
        else:
            plain = _gathered(buffer, spans, self._threads.scratch(plain_bytes))
        return self._threads.compressor(level).compress(plain)

    def _promises(self, buffer: memoryview, spans: Spans, plain_bytes: int, level: int) -> bool:
        """Whether compressing a frame is worth trying: as the last ones went, or as a sample of it goes."""
        if plain_bytes <= 2 * _SAMPLES * PAGE_BYTES:
            return True
        match self._outlook.next(patient=level < _LINK_IS_DEAR):
            case _Advice.COMPRESS:
                return True
            case _Advice.RAW:
                return False
            case _Advice.SAMPLE:
                sample = _sample(buffer, spans, plain_bytes)
                stored = self._threads.compressor(min(level, _SAMPLE_LEVEL)).compress(sample)
                promises = len(stored) <= len(sample) * self._most
                if not promises:
                    self._outlook.refused()
                return promises


class _Workshop(threading.local):
    """What each thread keeps: compressors by level, since none may be used by two at once and making one costs memory;
    and memory to gather a frame in, since fresh memory would cost more than the copying."""

    def __init__(self) -> None:
        self._scratch = np.empty(0, dtype=np.uint8)
        self._by_level: OrderedDict[int, zstandard.ZstdCompressor] = OrderedDict()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        compressor = self._by_level.get(level)
        if compressor is None:
            # One-shot compression declares the content size in the frame, which the receiver checks first. Our proofs
            # are stronger than zstd's checksum.
            compressor = self._by_level[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
        self._by_level.move_to_end(level)
        if len(self._by_level) > _KEPT_COMPRESSORS:
            self._by_level.popitem(last=False)
        return compressor

    def scratch(self, size_bytes: int) -> NDArray[np.uint8]:
        """Memory of exactly that size, the same each time."""
        if len(self._scratch) < size_bytes:
            self._scratch = np.empty(size_bytes, dtype=np.uint8)
        return self._scratch[:size_bytes]


class _Advice(enum.Enum):
    COMPRESS = enum.auto()
    SAMPLE = enum.auto()
    RAW = enum.auto()


class _Outlook:
    """What the last frames let one expect of the next. A frame that shrank speaks for the next without a sample; each
    sample that did not doubles, up to a bound, the frames that go raw before another is taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shrinks = False
        self._skip = 0  # frames that still go raw unasked
        self._refusals = 0  # samples and tries in a row that did not shrink

    def next(self, *, patient: bool) -> _Advice:
        """For the next frame; impatient when sending a frame raw that would have shrunk is dear."""
        with self._lock:
            if self._shrinks:
                return _Advice.COMPRESS
            if patient and self._skip > 0:
                self._skip -= 1
                return _Advice.RAW
            return _Advice.SAMPLE

    def refused(self) -> None:
        """A sample did not shrink."""
        with self._lock:
            self._refusals += 1
            self._skip = min(2 ** (self._refusals - 1), _MOST_SKIPPED)

    def tried(self, *, shrank: bool) -> None:
        """A whole frame was compressed."""
        with self._lock:
            self._shrinks = shrank
            if shrank:
                self._refusals = self._skip = 0


def _frame_bytes(choice: Choice) -> int:
    """Whole pages, at least one, at most what the wire carries."""
    return min(max(choice.frame_bytes // PAGE_BYTES, 1) * PAGE_BYTES, MAX_FRAME_BYTES)


def _as_ranges(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Ranges:
    return np.column_stack((offsets, lengths)).astype(np.uint64)


def _joined(
    runs: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Offsets, lengths and places of the runs, those joined that adjoin on the disk and in the buffer."""
    offsets, lengths = runs[:, 0], runs[:, 1]
    apart = (offsets[1:] != offsets[:-1] + lengths[:-1]) | (places[1:] != places[:-1] + lengths[:-1])
    first = np.concatenate(([True], apart))
    last = np.concatenate((apart, [True]))
    return offsets[first], offsets[last] + lengths[last] - offsets[first], places[first]


def _check(
    buffer: memoryview, offsets: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
) -> None:
    """Joined runs, as `Packer.pack` wants them."""
    if (lengths < 1).any() or (offsets[1:] < offsets[:-1] + lengths[:-1]).any():
        raise ValueError("runs must not be empty, and rise without overlapping")
    if (lengths[:-1] % PAGE_BYTES).any():
        raise ValueError(f"only the last run of a disk may be no multiple of {PAGE_BYTES} bytes")
    if (places < 0).any() or int((places + lengths).max()) > buffer.nbytes:
        raise ValueError(f"runs lie outside the buffer of {buffer.nbytes} bytes")


def _cut(
    offsets: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64], frame_bytes: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """The ranges of each frame: all of them full but the last, a range cut where it goes over."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    edges = np.unique(np.concatenate(([0], ends[:-1], np.arange(frame_bytes, total, frame_bytes))))
    run = np.searchsorted(ends, edges, side="right")
    skipped = edges - (ends[run] - lengths[run])
    cut_lengths = np.diff(edges, append=total)
    frames = [0, *(np.flatnonzero(np.diff(edges // frame_bytes)) + 1).tolist(), len(edges)]
    return [
        (offsets[run[a:b]] + skipped[a:b], cut_lengths[a:b], places[run[a:b]] + skipped[a:b])
        for a, b in pairwise(frames)
    ]


def _at_blocks(
    offsets: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Runs cut where blocks begin: a proof of its own for each block tells, when one fails, where on the disk."""
    runs = _as_ranges(offsets, lengths)
    cut = split(runs, BLOCK_BYTES)
    owner = owners(runs, cut)
    pieces = cut.astype(np.int64)
    return pieces[:, 0], pieces[:, 1], places[owner] + pieces[:, 0] - offsets[owner]


def _spans(lengths: NDArray[np.int64], places: NDArray[np.int64]) -> Spans:
    """Where ranges begin and end in the buffer, those joined that adjoin there: shape (n, 2)."""
    apart = places[1:] != places[:-1] + lengths[:-1]
    first = np.concatenate(([True], apart))
    last = np.concatenate((apart, [True]))
    return np.column_stack((places[first], places[last] + lengths[last]))


def _raw_pieces(buffer: memoryview, spans: Spans, plain_bytes: int) -> tuple[Buffer, ...]:
    """The bytes of spans: parts of the buffer, or, where those would be many and small, one copy."""
    if len(spans) <= _GATHER_PIECES or plain_bytes > len(spans) * _GATHER_PIECE_BYTES:
        return tuple(buffer[start:end] for start, end in spans.tolist())
    return (_gathered(buffer, spans, np.empty(plain_bytes, dtype=np.uint8)),)


def _gathered(buffer: memoryview, spans: Spans, memory: NDArray[np.uint8]) -> Buffer:
    """The bytes of spans one behind the other, in the memory given (exactly as long)."""
    if (spans % PAGE_BYTES).any():  # at the end of a disk
        return b"".join([buffer[start:end] for start, end in spans.tolist()])
    # numpy gathers pages faster than bytes.join does slices, and lets other threads run meanwhile.
    begins, counts = spans[:, 0] // PAGE_BYTES, (spans[:, 1] - spans[:, 0]) // PAGE_BYTES
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    pages = np.frombuffer(buffer, dtype=np.uint8, count=buffer.nbytes // PAGE_BYTES * PAGE_BYTES)
    index = np.repeat(begins, counts) + inside
    # Clipping never happens: it only spares numpy a buffer of its own.
    np.take(pages.reshape(-1, PAGE_BYTES), index, axis=0, out=memory.reshape(-1, PAGE_BYTES), mode="clip")
    return memory.data


def _sample(buffer: memoryview, spans: Spans, plain_bytes: int) -> bytes:
    """A few pages, evenly spread over the spans."""
    ends = np.cumsum(spans[:, 1] - spans[:, 0])
    step = plain_bytes // _SAMPLES
    positions = np.arange(step // 2, plain_bytes, step)
    span = np.searchsorted(ends, positions, side="right")
    starts = (spans[span, 1] - (ends[span] - positions)) // PAGE_BYTES * PAGE_BYTES
    return b"".join([buffer[start : start + PAGE_BYTES] for start in starts.tolist()])
