"""What a benchmark is to the command that runs it, and what the benchmarks share in setting up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import images
from bench.farm import Farm, say
from bench.images import UNIT_BYTES
from bench.measure import Result, Target
from bench.placement import Image, empty
from bench.readers import WARM_WAYS, Readers, Way, best_way, open_readers

GIB = 1 << 30
SEED = 1
TARGET_SHARE = 0.03
"""Of the blocks that changed, in every comparison that says nothing else."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a benchmark is to run.

    Attributes:
        folder: empty, short, on the storage to be measured; removed afterwards.
        size_gib: of the disks, instead of the benchmark's own choice.
        rounds: how many are counted; one more is run before to warm up.
        dense_gib: size of the dense synthetic disk of ``memory``.
    """

    folder: Path
    size_gib: float | None = None
    rounds: int = 7
    dense_gib: float = 1024.0

    def size_bytes(self, default_gib: float) -> int:
        """Size of a disk: a multiple of 16 MiB, at least one."""
        wanted = default_gib if self.size_gib is None else self.size_gib
        return max(1, int(wanted * GIB) // UNIT_BYTES) * UNIT_BYTES

    def count(self) -> Iterator[int]:
        """Round numbers; 0 is the one that warms up and is not counted."""
        for number in range(self.rounds + 1):
            say(f"round {number} of {self.rounds}" + ("" if number else " (warms up, not counted)"))
            yield number


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One name of the command.

    Attributes:
        name: of the command.
        summary: what is measured, in a line.
        run: does it.
        target: what it must be; None for a measure without one.
        needs_root: makes network namespaces.
    """

    name: str
    summary: str
    run: Callable[[Settings], Result]
    target: Target | None = None
    needs_root: bool = False


def make_image(path: Path, size_bytes: int, *, free_share: float = images.FREE_SHARE) -> Image:
    """A raw image such as `bench.images.make` makes."""
    say(f"making {path.name}, {size_bytes / GIB:.1f} GiB")
    return Image.of(path, "raw", images.make(path, size_bytes, seed=SEED, free_share=free_share))


def random_image(path: Path, size_bytes: int) -> Image:
    """A raw image full of bytes that no compressor shrinks."""
    image = Image.of(path, "raw", images.all_packed(size_bytes, seed=SEED))
    path.touch()
    refill(image, seed=SEED)
    return image


def refill(image: Image, *, seed: int) -> None:
    """Give every page of an image other bytes that no compressor shrinks, the same for the same seed."""
    image.apply(images.packed_patches(image.plan, seed=seed))


def empty_like(image: Image, path: Path) -> Image:
    """A raw image of that size that holds nothing."""
    with path.open("wb") as file:
        file.truncate(image.plan.size_bytes)
    return Image(path, "raw", image.plan, image.extents)


def empty_pass(farm: Farm, pair: str, target: Image, *options: str) -> float:
    """Seconds of a pass to a target that was emptied just before."""
    empty(target.path)
    return farm.run_pass(pair, *options).seconds


def warm_limit(paths: tuple[Path, ...]) -> tuple[Way, Callable[[], float]]:
    """The fastest way to read `paths` warm, and what measures it: seconds of two processes that do nothing else."""
    way = best_way(paths, WARM_WAYS, cold=False)

    def measure() -> float:
        with open_readers(paths, way) as readers:
            return _read(readers)

    return way, measure


def _read(readers: Readers) -> float:
    readers.read_s()  # whatever other processes pushed out of the page cache comes back
    return readers.read_s()


def describe_image(image: Image) -> dict[str, object]:
    """Its size and data for the record."""
    return {"size_bytes": image.plan.size_bytes, "data_bytes": image.plan.data_bytes}
