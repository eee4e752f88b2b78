"""The file of a plan: what it may say, and a sentence for everything that it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.cli.plan_file import load_plan, parse_plan
from coordinator.errors import UsageError
from coordinator.fleet import OnFailed
from coordinator.model import ShutdownPolicy, SwitchPolicy

ONE = '[[group]]\nname = "db"\npairs = ["db1"]\n'
TWO = ONE + '[[group]]\nname = "app"\npairs = ["app1", "app2"]\n'


def test_groups_follow_each_other_unless_they_say_otherwise() -> None:
    plan = parse_plan(TWO + 'delay = "2m"\non-failed = "go-on"\n[[group]]\nname = "x"\npairs = ["x"]\nafter = []', "f")
    assert [(group.name, group.after) for group in plan.groups] == [("db", ()), ("app", ("db",)), ("x", ())]
    assert (plan.groups[1].delay_s, plan.groups[1].on_failed) == (120.0, OnFailed.GO_ON)
    assert (plan.parallel, plan.parallel_per_host) == (4, 2)


def test_options_are_those_of_start_by_default_and_by_pair() -> None:
    text = (
        'parallel = 9\nparallel-per-host = 3\n[defaults]\nshutdown-timeout = "10m"\npower-on = false\n'
        f'freeze-guest = true\nmax-downtime = 30\n{TWO}[pair.app1]\nshutdown-policy = "force"\npower-on = true\n'
    )
    plan = parse_plan(text, "f")
    db1, app1 = plan.options["db1"], plan.options["app1"]
    assert (db1.shutdown_timeout_s, db1.power_on, db1.freeze_guest, db1.max_downtime_s) == (600.0, False, True, 30.0)
    assert (app1.shutdown_timeout_s, app1.power_on, app1.freeze_guest) == (600.0, True, True)
    assert (db1.shutdown_policy, app1.shutdown_policy) == (ShutdownPolicy.ABORT, ShutdownPolicy.FORCE)
    assert (plan.parallel, plan.parallel_per_host) == (9, 3)


def test_pairs_behind_others_wait_for_their_turn_and_keep_a_set_time_or_a_persons_word() -> None:
    plan = parse_plan(TWO + '[pair.app1]\nswitch = "at 2031-01-31T02:00+00:00"\n[pair.app2]\nswitch = "manual"\n', "f")
    assert plan.options["db1"].switch is SwitchPolicy.AUTO
    assert (plan.options["app1"].switch, plan.options["app1"].switch_at_s) == (SwitchPolicy.TURN, 1927591200.0)
    assert plan.options["app2"].switch is SwitchPolicy.MANUAL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "not valid TOML"),
        ("", "at least one \\[\\[group\\]\\]"),
        (ONE + "[defaluts]\n", "unknown key defaluts .did you mean defaults"),
        (ONE + "colour = 1\n", "group db: colour .known: name, pairs, after"),
        ("parallel = 0\n" + ONE, "parallel must be a whole number from 1 to 64"),
        ("parallel-per-host = true\n" + ONE, "parallel-per-host must be a whole number"),
        ('[[group]]\npairs = ["a"]\n', "group 1 must have a name"),
        ('[[group]]\nname = "g"\n', "group g: pairs must name at least one pair"),
        ('[[group]]\nname = "g"\npairs = "db1"\n', "pairs must be a list of names"),
        ('[[group]]\nname = "g"\npairs = ["DB 1"]\n', "'DB 1' is no name for a pair"),
        (ONE + ONE, "two groups have the name db.*the pair db1 stands in the plan twice"),
        (ONE + 'after = ["dbs"]\n', "group db: after names dbs, which is no group .did you mean db"),
        (ONE + 'after = ["db"]\n', "group db waits for db: leave out one `after`"),
        (ONE + 'delay = "soon"\n', "group db: delay: 'soon' is no length of time"),
        (ONE + "delay = true\n", "group db: delay: True is no length of time"),
        (ONE + 'on-failed = "panic"\n', "group db: on-failed is 'panic'"),
        (ONE + "[pair.db2]\n", "pair.db2. is about a pair that is in no group .did you mean db1"),
        (ONE + "[pair]\ndb1 = 1\n", "table of options for each pair"),
        (ONE + '[defaults]\nshutdown-timout = "1m"\n', "unknown option shutdown-timout .did you mean shutdown-timeout"),
        (ONE + '[pair.db1]\npower-on = "yes"\n', "pair.db1. power-on must be true or false"),
        (ONE + "[pair.db1]\ntrack = true\n", "pair.db1. track must be text or a number"),
        (ONE + '[pair.db1]\ntrack = "magic"\n', "pair.db1. Invalid value for '--track'"),
        ("defaults = 1\n" + ONE, "defaults must be a table"),
    ],
)
def test_what_a_plan_must_not_say_is_told_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as told:
        parse_plan(text, "site.toml")
    assert told.value.sentence.startswith("site.toml ")


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(UsageError) as told:
        parse_plan('parallel = 0\nspeed = 1\n[[group]]\nname = "g"\npairs = []\ndelay = "x"\n', "f")
    assert told.value.sentence.count(";") >= 3


def test_a_set_time_that_is_past_is_refused_where_runs_begin_and_no_matter_later() -> None:
    text = ONE + '[defaults]\nswitch = "at 2021-01-31T02:00Z"\n'
    with pytest.raises(UsageError, match="is past"):
        parse_plan(text, "f", begins=True)
    assert parse_plan(text, "f").pairs == ("db1",)


def test_a_file_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan file"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_plan(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_plan(tmp_path / "latin.toml")
    (tmp_path / "disk.img").write_bytes(b"#" * (1 << 20) + b"\n#")
    with pytest.raises(UsageError, match="more than"):
        load_plan(tmp_path / "disk.img")
