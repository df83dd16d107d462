"""What moves data between a device and the host."""

from __future__ import annotations

from typing import Protocol

import torch


class Event(Protocol):
    """A point in a queue of copies."""

    def synchronize(self) -> None:
        """Let the host wait until the copies before it are done."""


class Transfers(Protocol):
    """Copies between one device and the host: two queues of their own, down and up, beside the device's work.

    Tensors are of one dimension and contiguous. Those on the host are pieces of what `memory` has returned.
    """

    def memory(self, nbytes: int) -> torch.Tensor:
        """Return host memory that the device can copy from and to, as bytes."""

    def begin(self) -> None:
        """Have both queues go on only after the work that the device has been given so far."""

    def fetch(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy down: from `source` on the device to `target` on the host."""

    def fetched(self) -> Event:
        """Return the point in the queue down that is reached when all copies so far are done."""

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy up: from `source` on the host to `target` on the device."""

    def sent(self) -> Event:
        """Return the point in the queue up that is reached when all copies so far are done."""

    def finish(self) -> None:
        """Have the device go on with its later work only after all copies in both queues. The host does not wait."""


class CudaTransfers:
    """Those of a CUDA device: a stream for each queue, pinned memory, torch's current stream for the device's own work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def memory(self, nbytes: int) -> torch.Tensor:
        """Return pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        """Have both streams wait for the current one."""
        event = torch.cuda.current_stream(self._device).record_event()
        self._down.wait_event(event)
        self._up.wait_event(event)

    def fetch(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the stream down. The memory of `source` is not given to others before, though it be freed."""
        source.record_stream(self._down)
        with torch.cuda.stream(self._down):
            target.copy_(source, non_blocking=True)

    def fetched(self) -> Event:
        """Return an event on the stream down."""
        return self._record(self._down)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the stream up."""
        target.record_stream(self._up)
        with torch.cuda.stream(self._up):
            target.copy_(source, non_blocking=True)

    def sent(self) -> Event:
        """Return an event on the stream up."""
        return self._record(self._up)

    def finish(self) -> None:
        """Have the current stream wait for both."""
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._down)
        now.wait_stream(self._up)

    def _record(self, stream: torch.cuda.Stream) -> Event:
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        made: Event = event
        return made


class Done:
    """What has been reached already."""

    def synchronize(self) -> None:
        """Return at once."""


class HostTransfers:
    """Those of parameters that are in host memory themselves: every copy is done when it is queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self, nbytes: int) -> torch.Tensor:
        """Return memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(self) -> None:
        """Do nothing: there is no work but the host's."""

    def fetch(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def fetched(self) -> Event:
        """Return a point that has been reached."""
        return Done()

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def sent(self) -> Event:
        """Return a point that has been reached."""
        return Done()

    def finish(self) -> None:
        """Do nothing."""


def make_transfers(device: torch.device) -> Transfers:
    """Return what moves data between `device` and the host."""
    return CudaTransfers(device) if device.type == "cuda" else HostTransfers(device)
