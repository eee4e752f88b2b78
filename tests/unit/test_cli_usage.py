"""Wrong words, broken files, help: one clear sentence or a page that teaches, never a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from coordinator.cli.bugs import BUG_LOG
from coordinator.cli.main import cli
from coordinator.cli.session import Session
from coordinator.errors import ExitCode
from tests.unit.cli_house import PAIR, Command

VERBS = sorted(cli.commands)
PROGRAM = Path(sys.executable).with_name("failback")


@pytest.fixture
def failback(tmp_path: Path) -> Command:
    return Command(tmp_path)


def test_every_verb_the_product_promises_is_there() -> None:
    promised = (
        "register failover plan start status watch commit undo cancel resume switch limit pairs history backup doctor "
        "adopt forget readmit pki completion restore-points"
    )
    assert set(VERBS) == set(promised.split())


@pytest.mark.parametrize("words", [[], *[[verb] for verb in VERBS], ["pki", "init"], ["pki", "issue"]], ids=" ".join)
def test_help_teaches_with_an_example(failback: Command, words: list[str]) -> None:
    result = failback(*words, "--help")
    assert result.exit_code == 0
    example = "The usual way:" if not words else "Example:"
    assert example in result.stdout
    assert f"failback {' '.join(words)}".strip() in result.stdout.split(example)[1]
    if words and words != ["pki"]:
        assert "--json" in result.stdout


def test_without_a_verb_the_help_is_shown_and_the_code_says_usage(failback: Command) -> None:
    result = failback()
    assert result.exit_code == ExitCode.USAGE
    assert "Usage: failback" in result.stderr


WRONG = [
    (["pairz"], "'pairz'", "(did you mean 'pairs'?)"),
    (["start"], "PAIR", "failback start --help"),
    (["status", "Web_1"], "'Web_1'", "a-z, 0-9"),
    (["status", "../etc"], "'../etc'", "a-z, 0-9"),
    (["status", PAIR, "--bogus"], "--bogus", "failback status --help"),
    (["register", PAIR, "--original", "prod", "--replica", "dr/web"], "'prod'", "HOST/VM"),
    (["register", PAIR, "--original", "prod/web"], "--replica", "register --help"),
    (["register", PAIR, "--original", "p/w", "--replica", "d/w", "--disk", "vda"], "'vda'", "ORIGINAL=REPLICA"),
    (["start", PAIR, "--shutdown-timeout", "soon"], "'soon'", "15m"),
    (["start", PAIR, "--shutdown-timeout", "0s"], "'0s'", "7 days"),
    (["start", PAIR, "--shutdown-policy", "maybe"], "'maybe'", "'abort', 'force'"),
    (["commit", PAIR, "--restore-point", "burn"], "'burn'", "'keep', 'drop'"),
    (["start", PAIR, "--switch", "soon"], "'soon'", "--switch at 02:00"),
    (["start", PAIR, "--switch", "at", "noon"], "'noon'", "HH:MM"),
    (["start", PAIR, "--switch", "at", "2031-01-31T02:00"], "names no time zone", "+01:00"),
    (["start", PAIR, "--switch", "at", "2021-01-31T02:00+01:00"], "is past", "name one to come"),
    (["start", PAIR, "--max-downtime", "0s"], "'0s'", "7 days"),
    (["start", PAIR, "--track", "always"], "'always'", "'auto', 'none', 'overlay'"),
    (["start", PAIR, "--late-evidence", "maybe"], "'maybe'", "'return', 'proceed'"),
    (["switch", PAIR, "--at", "25:00"], "'25:00'", "HH:MM"),
    (["switch", PAIR, "--at", "2021-01-31T02:00Z"], "is past", "name one to come"),
    (["completion", "tcsh"], "'tcsh'", "'bash', 'zsh', 'fish'"),
    (["resume"], "which pair", "failback resume web1"),
    (["status", "nosuch"], "nosuch", "failback register"),
]


@pytest.mark.parametrize(("words", "thing", "cure"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_wrong_words_end_in_one_sentence(failback: Command, words: list[str], thing: str, cure: str) -> None:
    result = failback(*words)
    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    assert result.stderr.startswith("failback: ")
    assert result.stderr.count("\n") == 1
    assert thing in result.stderr
    assert cure in result.stderr


@pytest.mark.parametrize("words", [row[0] for row in WRONG], ids=" ".join)
def test_wrong_words_are_one_json_object_for_programs(failback: Command, words: list[str]) -> None:
    value = failback.json(*words, exit_code=ExitCode.USAGE)
    assert set(value) == {"error"}
    assert set(value["error"]) == {"code", "sentence", "facts"}


def test_json_may_stand_behind_the_verb(failback: Command) -> None:
    result = failback("pairs", "--json")
    assert json.loads(result.stdout) == {"verb": "pairs", "pairs": [], "owed": [], "excluded": []}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("state_dir = ", "is not valid TOML"),
        ("colour = 'blue'\n", "colour"),
        ("[hosts.prod]\nport = 70000\n", "port 70000"),
        (None, "there is no configuration file"),
    ],
)
def test_a_bad_configuration_is_told_in_one_sentence(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "coordinator.toml"
    if text is not None:
        file.write_text(text)
    result = CliRunner().invoke(cli, ["--config", str(file), "pairs"])
    assert result.exit_code == ExitCode.USAGE
    assert words in result.stderr
    assert str(file) in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unforeseen_error_is_one_sentence_and_its_trace_is_kept(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.config.state_dir.mkdir()
    session = command.session()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody foresaw this")

    session.opener = broken  # type: ignore[assignment]
    result = CliRunner().invoke(cli, ["pairs"], obj=session)
    log = command.config.state_dir / BUG_LOG
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr.count("\n") == 1
    assert str(log) in result.stderr
    assert "Traceback" not in result.output
    assert "nobody foresaw this" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("shell", "mark"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")])
def test_completion_prints_a_script_for_the_shell(failback: Command, shell: str, mark: str) -> None:
    result = failback("completion", shell)
    assert result.exit_code == 0
    assert mark in result.stdout
    assert failback.json("completion", shell)["script"] in result.stdout


def test_pair_names_are_completed_and_a_missing_registry_is_not_made_for_it(failback: Command) -> None:
    session = failback.session()
    assert session.known_pairs() == ()
    assert not failback.config.state_dir.exists()
    failback.register()
    assert failback.session().known_pairs() == (PAIR,)


def test_version_is_told_in_both_forms(failback: Command) -> None:
    assert failback("--version").stdout.startswith("failback ")
    assert failback.json("--version")["version"] in failback("--version").stdout


def test_pki_makes_certificates_and_never_overwrites(failback: Command, tmp_path: Path) -> None:
    folder = str(tmp_path / "pki")
    made = failback.json("pki", "init", "--dir", folder)
    assert Path(made["authority"]["certificate"]).is_file()
    again = failback("pki", "init", "--dir", folder)
    assert again.exit_code == ExitCode.FAILED
    assert again.stderr.count("\n") == 1
    issued = failback.json("pki", "issue", "prod1", "--address", "192.0.2.10", "--dir", folder)
    assert issued["issued"]["names"] == ["prod1", "192.0.2.10"]
    assert failback("pki", "issue", "Prod_1", "--dir", folder).exit_code == ExitCode.USAGE


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [str(PROGRAM), "--state-dir", str(tmp_path / "state"), "completion", "bash"],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.parametrize("words", [["completion", "bash"], ["--json", "pairs"], ["--help"]], ids=" ".join)
def test_output_that_is_cut_short_is_an_error(tmp_path: Path, words: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [str(PROGRAM), "--state-dir", str(tmp_path / "state"), *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.startswith("failback: the output could not be written whole: No space left on device")
    assert done.stderr.count("\n") == 1


def test_the_session_is_made_by_the_group_when_nobody_gives_one() -> None:
    result = CliRunner().invoke(cli, ["completion", "bash"])
    assert result.exit_code == 0
    assert Session().load is not None
