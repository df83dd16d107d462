"""Files that are replaced whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PathLike: TypeAlias = "str | os.PathLike[str]"
Bytes: TypeAlias = NDArray[np.uint8]

OURS = ".gradstep-"
"""How names of temporary files begin."""

_LEFT_BEHIND = 3600  # seconds after which nobody is at work on a temporary file


@contextmanager
def replacing(path: PathLike) -> Iterator[io.FileIO]:
    """Yield an empty file that takes the place of `path` when the ``with`` block ends, after all of it is on the disk.

    If anything fails, or the process or the machine ends, `path` is what it was. An error leaves no other file behind. A process
    that is killed may leave one: where the system knows files without a name (Linux, on most file systems) only in the moment of
    the exchange. Such files are removed here when they are an hour old.

    Args:
        path: where the file is to be; there may be one. What a symbolic link points to is replaced, not the link.

    Raises:
        OSError: if the file can't be written, of the full disk or of missing permission; if `path` is no regular file.
    """
    target = Path(path).resolve()
    mode = _mode_of(target)
    temporary = _temporary(target)
    descriptor, has_name = _open(target, temporary)
    try:
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            yield file
            os.fsync(descriptor)
            if not has_name:
                # With a folder, though it is not looked at, Python asks for a link to what the symbolic link points to.
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of(target: Path) -> int | None:
    """Return the permissions of the file that there is."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "no regular file, so nothing can take its place", str(target))
    return stat.S_IMODE(mode)


def _temporary(target: Path) -> Path:
    """Return the path of a file that is to become `target`, and remove those that processes have left behind."""
    begin = f"{OURS}{hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()}-"
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(begin) and entry.stat().st_mtime < time.time() - _LEFT_BEHIND:
                Path(entry).unlink()
    return target.with_name(f"{begin}{secrets.token_hex(8)}.tmp")


def _open(target: Path, temporary: Path) -> tuple[int, bool]:
    """Open a new file in the folder of `target`: without a name if that can be, else as `temporary`. Return whether it has one."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # a file system without them, or whatever the second attempt will say
            descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
            if os.path.lexists(f"/proc/self/fd/{descriptor}"):  # by which it gets its name
                return descriptor, False
            os.close(descriptor)
    try:
        return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666), True
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
