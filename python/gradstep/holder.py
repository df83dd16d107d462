"""What checkpoints and state files need to know of an optimizer, whichever face it has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from gradstep.arrays import Arrays
from gradstep.files import PathLike


class Holder:
    """Base of the mixins that put states into files. What is abstract here, each face knows."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: Any
    steps: int

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

    def _params(self) -> Iterator[tuple[int, int, Any, Any]]:
        """Yield all parameters: the group, the place in it, the name, the parameter."""
        for i, (group, names) in enumerate(zip(self.param_groups, self._names(), strict=True)):
            for j, (name, param) in enumerate(zip(names, group["params"], strict=True)):
                yield i, j, name, param

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
