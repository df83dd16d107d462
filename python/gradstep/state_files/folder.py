"""The folder of `state_dir`: files that are mapped into memory, a manifest that says what they are, and a lock.

.. code-block:: text

    manifest.json       replaced whole; "clean": false while the files belong to no step in particular
    000000.state, ...   one array each, as it lies in memory
    lock                held by the process that has the folder
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import sys
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gradstep import _core
from gradstep.files import OURS, PathLike, replacing, sync_folder

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_KIND = "gradstep states"
_VERSION = 1
_MANIFEST = "manifest.json"
_LOCK = "lock"
_AHEAD = 512 << 10  # bytes that are asked for at once: systems cut off what is longer
_BLOCK = 8 << 20


class MappedFile(NamedTuple):
    """A file in memory."""

    name: str
    memory: mmap.mmap


class Folder:
    """A folder of states, while an optimizer has it.

    Args:
        path: of the folder, which is made if it is not there.
        where: what messages begin with.

    Attributes:
        path: of the folder, absolute.
        is_new: whether there is no manifest in it.

    Raises:
        OSError: if it can't be read or written.
        RuntimeError: if another optimizer has it.
        ValueError: if something else lies there.
    """

    def __init__(self, path: PathLike, where: str) -> None:
        self.path = Path(path).resolve()
        self._where = f"{where}: state_dir {self.path}"
        self._is_made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        others = [file.name for file in self.path.iterdir() if file.name != _LOCK and not file.name.startswith(OURS)]
        if others and _MANIFEST not in others:
            raise self.refuse(f"has {min(others)!r} and no {_MANIFEST}: it must be empty, or hold states")
        self._numbers = itertools.count()
        self._process = os.getpid()
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._unlock = weakref.finalize(self, os.close, lock)
        if not _take(lock):
            self._unlock()
            raise RuntimeError(f"{self._where} is in use by another optimizer, of this process or another; close() ends that")
        self.is_new = not (self.path / _MANIFEST).exists()  # now that nobody else makes one

    def refuse(self, what: str) -> ValueError:
        """Return the error that says what is wrong with the folder."""
        return ValueError(f"{self._where} {what}")

    def check_mine(self) -> None:
        """Refuse to work in a folder that is closed, or belongs to another process.

        Raises:
            RuntimeError: if it is, or does since a fork.
        """
        if not self._unlock.alive:
            raise RuntimeError(f"{self._where} is closed")
        if os.getpid() != self._process:
            raise RuntimeError(f"{self._where} belongs to process {self._process}, this one ({os.getpid()}) is a fork of it")

    def close(self) -> None:
        """Let others have the folder."""
        self._unlock()

    # ---- files ------------------------------------------------------------------------------------------------------------

    def create(self, length: int) -> MappedFile:
        """Return a new file of zeros, for which there is room on the disk.

        Raises:
            OSError: if there is none.
        """
        path = next(path for i in self._numbers if not (path := self.path / f"{i:06}.state").exists())
        try:
            with path.open("xb", buffering=0) as file:
                _reserve(file.fileno(), length)
        except BaseException as error:
            with suppress(OSError):
                path.unlink()
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(path)
            raise
        return self.open(path.name)

    def open(self, name: str) -> MappedFile:
        """Return the file of that name."""
        with (self.path / name).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        if hasattr(memory, "madvise"):
            memory.madvise(mmap.MADV_SEQUENTIAL)
        return MappedFile(name, memory)

    def check_file(self, name: str, length: int) -> None:
        """Refuse a file that is not there, or of another length.

        Raises:
            ValueError: if it is.
        """
        try:
            found = (self.path / name).stat().st_size
        except FileNotFoundError:
            raise self.refuse(f"has no {name}, which its manifest names") from None
        if found != length:
            raise self.refuse(f"has {name} with {found} bytes, it should have {length}")

    def remove(self, name: str) -> None:
        """Delete a file, if that can be."""
        with suppress(OSError):
            (self.path / name).unlink()

    # ---- the manifest -----------------------------------------------------------------------------------------------------

    def write_manifest(self, contents: Mapping[str, Any]) -> None:
        """Write what is to be known of the files, after all new names are on the disk.

        Raises:
            OSError: if it can't be written; the old one is there still.
        """
        sync_folder(self.path)
        contents = {**contents, "gradstep": _core.__version__}
        head = {"kind": _KIND, "version": _VERSION, "crc32": _checksum(contents)}
        with replacing(self.path / _MANIFEST) as file:
            text = json.dumps({**head, "contents": contents}, allow_nan=False).encode()
            while text:
                text = text[file.write(text) :]

    def read_manifest(self) -> dict[str, Any]:
        """Return what is known of the files.

        Raises:
            OSError: if it can't be read.
            ValueError: if it is damaged, or of another version.
        """
        try:
            manifest = json.loads((self.path / _MANIFEST).read_bytes())
            kind, version, crc, contents = (manifest[name] for name in ("kind", "version", "crc32", "contents"))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.refuse(f"is damaged, or not gradstep's: its {_MANIFEST} can't be read") from None
        if kind != _KIND:
            raise self.refuse(f"is not gradstep's: it has {kind!r}, not {_KIND!r}")
        if version != _VERSION:
            raise self.refuse(f"has version {version!r} of the format, this gradstep reads version {_VERSION!r}")
        if crc != _checksum(contents) or not isinstance(contents, dict):
            raise self.refuse(f"is damaged: the checksum of its {_MANIFEST} is {_checksum(contents)}, it should be {crc}")
        return contents

    def delete(self) -> None:
        """Delete what a start that failed has made, and let others have the folder."""
        for file in [*self.path.glob("*.state"), self.path / _MANIFEST, self.path / _LOCK]:
            self.remove(file.name)
        if self._is_made:
            with suppress(OSError):
                self.path.rmdir()
        self.close()


def read_ahead(files: Sequence[Sequence[MappedFile]]) -> None:
    """Have files read into memory in the order of a step, beside it: parameter by parameter, the states of each in parallel.

    Stops at a quarter of the machine's memory: what is read too early has to make room again.
    """
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 if hasattr(os, "sysconf") else 0

    def run(left: int) -> None:
        for of_param in files:
            for at in range(0, max((len(file.memory) for file in of_param), default=0), _AHEAD):
                for _, memory in of_param:
                    if at < len(memory):
                        memory.madvise(mmap.MADV_WILLNEED, at, min(_AHEAD, len(memory) - at))
                        left -= _AHEAD
                if left < 0:
                    return

    if hasattr(mmap.mmap, "madvise"):
        threading.Thread(target=run, args=(left,), daemon=True).start()


def _checksum(contents: Any) -> str:
    return f"{zlib.crc32(json.dumps(contents).encode()):08x}"


def _reserve(descriptor: int, length: int) -> None:
    """Make a file of zeros that has its blocks: to run out of them in the middle of a step would end the process."""
    if hasattr(os, "posix_fallocate"):
        with suppress(OSError):  # not on this file system, or whatever writing will say
            os.posix_fallocate(descriptor, 0, length)
            return
    zeros = bytes(min(length, _BLOCK))
    while length:
        length -= os.write(descriptor, zeros[:length])


def _take(descriptor: int) -> bool:
    """Lock a file, unless it is locked."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
