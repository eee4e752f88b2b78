"""A target against sources that lie, err or stop: a clear error, told to them; nothing written that was not allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import zstandard

from agent.delta.blocks import BLOCK_BYTES, to_ranges
from agent.errors import DamagedFrame
from agent.sync import conversation
from agent.sync import target as target_side
from agent.sync.conversation import PeerFailed
from agent.sync.payloads import ranges_to_wire
from protocol.errors import ConnectionLost, PeerViolation
from protocol.messages import (
    BlockData,
    Codec,
    CompareSpan,
    Credit,
    EndOfPass,
    PassFailed,
    PassVerified,
    SpanAnswer,
    ZeroRanges,
)
from tests.fakes.wire import ScriptedEnd
from tests.unit.sync_scripts import SIZE, ask, completes, end_of_pass, give, storage, target_against

B = BLOCK_BYTES
P = 4096
OURS = storage(1)
CONTENT = bytes(OURS.content)


def answered(end: ScriptedEnd) -> None:
    """Wait for an answer."""
    assert isinstance(end.hear()[0], SpanAnswer)


async def refused(script: Callable[[ScriptedEnd], None], match: str) -> None:
    """The target refuses that script with a violation that says so; nothing is written."""
    target = storage(1)
    target.content[B + 5] ^= 1  # one page differs: data for it, and for the superblock around it, would be allowed
    before = bytes(target.content)
    ending = await target_against(target, script)
    assert isinstance(ending.failure, PeerViolation)
    assert bytes(target.content) == before
    assert match in ending.failure.sentence
    if ending.heard and isinstance(ending.heard[-1], PassFailed):
        assert ending.farewell.code == ending.failure.code
        assert (ending.farewell.target, ending.farewell.sentence) == ("vda", ending.failure.sentence)
    await completes(OURS, target)


async def test_an_honest_script_is_verified() -> None:
    target = storage(1)
    target.content[B + 5] ^= 1

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        give(end, CONTENT, (B, P))
        end_of_pass(end, data=P)

    ending = await target_against(target, script)
    assert ending.failure is None
    assert [type(message) for message in ending.heard] == [Credit, PassVerified]
    assert target.content == OURS.content


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "offset"),
    [
        ([(4 * B, P)], 4 * B),  # of a superblock that is the same
        ([(B, 2 * B)], B),  # over the end of the one that differs
        ([(100 * B, P)], 100 * B),  # outside the disk
        ([(B + 1, P)], B + 1),
        ([(B, 100)], B),
        ([(B, P), (8 * B, 512)], 8 * B),
    ],
)
async def test_data_outside_what_the_answer_allows_is_refused(runs: list[tuple[int, int]], offset: int) -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        give(end, CONTENT, *runs)

    await refused(script, f"at offset {offset} is outside what the answers allow")


async def test_data_before_any_answer_is_refused() -> None:
    await refused(lambda end: give(end, CONTENT, (B, P)), f"at offset {B} is outside")


@pytest.mark.parametrize("second", [(B, P), (0, P)], ids=["twice", "out of order"])
async def test_data_twice_or_out_of_order_is_refused_and_what_came_before_is_all_that_is_written(
    second: tuple[int, int],
) -> None:
    target = storage(2)
    before = bytes(target.content)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        give(end, CONTENT, (B, P))
        assert isinstance(end.hear()[0], Credit)
        give(end, CONTENT, second)

    ending = await target_against(target, script)
    assert isinstance(ending.failure, PeerViolation)
    assert f"at offset {second[0]} is outside" in ending.farewell.sentence
    assert bytes(target.content) == before[:B] + CONTENT[B : B + P] + before[B + P :]
    await completes(OURS, target)


async def test_data_that_is_not_its_proof_is_not_written_and_named_by_its_offset() -> None:
    target = storage(2)
    before = bytes(target.content)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        give(end, CONTENT, (B, P), proofs=bytes(32))

    ending = await target_against(target, script)
    assert isinstance(ending.failure, DamagedFrame)
    assert (ending.farewell.code, ending.farewell.offset_bytes, ending.farewell.target) == ("damaged-frame", B, "vda")
    assert bytes(target.content) == before
    await completes(OURS, target)


@pytest.mark.parametrize("declared", [P - 1, P + 1, 1 << 40])
async def test_a_frame_whose_declared_size_lies_is_refused(declared: int) -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        message = BlockData(count=1, codec=Codec.RAW, plain_bytes=declared)
        end.say(message, ranges_to_wire(to_ranges([(B, P)])) + bytes(32) + CONTENT[B : B + P])

    await refused(script, "plain_bytes is" if declared > SIZE else "BlockData")


async def test_a_compressed_frame_that_grows_beyond_its_ranges_is_refused_before_it_is_opened() -> None:
    target = storage(2)
    before = bytes(target.content)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
        message = BlockData(count=1, codec=Codec.ZSTD, plain_bytes=B)
        assert len(bomb) <= B
        end.say(message, ranges_to_wire(to_ranges([(B, B)])) + bytes(32) + bomb)

    ending = await target_against(target, script)
    assert isinstance(ending.failure, DamagedFrame)
    assert f"declares {64 << 20} bytes instead of {B}" in ending.farewell.sentence
    assert ending.farewell.offset_bytes == B
    assert bytes(target.content) == before


async def test_zeroes_are_allowed_no_more_than_data() -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        end.say(ZeroRanges(count=1), ranges_to_wire(to_ranges([(4 * B, B)])))

    await refused(script, f"at offset {4 * B} is outside")


# --- questions --------------------------------------------------------------------------------------------------------


async def test_a_span_outside_the_disk_is_refused() -> None:
    longer = CONTENT + bytes(B)
    await refused(lambda end: ask(end, longer), f"does not fit the disk of {SIZE} bytes")


async def test_a_span_that_ends_off_a_block_before_the_end_of_the_disk_is_refused() -> None:
    await refused(lambda end: ask(end, CONTENT, length=B + P), f"at offset 0 does not fit the disk of {SIZE} bytes")


@pytest.mark.parametrize("second", [0, B], ids=["twice", "out of order"])
async def test_spans_of_one_connection_rise(second: int) -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT, offset=B, length=2 * B)
        answered(end)
        ask(end, CONTENT, batch=1, offset=second, length=B)

    await refused(script, f"the span at byte {second} stands before byte {3 * B}")


async def test_a_span_that_another_connection_spoke_of_is_refused_on_both() -> None:
    target = storage(1)
    ask_all: list[ScriptedEnd] = []

    def script(end: ScriptedEnd) -> None:
        ask_all.append(end)
        ask(end, CONTENT)

    ending = await target_against(target, script, script)
    assert isinstance(ending.failure, PeerViolation)
    assert "span of 524800 bytes at offset 0 was spoken of before" in ending.failure.sentence
    assert ending.farewells == 2
    await completes(OURS, target)


@pytest.mark.parametrize("size", [16 * 3 + 1, 16 * 5, 0])
async def test_digests_that_are_not_as_many_as_superblocks_are_refused(size: int) -> None:
    def script(end: ScriptedEnd) -> None:
        message = CompareSpan(
            batch=0, offset_bytes=0, length_bytes=8 * B, superblock_bytes=2 * B, detail_bytes=P, count=1
        )
        end.say(message, ranges_to_wire(to_ranges([(0, 8 * B)])) + bytes(size))

    await refused(script, "payload" if size % 16 else "digests came for" if size else "CompareSpan of 1 ranges")


async def test_a_span_with_more_data_than_the_target_compares_at_once_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target_side, "MAX_SPAN_BYTES", 4 * B)
    ending = await target_against(storage(1), lambda end: ask(end, CONTENT))
    assert isinstance(ending.failure, PeerViolation)
    assert f"a span with {SIZE} bytes of data" in ending.farewell.sentence


async def test_a_superblock_that_fits_no_buffer_is_refused() -> None:
    await refused(lambda end: ask(end, CONTENT, superblock_bytes=2 << 20), "this agent compares")


async def test_data_of_another_seed_differs_everywhere_and_does_no_harm() -> None:
    target = storage(1)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT, seed=99)
        message, payload = end.hear()
        assert isinstance(message, SpanAnswer)
        assert payload[0] == 0b11111000
        end.shutdown()

    await target_against(target, script)
    assert target.content == OURS.content


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_a_pass_that_ends_before_all_of_the_disk_was_spoken_of_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT, length=4 * B)
        answered(end)
        end_of_pass(end, compared=4 * B)

    await refused(script, f"ended the pass after {4 * B} of {SIZE} bytes")


@pytest.mark.parametrize("books", [{"data": P}, {"compared": SIZE - 1}, {"zero": 1}])
async def test_books_that_differ_are_refused(books: dict[str, int]) -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        end_of_pass(end, **books)

    await refused(script, "the books of source and target differ")


async def test_the_end_while_a_question_is_open_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        end_of_pass(end)

    await refused(script, "EndOfPass while 1 spans are unanswered")


async def test_connections_that_tell_different_numbers_of_connections_are_refused() -> None:
    target = storage(1)

    def script(lanes: int, offset: int, length: int) -> Callable[[ScriptedEnd], None]:
        def play(end: ScriptedEnd) -> None:
            ask(end, CONTENT, offset=offset, length=length)
            answered(end)
            end_of_pass(end, compared=length, lanes=lanes)

        return play

    ending = await target_against(target, script(2, 0, 4 * B), script(3, 4 * B, SIZE - 4 * B))
    assert isinstance(ending.failure, PeerViolation)
    assert "connections" in ending.failure.sentence
    assert ending.farewells == 2


async def test_a_source_that_hangs_up_in_the_middle_is_lost() -> None:
    target = storage(1)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        end.shutdown()

    assert isinstance((await target_against(target, script)).failure, ConnectionLost)
    await completes(OURS, target)


async def test_a_source_that_says_why_it_failed_is_quoted() -> None:
    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        end.say(PassFailed(code="disk", sentence="the view cannot be read", target="vdb", offset_bytes=7))

    ending = await target_against(storage(1), script)
    assert isinstance(ending.failure, PeerFailed)
    assert ending.failure.sentence == "the view cannot be read"
    assert ending.failure.facts == {"peer_code": "disk", "disk": "vdb"}


async def test_what_only_a_target_says_is_refused() -> None:
    await refused(
        lambda end: end.say(
            PassVerified(written_bytes=0, zeroed_bytes=0, verified_bytes=0, compared_bytes=0, past_cache=True)
        ),
        "must not be said",
    )
    await refused(lambda end: end.say(Credit(payload_bytes=0)), "must not be said")


async def test_data_after_the_end_is_not_read() -> None:
    target = storage(1)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        end_of_pass(end)
        give(end, bytes(SIZE), (0, P))

    ending = await target_against(target, script)
    assert target.content == OURS.content
    assert ending.failure is None
    assert EndOfPass not in [type(message) for message in ending.heard]


async def test_a_source_that_spoke_of_more_connections_than_came_and_hung_up_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversation, "SIGN_OF_LIFE_S", 0.02)

    def script(end: ScriptedEnd) -> None:
        ask(end, CONTENT)
        answered(end)
        end_of_pass(end, lanes=2)
        while end.hear()[0] != Credit(payload_bytes=0):
            pass
        end.shutdown()

    assert isinstance((await target_against(storage(1), script)).failure, ConnectionLost)
