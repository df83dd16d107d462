"""The optimizer that offloading makes."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from gradstep import _core
from gradstep.averages import Average
from gradstep.files import PathLike
from gradstep.torch.offload import tensors
from gradstep.torch.offload.parts import Mirror, Upload
from gradstep.torch.offload.step import take_step, uncompiled_step
from gradstep.torch.offload.transfers import Transfers, make_transfers
from gradstep.torch.one_sweep import OneSweep, _check

CHUNK_BYTES = 32 << 20
"""Bytes of gradients that come down together, unless `offload` is told otherwise."""

BUFFERS = 3
"""Chunks of gradients that have room in pinned memory, unless `offload` is told otherwise."""

_HALVES = (torch.float16, torch.bfloat16)


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
            f"offload: optimizer must be one of gradstep.torch, got {type(optimizer).__module__}.{tensors.name(optimizer)}"
        )
    for name, value, least in (("chunk_bytes", chunk_bytes, 1), ("buffers", buffers, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"offload: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"offload: {name} must be at least {least}, got {value!r}")
    if optimizer._work is not None:
        raise ValueError("offload: optimizer has state_dir: offloaded states are in memory")
    return Offloaded(optimizer, chunk_bytes, buffers, transfers)


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
        self._mirrors: list[Mirror] = []
        self._lines: dict[torch.device, Transfers] = {}
        self._buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._checked: Any = None  # what the last check of all operands has seen
        self._broken: str | None = None
        self._inner = copy.copy(optimizer)
        self._plan = _core.Plan(f"{tensors.name(self._inner)}.step", _core.Face.torch, optimizer.counts_steps)
        self.steps = optimizer.steps
        for name in ("clip_norm", "on_nonfinite", "zeroes_grad"):
            setattr(self, name, getattr(optimizer, name))
        tensors.check_params([param for group in optimizer.param_groups for param in group["params"]], "offload")
        states = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        for name, hooks in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, hooks)
        for key, state in states.items():
            self.state[key] = tensors.on_host(state)
        optimizer.state = defaultdict(dict)
        optimizer._plan = None
        message = f"{tensors.name(optimizer)}.step: this optimizer has been offloaded: step what offload() has returned"

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
                f"{tensors.name(self._inner)}.step: an offloaded optimizer takes no grads: add them up in the parameters'"
            )
        if torch.compiler.is_compiling():  # leave it as it is: there is nothing in it for a compiler
            return uncompiled_step(self, closure, grad_scale, stats)
        return take_step(self, closure, grad_scale, stats)

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            for name, value in self._inner._options.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        index, where = len(self.param_groups) - 1, f"{tensors.name(self._inner)}.add_param_group"
        try:
            params = param_group["params"]
            if self._mirrors:  # the first ones have been checked together
                tensors.check_params([*(mirror.param for mirror in self._mirrors), *params], where, len(self._mirrors))
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
        return f"Offloaded {tensors.name(self._inner)}{super().__repr__().removeprefix(type(self).__name__)}"

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
        self.state = defaultdict(
            dict, {by_copy.get(id(key), key): tensors.on_host(state) for key, state in inner.state.items()}
        )
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

    def _make_mirrors(self, params: Sequence[torch.Tensor], group: int) -> list[Mirror]:
        """Return copies of parameters, filled. Small ones lie together: each piece of pinned memory takes a call of the driver."""
        mirrors = []
        rooms: dict[torch.device, torch.Tensor] = {}
        for i, param in enumerate(params):
            nbytes = tensors.padded(param)
            if rooms.get(param.device, tensors.NOTHING).numel() < nbytes:
                rest = sum(tensors.padded(other) for other in params[i:] if other.device == param.device)
                rooms[param.device] = self._line(param.device).memory(max(nbytes, min(rest, CHUNK_BYTES)))
            room, rooms[param.device] = rooms[param.device][:nbytes], rooms[param.device][nbytes:]
            like = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
            typed = room[: param.numel() * param.element_size()].view(param.dtype)
            mirrors.append(Mirror(param, group, typed.as_strided(param.shape, like.stride(), typed.storage_offset())))
        self._pull(mirrors)
        return mirrors

    @torch.no_grad()
    def _pull(self, mirrors: Iterable[Mirror]) -> None:
        """Take parameters from the device, and wait for them."""
        changed = [mirror for mirror in mirrors if mirror.known != mirror.now()]
        if not changed:
            return
        dense = [mirror.param if mirror.is_dense() else tensors.laid_out(mirror.param, mirror.copy) for mirror in changed]
        lines = {mirror.param.device: self._line(mirror.param.device) for mirror in changed}
        for line in lines.values():
            line.begin()
        for mirror, source in zip(changed, dense, strict=True):
            mirror.sent.synchronize()
            tensors.fetch(lines[mirror.param.device], tensors.flat(mirror.copy), tensors.flat(source))
        for line in lines.values():
            line.fetched().synchronize()
        for mirror in changed:
            mirror.known = mirror.now()

    @torch.no_grad()
    def _push(self) -> None:
        """Bring all copies to the device; the host does not wait."""
        lines = {mirror.param.device: self._line(mirror.param.device) for mirror in self._mirrors}
        upload = Upload(self, self._mirrors)
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
            raise RuntimeError(f"{tensors.name(self._inner)}.{function}: {self._broken}")
