"""How an image is named to QEMU's tools."""

from __future__ import annotations

from pathlib import Path


def image_options(
    image: Path,
    image_format: str,
    *,
    is_device: bool,
    locked_by_us: bool = False,
    past_cache: bool = False,
    shared: bool = False,
) -> str:
    """The image as ``--image-opts``: every part named, so nothing in a file name is taken for a protocol or option.

    Args:
        image: file or block device; any name the file system allows.
        image_format: QEMU's name of the format; never guessed from the content.
        is_device: whether it is a block device.
        locked_by_us: we hold its exclusive lock, which QEMU would take for another's: it must not look.
        past_cache: open it with O_DIRECT.
        shared: whoever has it open may go on writing to it: no lock is taken that could hinder them, and what is read
            may be torn.
    """
    options = {
        "driver": image_format,
        "file.driver": "host_device" if is_device else "file",
        "file.filename": str(image.absolute()),
    }
    if locked_by_us or shared:
        options["file.locking"] = "off"  # the lock is ours, and stronger; or none is wanted
    if shared:
        options["force-share"] = "on"  # for the backing files, which inherit it
    if past_cache:
        options["cache.direct"] = "on"
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
