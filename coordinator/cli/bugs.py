"""Errors that nobody foresaw: their traces go to a file, and people get a sentence that names it."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import tempfile
import traceback
from pathlib import Path

from coordinator.cli.session import Session
from coordinator.errors import CoordinatorError

BUG_LOG = "failback-errors.log"


def keep_trace(session: Session, error: BaseException) -> Path:
    """Append the error's trace to a file beside the database, or where that cannot be, in the temporary folder."""
    text = f"--- {datetime.datetime.now(datetime.UTC).isoformat()} failback {' '.join(sys.argv[1:])}\n"
    text += "".join(traceback.format_exception(error))
    folders = [Path(tempfile.gettempdir())]
    with contextlib.suppress(CoordinatorError):  # a bad configuration is told elsewhere
        folders.insert(0, session.config().state_dir)
    for folder in folders:
        path = folder / BUG_LOG
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        with open(descriptor, "a", encoding="utf-8") as log:
            log.write(text)
        return path
    return Path(os.devnull)


def bug_sentence(session: Session, error: BaseException) -> str:
    """Keep its trace; what to say of it."""
    return (
        f"an error nobody foresaw, {type(error).__name__}; its trace is in {keep_trace(session, error)}: please report "
        "it with that file"
    )
