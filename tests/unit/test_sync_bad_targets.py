"""A source against targets that lie, err or stop: a clear error, told to the peer, and nothing is called verified."""

from __future__ import annotations

import pytest

from agent.delta.blocks import BLOCK_BYTES
from agent.sync.conversation import PeerFailed
from protocol.errors import ConnectionLost, PeerViolation
from protocol.messages import BulkMessage, CompareSpan, Credit, EndOfPass, PassFailed, PassVerified, SpanAnswer
from tests.fakes.wire import ScriptedEnd
from tests.unit.sync_scripts import SIZE, Script, completes, source_against, storage

B = BLOCK_BYTES
VERIFIED = PassVerified(written_bytes=0, zeroed_bytes=0, verified_bytes=0, compared_bytes=0, past_cache=True)


def question(end: ScriptedEnd) -> CompareSpan:
    """The next question."""
    message = end.hear()[0]
    assert isinstance(message, CompareSpan)
    return message


def same(end: ScriptedEnd) -> BulkMessage:
    """Answer every question (each about less than eight superblocks) with: the same. Returns what comes then."""
    while isinstance(message := end.hear()[0], CompareSpan):
        end.say(SpanAnswer(batch=message.batch, read_bytes=0, details=0), bytes(2))
    return message


async def refused(script: Script, match: str) -> None:
    """The source refuses that script with a violation that says so, and tells it where the rules of the wire let it."""
    source = storage(1)
    ending = await source_against(source, script)
    assert isinstance(ending.failure, PeerViolation)
    assert match in ending.failure.sentence
    if ending.heard and isinstance(ending.heard[-1], PassFailed):
        assert ending.farewell.sentence == ending.failure.sentence
        assert ending.farewell.target == "vda"
    await completes(source, storage(2))


async def test_an_honest_script_ends_the_pass() -> None:
    def script(end: ScriptedEnd) -> None:
        message = same(end)
        assert isinstance(message, EndOfPass)
        assert (message.lanes, message.data_bytes, message.zero_bytes, message.compared_bytes) == (1, 0, 0, SIZE)
        end.say(VERIFIED)

    assert (await source_against(storage(1), script)).failure is None


async def test_an_answer_to_what_was_not_asked_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        question(end)
        end.say(SpanAnswer(batch=99, read_bytes=0, details=0), bytes(2))

    await refused(script, "99")


async def test_an_answer_that_comes_twice_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        asked = question(end)
        for _ in range(2):
            end.say(SpanAnswer(batch=asked.batch, read_bytes=0, details=0), bytes(2))

    await refused(script, str(0))


@pytest.mark.parametrize("size", [0, 1, 3, 18])
async def test_an_answer_of_the_wrong_length_is_refused(size: int) -> None:
    def script(end: ScriptedEnd) -> None:
        asked = question(end)
        end.say(SpanAnswer(batch=asked.batch, read_bytes=0, details=0), bytes(size))

    await refused(script, "payload")


async def test_an_answer_that_contradicts_itself_is_refused_naming_the_offset() -> None:
    def script(end: ScriptedEnd) -> None:
        asked = question(end)
        end.say(SpanAnswer(batch=asked.batch, read_bytes=0, details=1), bytes([0b10000000, 0]) + bytes(16))

    await refused(script, "from byte 0 on contradicts itself")


async def test_more_details_than_the_span_has_are_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        asked = question(end)
        end.say(SpanAnswer(batch=asked.batch, read_bytes=0, details=1000), bytes(2 + 16000))

    await refused(script, "details")


async def test_more_credit_than_is_on_its_way_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        question(end)
        end.say(Credit(payload_bytes=1))

    await refused(script, "payload_bytes is 1")


async def test_a_pass_that_is_verified_before_it_ended_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        question(end)
        end.say(VERIFIED)

    await refused(script, "must not be said")


async def test_two_connections_that_tell_different_results_are_refused() -> None:
    def script(verified: PassVerified) -> Script:
        def play(end: ScriptedEnd) -> None:
            same(end)
            end.say(verified)

        return play

    other = PassVerified(written_bytes=1, zeroed_bytes=0, verified_bytes=0, compared_bytes=0, past_cache=True)
    ending = await source_against(storage(1), script(VERIFIED), script(other))
    assert isinstance(ending.failure, PeerViolation)
    assert "different results" in ending.failure.sentence


async def test_a_target_that_fails_is_quoted_on_every_connection() -> None:
    def failing(end: ScriptedEnd) -> None:
        question(end)
        end.say(PassFailed(code="disk-full", sentence="no room on vda", target="vda", offset_bytes=4096))

    def waiting(end: ScriptedEnd) -> None:
        question(end)

    ending = await source_against(storage(1), failing, waiting)
    assert isinstance(ending.failure, PeerFailed)
    assert ending.failure.sentence == "no room on vda"
    assert ending.failure.facts == {"peer_code": "disk-full", "disk": "vda"}


async def test_a_target_that_hangs_up_in_the_middle_is_lost() -> None:
    def script(end: ScriptedEnd) -> None:
        question(end)
        end.shutdown()

    source = storage(1)
    assert isinstance((await source_against(source, script)).failure, ConnectionLost)
    await completes(source, storage(2))


async def test_a_target_that_hangs_up_instead_of_verifying_is_lost() -> None:
    def script(end: ScriptedEnd) -> None:
        same(end)
        end.shutdown()

    assert isinstance((await source_against(storage(1), script)).failure, ConnectionLost)
