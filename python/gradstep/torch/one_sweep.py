"""What the torch classes share: a step of one sweep over memory, in the place of a subclass of `torch.optim.Optimizer`'s own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradstep import _core
from gradstep.averages import HoldsAverages
from gradstep.checkpoint import HoldsCheckpoints
from gradstep.formats import AVERAGES, Array, arrays_of_state, check_state_dtype
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer as Rule
from gradstep.options import OPTIONS, check_weights, keep, make_conditions
from gradstep.saved import NUMBERS
from gradstep.state_files import HoldsStateFiles
from gradstep.stats import Seen, make_stats
from gradstep.torch.arrays import TorchArrays
from gradstep.torch.loading import exact_dtypes

Closure = Callable[[], Any]
Sources = Sequence[tuple[float, Sequence[torch.Tensor | None]]]

_OF_ALL = {"clip_norm": "clip_norm", "on_nonfinite": "on_nonfinite", "zero_grad": "zeroes_grad"}
"""Options that hold for all parameters together, and the attributes that keep them: `zero_grad` is a method of torch's."""

_MISPLACED = _OF_ALL.keys() | {"state_dir"}
"""Options that no group may have."""

# What torch.amp.GradScaler leaves on an optimizer for the length of a step.
_OF_SCALER = frozenset({"grad_scale", "found_inf"})

_WITH_CUDA = hasattr(torch._C, "_cuda_isCurrentStreamCapturing")
"""Whether this torch can record CUDA graphs at all."""


class OneSweep(HoldsAverages, HoldsCheckpoints, HoldsStateFiles, Optimizer):
    """Mixin, to stand before the torch class that it replaces: that one keeps constructor, checks, states and serialization.

    The constructor takes the options around a rule as well (`gradstep.options.Options`), by keyword. Those that may differ by group
    stand in the groups, as far as they are given; `clip_norm`, `on_nonfinite` and `zeroes_grad` (the option `zero_grad`) are
    attributes. All may be edited between steps.

    The choices `foreach` and `fused` are accepted and change nothing: they name ways to run the same update, and there is one way
    here. `differentiable` is refused, and so is `capturable` for parameters in CPU memory. Gradients that are sparse are left to the
    torch class, whole steps with such a gradient at a time: its step is right, or raises its error.

    Parameters may be on CUDA devices, also on several, and in CPU memory beside (docs/gpu.md). Their counts are on the device too, and
    so may `lr` be: a tensor there is read by the step, and not by the host. `torch.distributed`'s DTensors are updated part by part.
    """

    rule: ClassVar[type[Rule]]
    """The NumPy optimizer of the same name, which turns settings into a kernel."""

    counts_steps: ClassVar[bool] = True
    """Whether the states of a parameter have a ``step``."""

    _plan: _core.Plan | None = None
    _arrays = TorchArrays()

    clip_norm: float | None = None
    on_nonfinite: str = "propagate"
    zeroes_grad: bool = False
    _options: Mapping[str, Any] = MappingProxyType({})  # of groups that do not say otherwise

    # torch.amp.GradScaler leaves `grad_scale` and `found_inf` here for a step that unscales for itself.
    _step_supports_amp_scaling = property(lambda self: True, lambda self, value: None)  # noqa: ARG005

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the signature of the torch class, with options."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            theirs = inspect.signature(super().__init__)
            options = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
            cls.__signature__ = theirs.replace(parameters=[*list(theirs.parameters.values())[1:], options])  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in OPTIONS}
        self._options, conditions = keep({}, options)
        for name, attribute in _OF_ALL.items():
            setattr(self, attribute, conditions[name])
        self._conditions(stats=False)
        super().__init__(*args, **kwargs)
        self.defaults.update(self._options)
        if options.get("state_dir") is not None:
            self._open_state_dir(options["state_dir"], type(self).__name__)

    def step(
        self,
        closure: Closure | None = None,
        *,
        grads: Sources | None = None,
        grad_scale: float = 1.0,
        stats: bool = False,
    ) -> Any:
        """Perform one step, as `torch.optim.Optimizer.step` does.

        Args:
            closure: evaluates the model again and returns the loss.
            grads: several gradients in the place of the parameters' own: pairs of a weight and a list of gradients, one a parameter
                in the order of the groups. The step is that of their weighted sum.
            grad_scale: number that the gradients are multiplied by on their way into the update: the inverse of a loss scale.
            stats: whether to gather statistics on the way.

        Returns:
            What the closure returned, or None without one. With `stats`, a `gradstep.stats.StepStats`, or a pair of both.

        Raises:
            TypeError, ValueError: for what can't be updated right, with the name of what is wrong. Nothing has been written then.
            RuntimeError: torch's, for sparse gradients where the torch class does not take them; for parameters on a device that there
                is no engine for, or that fails; while a CUDA graph is captured, for what it can't repeat.
            FloatingPointError: with ``on_nonfinite="raise"``, for a gradient that is not finite. Nothing has changed then.
        """
        hooked = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )
        if torch.compiler.is_compiling():  # leave it as it is: there is nothing in it for a compiler
            return _uncompiled_step(self, closure, grads=grads, grad_scale=grad_scale, stats=stats)
        if hooked:
            return _hooked_step(self, closure, grads=grads, grad_scale=grad_scale, stats=stats)
        return _step(self, closure, grads=grads, grad_scale=grad_scale, stats=stats)

    # Keeps torch from wrapping `step` into its hooks and profiler range at all times: that alone costs more than a small step.
    step.hooked = True  # type: ignore[attr-defined]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            for name, value in self._options.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        try:
            _check(self, self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states and settings, as `torch.optim.Optimizer.load_state_dict` does.

        States keep the dtypes that they have in `state_dict`, whatever their parameter's is.

        Options of groups that `state_dict` does not name stay as they are, and so do `clip_norm`, `on_nonfinite`, `zeroes_grad` and
        `steps`: torch's form of a state dict has no place for what holds for all groups.
        """
        before = [{name: group[name] for name in OPTIONS & group.keys()} for group in self.param_groups]
        with exact_dtypes(self):
            super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, before, strict=True):
            for name, value in options.items():
                group.setdefault(name, value)
        _settle_numbers(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*_OF_ALL.values(), "steps", "_options")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None

    @property
    def ema(self) -> list[torch.Tensor | None]:
        """The exponential moving averages, one a parameter in the order of the groups; None where there is none yet."""
        return [average for group in self._averages("ema") for average in group]

    @property
    def swa(self) -> list[torch.Tensor | None]:
        """The equal averages, one a parameter in the order of the groups; None where there is none yet."""
        return [average for group in self._averages("swa") for average in group]

    def _names(self) -> list[list[Any]]:
        names = iter(_keys_of(self))
        return [[next(names) for _ in group["params"]] for group in self.param_groups]

    def _key_of(self, group: int, index: int) -> torch.Tensor:
        param: torch.Tensor = self.param_groups[group]["params"][index]
        return param

    def _of_all(self) -> dict[str, Any]:
        return {name: getattr(self, attribute) for name, attribute in _OF_ALL.items()}

    def _set_of_all(self, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            setattr(self, _OF_ALL[name], value)

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        try:
            _check(self, group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    def _state_of(self, group: int, index: int) -> Mapping[str, Any]:
        param = self.param_groups[group]["params"][index]
        state: Mapping[str, Any] = self.state.get(param, {})
        return state

    def _conditions(self, *, stats: bool, weights: tuple[float, ...] | None = None, skip: bool = False) -> Any:
        try:
            conditions = make_conditions(self._of_all(), stats=stats, weights=weights)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(self).__name__}: {error}") from None
        return (conditions[0], "leave out", *conditions[2:]) if skip and conditions else conditions

    def rule_of(self, group: Mapping[str, Any]) -> type[Rule]:  # noqa: ARG002
        """Return the rule that the settings of a group ask for."""
        return self.rule

    def _make_state(self, group: int, param: torch.Tensor, names: list[str]) -> dict[str, Any]:
        fresh: dict[str, Any] = {}
        on_device = _core.device_of(param) >= 0
        if on_device and _WITH_CUDA and _is_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step: states are made by the first step, which has to come before a CUDA graph is captured"
            )
        for name in names:
            if name == "step" or (on_device and name in NUMBERS):
                fresh[name] = torch.zeros((), dtype=torch.float64, device=param.device if on_device else "cpu")
            elif name in NUMBERS:  # Python's, which torch saves and loads as they are; tensors it would round
                fresh[name] = NUMBERS[name]
            else:
                settings = self.param_groups[group]
                fill = 0.0 if name in AVERAGES else self.rule.initial_state(name, settings)
                dtype = str(param.dtype).removeprefix("torch.")
                for part, array in arrays_of_state(name, settings, dtype, tuple(param.shape), fill).items():
                    fresh[part] = self._new_array(array, param)
        return fresh

    def _new_array(self, array: Array, param: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._empty(array.shape, array.dtype, param)
        return made.copy_(param.detach()) if math.isnan(array.fill) else made.fill_(array.fill)

    def _empty(self, shape: tuple[int, ...], dtype: str, param: torch.Tensor) -> Any:
        kind = getattr(torch, dtype)
        if hasattr(param, "to_local") and shape != tuple(param.shape):
            raise ValueError(f"{type(self).__name__}: a DTensor's states can't be compressed: state_dtype must be of floats")
        if shape == tuple(param.shape):  # in the parameter's order in memory
            like = torch.empty_like(param, dtype=kind, requires_grad=False, memory_format=torch.preserve_format)
            return self._place(like)
        return self._place(torch.empty(shape, dtype=kind, device=param.device))


def _kernel(optimizer: OneSweep, group: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
    if group.get("differentiable"):
        raise ValueError(f"{type(optimizer).__name__}: differentiable=True is not supported: the step runs outside autograd")
    if group.get("capturable") and -1 in _core.devices_of(group["params"]):
        raise ValueError(
            f"{type(optimizer).__name__}: capturable=True is not supported: no CUDA graph can capture a step on the CPU"
        )
    rule = optimizer.rule_of(group)
    if not _MISPLACED.isdisjoint(group):
        misplaced = min(_MISPLACED & group.keys())
        raise TypeError(f"{type(optimizer).__name__}: {misplaced} holds for all groups together: the constructor takes it")
    if OPTIONS.isdisjoint(group) and optimizer.on_nonfinite != "zero":
        return rule.kernel(group, grad_scale)
    try:
        kernel = rule.kernel({**group, "on_nonfinite": optimizer.on_nonfinite}, grad_scale)
        if "state_dtype" in group:
            check_state_dtype(group["state_dtype"], kernel.rule.states)
        return kernel
    except (TypeError, ValueError) as error:
        raise type(error)(f"{type(optimizer).__name__}: {error}") from None


def _check(optimizer: OneSweep, group: Mapping[str, Any]) -> None:
    """Refuse what the settings of a group ask for and can't have."""
    plan = _core.Plan(type(optimizer).__name__, _core.Face.torch)
    plan.step([], None, [], {}, [(0, _kernel(optimizer, group))], optimizer._make_state)


def _settle_numbers(optimizer: OneSweep) -> None:
    """Bring the numbers beside states to where they count: in double, beside parameters on a device on the device.

    torch's counts are float32, which ends at 2^24 steps; a double goes on to 2^53, and torch loads it as well.
    """
    for param, state in optimizer.state.items():
        numbers = [name for name in NUMBERS if name in state]
        if not numbers or not isinstance(param, torch.Tensor):
            continue
        on_device = _core.device_of(param) >= 0
        for name in numbers:
            value = state[name]
            if isinstance(value, torch.Tensor):
                state[name] = value.to(param.device if on_device else "cpu", torch.float64)
            elif on_device and isinstance(value, (int, float)):
                state[name] = torch.tensor(value, dtype=torch.float64, device=param.device)


def _new_plan(optimizer: OneSweep) -> _core.Plan:
    _settle_numbers(optimizer)
    return _core.Plan(f"{type(optimizer).__name__}.step", _core.Face.torch, optimizer.counts_steps)


def _step(
    optimizer: OneSweep,
    closure: Closure | None = None,
    *,
    grads: Sources | None = None,
    grad_scale: float = 1.0,
    stats: bool = False,
) -> Any:
    loss = None
    try:
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen = _carry_out(optimizer, grads, grad_scale, stats)
    except BaseException:
        # GradScaler will not hear the end of this step, and would leave its scale to the next.
        for name in _OF_SCALER:
            vars(optimizer).pop(name, None)
        raise
    if not stats or seen is None:
        return loss
    made = make_stats(seen[1], _keys_of(optimizer), seen[0])
    return made if closure is None else (loss, made)


def _carry_out(
    optimizer: OneSweep, grads: Sources | None, grad_scale: float, stats: bool
) -> tuple[Seen | _core.PendingStep, Callable[[], int]] | None:
    """Take a step. Return what the plan saw of it, if anything, and what tells the number of the call."""
    loss_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)  # of GradScaler
    scaler, overflow = None, False
    if loss_scale is not None or found_inf is not None:
        scaler = _scaler_of(optimizer, loss_scale, found_inf)
        if scaler is None:
            grad_scale, overflow = _read_scaler(grad_scale, loss_scale, found_inf)
    if overflow and not stats:
        if optimizer.zeroes_grad:
            optimizer.zero_grad(set_to_none=False)
        return None
    if optimizer._plan is None:
        optimizer._plan = _new_plan(optimizer)
    param_groups = optimizer.param_groups
    capturing = _WITH_CUDA and _is_capturing()
    if capturing:
        _check_capture(optimizer, stats)
    groups = [(len(group["params"]), _kernel(optimizer, group, grad_scale)) for group in param_groups]
    params = param_groups[0]["params"] if len(param_groups) == 1 else [p for group in param_groups for p in group["params"]]
    sources = weights = None
    if grads is not None:
        sources, weights = _sources(optimizer, grads)
    conditions = None
    if optimizer.clip_norm is not None or optimizer.on_nonfinite != "propagate" or optimizer.zeroes_grad or stats or weights:
        conditions = optimizer._conditions(stats=stats, weights=weights, skip=overflow)
    if optimizer._work is not None:
        optimizer._begin_writing()
    try:
        seen = optimizer._plan.step(
            params, sources, params, optimizer.state, groups, optimizer._make_state, conditions, scaler, not capturing
        )
    except (TypeError, ValueError):
        alone = conditions is None and optimizer.on_nonfinite == "propagate"
        if not alone or not any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise
        if scaler is not None:
            grad_scale, overflow = _read_scaler(grad_scale, loss_scale, found_inf)
        if overflow:
            return None
        _torch_step(optimizer, grad_scale)
        seen = None
    if capturing:  # which is no step yet
        return None
    number = optimizer._count(seen)
    return None if seen is None else (seen, number)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check_capture(optimizer: OneSweep, stats: bool) -> None:
    """Refuse what a CUDA graph can't repeat."""
    where = f"{type(optimizer).__name__}.step: a CUDA graph is being captured"
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise RuntimeError(f"{where}, and capturable=False: make the optimizer with capturable=True")
    if stats or optimizer.on_nonfinite == "raise":
        what = "stats" if stats else "on_nonfinite='raise'"
        raise RuntimeError(f"{where}, and {what} asks for what only a step that has been carried out can tell")


def _read_scaler(grad_scale: float, loss_scale: Any, found_inf: Any) -> tuple[float, bool]:
    """Return what gradients are to be multiplied by, and whether the step is to be left out, as GradScaler says."""
    if loss_scale is not None:
        grad_scale = float(grad_scale) / float(loss_scale)
    return grad_scale, found_inf is not None and float(found_inf) != 0


def _scaler_of(optimizer: OneSweep, loss_scale: Any, found_inf: Any) -> list[tuple[Any, Any]] | None:
    """Return what GradScaler says, for each device as tensors on it; None where the host has to read it."""
    given = [value for value in (loss_scale, found_inf) if value is not None]
    if not all(isinstance(value, torch.Tensor) for value in given):
        return None
    if -1 in _core.devices_of(given):
        return None
    params = [param for group in optimizer.param_groups for param in group["params"]]
    devices = _core.devices_of(params)
    if -1 in devices:
        return None
    if len(devices) == 1 and devices == _core.devices_of(given):
        return [(loss_scale, found_inf)]

    def there(value: Any, place: torch.device) -> Any:
        return None if value is None else value.to(place, non_blocking=True)

    return [(there(loss_scale, place), there(found_inf, place)) for place in {param.device for param in params}]


def _sources(optimizer: OneSweep, grads: Sources) -> tuple[list[list[torch.Tensor | None]], tuple[float, ...]]:
    name = f"{type(optimizer).__name__}.step"
    try:
        pairs = [(weight, list(each)) for weight, each in grads]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: grads must be pairs (weight, gradients), got {grads!r}") from None
    if not pairs:
        raise ValueError(f"{name}: grads has no gradients")
    try:
        return [each for _, each in pairs], check_weights(tuple(weight for weight, _ in pairs), None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


_hooked_step = Optimizer.profile_hook_step(_step)
_uncompiled_step = _disable_dynamo(_hooked_step)


def _torch_step(optimizer: OneSweep, grad_scale: float) -> None:
    """Perform the step of the torch class that `optimizer` replaces, with gradients times `grad_scale`."""
    given = {name for group in optimizer.param_groups for name in OPTIONS & group.keys() if group[name] is not None}
    if given:
        raise ValueError(f"{type(optimizer).__name__}.step: sparse gradients go without the options {', '.join(sorted(given))}")
    theirs = next(cls for cls in type(optimizer).__mro__ if not issubclass(cls, OneSweep) and "step" in vars(cls))
    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    grads = [param.grad for param in params]
    scaler = {name: vars(optimizer).pop(name) for name in _OF_SCALER & vars(optimizer).keys()}  # theirs would refuse
    with torch.no_grad():
        try:
            if grad_scale != 1:
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad * grad_scale
            inspect.unwrap(vars(theirs)["step"])(optimizer)
        finally:
            vars(optimizer).update(scaler)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad


def _keys_of(optimizer: OneSweep) -> list[Any]:
    """Return the names of all parameters, or their positions."""
    names: list[Any] = []
    for group in optimizer.param_groups:
        names += group.get("param_names") or range(len(names), len(names) + len(group["params"]))
    return names
