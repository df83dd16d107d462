"""Optimizers whose states are in host memory, of parameters on a device: see docs/offload.md.

A step goes over the parameters in chunks. At the same time one chunk's gradients come down into pinned memory, the processor sweeps
over the chunk before, and the parameters of the one before that go up. What the device does stands behind `Transfers`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from gradstep import _core
from gradstep.averages import Average
from gradstep.files import PathLike
from gradstep.formats import scale_name
from gradstep.kernel import Kernel
from gradstep.saved import NUMBERS
from gradstep.stats import Numbers, Seen, make_stats
from gradstep.torch.one_sweep import OneSweep, _check, _kernel, _keys_of

CHUNK_BYTES = 32 << 20
"""Bytes of gradients that come down together, unless `offload` is told otherwise."""

BUFFERS = 3
"""Chunks of gradients that have room in pinned memory, unless `offload` is told otherwise."""

_HALVES = (torch.float16, torch.bfloat16)

# A tensor is cut at multiples of this many elements: blocks of compressed states stay whole.
_UNIT = 1024

# Stages that look at an element and nothing beside it, so that a tensor may be swept over in pieces.
_BY_ELEMENT = frozenset(
    {
        "scale",
        "zero_nonfinite",
        "clip_value",
        "seed",
        "precision",
        "coupled_decay",
        "decoupled_decay",
        "independent_decay",
        "elastic_net",
        "bounds",
        "lookahead",
        "ema",
        "swa",
    }
)

# Stages that change what `clip_norm` goes by, after the gradient has been scaled.
_BEFORE_CLIPPING = ("clip_value", "agc", "clip_norm_per_tensor")

# Stages between the gradient as it came and the rule, other than factors.
_CHANGING = frozenset({"zero_nonfinite", "clip_value", "agc", "centralize", "noise"})

# Those that draw random numbers, or change the order of the elements.
_IN_ORDER = frozenset({"noise", "stochastic_states"})


class BrokenStepError(RuntimeError):
    """A step failed when a part of it had been carried out. The message says which parameters have been updated."""


# ---- the device -----------------------------------------------------------------------------------------------------------


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


class _Done:
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
        return _Done()

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def sent(self) -> Event:
        """Return a point that has been reached."""
        return _Done()

    def finish(self) -> None:
        """Do nothing."""


def make_transfers(device: torch.device) -> Transfers:
    """Return what moves data between `device` and the host."""
    return CudaTransfers(device) if device.type == "cuda" else HostTransfers(device)


# ---- the optimizer --------------------------------------------------------------------------------------------------------


def offload(
    optimizer: OneSweep,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    buffers: int = BUFFERS,
    transfers: Callable[[torch.device], Transfers] = make_transfers,
) -> Offloaded:
    """Take over an optimizer, so that its states are in host memory, and steps are computed by the processor.

    For models whose parameters and gradients fit a GPU, but whose states do not. What comes back is used in the place of
    `optimizer`, which takes no further steps. It has the same groups (the same dicts) and states, which move to the host.

    Parameters of 16 bits get masters of float32, ``precision="master"``, where their group does not say otherwise.

    Args:
        optimizer: one of `gradstep.torch`, of parameters on CUDA devices (or in host memory, which is of use for trying it out).
        chunk_bytes: bytes of gradients that come down together. A tensor with more is cut, where its settings allow.
        buffers: chunks of gradients that have room on the host: one that is swept over, others that are on their way.
        transfers: returns what moves data for a device.

    Raises:
        TypeError: for another optimizer, or a parameter that is spread over devices.
        ValueError: for numbers out of range, parameters on other devices, twice the same, or sharing memory; for `state_dir`.

    Example:
        >>> import torch, gradstep.torch
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = gradstep.torch.offload(gradstep.torch.AdamW([w], lr=0.1))
        >>> w.sum().backward()
        >>> opt.step()
        >>> w.data
        tensor([0.8990, 0.8990, 0.8990])

    References:
        Ren et al., arXiv:2101.06840 (ZeRO-Offload).
    """
    if not isinstance(optimizer, OneSweep):
        raise TypeError(
            f"offload: optimizer must be one of gradstep.torch, got {type(optimizer).__module__}.{_name(optimizer)}"
        )
    for name, value, least in (("chunk_bytes", chunk_bytes, 1), ("buffers", buffers, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"offload: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"offload: {name} must be at least {least}, got {value!r}")
    if optimizer._work is not None:
        raise ValueError("offload: optimizer has state_dir: offloaded states are in memory")
    return Offloaded(optimizer, chunk_bytes, buffers, transfers)


@dataclass(eq=False)
class _Mirror:
    """A parameter, and what is kept of it on the host."""

    param: torch.Tensor
    group: int
    copy: torch.Tensor
    """Pinned; laid out in memory as the parameter, without gaps."""
    known: tuple[int, int] | None = None
    """Address and version of the parameter when it held what the copy holds."""
    sent: Event = field(default_factory=_Done)
    """The copy may be written again."""

    def now(self) -> tuple[int, int]:
        """Return address and version of the parameter."""
        return self.param.data_ptr(), self.param._version

    def is_dense(self) -> bool:
        """Whether the parameter itself is laid out as the copy is."""
        return self.param.stride() == self.copy.stride() and not _is_lazy(self.param)


@dataclass
class _Piece:
    """A range of the elements of a parameter, in the order of its memory; or all of it, as it is."""

    index: int
    start: int
    stop: int
    is_whole: bool


@dataclass
class _Chunk:
    """What comes down together, from one device."""

    device: torch.device
    pieces: list[_Piece] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where the gradients lie in the buffer, in bytes."""
    nbytes: int = 0
    fetched: Event = field(default_factory=_Done)


class Offloaded(Optimizer):
    """A `torch.optim.Optimizer` of parameters on a device, with states in host memory. Made by `offload`; see docs/offload.md.

    `param_groups` has the parameters on the device, `state` the states on the host.
    """

    steps: int
    """Number of steps so far."""
    clip_norm: float | None
    on_nonfinite: str
    zeroes_grad: bool

    # torch.amp.GradScaler leaves `grad_scale` and `found_inf` here for a step that unscales for itself.
    _step_supports_amp_scaling = True

    def __init__(
        self, optimizer: OneSweep, chunk_bytes: int, buffers: int, transfers: Callable[[torch.device], Transfers]
    ) -> None:
        self._chunk_bytes, self._n_buffers, self._transfers = chunk_bytes, buffers, transfers
        self._mirrors: list[_Mirror] = []
        self._lines: dict[torch.device, Transfers] = {}
        self._buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._checked: Any = None  # what the last check of all operands has seen
        self._broken: str | None = None
        self._inner = copy.copy(optimizer)
        self._plan = _core.Plan(f"{_name(self._inner)}.step", _core.Face.torch, optimizer.counts_steps)
        self.steps = optimizer.steps
        for name in ("clip_norm", "on_nonfinite", "zeroes_grad"):
            setattr(self, name, getattr(optimizer, name))
        _check_params([param for group in optimizer.param_groups for param in group["params"]], "offload")
        states = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        for name, hooks in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, hooks)
        for key, state in states.items():
            self.state[key] = _on_host(state)
        optimizer.state = defaultdict(dict)
        optimizer._plan = None
        message = f"{_name(optimizer)}.step: this optimizer has been offloaded: step what offload() has returned"

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError(message)

        optimizer.step = refuse  # type: ignore[method-assign]

    # ---- stepping ---------------------------------------------------------------------------------------------------------

    def step(
        self, closure: Callable[[], Any] | None = None, *, grads: None = None, grad_scale: float = 1.0, stats: bool = False
    ) -> Any:
        """Perform one step, as the optimizer that was offloaded does.

        The host waits for the gradients. The new parameters may still be on their way to the device when this returns; what the
        device is given to do afterwards waits for them.

        Args:
            closure: evaluates the model again and returns the loss.
            grads: not taken: gradients are those of the parameters.
            grad_scale: number that the gradients are multiplied by on their way into the update: the inverse of a loss scale.
            stats: whether to gather statistics on the way.

        Returns:
            What the closure returned, or None without one. With `stats`, a `gradstep.stats.StepStats`, or a pair of both.

        Raises:
            TypeError, ValueError: for what can't be updated right, with the name of what is wrong. Nothing has been written then.
            FloatingPointError: with ``on_nonfinite="raise"``, for a gradient that is not finite. Nothing has changed then.
            BrokenStepError: if something failed when a part of the parameters had been updated. No step can be taken then before
                `load_state_dict`.
        """
        if grads is not None:
            raise ValueError(
                f"{_name(self._inner)}.step: an offloaded optimizer takes no grads: add them up in the parameters'"
            )
        if torch.compiler.is_compiling():  # leave it as it is: there is nothing in it for a compiler
            return _uncompiled_step(self, closure, grad_scale, stats)
        return _step(self, closure, grad_scale, stats)

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            for name, value in self._inner._options.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        index, where = len(self.param_groups) - 1, f"{_name(self._inner)}.add_param_group"
        try:
            params = param_group["params"]
            if self._mirrors:  # the first ones have been checked together
                _check_params([*(mirror.param for mirror in self._mirrors), *params], where, len(self._mirrors))
            precision = param_group.get("precision") or ("master" if any(param.dtype in _HALVES for param in params) else None)
            _check(self._inner, {**param_group, **({"precision": precision} if precision else {})})
            mirrors = self._make_mirrors(params, index)
        except BaseException:
            del self.param_groups[-1]
            raise
        if precision:
            param_group["precision"] = precision
        self._mirrors += mirrors

    def pull(self) -> None:
        """Take all parameters from the device anew.

        A step does so by itself for parameters that were written in place, or given other memory. It does not see what is written
        through ``.data`` or by other means that torch keeps no count of.
        """
        for mirror in self._mirrors:
            mirror.known = None
        self._pull(self._mirrors)

    def synchronize(self) -> None:
        """Wait until all parameters are on the device."""
        for mirror in self._mirrors:
            mirror.sent.synchronize()

    def __repr__(self) -> str:
        return f"Offloaded {_name(self._inner)}{super().__repr__().removeprefix(type(self).__name__)}"

    # ---- states -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return states and settings, as `torch.optim.Optimizer.state_dict` does. The optimizer itself loads them, too.

        Raises:
            RuntimeError: if a step has broken off.
        """
        self._refuse_broken("state_dict")
        return super().state_dict()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states and settings, its own or those of an optimizer that is not offloaded. States stay on the host.

        Options of groups that `state_dict` does not name stay as they are, and so do `clip_norm`, `on_nonfinite`, `zeroes_grad` and
        `steps`.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            if changed is not None:
                state_dict = changed
        inner = self._lend()
        inner.load_state_dict(state_dict)
        for group, loaded in zip(self.param_groups, inner.param_groups, strict=True):
            params = group["params"]
            group.clear()
            group.update({**loaded, "params": params})
        by_copy = {id(mirror.copy): mirror.param for mirror in self._mirrors}
        self.state = defaultdict(dict, {by_copy.get(id(key), key): _on_host(state) for key, state in inner.state.items()})
        self._checked = self._broken = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save(self, path: PathLike) -> None:
        """Write a checkpoint, as the optimizer's own ``save`` does: its class loads it."""
        self._refuse_broken("save")
        self._lend().save(path)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an offloaded optimizer can't be copied or pickled: save its state_dict()")

    # ---- averages ---------------------------------------------------------------------------------------------------------

    @property
    def ema(self) -> list[torch.Tensor | None]:
        """The exponential moving averages, on the host, one a parameter in the order of the groups; None where there is none."""
        return self._lend().ema

    @property
    def swa(self) -> list[torch.Tensor | None]:
        """The equal averages, on the host, one a parameter in the order of the groups; None where there is none yet."""
        return self._lend().swa

    def swap_ema(self) -> None:
        """Exchange parameters and exponential moving averages, in place; a second call exchanges them back.

        Raises:
            RuntimeError: if there are no averages yet.
            ValueError: if an average has another dtype than its parameter, and would be rounded: `averaged` leaves it as it is.
        """
        self._settle()
        self._lend().swap_ema()
        self._push()

    @contextlib.contextmanager
    def averaged(self, name: Average | None = None) -> Iterator[None]:
        """Let the parameters hold their averages inside a ``with`` block, for evaluation.

        Args:
            name: ``"ema"`` or ``"swa"``; None for the one that there is, the exponential one if there are both.

        Raises:
            RuntimeError: if there are no averages yet.
        """
        self._settle()
        try:
            with self._lend().averaged(name):
                self._push()
                try:
                    yield
                finally:
                    self.synchronize()
        finally:
            self._push()

    # ---- what is on the host ----------------------------------------------------------------------------------------------

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _line(self, device: torch.device) -> Transfers:
        """Return what moves data between a device and the host."""
        if device not in self._lines:
            self._lines[device] = self._transfers(device)
        return self._lines[device]

    def _make_mirrors(self, params: Sequence[torch.Tensor], group: int) -> list[_Mirror]:
        """Return copies of parameters, filled. Small ones lie together: each piece of pinned memory takes a call of the driver."""
        mirrors = []
        rooms: dict[torch.device, torch.Tensor] = {}
        for i, param in enumerate(params):
            nbytes = _padded(param)
            if rooms.get(param.device, _NOTHING).numel() < nbytes:
                rest = sum(_padded(other) for other in params[i:] if other.device == param.device)
                rooms[param.device] = self._line(param.device).memory(max(nbytes, min(rest, CHUNK_BYTES)))
            room, rooms[param.device] = rooms[param.device][:nbytes], rooms[param.device][nbytes:]
            like = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
            typed = room[: param.numel() * param.element_size()].view(param.dtype)
            mirrors.append(_Mirror(param, group, typed.as_strided(param.shape, like.stride(), typed.storage_offset())))
        self._pull(mirrors)
        return mirrors

    @torch.no_grad()
    def _pull(self, mirrors: Iterable[_Mirror]) -> None:
        """Take parameters from the device, and wait for them."""
        changed = [mirror for mirror in mirrors if mirror.known != mirror.now()]
        if not changed:
            return
        dense = [mirror.param if mirror.is_dense() else _laid_out(mirror.param, mirror.copy) for mirror in changed]
        lines = {mirror.param.device: self._line(mirror.param.device) for mirror in changed}
        for line in lines.values():
            line.begin()
        for mirror, source in zip(changed, dense, strict=True):
            mirror.sent.synchronize()
            _fetch(lines[mirror.param.device], _flat(mirror.copy), _flat(source))
        for line in lines.values():
            line.fetched().synchronize()
        for mirror in changed:
            mirror.known = mirror.now()

    @torch.no_grad()
    def _push(self) -> None:
        """Bring all copies to the device; the host does not wait."""
        lines = {mirror.param.device: self._line(mirror.param.device) for mirror in self._mirrors}
        upload = _Upload(self, self._mirrors)
        for line in lines.values():
            line.begin()
        for mirror in self._mirrors:
            upload.send(mirror, 0, mirror.copy.numel())
            mirror.sent = lines[mirror.param.device].sent()
        for line in lines.values():
            line.finish()
        upload.end()

    def _settle(self) -> None:
        """Have the copies hold what the parameters hold, with nothing on its way."""
        self._refuse_broken("averages")
        self._pull(self._mirrors)
        self.synchronize()

    def _lend(self) -> OneSweep:
        """Return the optimizer of the copies, with the settings and states of now."""
        inner, mirrors = self._inner, iter(self._mirrors)
        inner.param_groups = [{**group, "params": [next(mirrors).copy for _ in group["params"]]} for group in self.param_groups]
        copies = {id(mirror.param): mirror.copy for mirror in self._mirrors}
        inner.state = defaultdict(dict, {copies.get(id(key), key): state for key, state in self.state.items()})
        inner.defaults, inner.steps = self.defaults, self.steps
        inner.clip_norm, inner.on_nonfinite, inner.zeroes_grad = self.clip_norm, self.on_nonfinite, self.zeroes_grad
        return inner

    def _refuse_broken(self, function: str) -> None:
        if self._broken is not None:
            raise RuntimeError(f"{_name(self._inner)}.{function}: {self._broken}")


# ---- one step -------------------------------------------------------------------------------------------------------------


def _step(optimizer: Offloaded, closure: Callable[[], Any] | None, grad_scale: float, stats: bool) -> Any:
    loss = None
    try:
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen = _take_step(optimizer, grad_scale, stats)
    except BaseException:
        # GradScaler will not hear the end of this step, and would leave its scale to the next.
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        raise
    if not stats or seen is None:
        return loss
    number = optimizer.steps + (not seen[0])
    made = make_stats(lambda: number, _keys_of(optimizer._inner), seen)
    return made if closure is None else (loss, made)


_uncompiled_step = _disable_dynamo(_step)


def _take_step(optimizer: Offloaded, grad_scale: float, stats: bool) -> Seen | None:
    optimizer._refuse_broken("step")
    loss_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)  # of GradScaler
    if loss_scale is not None:
        grad_scale = float(grad_scale) / float(loss_scale)
    overflow = found_inf is not None and float(found_inf) != 0
    if overflow and not stats:
        if optimizer.zeroes_grad:
            optimizer.zero_grad(set_to_none=False)
        return None
    with torch.no_grad():
        carried_out, seen = _Step(optimizer, grad_scale, stats=stats, overflow=overflow).run()
    optimizer.steps += carried_out
    return seen


class _Step:
    """One step: what it finds, in the order in which it looks."""

    def __init__(self, owner: Offloaded, grad_scale: float, *, stats: bool, overflow: bool) -> None:
        self._owner, self._inner, self._mirrors = owner, owner._lend(), owner._mirrors
        self._name = f"{_name(self._inner)}.step"
        self._stats, self._overflow = stats, overflow
        self._clip_norm, self._on_nonfinite = owner.clip_norm, owner.on_nonfinite
        self._inner._conditions(stats=stats)  # refuses what they can't be
        self._scale = grad_scale
        self._groups = self._make_groups(grad_scale)
        self._fresh: dict[int, dict[str, Any]] = {}  # states of parameters that had none
        self._by_copy = {id(mirror.copy): i for i, mirror in enumerate(self._mirrors)}
        self._grads = self._take_gradients()
        owner._pull(self._mirrors[i] for i in self._grads)
        self._uploads = [mirror.sent for mirror in self._mirrors]  # of earlier steps: they read what this one writes
        operands = self._check_operands()
        self._is_checked = None if self._fresh else operands
        self._chunks = self._cut()
        self._lines = {chunk.device: owner._line(chunk.device) for chunk in self._chunks}
        self._make_room()
        self._clip_factor = 1.0
        self._written = 0  # chunks
        self._seen: dict[int, Numbers] = {}

    def run(self) -> tuple[bool, Seen | None]:
        """Carry the step out, or leave it out. Return whether it was, and what was seen of it, if that was asked for."""
        ahead = self._owner._n_buffers
        upload = _Upload(self._owner, (self._mirrors[i] for i in self._grads))
        try:
            for line in self._lines.values():
                line.begin()
            for k in range(min(ahead, len(self._chunks))):
                self._fetch(k)
            found = self._look()
            skipped = self._overflow or (
                self._on_nonfinite in ("skip", "raise") and not all(f.is_finite for f in found.values())
            )
            if not skipped:
                self._clip(found)
                for k, chunk in enumerate(self._chunks):
                    chunk.fetched.synchronize()
                    self._sweep(k)
                    self._send(chunk, upload)
                    if k + ahead < len(self._chunks):
                        self._fetch(k + ahead)
        except BaseException as error:
            if self._written:
                self._break_off(error)
            raise
        finally:
            for line in self._lines.values():
                line.finish()
            if self._written:
                upload.end()
        if skipped and self._on_nonfinite == "raise" and not self._overflow:
            first = next(i for i, each in found.items() if not each.is_finite)
            raise FloatingPointError(f"{self._name}: params[{first}].grad has an element that is not finite")
        if self._owner.zeroes_grad:
            for i in self._grads:
                grad = self._mirrors[i].param.grad
                if grad is not None:
                    grad.zero_()
        if not skipped:
            self._owner._checked = self._is_checked or self._operands()
        return not skipped, self._report(found, skipped) if self._stats else None

    # ---- before anything is written ---------------------------------------------------------------------------------------

    def _make_groups(self, grad_scale: float) -> list[tuple[int, Kernel]]:
        groups = [(len(group["params"]), _kernel(self._inner, group, grad_scale)) for group in self._inner.param_groups]
        plan = _core.Plan(self._name, _core.Face.torch)
        plan.step([], None, [], {}, [(0, kernel) for _, kernel in groups], self._inner._make_state)  # refuses settings
        if self._clip_norm is not None:
            for _, kernel in groups:
                for stage in kernel.stages:
                    if stage[0] in _BEFORE_CLIPPING:
                        raise ValueError(
                            f"{self._name}: clip_norm together with {stage[0]} is not supported by an offloaded optimizer: it takes "
                            "the norm of the gradients as they are"
                        )
        return groups

    def _kernel_of(self, index: int) -> Kernel:
        return self._groups[self._mirrors[index].group][1]

    def _take_gradients(self) -> dict[int, torch.Tensor]:
        """Return the gradients that there are, on the device, of one dimension, in the order of the copies' memory."""
        grads: dict[int, torch.Tensor] = {}
        moved = False
        for i, mirror in enumerate(self._mirrors):
            param, grad = mirror.param, mirror.param.grad
            if grad is None:
                continue
            if param.dtype != mirror.copy.dtype or param.shape != mirror.copy.shape:
                ours, theirs = _describe(param), _describe(mirror.copy)
                raise ValueError(f"{self._name}: params[{i}] is {ours}, and was {theirs} when it was offloaded")
            if grad.layout != torch.strided or _is_wrapper(grad):
                what = "sparse" if grad.layout != torch.strided else f"a {type(grad).__name__}"
                raise ValueError(f"{self._name}: params[{i}].grad is {what}: an offloaded optimizer takes dense gradients")
            moved = moved or mirror.known is None or mirror.known[0] != param.data_ptr()
            is_dense = grad.stride() == mirror.copy.stride() and not _is_lazy(grad)
            grads[i] = _flat(grad if is_dense else _laid_out(grad, mirror.copy))
        if moved:
            _check_params(self._owner._params(), self._name)
        return grads

    def _state(self, index: int) -> dict[str, Any] | None:
        """Return the states of a parameter that has some."""
        return self._owner.state.get(self._mirrors[index].param)

    def _operands(self) -> Any:
        """Return what makes operands right or wrong."""
        stages = [
            (kernel.rule.name, [stage[:2] if stage[0] == "precision" else stage[0] for stage in kernel.stages])
            for _, kernel in self._groups
        ]
        return stages, [
            (i, self._mirrors[i].copy.data_ptr(), grad.dtype, _signature(self._state(i))) for i, grad in self._grads.items()
        ]

    def _check_operands(self) -> Any:
        """Refuse operands that can't be stepped over, all of them before the first is. Make states that are missing."""
        operands = self._operands()
        if operands == self._owner._checked:
            return operands
        grads: list[torch.Tensor | None] = [None] * len(self._mirrors)
        for i, grad in self._grads.items():
            grads[i] = torch.zeros((), dtype=grad.dtype).expand(self._mirrors[i].copy.shape)
        states = {i: state for i in self._grads if (state := self._state(i)) is not None}
        plan = _core.Plan(self._name, _core.Face.torch, self._inner.counts_steps)
        copies = [mirror.copy for mirror in self._mirrors]
        left_out = (None, "leave out", False, False, None)
        plan.step(copies, grads, [*range(len(copies))], states, self._groups, self._make_state, left_out)
        return operands

    def _make_state(self, group: int, param: torch.Tensor, names: list[str]) -> dict[str, Any]:
        made = self._inner._make_state(group, param, names)
        self._fresh.setdefault(self._by_copy[id(param)], {}).update(made)
        return made

    def _cut(self) -> list[_Chunk]:
        """Return the chunks: tensors in their order, large ones in pieces."""
        chunks: list[_Chunk] = []
        limit = self._owner._chunk_bytes
        for i, grad in self._grads.items():
            device, item, size = grad.device, grad.element_size(), grad.numel()
            longest = max(_UNIT, limit // item // _UNIT * _UNIT)
            is_whole = size <= longest or not self._is_by_element(i)
            for start in (0,) if is_whole else range(0, size, longest):
                stop = size if is_whole else min(start + longest, size)
                nbytes = _padded(grad[start:stop])
                last = chunks[-1] if chunks else None
                if (
                    last is None
                    or last.device != device
                    or last.nbytes + nbytes > limit
                    or any(piece.index == i for piece in last.pieces)
                ):
                    last = _Chunk(device)
                    chunks.append(last)
                last.pieces.append(_Piece(i, start, stop, is_whole))
                last.offsets.append(last.nbytes)
                last.nbytes += nbytes
        return chunks

    def _is_by_element(self, index: int) -> bool:
        """Whether a parameter may be stepped over piece by piece: the bits are then those of one step over all of it."""
        for stage in self._kernel_of(index).stages:
            if stage[0] not in _BY_ELEMENT or (stage[0] == "precision" and stage[1] == _STOCHASTIC):
                return False
        mirror = self._mirrors[index]
        states = {**(self._state(index) or {}), **self._fresh.get(index, {})}
        for name, value in states.items():
            if name in NUMBERS or not isinstance(value, torch.Tensor):
                continue
            if _is_compressed(name, states):
                if not mirror.copy.is_contiguous():
                    return False
            elif value.shape != mirror.copy.shape or value.stride() != mirror.copy.stride():
                return False
        return True

    def _make_room(self) -> None:
        """See that there are buffers for the gradients."""
        for device, line in self._lines.items():
            needed = max(chunk.nbytes for chunk in self._chunks if chunk.device == device)
            for k in range(min(self._owner._n_buffers, len(self._chunks))):
                there = self._owner._buffers.get((device, k))
                if there is not None and there.numel() >= needed:
                    continue
                if there is not None:
                    line.fetched().synchronize()  # a step that was left out may have copies on their way
                self._owner._buffers[device, k] = line.memory(needed)

    # ---- chunk by chunk ---------------------------------------------------------------------------------------------------

    def _gradients(self, k: int) -> list[torch.Tensor]:
        """Return where the gradients of a chunk lie on the host, of one dimension."""
        chunk = self._chunks[k]
        buffer = self._owner._buffers[chunk.device, k % self._owner._n_buffers]
        places = []
        for piece, offset in zip(chunk.pieces, chunk.offsets, strict=True):
            grad = self._grads[piece.index]
            nbytes = (piece.stop - piece.start) * grad.element_size()
            places.append(buffer[offset : offset + nbytes].view(grad.dtype))
        return places

    def _fetch(self, k: int) -> None:
        chunk = self._chunks[k]
        line = self._lines[chunk.device]
        for piece, place in zip(chunk.pieces, self._gradients(k), strict=True):
            _fetch(line, place, self._grads[piece.index][piece.start : piece.stop])
        chunk.fetched = line.fetched()

    def _clip(self, found: Mapping[int, _Found]) -> None:
        if self._clip_norm is None:
            return
        total = 0.0
        for each in found.values():
            total += each.squares
        self._clip_factor = _core.clip_factor(float(self._clip_norm), math.sqrt(total))
        if not math.isnan(self._clip_factor) and self._clip_factor != 1:
            self._groups = self._make_groups(self._scale * self._clip_factor)

    def _sweep(self, k: int) -> None:
        """Step over a chunk, and enter what has come of it into the states."""
        chunk = self._chunks[k]
        params = [mirror.copy for mirror in self._mirrors]
        grads: list[torch.Tensor | None] = [None] * len(params)
        states: dict[int, dict[str, Any]] = {}
        pieces: dict[int, _Piece] = {}  # by parameter as the plan sees it
        for piece, place in zip(chunk.pieces, self._gradients(k), strict=True):
            i, mirror = piece.index, self._mirrors[piece.index]
            self._uploads[i].synchronize()
            if math.isnan(self._clip_factor):
                place.fill_(math.nan)
            state = self._state(i)
            if not piece.is_whole:
                params[i] = _flat(mirror.copy)[piece.start : piece.stop]
            grads[i] = _shaped(place, mirror.copy) if piece.is_whole else place
            pieces[id(params[i])] = piece
            if state is not None:
                states[i] = state if piece.is_whole else _part(state, piece, mirror.copy)

        def make_part(group: int, param: torch.Tensor, names: list[str]) -> dict[str, Any]:
            piece = pieces[id(param)]
            whole = self._fresh.get(piece.index, {})
            if not whole.keys() >= set(names):
                whole = self._make_state(group, self._mirrors[piece.index].copy, names)
            return whole if piece.is_whole else _part(whole, piece, self._mirrors[piece.index].copy)

        conditions = (None, "propagate", True, False, None) if self._stats else None
        self._written = k + 1  # an interrupt may come as soon as it is
        try:
            seen = self._owner._plan.step(params, grads, [*range(len(params))], states, self._groups, make_part, conditions)
        except Exception:
            self._written = k
            raise
        for numbers in seen[2] if isinstance(seen, tuple) else ():
            before = self._seen.get(numbers[0])
            self._seen[numbers[0]] = numbers if before is None else _together(before, numbers)
        for piece in chunk.pieces:
            self._commit(piece, states.get(piece.index, {}))

    def _commit(self, piece: _Piece, stepped: dict[str, Any]) -> None:
        """Enter new states and counts of a parameter that has been stepped over to its end."""
        i, mirror = piece.index, self._mirrors[piece.index]
        if piece.stop < mirror.copy.numel():
            return
        state = self._state(i)
        if piece.is_whole:
            if state is None and stepped:
                self._owner.state[mirror.param] = stepped
            return
        whole = state if state is not None else {}
        whole.update(self._fresh.get(i, {}))
        for name in NUMBERS.keys() & stepped.keys():
            value, place = stepped[name], whole.get(name)
            if isinstance(value, torch.Tensor) and isinstance(place, torch.Tensor):
                place.copy_(value)
            else:
                whole[name] = value
        if whole and state is None:
            self._owner.state[mirror.param] = whole

    def _send(self, chunk: _Chunk, upload: _Upload) -> None:
        for piece in chunk.pieces:
            upload.send(self._mirrors[piece.index], piece.start, piece.stop)
        sent = self._lines[chunk.device].sent()
        for piece in chunk.pieces:
            self._mirrors[piece.index].sent = sent

    def _break_off(self, error: BaseException) -> None:
        """Say how far the step has come, now and to whoever wants to go on."""
        written = self._written
        touched = {piece.index for chunk in self._chunks[:written] for piece in chunk.pieces}
        left = {piece.index for chunk in self._chunks[written:] for piece in chunk.pieces}
        partly = "".join(f", params[{i}] in part" for i in sorted(touched & left))
        what = (
            f"a step broke off after {written} of {len(self._chunks)} chunks: {len(touched - left)} of {len(self._grads)} parameters "
            f"have been updated{partly}; load a state dict, and the parameters that go with it"
        )
        self._owner._broken = what
        for i in self._grads:
            self._mirrors[i].known = None
        if isinstance(error, Exception):
            raise BrokenStepError(f"{self._name}: {what}") from error

    # ---- norms and statistics ---------------------------------------------------------------------------------------------

    def _look(self) -> dict[int, _Found]:
        """Return what has to be known of all gradients before the first chunk is swept over, as far as anything has."""
        if self._clip_norm is None and self._on_nonfinite not in ("skip", "raise") and not self._overflow:
            return {}
        return look(
            {i: self._in_order(i) for i in self._grads},
            wide={i for i in self._grads if self._is_wide(i)},
            scale=self._scale,
            drops=self._on_nonfinite == "zero",
            counts=self._stats,
        )

    def _in_order(self, index: int) -> torch.Tensor:
        """Return a gradient in the order in which its sums are taken."""
        grad, mirror = self._grads[index], self._mirrors[index]
        stages = self._kernel_of(index).stages
        states = {**(self._state(index) or {}), **self._fresh.get(index, {})}
        in_order = any(stage[0] in _IN_ORDER or stage[:2] == ("precision", _STOCHASTIC) for stage in stages) or any(
            _is_compressed(name, states) for name in states
        )
        if in_order and not mirror.copy.is_contiguous():
            grad = _shaped(grad, mirror.copy).reshape(-1)
        return torch.view_as_real(grad).reshape(-1) if grad.is_complex() else grad

    def _is_wide(self, index: int) -> bool:
        """Whether a parameter is stepped over in float64."""
        states = {**(self._state(index) or {}), **self._fresh.get(index, {})}
        arrays = [value for name, value in states.items() if name not in NUMBERS and isinstance(value, torch.Tensor)]
        return any(array.dtype in (torch.float64, torch.complex128) for array in (self._mirrors[index].copy, *arrays))

    def _report(self, found: Mapping[int, _Found], skipped: bool) -> Seen:
        """Return the statistics, as a plan does."""
        each = []
        for i in self._grads:
            if skipped:
                copy = self._mirrors[i].copy
                size = copy.numel() * (2 if copy.is_complex() else 1)
                square = _core.sum_of_squares([copy], self._name, "params")
                numbers: Numbers = (i, size, 1.0, 0.0, 0.0, 0.0, square, 0.0, 0.0, 0.0, 0.0)
            else:
                numbers = self._seen[i]
            if i in found:
                index, size, factor, _, rule, update, param, *_ = numbers
                came = found[i]
                if not skipped:
                    factor *= self._clip_factor
                    if not any(stage[0] in _CHANGING for stage in self._kernel_of(i).stages):
                        rule = factor * factor * came.came
                numbers = (index, size, factor, came.came, rule, update, param, came.largest, came.nans, came.infs, came.zeros)
            each.append(numbers)
        total: Numbers = (-1, 0, 1.0 if skipped else self._clip_factor, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        for numbers in each:
            total = _together(total, numbers)
        return not skipped, total, each


class _Upload:
    """Parameters on their way up. To be made before the queues begin: the room that it takes on the device is free by then."""

    def __init__(self, owner: Offloaded, mirrors: Iterable[_Mirror]) -> None:
        self._owner = owner
        self._sent: dict[int, tuple[_Mirror, int]] = {}  # with the number of elements
        self._landings: dict[int, torch.Tensor] = {}  # of parameters that are laid out otherwise
        for mirror in mirrors:
            if not mirror.is_dense():
                like, param = mirror.copy, mirror.param
                made = torch.empty_strided(like.shape, like.stride(), dtype=param.dtype, device=param.device)
                self._landings[id(mirror)] = made

    def send(self, mirror: _Mirror, start: int, stop: int) -> None:
        """Queue a range of a parameter's elements."""
        self._sent[id(mirror)] = (mirror, self._sent.get(id(mirror), (mirror, 0))[1] + stop - start)
        target = self._landings.get(id(mirror), mirror.param)
        if start < stop:
            line = self._owner._line(mirror.param.device)
            line.send(_flat(target)[start:stop], _flat(mirror.copy)[start:stop])

    def end(self) -> None:
        """Do what is left when the device waits for the copies: lay out, and note what the parameters hold."""
        for key, (mirror, size) in self._sent.items():
            if key in self._landings and size == mirror.copy.numel():
                mirror.param.copy_(self._landings[key])
            if self._owner._broken is None:
                mirror.known = mirror.now()


# ---- sums over gradients, on the device -----------------------------------------------------------------------------------

_LANES = 32
_LEAVES = 16
_BLOCK = _LANES * _LANES * _LEAVES
_BLOCKS = 256

_AT_ONCE = _BLOCK * 512
"""Elements that are in memory as float64 at the same time."""


@dataclass(frozen=True)
class _Found:
    """What is known of a gradient, times its scale."""

    squares: float
    """What clipping goes by."""
    came: float
    """The sum of squares of all elements."""
    is_finite: bool
    largest: float = 0.0
    nans: float = 0.0
    infs: float = 0.0
    zeros: float = 0.0


def look(
    grads: Mapping[int, torch.Tensor], *, wide: set[int], scale: float = 1.0, drops: bool = False, counts: bool = False
) -> dict[int, _Found]:
    """Return what is known of gradients. The sums have the bits that the engine's have: they are taken along its tree.

    Args:
        grads: of one dimension, on any devices.
        wide: those that a step scales in float64, not in float32.
        scale: number that the gradients are multiplied by.
        drops: whether elements that are not finite are left out of what clipping goes by.
        counts: whether the counts are asked for.
    """
    found: dict[int, _Found] = {}
    for device in {grad.device: None for grad in grads.values()}:
        for is_wide in (False, True):
            chosen = {i: grad for i, grad in grads.items() if grad.device == device and (i in wide) == is_wide}
            if not chosen:
                continue
            flats = list(chosen.values())
            squares = _sums_of_squares(flats, scale, is_wide, drops)
            came = _sums_of_squares(flats, scale, is_wide, False) if drops and counts else squares
            more = _count(flats, scale, is_wide) if counts or is_wide else [(0.0, 0.0, 0.0, 0.0)] * len(flats)
            for i, each, all_of_it, (largest, nans, infs, zeros) in zip(chosen, squares, came, more, strict=True):
                is_finite = nans + infs == 0 if counts or is_wide else math.isfinite(each)
                found[i] = _Found(each, all_of_it, is_finite, largest, nans, infs, zeros)
    return {i: found[i] for i in grads}


def _sums_of_squares(flats: Sequence[torch.Tensor], scale: float, is_wide: bool, drops: bool) -> list[float]:
    """Return the sum of squares of each, in double, along the tree of docs/stages.md."""
    needed = sum(-(-flat.numel() // _BLOCK) * _BLOCK for flat in flats)
    room = torch.empty(min(needed, _AT_ONCE), dtype=torch.float64, device=flats[0].device)
    parts, at = [], 0
    for flat in flats:
        for some in flat.split(_AT_ONCE) if flat.numel() else ():
            end = at + -(-some.numel() // _BLOCK) * _BLOCK
            if end > room.numel():
                parts.append(_sums_of_blocks(room[:at], scale, is_wide, drops))
                at, end = 0, end - at
            room[at : at + some.numel()].copy_(some)
            room[at + some.numel() : end].zero_()
            at = end
    parts.append(_sums_of_blocks(room[:at], scale, is_wide, drops))
    blocks = torch.cat(parts).cpu().numpy()  # the host waits here
    sums, at = [], 0
    for flat in flats:
        n = -(-flat.numel() // _BLOCK)
        sums.append(_sum_of_groups(blocks[at : at + n]))
        at += n
    return sums


def _sums_of_blocks(x: torch.Tensor, scale: float, is_wide: bool, drops: bool) -> torch.Tensor:
    """Return the sums of squares of whole blocks of a scratch tensor, which is written."""
    if scale != 1:
        x.mul_(scale if is_wide else float(np.float32(scale)))
        if not is_wide:
            x.copy_(x.to(torch.float32))  # the product of two float32 numbers is exact in double
    if drops:
        x.masked_fill_(~torch.isfinite(x), 0.0)
    leaves = x.mul_(x).view(-1, _LANES, _LANES)
    lanes = _add_up(leaves)
    half = _LANES
    while half > 1:
        half //= 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return _add_up(lanes.view(-1, _LEAVES))


def _add_up(terms: torch.Tensor) -> torch.Tensor:
    """Return the sums along the second dimension, taken one after the other."""
    total = terms[:, 0].clone()
    for k in range(1, terms.shape[1]):
        total += terms[:, k]
    return total


def _sum_of_groups(blocks: np.ndarray[Any, Any]) -> float:
    """Return the sum of a tensor from those of its blocks."""
    padded = np.zeros(-(-len(blocks) // _BLOCKS) * _BLOCKS)
    padded[: len(blocks)] = blocks
    groups = padded.reshape(-1, _BLOCKS)
    total = 0.0
    with np.errstate(all="ignore"):
        partial = np.zeros(len(groups))
        for k in range(_BLOCKS):
            partial += groups[:, k]
        for each in partial.tolist():
            total += each
    return total


def _count(flats: Sequence[torch.Tensor], scale: float, is_wide: bool) -> list[tuple[float, float, float, float]]:
    """Return of each the largest magnitude, and how many elements are NaN, infinite and zero."""
    rows = []
    for flat in flats:
        row = torch.zeros(4, dtype=torch.float64, device=flat.device)
        for some in flat.split(_AT_ONCE) if flat.numel() else ():
            x = some.to(torch.float64 if is_wide else torch.float32)
            if scale != 1:
                x = x * scale
            row[0] = torch.maximum(row[0], x.abs().max())
            row[1:] += torch.stack([x.isnan().sum(), x.isinf().sum(), (x == 0).sum()])
        rows.append(row)
    made: list[tuple[float, float, float, float]] = [tuple(row) for row in torch.stack(rows).tolist()]
    return made


def _together(one: Numbers, other: Numbers) -> Numbers:
    """Return the statistics of two that are looked at as one, under the first one's name."""
    index, size, factor, came, rule, update, param, largest, nans, infs, zeros = one
    _, more, _, *sums, other_largest, other_nans, other_infs, other_zeros = other
    largest = largest if largest >= other_largest or math.isnan(largest) else other_largest
    came, rule, update, param = (a + b for a, b in zip((came, rule, update, param), sums, strict=True))
    return (
        index,
        size + more,
        factor,
        came,
        rule,
        update,
        param,
        largest,
        nans + other_nans,
        infs + other_infs,
        zeros + other_zeros,
    )


# ---- tensors --------------------------------------------------------------------------------------------------------------

_NOTHING = torch.empty(0, dtype=torch.uint8)
_ALIGNMENT = 64
_STOCHASTIC = 1  # as `gradstep.options` numbers the precisions
_PER_BLOCK = {1: 256, 2: 128}  # elements of a scale, by those of a code's byte


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the elements are in other tensors: DTensor and its like."""
    return hasattr(tensor, "__tensor_flatten__")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _padded(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, up to a whole number of cache lines."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the memory holds other numbers than the tensor."""
    return tensor.is_conj() or tensor.is_neg()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor without gaps, in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _shaped(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of one dimension as one that is laid out as another."""
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, on its device, that is laid out as another."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach())


def _fetch(line: Transfers, target: torch.Tensor, source: torch.Tensor) -> None:
    if target.numel():
        line.fetch(target, source)


def _on_host(state: Any) -> Any:
    """Return the states of a parameter in host memory, with counts in double: torch's own end at 2^24."""
    if not isinstance(state, Mapping):
        return state
    return {
        name: value.detach().to("cpu", torch.float64 if name in NUMBERS else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in state.items()
    }


def _is_compressed(name: str, states: Mapping[str, Any]) -> bool:
    """Whether a state is codes, or the scales of some."""
    return scale_name(name) in states or (name.endswith("_scale") and name.removesuffix("_scale") in states)


def _part(state: Mapping[str, Any], piece: _Piece, like: torch.Tensor) -> dict[str, Any]:
    """Return the states of a piece of a parameter: numbers of its own, and views of the arrays."""
    part: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            part[name] = value
        elif name in NUMBERS:
            part[name] = value.clone()
        elif _is_compressed(name, state):
            codes = state[name.removesuffix("_scale")] if name.endswith("_scale") else value
            per_byte = 1 if codes.numel() == like.numel() else 2
            per = _PER_BLOCK[per_byte] if name.endswith("_scale") else per_byte
            part[name] = value[piece.start // per : -(-piece.stop // per)]
        else:
            part[name] = _flat(value)[piece.start : piece.stop]
    return part


def _signature(state: Mapping[str, Any] | None) -> list[Any]:
    """Return what may be wrong with states, other than the numbers in them."""
    return [
        (name, value.dtype, value.shape, value.stride(), value.data_ptr())
        if isinstance(value, torch.Tensor)
        else (name, type(value))
        for name, value in (state or {}).items()
    ]


def _check_params(params: Sequence[torch.Tensor], where: str, first: int = 0) -> None:
    """Refuse parameters that can't be offloaded; those before `first` have been looked at by themselves."""
    for i, param in enumerate(params[first:], first):
        if _is_wrapper(param):
            raise TypeError(f"{where}: params[{i}] is a {type(param).__name__}: parameters must be tensors of one device")
        if param.layout != torch.strided:
            raise ValueError(f"{where}: params[{i}] is sparse")
        if param.device.type not in ("cuda", "cpu"):
            raise ValueError(f"{where}: params[{i}] is on device {param.device}: offloading is from CUDA devices")
    spans: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
    for i, param in enumerate(params):
        if param.numel():
            reach = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True)) + 1
            spans[param.device].append((param.data_ptr(), param.data_ptr() + reach * param.element_size(), i))
    for on_device in spans.values():
        open_ones: list[tuple[int, int]] = []  # where they end, and which they are
        for begin, end, i in sorted(on_device):
            open_ones = [(other_end, j) for other_end, j in open_ones if other_end > begin]
            for _, j in open_ones:
                one, other = sorted((i, j))
                if params[one] is params[other]:
                    raise ValueError(f"{where}: params[{other}] is params[{one}] again: a parameter may be given once")
                if np.shares_memory(_shadow(params[one]), _shadow(params[other])):
                    raise ValueError(f"{where}: params[{other}] shares memory with params[{one}]")
            open_ones.append((end, i))


class _Shadow:
    """What NumPy takes for an array, to compare addresses: the memory may be a device's, and is never looked at."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
            "version": 3,
        }


def _shadow(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(_Shadow(tensor))
