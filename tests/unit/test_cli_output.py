"""What people and programs see: terminals that go away, colours, widths, numbers, signals."""

from __future__ import annotations

import errno
import io
import os
import signal
from typing import Any

import pytest
import trio
from rich.console import Console

from coordinator.cli import human
from coordinator.cli.conduct import Interrupted, conduct, heard_signals
from coordinator.cli.output import LastingStream, Output, table
from coordinator.cli.run_view import LINE_EVERY_S, JsonView, LineView, LiveView, bars, progress_line, run_view
from coordinator.errors import CoordinatorError, ExitCode
from coordinator.events import Event, Notice, Observer, Outcome, Progressed, StateChanged, StepDone, StepStarted
from coordinator.model import State
from coordinator.progress import Progress
from protocol.messages import DiskProgress

GIB = 1 << 30


class LostTerminal(io.StringIO):
    """A terminal whose line was cut."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)

    def flush(self) -> None:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")


def output(stream: Any = None, **options: Any) -> Output:
    return Output(
        as_json=options.pop("as_json", False),
        no_color=options.pop("no_color", False),
        stdout=stream or io.StringIO(),
        stderr=io.StringIO(),
    )


def progress(done_bytes: int = 4 * GIB, rate_bytes_s: float = 230e6) -> Progress:
    disk = DiskProgress(
        target="vda",
        total_bytes=8 * GIB,
        done_bytes=done_bytes,
        zero_bytes=GIB,
        changed_bytes=GIB // 4,
        wire_bytes=GIB // 8,
    )
    return Progress(
        run="r1",
        step="pass:1",
        at_s=0.0,
        elapsed_s=1.0,
        disks=(disk,),
        total_bytes=8 * GIB,
        done_bytes=done_bytes,
        zero_bytes=GIB,
        changed_bytes=GIB // 4,
        wire_bytes=GIB // 8,
        saved_bytes=done_bytes - GIB // 8,
        rate_bytes_s=rate_bytes_s,
        eta_s=20.0,
    )


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (65536, "64.0 KiB"),
        (8 << 30, "8.00 GiB"),
        (100 << 20, "100 MiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_sizes_have_three_digits_and_a_binary_unit(size_bytes: int, words: str) -> None:
    assert human.size(size_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.0, "0 ms"),
        (0.34, "340 ms"),
        (3.214, "3.21 s"),
        (9.999, "10.0 s"),
        (59.97, "1 min 00 s"),
        (185.2, "3 min 05 s"),
        (7620.0, "2 h 07 min"),
        (100 * 3600.0, "4 d 4 h"),
    ],
)
def test_durations_are_words_a_person_reads(seconds: float | None, words: str) -> None:
    assert human.duration(seconds) == words


def test_hundred_percent_means_all_of_it() -> None:
    assert human.percent(999, 1000) == "99%"
    assert human.percent(1000, 1000) == "100%"
    assert human.percent(0, 0) == "100%"


def test_a_terminal_that_goes_away_ends_nothing() -> None:
    terminal = LostTerminal()
    out = output(terminal)
    with run_view(out) as view:
        assert isinstance(view, LiveView)
        view.take(StepStarted(step="pass:1", sentence="first pass", undoing=False))
        view.take(Progressed(progress=progress()))
        terminal.gone = True
        view.take(StepDone(step="pass:1", undoing=False, elapsed_s=1.0, found_done=False))
        out.say("nobody reads this")
    assert out.stdout.lost


def test_a_stream_that_is_gone_stays_silent_and_is_no_terminal() -> None:
    terminal = LostTerminal()
    stream = LastingStream(terminal)
    assert stream.isatty()
    terminal.gone = True
    assert stream.write("text") == 4
    stream.flush()
    terminal.gone = False
    stream.write("late")
    assert terminal.getvalue() == ""
    assert not stream.isatty()


def test_in_a_pipe_there_is_no_escape_and_no_trailing_blank() -> None:
    stream = io.StringIO()
    out = output(stream)
    rows = table("One", "Two", title="Title")
    rows.add_row("a", "b")
    rows.add_row("a long cell", "b")
    out.show(rows)
    out.say("a sentence " * 40, style="bold red")
    text = stream.getvalue()
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.endswith(" ")]
    assert len(text.splitlines()) == 5, "sentences are not wrapped in a pipe"


def test_no_color_leaves_colours_out_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for no_color, coloured in ((False, True), (True, False)):
        terminal = LostTerminal()
        output(terminal, no_color=no_color).say("red", style="red")
        assert ("\x1b[31m" in terminal.getvalue()) is coloured


@pytest.mark.parametrize("columns", [80, 200])
def test_progress_fits_the_terminal(columns: int) -> None:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    console.print(bars(progress()))
    console.print(f"    {progress_line(progress())}")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2, lines
    assert all(word in lines[0] for word in ("vda", "50%", "8.00 GiB", "256 MiB changed"))
    for word in ("50% of 8.00 GiB", "219 MiB/s", "20.0 s left", "128 MiB sent", "3.88 GiB saved"):
        assert word in lines[1]


def test_progress_in_a_pipe_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    now = [0.0]
    view = LineView(output(stream), clock=lambda: now[0])
    view.take(StepStarted(step="pass:1", sentence="first pass", undoing=False))
    for tick in range(61):
        now[0] = tick / 2
        view.take(Progressed(progress=progress(done_bytes=GIB)))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "... first pass"
    assert len(lines) == 1 + 1 + int(30 / LINE_EVERY_S)


def test_json_shows_people_nothing_and_errors_as_one_object() -> None:
    stream = io.StringIO()
    out = output(stream, as_json=True)
    out.say("not for programs")
    out.warn("nor this")
    out.fail(CoordinatorError("it broke", code="broken", disk="vda", offset_bytes=4096))
    assert stream.getvalue() == (
        '{"error": {"code": "broken", "sentence": "it broke", "facts": {"disk": "vda", "offset_bytes": 4096}}}\n'
    )
    assert isinstance(run_view(out, json_lines=True), JsonView)
    assert not isinstance(run_view(out), LineView | LiveView)


class Seen:
    """A view that remembers."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.noticed = trio.Event()

    def take(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.notices.append(event.sentence)
            self.noticed.set()

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        return


def ended(state: State) -> Outcome:
    return Outcome(pair="web", run="r1", state=state, exit_code=ExitCode.FAILED, sentence="stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_stops_a_syncing_run_at_its_next_boundary(number: signal.Signals) -> None:
    async def work(_observer: Observer, stop: trio.Event) -> Outcome:
        signal.raise_signal(number)
        await stop.wait()
        return ended(State.SYNCING)

    view = Seen()
    with trio.fail_after(10):
        outcome = await conduct("web", State.SYNCING, view, work)
    assert outcome.state is State.SYNCING
    assert len(view.notices) == 1
    assert number.name in view.notices[0]
    assert "failback resume web" in view.notices[0]


async def test_inside_the_switchover_the_first_signal_is_answered_and_not_obeyed() -> None:
    view = Seen()

    async def work(observer: Observer, stop: trio.Event) -> Outcome:
        observer(StateChanged(pair="web", state=State.SWITCHING))
        os.kill(os.getpid(), signal.SIGTERM)
        await view.noticed.wait()
        assert not stop.is_set()
        return ended(State.FAILBACK)

    with trio.fail_after(10):
        assert (await conduct("web", State.SYNCING, view, work)).state is State.FAILBACK
    assert "the replica of web is off or going off" in view.notices[0]


async def test_a_second_signal_ends_the_process_with_the_way_on() -> None:
    view = Seen()

    async def work(_observer: Observer, _stop: trio.Event) -> Outcome:
        os.kill(os.getpid(), signal.SIGINT)
        await view.noticed.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()
        raise AssertionError

    with trio.fail_after(10), pytest.raises(Interrupted) as caught:
        await conduct("web", State.SYNCING, view, work)
    assert caught.value.exit_code is ExitCode.FAILED
    assert "failback resume web" in caught.value.sentence


async def test_an_error_of_the_work_comes_out_as_itself() -> None:
    async def work(_observer: Observer, _stop: trio.Event) -> Outcome:
        raise CoordinatorError("it broke")

    with pytest.raises(CoordinatorError, match="it broke"):
        await conduct("web", State.SYNCING, Seen(), work)


def test_a_signal_that_the_caller_had_us_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in heard_signals()
        assert signal.SIGTERM in heard_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
