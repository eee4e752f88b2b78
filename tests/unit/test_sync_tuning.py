"""What a pass learns while it runs, and what the next one over the disk begins with."""

from __future__ import annotations

import pytest

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES
from agent.delta.granularity import Granularity, Seen
from agent.sync import source as source_side
from agent.sync.buffers import BufferPool
from agent.sync.tuning import QUIET_AFTER_BYTES, Tuning, Tunings
from protocol.messages import CompareSpan
from tests.fakes.pass_bench import PassRun, run_disks
from tests.fakes.sparse_disk import SparseDisk
from tests.unit.test_sync_counts import storage

B, P, MIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20
BLOCKS_OF_MIB = MIB // B


def learn(tuning: Tuning, mib: int, *, differing_bytes: int = 0) -> None:
    """Spans of 8 MiB, in each of which so much lies in superblocks that differ."""
    for _ in range(mib // 8):
        superblocks = differing_bytes // MIB
        seen = Seen(8 * MIB, MIB, P, 8, superblocks, superblocks * MIB // P, superblocks, superblocks)
        tuning.learn(seen, compared_bytes=8 * MIB, differing_bytes=differing_bytes)


def test_a_disk_is_not_called_quiet_before_enough_of_it_was_compared() -> None:
    tuning = Tuning()
    learn(tuning, QUIET_AFTER_BYTES // MIB - 8)
    assert not tuning.quiet
    learn(tuning, 8)
    assert tuning.quiet


def test_a_disk_that_was_quiet_is_quiet_from_the_first_span() -> None:
    assert Tuning(was_quiet=True).quiet


def test_a_disk_that_begins_to_differ_is_quiet_no_more() -> None:
    tuning = Tuning(was_quiet=True)
    learn(tuning, 256)
    assert tuning.quiet
    learn(tuning, 8, differing_bytes=8 * MIB)
    assert not tuning.quiet


def test_a_disk_that_stops_differing_becomes_quiet_again() -> None:
    tuning = Tuning()
    learn(tuning, 64, differing_bytes=8 * MIB)
    assert not tuning.quiet
    learn(tuning, 1024)
    assert tuning.quiet


def test_rare_changes_leave_a_disk_quiet() -> None:
    tuning = Tuning()
    for _ in range(16):
        learn(tuning, 248)
        learn(tuning, 8, differing_bytes=MIB)
    assert tuning.quiet


def test_what_the_target_reads_as_zero_tells_nothing_of_granularity_but_is_no_quiet() -> None:
    tuning = Tuning()
    before = tuning.granularity
    for _ in range(64):
        tuning.learn(Seen(0, MIB, P, 0, 0, 0, 0, 0), compared_bytes=8 * MIB, differing_bytes=8 * MIB)
    assert tuning.granularity == before
    assert not tuning.quiet


# --- from pass to pass ------------------------------------------------------------------------------------------------


def test_the_next_pass_over_a_disk_begins_where_the_last_ended() -> None:
    tunings = Tunings()
    tuning = tunings.begin("vm", "vda", None)
    assert not tuning.quiet
    learn(tuning, 512)
    tunings.end("vm", "vda", tuning)
    following = tunings.begin("vm", "vda", None)
    assert following.quiet
    assert following.granularity == tuning.ended_with() != Tuning().granularity
    for other in (("vm", "vdb"), ("other", "vda")):
        assert not tunings.begin(*other, None).quiet


def test_of_many_disks_the_oldest_are_forgotten() -> None:
    tunings = Tunings()
    for number in range(300):
        tunings.end("vm", f"disk{number}", Tuning(was_quiet=True))
    assert not tunings.begin("vm", "disk0", None).quiet
    assert tunings.begin("vm", "disk299", None).quiet


# --- in a pass --------------------------------------------------------------------------------------------------------


async def compare(size_mib: int, *, changed: bool, tuning: Tuning, batch_mib: int = 8) -> PassRun:
    blocks = range(size_mib * BLOCKS_OF_MIB)
    source, target = storage(size_mib * MIB, blocks), storage(size_mib * MIB, blocks)
    if changed:
        target.blocks = {number: content[1:] + content[:1] for number, content in target.blocks.items()}
    run = await run_disks(
        SparseDisk("vda", source, writable=False),
        SparseDisk("vda", target),
        source_others={"buffers": BufferPool(4, batch_mib * MIB), "tuning": tuning},
        target_others={"buffers": BufferPool(2, 8 * MIB)},
    )
    assert run.complete
    assert source.blocks == target.blocks
    return run


def lengths(run: PassRun) -> list[int]:
    """Of the spans, in MiB."""
    return [message.length_bytes // MIB for message, _ in run.said if isinstance(message, CompareSpan)]


async def test_a_disk_that_turns_out_the_same_is_asked_about_in_larger_spans() -> None:
    tuning = Tuning()
    run = await compare(640, changed=False, tuning=tuning)
    assert tuning.quiet
    assert lengths(run)[:8] == [8] * 8
    assert max(lengths(run)) > 32
    assert lengths(run)[-1] <= 8  # what the target has still to compare when the source has read everything
    assert run.source.superblock_bytes == 4 * MIB


async def test_a_disk_thought_quiet_that_differs_everywhere_goes_back_to_small_spans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_side, "SKIMMED_BYTES", 4 * MIB)
    tuning = Tuning(Granularity(MIB, P), was_quiet=True)
    run = await compare(96, changed=True, tuning=tuning, batch_mib=1)
    assert not tuning.quiet
    assert lengths(run)[4] == 4
    assert lengths(run)[-1] == 1
    assert run.target.written_bytes == run.target.verified_bytes == 96 * MIB
