"""The files of a VM's state: read whole, put in place so that the old can be given back, and given back.

NVRAM is one file; swtpm's state is a folder of small files, whose lock and other hidden files are not carried. What was
there is kept under another name beside it, so that its owner, mode and label stay with it. A link that stands where a
file should be is not followed: swtpm's user may write to its folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from agent.errors import AgentError
from agent.machine_book import KeptState
from agent.virt.seam import StatePlace, StateRole

MAX_STATE_BYTES = 64 << 20
"""Of all state of one VM: firmware's variables take half a MiB, a TPM's state some ten KiB."""
MAX_STATE_FILES = 64
NVRAM_NAME = "vars"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LABEL = "security.selinux"


class StateError(AgentError):
    """State that is no disk cannot be read, kept or put in place."""

    code = "machine-state"


def check_name(role: StateRole, name: str) -> None:
    """Refuse a name that no file of such state has."""
    if (role is StateRole.NVRAM and name != NVRAM_NAME) or not _NAME.fullmatch(name):
        raise StateError(f"{name!r} is no file of {role.value} state: the other host's agent is at fault")


def files_of(place: StatePlace) -> dict[str, Path]:
    """The files at that place, by name, in order; none where there is nothing.

    Raises:
        StateError: something else stands there, or too much.
    """
    try:
        if place.role is StateRole.NVRAM:
            return {NVRAM_NAME: place.path} if _is_file(place.path) else {}
        if not place.path.is_dir():
            return {}
        found = {path.name: path for path in sorted(place.path.iterdir()) if not path.name.startswith(".")}
        for name, path in found.items():
            check_name(place.role, name)
            if not _is_file(path):
                raise StateError(f"{path} is no ordinary file: move it out of the TPM's state folder")
        if len(found) > MAX_STATE_FILES:
            raise StateError(
                f"{place.path} has {len(found)} files, more than {MAX_STATE_FILES}: that is no TPM's state"
            )
        return found
    except OSError as error:
        raise StateError(f"the state in {place.path} cannot be read: {error.strerror}") from error


def size_of(files: Mapping[str, Path]) -> int:
    """Bytes of these files. Raises `StateError` as `files_of`."""
    try:
        return sum(path.lstat().st_size for path in files.values())
    except OSError as error:
        raise StateError(f"the size of a VM's state cannot be read: {error}") from error


def check_total(size_bytes: int, of: str) -> None:
    """Refuse more than is ever carried."""
    if size_bytes > MAX_STATE_BYTES:
        raise StateError(f"the firmware variables and TPM state of {of} take {size_bytes} bytes, more than 64 MiB")


def read_from(path: Path, offset_bytes: int, length_bytes: int) -> bytes:
    """Bytes of a file, fewer at its end. Raises `StateError`."""
    with _opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length_bytes, offset_bytes)


def read_stored(path: Path) -> bytes:
    """All of a file as its storage has it: flushed, let go by the page cache, and read. Raises `StateError`."""
    with _opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(fd).st_size
        check_total(size, str(path))
        return os.pread(fd, size, 0)


def digest_of(data: bytes) -> bytes:
    """BLAKE3, 32 bytes."""
    return blake3(data).digest()


def keep_aside(state: KeptState) -> None:
    """Keep what is at `state.path` under the name `state.kept`; done already where that is there. Durable."""
    if not state.existed or os.path.lexists(state.kept):
        return
    with _errors("keeping", state.path):
        if state.role is StateRole.NVRAM:
            os.link(state.path, state.kept, follow_symlinks=False)  # the old file itself, whoever it belongs to
        else:
            state.path.rename(state.kept)
        _sync(state.path.parent)


def put_in_place(state: KeptState, contents: Mapping[str, bytes]) -> None:
    """Let `state.path` hold these files and nothing else, with owner, mode and label of what was there. Durable.

    A crash leaves the old or the new; of a folder it may also leave nothing, the old being kept then.
    """
    fresh = state.path.with_name(f"{state.kept.name}.new")
    with _errors("writing", state.path):
        _remove(fresh)
        if state.role is StateRole.NVRAM:
            _missing_folders(state.path.parent, 0o755)
            _write(fresh, contents[NVRAM_NAME], like=state.kept if state.existed else None)
            fresh.replace(state.path)
        else:
            _missing_folders(state.path.parent, 0o711)
            _write_folder(fresh, contents, like=state.kept if state.existed else None)
            _remove(state.path)
            fresh.rename(state.path)
        _sync(state.path.parent)


def give_back(state: KeptState) -> None:
    """Let `state.path` be what it was before; harmless when it is."""
    with _errors("giving back", state.path):
        _remove(state.path.with_name(f"{state.kept.name}.new"))
        if not state.existed:
            _remove(state.path)
        elif os.path.lexists(state.kept):
            if state.role is StateRole.TPM:
                _remove(state.path)
            state.kept.replace(state.path)
            _remove(state.kept)  # two names of one file: a rename leaves both
        if state.path.parent.is_dir():
            _sync(state.path.parent)


def drop_kept(state: KeptState) -> None:
    """The old is wanted no more; harmless when it is gone."""
    with _errors("removing the old copy of", state.path):
        _remove(state.path.with_name(f"{state.kept.name}.new"))
        _remove(state.kept)
        if state.path.parent.is_dir():
            _sync(state.path.parent)


def _write_folder(folder: Path, contents: Mapping[str, bytes], *, like: Path | None) -> None:
    folder.mkdir(mode=0o700)
    for name, data in contents.items():
        before = None if like is None else like / name
        if before is not None and not _is_file(before):
            before = next((path for path in sorted(like.iterdir()) if _is_file(path)), None) if like else None
        _write(folder / name, data, like=before)
    if like is not None:
        _make_like(folder, like)
    _sync(folder)


def _write(path: Path, data: bytes, *, like: Path | None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if like is not None:
        _make_like(path, like)


def _make_like(path: Path, like: Path) -> None:
    """Owner, mode and SELinux label as `like` has them; a system without labels has none to give."""
    found = like.lstat()
    if (path.lstat().st_uid, path.lstat().st_gid) != (found.st_uid, found.st_gid):
        os.chown(path, found.st_uid, found.st_gid, follow_symlinks=False)
    path.chmod(stat.S_IMODE(found.st_mode))
    try:
        os.setxattr(path, _LABEL, os.getxattr(like, _LABEL, follow_symlinks=False), follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def make_like(path: Path, like: Path) -> None:
    """Give a new file owner, mode and label of another. Raises `StateError`."""
    with _errors("setting the owner of", path):
        _make_like(path, like)


def _missing_folders(folder: Path, mode: int) -> None:
    if not folder.is_dir():
        _missing_folders(folder.parent, mode)
        folder.mkdir(mode=mode, exist_ok=True)
        folder.chmod(mode)
        _sync(folder.parent)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    with _errors("reading", path):
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def _errors(act: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(f"{act} {path} failed: {error.strerror or error}; mend that, then repeat") from error


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
