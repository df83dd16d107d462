"""The optimizers' common part for NumPy loops: parameters in groups, their states, one step for all of them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from gradstep import _core, device_arrays
from gradstep.arrays import NumpyArrays
from gradstep.averages import Average, HoldsAverages
from gradstep.checkpoint import HoldsCheckpoints
from gradstep.device_arrays import has_interface, is_on_device
from gradstep.formats import AVERAGES, Array, arrays_of_state, check_state_dtype, numpy_dtype
from gradstep.kernel import Kernel
from gradstep.options import CONDITIONS, GROUP_OPTIONS, OPTIONS, call, check_no_arrays, check_weights, keep, make_conditions
from gradstep.saved import NUMBERS, check_form, read_count, read_state
from gradstep.state_files import HoldsStateFiles
from gradstep.stats import StepStats, make_stats
from gradstep.typing import Params

_ARRAY, _LIST, _DICT = "array", "list", "dict"


def _form_of(params: Any, where: str) -> str:
    if isinstance(params, Mapping):
        return _DICT
    if isinstance(params, np.ndarray) or has_interface(params):
        return _ARRAY
    if isinstance(params, Iterable) and not isinstance(params, (str, bytes, bytearray, memoryview)):
        return _LIST
    if hasattr(params, "__array_interface__") or isinstance(params, (bytearray, memoryview)):
        return _ARRAY
    raise TypeError(f"{where} must be an array, a sequence of arrays or a dict of arrays, got {type(params).__name__}")


def _is_weighted(grads: Any) -> bool:
    """Whether `grads` is a list of pairs (weight, gradients)."""
    return (
        isinstance(grads, (list, tuple))
        and len(grads) > 0
        and all(
            isinstance(item, tuple)
            and len(item) == 2
            and (isinstance(item[0], (Real, str)) or getattr(item[0], "ndim", 1) == 0)
            for item in grads
        )
    )


class Optimizer(HoldsAverages, HoldsCheckpoints, HoldsStateFiles, ABC):
    """Base of the NumPy optimizers. A subclass names its settings in its constructor and turns them into a kernel.

    Attributes:
        param_groups: a list of dicts, each with ``params`` (a list of arrays) and the group's settings. Settings may be edited
            between steps; what they were edited to is checked by the next step, before it writes anything.
        state: a dict from a parameter's key (its name, or its position among all parameters) to a dict of its states and its
            ``step``, the number of steps it has taken. Filled by the first step that has a gradient for the parameter.
        steps: the number of steps so far. Settings that are callables are called with it.
        clip_norm, on_nonfinite, zero_grad: the options that hold for all parameters together. They may be edited between steps.
    """

    _arrays = NumpyArrays()

    def __init__(self, params: Params, defaults: dict[str, Any], options: Mapping[str, Any]) -> None:
        try:
            group_options, conditions = keep(defaults, options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() {error}") from None
        self.clip_norm: float | None = conditions["clip_norm"]
        self.on_nonfinite: str = conditions["on_nonfinite"]
        self.zero_grad: bool = conditions["zero_grad"]
        self.defaults = {**defaults, **group_options}
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Any, dict[str, Any]] = {}
        self.steps = 0
        self._keys: list[list[Any]] = []  # of each group's parameters
        self._forms: list[str] = []  # in which each group's parameters were given
        self._grouped = isinstance(params, Sequence) and len(params) > 0 and isinstance(params[0], Mapping)
        self._plan = self._new_plan()
        self._conditions(stats=False)
        groups: Any = params if self._grouped else [{"params": params}]
        for group in groups:
            self.add_param_group(group)
        if options.get("state_dir") is not None:
            self._open_state_dir(options["state_dir"], type(self).__name__)

    @staticmethod
    @abstractmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group; the learning rate in them is a number."""

    @classmethod
    def initial_state(cls, name: str, settings: Mapping[str, Any]) -> float:  # noqa: ARG003
        """Return the number that every element of state `name` begins with."""
        return 0.0

    # ---- stepping ---------------------------------------------------------------------------------------------------------

    def step(
        self, grads: Any, *, grad_scale: float = 1.0, stats: bool = False, total_weight: float | None = None
    ) -> StepStats | None:
        """Move every parameter that has a gradient, in place, in one sweep over memory.

        Args:
            grads: gradients in the form in which the parameters were given: an array, a sequence, a dict of the same names, or
                for groups a list with one such item a group (a flat list of all gradients will do too). None in the place of a
                gradient leaves that parameter, its states and its step count as they are.

                Several gradients are given as a list of pairs ``(weight, gradients)``; the step is that of their weighted sum:
                accumulated micro-batches, workers, clients.
            grad_scale: number that the gradients are multiplied by on their way into the update: the inverse of a loss scale.
            stats: whether to gather statistics on the way.
            total_weight: what the weights of several gradients have to add up to, 1 for an average; None: anything.

        Returns:
            The statistics, if asked for; those of a step on a device are fetched when one of them is looked at. None otherwise.

        Raises:
            TypeError: for gradients that are no floating-point numbers.
            ValueError: for gradients missing or left over, of the wrong shape, or sharing memory with what the step writes; for
                settings out of range; for weights that are not finite, or do not add up to `total_weight`. Nothing has been
                written then, and no state or step count has changed.
            FloatingPointError: with ``on_nonfinite="raise"``, for a gradient that is not finite. Nothing has changed then.
            RuntimeError: for arrays on a device that there is no engine for, or that fails.
        """
        name = type(self).__name__
        weights = None
        flat: Any
        if _is_weighted(grads):
            try:
                weights = check_weights(tuple(weight for weight, _ in grads), total_weight)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}.step: {error}") from None
            flat = [self._flatten(each, f"{name}.step: grads[{i}]") for i, (_, each) in enumerate(grads)]
        elif total_weight is not None:
            raise ValueError(f"{name}.step: total_weight needs several gradients: a list of pairs (weight, gradients)")
        else:
            flat = self._flatten(grads, f"{name}.step: grads")
        groups = [
            (len(keys), self._kernel(group, grad_scale)) for group, keys in zip(self.param_groups, self._keys, strict=True)
        ]
        params = [param for group in self.param_groups for param in group["params"]]
        keys = [key for keys in self._keys for key in keys]
        conditions = self._conditions(stats=stats, weights=weights)
        if self._work is not None:
            self._begin_writing()
        seen = self._plan.step(params, flat, keys, self.state, groups, self._make_state, conditions)
        number = self._count(seen)
        return make_stats(number, keys, seen) if stats and seen is not None else None

    def _kernel(self, group: Mapping[str, Any], grad_scale: float = 1.0, where: str | None = None) -> Kernel:
        name = where or type(self).__name__
        if len(group) > len(self.defaults) + 1:  # not only what the constructor has put there
            self._check_names(group, name)
        settings = call(group, lambda: self.steps)
        if self.on_nonfinite == "zero":
            settings = {**settings, "on_nonfinite": "zero"}
        try:
            kernel = self.kernel(settings, grad_scale)
            if "state_dtype" in group:
                check_state_dtype(group["state_dtype"], kernel.rule.states)
            return kernel
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None

    def _check_names(self, group: Mapping[str, Any], where: str) -> None:
        unknown = sorted(map(str, group.keys() - self.defaults.keys() - GROUP_OPTIONS - {"params"}))
        for name in unknown:
            if name in OPTIONS:
                raise TypeError(f"{where}: {name} holds for all groups together: the constructor takes it")
        if unknown:
            raise TypeError(f"{where} has no setting {', '.join(map(repr, unknown))}")

    def _conditions(
        self,
        *,
        stats: bool,
        weights: tuple[float, ...] | None = None,
        of_all: Mapping[str, Any] | None = None,
        where: str | None = None,
    ) -> Any:
        try:
            return make_conditions(of_all or self._of_all(), stats=stats, weights=weights)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where or type(self).__name__}: {error}") from None

    def _of_all(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CONDITIONS}

    def _flatten(self, grads: Any, where: str) -> list[Any]:
        if not self._grouped:
            return self._flatten_group(grads, 0, where)
        if not isinstance(grads, Sequence):
            raise TypeError(f"{where} must be a sequence with an item for each group, got {type(grads).__name__}")
        total = sum(len(keys) for keys in self._keys)
        if (
            len(grads) == total
            and all(form != _ARRAY for form in self._forms)
            and not any(isinstance(grad, (list, tuple, Mapping)) for grad in grads)
        ):
            return list(grads)
        if len(grads) != len(self._keys):
            raise ValueError(f"{where} has {len(grads)} items, there are {len(self._keys)} groups of {total} parameters")
        return [grad for i, part in enumerate(grads) for grad in self._flatten_group(part, i, f"{where}[{i}]")]

    def _flatten_group(self, grads: Any, index: int, where: str) -> list[Any]:
        form, keys = self._forms[index], self._keys[index]
        if self._grouped and isinstance(grads, Mapping) and "params" in grads and "params" not in keys:
            grads = grads["params"]
        if form == _ARRAY:
            return [grads]
        if form == _DICT:
            if not isinstance(grads, Mapping):
                raise TypeError(f"{where} must be a dict of the parameters' names, got {type(grads).__name__}")
            if grads.keys() != set(keys):
                missing = ", ".join(repr(key) for key in keys if key not in grads) or "none"
                unknown = ", ".join(repr(key) for key in grads if key not in keys) or "none"
                raise ValueError(f"{where} must have the parameters' names: missing {missing}, unknown {unknown}")
            return [grads[key] for key in keys]
        if isinstance(grads, (np.ndarray, Mapping)) or not isinstance(grads, Iterable):
            raise TypeError(f"{where} must be a sequence of arrays, as params is, got {type(grads).__name__}")
        flat = list(grads)
        if len(flat) != len(keys):
            raise ValueError(f"{where} has {len(flat)} arrays, params has {len(keys)}")
        return flat

    def _make_state(self, group: int, param: Any, names: list[str]) -> dict[str, Any]:
        on_device, settings = is_on_device(param), self.param_groups[group]
        like = param if on_device else np.asarray(param)
        made: dict[str, Any] = {}
        for name in names:
            if name in NUMBERS:
                made[name] = device_arrays.number(NUMBERS[name], param) if on_device else NUMBERS[name]
                continue
            fill = 0.0 if name in AVERAGES else self.initial_state(name, settings)
            dtype, shape = device_arrays.dtype_of(like), tuple(like.shape)
            for part, array in arrays_of_state(name, settings, dtype, shape, fill).items():
                made[part] = self._new_array(array, like)
        return made

    def _new_array(self, array: Array, like: Any) -> Any:
        made = self._empty(array.shape, array.dtype, like)
        fill = like if math.isnan(array.fill) else array.fill
        if isinstance(made, np.ndarray):
            made[...] = fill
        else:
            device_arrays.assign(made, fill)
        return made

    def _empty(self, shape: tuple[int, ...], dtype: str, param: Any) -> Any:
        if is_on_device(param):
            return self._place(device_arrays.empty(shape, dtype, param))
        if shape == np.shape(param):  # in the parameter's order in memory
            return self._place(np.empty_like(param, numpy_dtype(dtype), subok=False))
        return self._place(np.empty(shape, numpy_dtype(dtype)))

    # ---- averages ---------------------------------------------------------------------------------------------------------

    @property
    def ema(self) -> Any:
        """The exponential moving averages, in the form of the parameters; of parameters that have none yet, None."""
        return self._in_form("ema")

    @property
    def swa(self) -> Any:
        """The equal averages, in the form of the parameters; of parameters that have none yet, None."""
        return self._in_form("swa")

    def _in_form(self, name: Average) -> Any:
        forms = [
            group[0] if form == _ARRAY else dict(zip(keys, group, strict=True)) if form == _DICT else group
            for group, form, keys in zip(self._averages(name), self._forms, self._keys, strict=True)
        ]
        return forms if self._grouped else forms[0]

    def _names(self) -> list[list[Any]]:
        return self._keys

    def _key_of(self, group: int, index: int) -> Any:
        return self._keys[group][index]

    def _state_of(self, group: int, index: int) -> Mapping[str, Any]:
        return self.state.get(self._keys[group][index], {})

    # ---- groups -----------------------------------------------------------------------------------------------------------

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; those that `group` does not name are the optimizer's defaults.

        Args:
            group: a dict with ``params`` (an array, a sequence or a dict of arrays) and settings.

        Raises:
            TypeError: if `group` has no ``params``, or a setting that the optimizer does not have.
            ValueError: for settings out of range, or a name that is taken.
        """
        where = f"{type(self).__name__}: param_groups[{len(self.param_groups)}]"
        if "params" not in group:
            raise TypeError(f"{where} must be a dict with params, got {group!r}")
        self._check_names(group, where)
        params = group["params"]
        form = _form_of(params, f"{type(self).__name__}: params")
        arrays = [params] if form == _ARRAY else list(params.values()) if form == _DICT else list(params)
        first = sum(len(keys) for keys in self._keys)
        keys = list(params) if form == _DICT else list(range(first, first + len(arrays)))
        taken = [key for key in keys if any(key in others for others in self._keys)]
        if taken:
            raise ValueError(f"{where} has the name {taken[0]!r}, which another group has")
        for key, array in zip(keys, arrays, strict=True):
            if not hasattr(array, "__array_interface__") and not has_interface(array):
                raise TypeError(f"{type(self).__name__}: params[{key!r}] must be an array, got {type(array).__name__}")
        settings = {**self.defaults, **group, "params": arrays}
        self._check(settings, type(self).__name__)
        self.param_groups.append(settings)
        self._keys.append(keys)
        self._forms.append(form)
        self._grouped = self._grouped or len(self._keys) > 1

    def _check(self, settings: Mapping[str, Any], where: str) -> None:
        """Refuse settings out of range, by a step of no parameters."""
        check_no_arrays(where, settings)
        plan = _core.Plan(where, _core.Face.numpy)
        plan.step([], [], [], {}, [(0, self._kernel(settings, where=where))], self._make_state)

    # ---- saving -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later run needs to go on: states by key, groups with keys in the place of arrays, the step count.

        The states are the arrays themselves, which later steps change: copy what you keep in memory.
        """
        groups = [{**group, "params": list(keys)} for group, keys in zip(self.param_groups, self._keys, strict=True)]
        state = {key: dict(state) for key, state in self.state.items()}
        return {"state": state, "param_groups": groups, "steps": self.steps, **self._of_all()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over states, settings and step count. Everything is checked before anything changes; arrays are copied.

        Args:
            state_dict: what `state_dict` of an optimizer of the same kind returned, for parameters of the same keys and shapes.

        Raises:
            TypeError: if something is of the wrong type, named in the message.
            ValueError: if something is missing or does not fit, named in the message.
        """
        where = f"{type(self).__name__}.load_state_dict"
        check_form(where, state_dict)
        groups, states = state_dict["param_groups"], state_dict["state"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"{where}: state_dict has {len(groups)} groups, the optimizer has {len(self.param_groups)}")
        fresh_groups, fresh_state = [], {}
        for i, (theirs, ours, keys) in enumerate(zip(groups, self.param_groups, self._keys, strict=True)):
            group = f"{where}: param_groups[{i}]"
            settings = dict(theirs)
            names = list(settings.pop("params"))
            if any(getattr(name, "ndim", 0) for name in names) or names != keys:  # arrays: comparing them is no yes or no
                raise ValueError(f"{group} has parameters {names!r}, the optimizer has {keys!r}")
            unknown = settings.keys() - ours.keys() - GROUP_OPTIONS
            if unknown:
                raise ValueError(f"{group} has no setting {', '.join(sorted(map(repr, unknown)))}")
            self._check({**ours, **settings}, group)
            fresh_groups.append({**ours, **copy.deepcopy(settings)})
            for key, param in zip(keys, ours["params"], strict=True):
                if key in states:
                    like = param if is_on_device(param) else np.asarray(param)
                    fresh_state[key] = read_state(f"{where}: state[{key!r}]", states[key], like)
        left = [key for key in states if key not in fresh_state]
        if left:
            raise ValueError(f"{where}: state has {left[0]!r}, the optimizer has no such parameter")
        of_all = {name: state_dict.get(name, value) for name, value in self._of_all().items()}
        check_no_arrays(where, of_all)
        self._conditions(stats=False, of_all=of_all, where=where)
        steps = read_count(f"{where}: steps", state_dict["steps"])
        self.param_groups, self.state, self.steps = fresh_groups, fresh_state, steps
        for name, value in of_all.items():
            setattr(self, name, value)

    def _set_of_all(self, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            setattr(self, name, value)

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        self._check(group, where)

    def _new_plan(self) -> _core.Plan:
        return _core.Plan(f"{type(self).__name__}.step", _core.Face.numpy)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.__dict__.items() if name not in ("_plan", "_undecided")},
            "steps": self.steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plan = self._new_plan()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {name}: {group[name]}" for name in sorted(group) if name != "params"]
        given = {name: value for name, value in self._of_all().items() if value != CONDITIONS[name]}
        lines += [f"{name}: {value}" for name, value in given.items()]
        return "\n".join([*lines, ")"])
