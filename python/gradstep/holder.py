"""What checkpoints and state files need to know of an optimizer, whichever face it has."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from gradstep import _core
from gradstep.arrays import Arrays
from gradstep.files import PathLike
from gradstep.stats import Seen


class Holder:
    """Base of the mixins that put states into files. What is abstract here, each face knows."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: Any

    _arrays: ClassVar[Arrays]

    @abstractmethod
    def _names(self) -> list[list[Any]]:
        """Return the names of the parameters, or their positions, group by group."""

    @abstractmethod
    def _key_of(self, group: int, index: int) -> Any:
        """Return the key of a parameter in `state`."""

    @abstractmethod
    def _state_of(self, group: int, index: int) -> Mapping[str, Any]:
        """Return the states of a parameter of a group; empty if it has none yet."""

    @abstractmethod
    def _of_all(self) -> dict[str, Any]:
        """Return the options that hold for all groups, by the constructor's names."""

    @abstractmethod
    def _set_of_all(self, options: Mapping[str, Any]) -> None:
        """Set options that hold for all groups."""

    @abstractmethod
    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Refuse settings of a group that are out of range."""

    @abstractmethod
    def _empty(self, shape: tuple[int, ...], dtype: str, param: Any) -> Any:
        """Return a new array for a state: laid out in memory as its parameter, if it has its shape."""

    @abstractmethod
    def _open_state_dir(self, folder: PathLike, where: str, *, new: bool = False) -> None:
        """Keep states in files in `folder` from now on."""

    @abstractmethod
    def _discard_state_dir(self) -> None:
        """Delete what a failed start has left there."""

    @abstractmethod
    def _begin_writing(self) -> None:
        """Take note that states are going to be written."""

    @abstractmethod
    def flush(self) -> None:
        """Write what a later process needs to go on with the states in `state_dir`."""

    @property
    def steps(self) -> int:
        """Number of steps so far.

        Steps that were left out are not counted. Where only a device knows whether the latest were, reading this waits for them.
        """
        kept = vars(self)
        undecided = kept.pop("_undecided", None)
        if undecided:
            kept["steps"] = kept.get("steps", 0) + sum(step.wait()[0] for step in undecided)
        count: int = kept.get("steps", 0)
        return count

    @steps.setter
    def steps(self, count: int) -> None:
        vars(self).pop("_undecided", None)
        vars(self)["steps"] = count

    def _count(self, seen: Seen | _core.PendingStep | None) -> Callable[[], int]:
        """Count a step that the plan has returned from. Return a function that tells the number of the call."""
        kept = vars(self)
        before: int = kept.get("steps", 0)
        earlier: tuple[_core.PendingStep, ...] = tuple(kept["_undecided"]) if "_undecided" in kept else ()
        if isinstance(seen, _core.PendingStep) and seen.may_be_left_out:
            undecided = kept.setdefault("_undecided", deque())
            undecided.append(seen)
            while len(undecided) > 1 and undecided[0].is_done():
                kept["steps"] = kept.get("steps", 0) + undecided.popleft().wait()[0]
        elif seen is None or isinstance(seen, _core.PendingStep) or seen[0]:
            kept["steps"] = before + 1
        return lambda: before + sum(step.wait()[0] for step in earlier) + 1

    def _params(self) -> Iterator[tuple[int, int, Any, Any]]:
        """Yield all parameters: the group, the place in it, the name, the parameter."""
        for i, (group, names) in enumerate(zip(self.param_groups, self._names(), strict=True)):
            for j, (name, param) in enumerate(zip(names, group["params"], strict=True)):
                yield i, j, name, param

    def _check_whole(self, where: str) -> None:
        """Refuse parameters of which this process has a part only.

        Raises:
            ValueError: for torch's DTensors.
        """
        for _, _, name, param in self._params():
            if hasattr(param, "to_local"):
                raise ValueError(
                    f"{where}: params[{name!r}] is a DTensor, which torch.distributed.checkpoint saves and loads, by state_dict()"
                )

    def _check_states(self, where: str) -> None:
        """Refuse states that no file has a place for.

        Raises:
            TypeError: if one has a name that is no text.
            ValueError: if one belongs to no parameter.
        """
        keys = {self._key_of(i, j) for i, j, _, _ in self._params()}
        for key in self.state:
            if key not in keys and self.state[key]:
                raise ValueError(f"{where}: state has {key!r}, the optimizer has no such parameter")
        for i, j, name, _ in self._params():
            for label in self._state_of(i, j):
                if not isinstance(label, str):
                    raise TypeError(f"{where}: state[{name!r}] has the key {label!r}, which is no text")

    def _is_named(self, name: Any, other: Any) -> bool:
        """Return whether two parameters have the same name, as far as there are names: torch's may be mere positions."""
        positions = isinstance(name, int) or isinstance(other, int)
        return name == other or (positions and self._arrays.interface == "torch")
