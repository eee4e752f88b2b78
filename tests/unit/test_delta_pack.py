"""Making frames, by values."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from agent.delta import pack as pack_module
from agent.delta.blocks import to_ranges
from agent.delta.compression import Choice
from agent.delta.pack import Codec, Packer
from agent.delta.unpack import Unpacker
from tests.unit.delta_house import FAST, MIB, OFF, B, P, noise, pack, stored, text, unpack

# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_text_is_compressed_and_noise_is_not() -> None:
    (compressed,) = pack(text(4 * B))
    assert (compressed.codec, compressed.level) == (Codec.ZSTD, 1)
    assert len(compressed.pieces) == 1
    assert compressed.stored_bytes < 4 * B // 10
    assert zstandard.frame_content_size(stored(compressed)) == 4 * B == compressed.plain_bytes
    assert unpack(compressed) == text(4 * B)
    (raw,) = pack(noise(4 * B))
    assert (raw.codec, raw.level, stored(raw)) == (Codec.RAW, None, noise(4 * B))
    assert unpack(raw) == noise(4 * B)


def test_nothing_is_compressed_when_compression_is_off() -> None:
    (packed,) = pack(text(4 * B), choice=OFF)
    assert (packed.codec, packed.level) == (Codec.RAW, None)


def test_what_saves_too_little_is_sent_as_it_is() -> None:
    # One byte in sixteen is predictable: zstd saves something, but not the fifth that this packer asks for.
    chance = random.Random(0)
    content = b"".join(chance.randbytes(15) + b"\0" for _ in range(B // 8))
    (packed,) = pack(content, packer=Packer(min_saving=0.2))
    assert packed.codec is Codec.RAW


def test_compressible_only_where_the_sample_does_not_look_costs_nothing_but_bytes() -> None:
    content = noise(8192) + bytes(4096) + noise(3 * B)
    (packed,) = pack(content)
    assert unpack(packed) == content


class Attempts:
    """Counts what is compressed, by its length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        real = pack_module._Workshop.compressor

        def compressor(workshop: pack_module._Workshop, level: int) -> Attempts:
            self._compress = real(workshop, level).compress
            return self

        monkeypatch.setattr(pack_module._Workshop, "compressor", compressor)

    def compress(self, plain: bytes) -> bytes:
        self.lengths.append(len(plain))
        return self._compress(plain)

    @property
    def samples(self) -> int:
        return sum(length < MIB for length in self.lengths)

    @property
    def frames(self) -> int:
        return sum(length == MIB for length in self.lengths)


def test_data_that_does_not_shrink_is_sampled_rarely_and_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(monkeypatch)
    packer = Packer()
    content = noise(8 * MIB)
    for _ in range(16):
        pack(content, packer=packer)
    assert attempts.frames == 0
    assert attempts.samples <= 128 // 8 + 2


def test_data_that_does_not_shrink_is_sampled_always_while_the_link_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(monkeypatch)
    pack(noise(8 * MIB), choice=Choice(3, MIB))
    assert (attempts.frames, attempts.samples) == (0, 8)


def test_data_that_just_shrank_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(monkeypatch)
    packer = Packer()
    for _ in range(4):
        pack(text(8 * MIB), packer=packer)
    assert (attempts.frames, attempts.samples) == (32, 1)


def test_data_that_begins_to_shrink_is_noticed_within_some_frames() -> None:
    packer = Packer()
    for _ in range(4):
        pack(noise(8 * MIB), packer=packer)
    codecs = [frame.codec for frame in pack(text(16 * MIB), packer=packer)]
    assert codecs.index(Codec.ZSTD) <= 8
    assert set(codecs[codecs.index(Codec.ZSTD) :]) == {Codec.ZSTD}


def test_one_frame_that_did_not_shrink_brings_the_samples_back(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Packer()
    pack(text(MIB), packer=packer)
    attempts = Attempts(monkeypatch)
    pack(noise(8 * MIB), packer=packer)
    assert attempts.frames == 1


def test_a_thread_keeps_few_compressors() -> None:
    packer = Packer()
    for level in (-20, -5, -1, 1, 3, 5, 6, 9):
        (packed,) = pack(text(B), choice=Choice(level, MIB), packer=packer)
        assert packed.level == level
    assert len(packer._threads._by_level) == 3


# --- frames -----------------------------------------------------------------------------------------------------------


def test_each_range_has_its_blake3() -> None:
    content = noise(B + 3 * P + 100)
    (packed,) = pack(content, [(B, B), (2 * B + P, 2 * P + 100)])
    assert packed.ranges.tolist() == [[B, B], [2 * B + P, 2 * P + 100]]
    assert packed.proofs == blake3(content[:B]).digest() + blake3(content[B + P :]).digest()
    assert packed.plain_bytes == B + 2 * P + 100


def test_no_range_reaches_over_a_block_so_that_a_failed_proof_tells_where() -> None:
    content = noise(2 * B + 3 * P)
    (packed,) = pack(content, [(B + 3 * P, 2 * B)])
    assert packed.ranges.tolist() == [[B + 3 * P, B - 3 * P], [2 * B, B], [3 * B, 3 * P]]
    assert len(packed.proofs) == 3 * 32
    assert unpack(packed) == content[3 * P :]


def test_adjoining_runs_become_one_range() -> None:
    content = noise(8 * P)
    (packed,) = pack(content, [(B, P), (B + P, 2 * P), (B + 4 * P, P)])
    assert packed.ranges.tolist() == [[B, 3 * P], [B + 4 * P, P]]


def test_runs_that_adjoin_on_the_disk_alone_stay_apart() -> None:
    content = noise(3 * P)
    runs, starts = to_ranges([(B, P), (B + P, P)]), np.array([2 * P, 0], dtype=np.uint64)
    (packed,) = Packer().pack(memoryview(content), runs, starts, FAST)
    assert packed.ranges.tolist() == [[B, P], [B + P, P]]
    assert unpack(packed) == content[2 * P :] + content[:P]


def test_zeroes_become_ranges_in_their_turn() -> None:
    frames = pack(b"x" * B + bytes(2 * B) + b"y" * B + bytes(5))
    assert [(frame.zero, frame.ranges.tolist()) for frame in frames] == [
        (False, [[B, B]]),
        (True, [[2 * B, 2 * B]]),
        (False, [[4 * B, B], [5 * B, 5]]),
    ]
    zero = frames[1]
    assert (zero.pieces, zero.proofs, zero.stored_bytes, zero.plain_bytes) == ((), b"", 0, 2 * B)


def test_zeroes_with_no_data_between_them_are_one_entry() -> None:
    (packed,) = pack(bytes(8 * B), [(B, B), (3 * B, 2 * B), (6 * B, B)])
    assert packed.zero
    assert packed.ranges.tolist() == [[B, B], [3 * B, 2 * B], [6 * B, B]]


def test_frames_are_full_but_for_the_last_and_long_runs_are_cut_at_pages() -> None:
    content = noise(5 * B + 100)
    frames = pack(content, choice=Choice(1, 2 * B + 100))
    assert [frame.ranges.tolist() for frame in frames] == [
        [[B, B], [2 * B, B]],
        [[3 * B, B], [4 * B, B]],
        [[5 * B, B], [6 * B, 100]],
    ]
    assert [frame.plain_bytes for frame in pack(content, choice=Choice(1, 1))] == [P] * 80 + [100]


def test_no_frame_is_larger_than_the_wire_lets_it_be() -> None:
    frames = pack(noise(9 * MIB), choice=Choice(None, 1 << 40))
    assert [frame.plain_bytes for frame in frames] == [8 * MIB, MIB]


def test_a_range_is_cut_where_its_frame_is_full() -> None:
    content = noise(16 * P)
    frames = pack(content, [(B, 3 * P), (B + 4 * P, 3 * P), (B + 8 * P, P)], Choice(None, 4 * P))
    assert [frame.ranges.tolist() for frame in frames] == [
        [[B, 3 * P], [B + 4 * P, P]],
        [[B + 5 * P, 2 * P], [B + 8 * P, P]],
    ]
    assert (
        b"".join(unpack(frame) for frame in frames) == content[: 3 * P] + content[4 * P : 7 * P] + content[8 * P :][:P]
    )


def test_raw_frames_of_few_ranges_refer_to_the_buffer() -> None:
    content = noise(8 * MIB)
    frames = pack(content, choice=OFF)
    assert len(frames) == 8
    for frame in frames:
        (piece,) = frame.pieces
        assert isinstance(piece, memoryview)
        assert piece.obj is content


def test_ranges_that_lie_together_in_the_buffer_are_one_piece() -> None:
    content = noise(2 * B)
    runs, starts = to_ranges([(0, B), (9 * B, B)]), np.array([0, B], dtype=np.uint64)
    (packed,) = Packer().pack(memoryview(content), runs, starts, OFF)
    assert len(packed.ranges) == 2
    assert len(packed.pieces) == 1


@pytest.mark.parametrize("tail", [0, 100])
@pytest.mark.parametrize("choice", [FAST, OFF])
def test_many_small_ranges_are_put_together(choice: Choice, tail: int) -> None:
    content = noise(512 * P - tail)
    runs = [(B + at, min(P, len(content) - at)) for at in range(P, len(content), 2 * P)]
    (packed,) = pack(content, runs, choice)
    assert len(packed.pieces) == 1
    assert len(packed.ranges) == 256
    assert unpack(packed) == b"".join(content[offset - B :][:length] for offset, length in runs)


def test_nothing_changed_makes_no_frames() -> None:
    assert pack(noise(B), []) == []


@pytest.mark.parametrize(
    "runs",
    [
        [(B, 0)],
        [(B, P), (B, P)],
        [(B + P, P), (B, P)],
        [(B, 100), (B + P, P)],
        [(B, B + 1)],
        [(3 * B, P)],
    ],
)
def test_runs_that_cannot_be_are_refused(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"runs? "):
        pack(noise(B), runs)


def test_offsets_of_huge_disks_stay_exact() -> None:
    first = (1 << 62) + P
    (packed,) = pack(noise(3 * P), first=first)
    assert packed.ranges.tolist() == [[first, 3 * P]]


def test_several_threads_may_share_a_packer_and_an_unpacker() -> None:
    packer, unpacker = Packer(), Unpacker()
    contents = [text(MIB // 2) + noise(MIB // 2, seed) + bytes(MIB) for seed in range(4)]
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            frames = pack(contents[number], packer=packer, first=0)
            plain = b"".join(
                bytes(frame.plain_bytes)
                if frame.zero
                else unpacker.unpack(memoryview(stored(frame)), frame.codec, frame.ranges, memoryview(frame.proofs))
                for frame in frames
            )
            if plain != contents[number]:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
