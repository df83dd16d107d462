"""Files of arrays in the layout of safetensors, in which every byte is under a checksum.

.. code-block:: text

    8 bytes                 length of the header, little-endian
    the header              JSON: "__metadata__", and for each array its dtype, shape, first and last byte in the data
    the data                all arrays, one behind the other, in the order of C

The metadata have ``kind``, ``version``, ``contents`` (JSON of whoever writes the file), and the checksums, CRC-32 each:
``data_crc32`` of the data, ``header_crc32`` of all that stands before them, with zeros in the place of its own digits.

Files are written and read here, not by the library of that name: arrays go from their memory to the disk and back without a
copy, and the checksum is computed meanwhile.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradstep.checkpoint.checksum import Checksum
from gradstep.files import Bytes, PathLike, replacing

if TYPE_CHECKING:
    from typing_extensions import Self

VERSION = "1"
_KIND = "gradstep optimizer"
_BLOCK = 8 << 20  # bytes that are written or read at once
_BACKLOG = 64 << 20
_MANY = 512  # arrays that are written at once

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_PAIRS = {"complex64": "float32", "complex128": "float64"}  # stored as pairs of reals: not all readers know complex numbers


def itemsize(dtype: str) -> int:
    """Return the bytes of an element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


class Tensor(NamedTuple):
    """An array that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Bytes]
    """Returns its bytes in the order of C. Called once, when it is time to write them."""


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and shape that an array has in a file."""
    return (_PAIRS[dtype], (*shape, 2)) if dtype in _PAIRS else (dtype, shape)


def is_storable(dtype: str) -> bool:
    """Return whether a file can hold arrays of this dtype."""
    return dtype in _NAMES or dtype in _PAIRS


def write(path: PathLike, contents: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Write a file in the place of `path`, whole or not at all.

    Args:
        path: where it is to be.
        contents: what is to be known beside the arrays, in plain JSON types.
        tensors: the arrays; their names differ.

    Raises:
        OSError: if the file can't be written. What was at `path` is there still.
        RuntimeError: on a big-endian machine.
    """
    _check_byte_order(f"{path} can't be written")
    tensors = sorted(tensors, key=lambda tensor: -itemsize(tensor.dtype))  # so that each begins where its dtype may
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, _ in tensors:
        begin, end = end, end + math.prod(shape) * itemsize(dtype)
        stored, stored_as = stored_shape(dtype, shape)
        entries[name] = {"dtype": _NAMES[stored], "shape": list(stored_as), "data_offsets": [begin, end]}
    text = json.dumps(contents, separators=(",", ":"), allow_nan=False)
    with replacing(path) as file:
        _write_all(file, [memoryview(_header(text, entries, 0))])
        with Checksum(_BACKLOG) as checksum:
            for block in _blocks(tensors):
                for piece in block:
                    checksum.add(piece)
                _write_all(file, block)
            if end > _BACKLOG:
                os.fsync(file.fileno())  # the disk works, the checksum catches up
            crc = checksum.value()
        file.seek(0)
        _write_all(file, [memoryview(_header(text, entries, crc))])


def _check_byte_order(what: str) -> None:
    if sys.byteorder != "little":
        raise RuntimeError(f"{what}: arrays in it are little-endian, this machine is {sys.byteorder}-endian")


def _header(contents: str, entries: Mapping[str, Any], data_crc: int) -> bytes:
    metadata = {"kind": _KIND, "version": VERSION, "contents": contents}
    metadata.update(data_crc32=f"{data_crc:08x}", header_crc32=f"{0:08x}")
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header.replace(_own_digits("00000000"), _own_digits(f"{zlib.crc32(header):08x}"))


def _own_digits(digits: str) -> bytes:
    return f'"header_crc32":"{digits}"'.encode()  # quotes within strings have a backslash, so there is no second one


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[memoryview]]:
    """Yield the data in pieces worth writing: small arrays together, large ones in parts."""
    block: list[memoryview] = []
    room = _BLOCK
    for tensor in tensors:
        data = tensor.data().data
        while data:
            block.append(data[:room])
            room, data = room - len(block[-1]), data[room:]
            if room == 0 or len(block) == _MANY:
                yield block
                block, room = [], _BLOCK
    if block:
        yield block


def _write_all(file: io.FileIO, block: Sequence[memoryview]) -> None:
    written = os.writev(file.fileno(), block) if hasattr(os, "writev") else 0
    for piece in block:
        left = piece[written:]
        written = max(written - len(piece), 0)
        while left:
            left = left[file.write(left) :]


class Entry(NamedTuple):
    """An array in a file; one of complex numbers is there as pairs of reals."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A file of arrays, open for reading. The header has been checked when there is one of these, the data when they are read.

    Args:
        path: of the file.
        where: what messages begin with.

    Attributes:
        contents: what was given to `write`.
        tensors: the arrays, by name, in their order in the file.

    Raises:
        OSError: if the file can't be read.
        RuntimeError: on a big-endian machine.
        ValueError: if it is no such file, of another version, cut short or damaged.
    """

    def __init__(self, path: PathLike, where: str) -> None:
        _check_byte_order(f"{where}: {path} can't be read")
        self.path = Path(path)
        self._where = where
        self._file = self.path.open("rb", buffering=0)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def refuse(self, what: str) -> ValueError:
        """Return the error that says what is wrong with the file."""
        return ValueError(f"{self._where}: {self.path} {what}")

    def _read_header(self) -> None:
        size = self._file.seek(0, 2)
        self._file.seek(0)
        start = self._read_bytes(min(8, size))
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise self.refuse(f"is cut short, or no file of arrays: it has {size} bytes, its header would need {8 + length}")
        text = self._read_bytes(length)
        try:
            header = json.loads(text)
            metadata = header.pop("__metadata__")
            kind, version, crc, data_crc = (metadata[name] for name in ("kind", "version", "header_crc32", "data_crc32"))
            contents = metadata["contents"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self.refuse("is damaged, or no checkpoint of gradstep: its header can't be read") from None
        if kind != _KIND:
            raise self.refuse(f"is no checkpoint of gradstep: its kind is {kind!r}, not {_KIND!r}")
        if version != VERSION:
            raise self.refuse(f"has version {version!r} of the format, this gradstep reads version {VERSION!r}")
        found = f"{zlib.crc32((start + text).replace(_own_digits(str(crc)), _own_digits('00000000'))):08x}"
        if crc != found:
            raise self.refuse(f"is damaged: the checksum of its header is {found}, it should be {crc}")
        self._data_crc = data_crc
        try:
            self.contents: Any = json.loads(contents)
            self.tensors = self._entries(header)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.refuse("is damaged: its header makes no sense") from None
        self._data_length = max((entry.end for entry in self.tensors.values()), default=0)
        self._data_begin, found_length = 8 + length, size - 8 - length
        if found_length != self._data_length:
            raise self.refuse(
                f"is cut short or too long: it has {found_length} bytes of data, it should have {self._data_length}"
            )

    def _entries(self, header: Mapping[str, Any]) -> dict[str, Entry]:
        entries, at = {}, 0
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = fields["data_offsets"]
            entry = Entry(_DTYPES[fields["dtype"]], tuple(fields["shape"]), begin, end)
            if begin != at or end != begin + math.prod(entry.shape) * itemsize(entry.dtype):
                raise ValueError(name)
            entries[name], at = entry, end
        return entries

    def _read_bytes(self, length: int) -> bytes:
        room = np.empty(length, np.uint8)
        self._fill(room.data)
        return room.tobytes()

    def _fill(self, room: memoryview) -> None:
        at = 0
        while at < len(room):
            count = self._file.readinto(room[at:])
            if not count:
                raise self.refuse("is cut short: it became shorter while it was read")
            at += count

    def read(self, room: Callable[[str], Bytes]) -> None:
        """Read all data, and check them.

        Args:
            room: called with the name of each array, in their order, and returns where its bytes go. Until this method has
                returned, nothing can be said of what lies there.

        Raises:
            OSError: if the file can't be read.
            ValueError: if it is damaged.
        """
        rooms = (room(name).data for name in self.tensors)
        self._read_blocks((data[at : at + _BLOCK] for data in rooms for at in range(0, len(data), _BLOCK)), _BACKLOG)

    def check(self) -> None:
        """Read all data to check them, and keep none.

        Raises:
            OSError: if the file can't be read.
            ValueError: if it is damaged.
        """
        rooms = [np.empty(_BLOCK, np.uint8).data for _ in range(2)]  # one to read into, one under the checksum
        length = self._data_length
        self._read_blocks((rooms[at // _BLOCK % 2][: length - at] for at in range(0, length, _BLOCK)), _BLOCK)

    def _read_blocks(self, blocks: Iterable[memoryview], backlog: int) -> None:
        self._file.seek(self._data_begin)
        with Checksum(backlog) as checksum:
            for block in blocks:
                self._fill(block)
                checksum.add(block)
            found = f"{checksum.value():08x}"
        if found != self._data_crc:
            raise self.refuse(f"is damaged: the checksum of its data is {found}, it should be {self._data_crc}")
