"""`ClusterMap`: where the bytes of a closed image lie, asked of qemu-img by window as they are needed."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.disk.image_options import image_options
from agent.disk.qemu_img import run_bounded
from agent.disk.windows import FIRST_WINDOW_BYTES, TEXT_BYTES, Piece, Window, next_window_bytes, window_of

KEPT_WINDOWS = 8
"""As many as there may be places where a disk is read at once; a window has some 150 KiB."""


class ClusterMap:
    """The map of one image. Thread-safe; two threads that need the same window wait for one qemu-img.

    Args:
        image: nobody writes to it as long as the map is used.
        image_format: QEMU's name of its format.
        size_bytes: of the disk in it.
        files: how many files of its chain we read ourselves.
        locked_by_us, past_cache: see `image_options`.
        in_place: asked after each question: whether the paths still lead to the files that are read. qemu-img goes
            by path, and a map of one file is no map of another.
        given_up: asked while waiting for qemu-img; True ends it with an error.
    """

    def __init__(
        self,
        image: Path,
        image_format: str,
        size_bytes: int,
        *,
        files: int,
        locked_by_us: bool,
        past_cache: bool,
        in_place: Callable[[], bool],
        given_up: Callable[[], bool],
    ) -> None:
        self._size_bytes = size_bytes
        self._files = files
        self._in_place = in_place
        self._given_up = given_up
        self._options = image_options(
            image,
            image_format,
            is_device=stat.S_ISBLK(image.stat().st_mode),
            locked_by_us=locked_by_us,
            past_cache=past_cache,
        )
        self._asking = threading.Lock()
        self._next_bytes = FIRST_WINDOW_BYTES
        self._windows: list[Window] = []  # the one used last stands last
        self.questions = 0
        """How often qemu-img was asked."""

    def pieces(self, offset_bytes: int, length_bytes: int) -> Iterator[Piece]:
        """The places of a run, in order and adjoining.

        Raises:
            OSError: qemu-img cannot tell.
        """
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            window = self._window(offset_bytes)
            yield from window.pieces(offset_bytes, end)
            offset_bytes = window.end

    def _window(self, offset_bytes: int) -> Window:
        with self._asking:
            for window in self._windows:
                if window.start <= offset_bytes < window.end:
                    self._windows.remove(window)
                    break
            else:
                window = self._ask(offset_bytes)
                del self._windows[: len(self._windows) - KEPT_WINDOWS + 1]
            self._windows.append(window)
            return window

    def _ask(self, start: int) -> Window:
        length = min(self._next_bytes, self._size_bytes - start)
        command = ["qemu-img", "map", "--output=json", f"--start-offset={start}", f"--max-length={length}"]
        self.questions += 1
        text, complete = run_bounded([*command, "--image-opts", self._options], TEXT_BYTES, self._given_up)
        if not self._in_place():
            raise OSError(0, "the image or its backing file was moved or replaced while it was read")
        try:
            window = window_of(text, start, start + length, complete=complete, files=self._files)
        except (ValueError, LookupError, TypeError, json.JSONDecodeError) as error:
            raise OSError(0, f"the cluster map cannot be understood: {error}") from error
        self._next_bytes = next_window_bytes(self._next_bytes, window, complete=complete)
        return window
