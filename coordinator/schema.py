"""The tables of the registry and the journal, in SQL's common words."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text

VERSION = 3
"""Raised by every change to the tables; a database of a higher one is never opened, one of a lower one is brought up
to it (`coordinator.upgrades`)."""

metadata = MetaData()

pairs = Table(
    "pairs",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("original", Text, nullable=False),  # VmRef as JSON
    Column("replica", Text, nullable=False),  # VmRef as JSON
    Column("disks", Text, nullable=False),  # list of DiskPair as JSON
    Column("excluded", Text, nullable=False),  # list of disk targets and host devices as JSON
    Column("state", String(32), nullable=False),
    Column("newest", String(16), nullable=False),
    Column("condition", String(16), nullable=False),
    Column("condition_view", Text),
    Column("epoch", Integer, nullable=False),
    Column("run", String(64)),
    Column("original_autostart", Boolean),
    Column("operator", Text),  # OperatorCall as JSON
    Column("former", Text),  # FormerOriginal as JSON; null while no run to another place is under way
)

hosts = Table(
    "hosts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("software", Text, nullable=False),
    Column("bulk_port", Integer, nullable=False),
    Column("seen_s", Float, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("pair", ForeignKey("pairs.name"), nullable=False),
    Column("options", Text, nullable=False),  # RunOptions as JSON
    Column("actor", Text, nullable=False),
    Column("started_s", Float, nullable=False),
    Column("ended_s", Float),
    Column("outcome", String(32)),
    Column("reason", Text, nullable=False),
    Column("software", Text, nullable=False, server_default=""),  # that began it; empty: from before this was kept
    Column("format", Integer, nullable=False, server_default="1"),  # `coordinator.entries.JOURNAL_FORMAT` of that
)

journal = Table(
    "journal",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("pair", ForeignKey("pairs.name"), nullable=False),
    Column("run", String(64), nullable=False),  # empty: an entry of the pair outside any run
    Column("epoch", Integer, nullable=False),
    Column("at_s", Float, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("phase", String(8), nullable=False),
    Column("step", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("sentence", Text, nullable=False),
    Column("elapsed_s", Float),
    Column("result", Text),
    Index("journal_by_run", "pair", "run", "seq"),
)

requests = Table(
    "requests",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("pair", ForeignKey("pairs.name"), nullable=False),
    Column("run", String(64), nullable=False),
    Column("verb", String(16), nullable=False),
    Column("actor", Text, nullable=False),
    Column("asked_s", Float, nullable=False),
    Column("claimed", Boolean, nullable=False),
    Column("answer", Text),
)

duties = Table(
    "duties",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("pair", ForeignKey("pairs.name"), nullable=False),
    Column("run", String(64), nullable=False),
    Column("vm", Text, nullable=False),  # VmRef as JSON: the original that must be fenced before anything else
    Column("targets", Text, nullable=False),  # list of its disks as JSON
    Column("actor", Text, nullable=False),
    Column("said_s", Float, nullable=False),
)

exclusions = Table(  # outlives its pair: no foreign key
    "exclusions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("vm", Text, nullable=False),  # VmRef as JSON
    Column("targets", Text, nullable=False),  # list of its disks as JSON
    Column("reason", String(16), nullable=False),  # `coordinator.exclusions.Why`
    Column("pair", String(63), nullable=False),
    Column("run", String(64), nullable=False),
    Column("since_s", Float, nullable=False),
)

progress = Table(
    "progress",
    metadata,
    Column("pair", ForeignKey("pairs.name"), primary_key=True),
    Column("run", String(64), nullable=False),
    Column("snapshot", Text, nullable=False),  # Progress as JSON
)
