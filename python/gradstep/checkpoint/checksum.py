"""CRC-32 of many blocks, by a thread of its own."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK = 4 << 20  # bytes that are worth handing to a thread


class Checksum:
    """The checksum of blocks in their order, computed beside what else is done with them. To be used in a ``with`` block.

    Args:
        backlog: number of bytes that may wait for it. Blocks stay as they are until so many have come after them.
    """

    def __init__(self, backlog: int) -> None:
        self._backlog = backlog
        self._crc = 0
        self._gathered: list[memoryview] = []
        self._size = 0
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, block: memoryview) -> None:
        """Take a block into account, now or later."""
        self._gathered.append(block)
        self._size += len(block)
        if self._size < _BLOCK:
            return
        self._pool = self._pool or ThreadPoolExecutor(1)
        self._pending.append((self._pool.submit(self._take, self._gathered), self._size))
        self._gathered, self._size = [], 0
        while sum(size for _, size in self._pending) > self._backlog:
            self._pending.popleft()[0].result()

    def value(self) -> int:
        """Return the checksum of all blocks so far."""
        while self._pending:
            self._pending.popleft()[0].result()
        self._take(self._gathered)
        self._gathered, self._size = [], 0
        return self._crc

    def _take(self, blocks: Sequence[memoryview]) -> None:
        for block in blocks:
            self._crc = zlib.crc32(block, self._crc)
