"""What a step goes over: copies of parameters on the host, cut into pieces and chunks; and how they go up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gradstep.torch.offload import tensors
from gradstep.torch.offload.transfers import Done, Event

if TYPE_CHECKING:
    from gradstep.torch.offload.optimizer import Offloaded


@dataclass(eq=False)
class Mirror:
    """A parameter, and what is kept of it on the host."""

    param: torch.Tensor
    group: int
    copy: torch.Tensor
    """Pinned; laid out in memory as the parameter, without gaps."""
    known: tuple[int, int] | None = None
    """Address and version of the parameter when it held what the copy holds."""
    sent: Event = field(default_factory=Done)
    """The copy may be written again."""

    def now(self) -> tuple[int, int]:
        """Return address and version of the parameter."""
        return self.param.data_ptr(), self.param._version

    def is_dense(self) -> bool:
        """Whether the parameter itself is laid out as the copy is."""
        return self.param.stride() == self.copy.stride() and not tensors.is_lazy(self.param)


@dataclass
class Piece:
    """A range of the elements of a parameter, in the order of its memory; or all of it, as it is."""

    index: int
    start: int
    stop: int
    is_whole: bool


@dataclass
class Chunk:
    """What comes down together, from one device."""

    device: torch.device
    pieces: list[Piece] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where the gradients lie in the buffer, in bytes."""
    nbytes: int = 0
    fetched: Event = field(default_factory=Done)


class Upload:
    """Parameters on their way up. To be made before the queues begin: the room that it takes on the device is free by then."""

    def __init__(self, owner: Offloaded, mirrors: Iterable[Mirror]) -> None:
        self._owner = owner
        self._sent: dict[int, tuple[Mirror, int]] = {}  # with the number of elements
        self._landings: dict[int, torch.Tensor] = {}  # of parameters that are laid out otherwise
        for mirror in mirrors:
            if not mirror.is_dense():
                like, param = mirror.copy, mirror.param
                made = torch.empty_strided(like.shape, like.stride(), dtype=param.dtype, device=param.device)
                self._landings[id(mirror)] = made

    def send(self, mirror: Mirror, start: int, stop: int) -> None:
        """Queue a range of a parameter's elements."""
        self._sent[id(mirror)] = (mirror, self._sent.get(id(mirror), (mirror, 0))[1] + stop - start)
        target = self._landings.get(id(mirror), mirror.param)
        if start < stop:
            line = self._owner._line(mirror.param.device)
            line.send(tensors.flat(target)[start:stop], tensors.flat(mirror.copy)[start:stop])

    def end(self) -> None:
        """Do what is left when the device waits for the copies: lay out, and note what the parameters hold."""
        for key, (mirror, size) in self._sent.items():
            if key in self._landings and size == mirror.copy.numel():
                mirror.param.copy_(self._landings[key])
            if self._owner._broken is None:
                mirror.known = mirror.now()
