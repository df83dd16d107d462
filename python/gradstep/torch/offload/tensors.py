"""Tensors and states, as offloading looks at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.optimizer import Optimizer

from gradstep.formats import scale_name
from gradstep.saved import NUMBERS

if TYPE_CHECKING:
    from gradstep.torch.offload.parts import Piece
    from gradstep.torch.offload.transfers import Transfers

NOTHING = torch.empty(0, dtype=torch.uint8)
_ALIGNMENT = 64
STOCHASTIC = 1  # as `gradstep.options` numbers the precisions
_PER_BLOCK = {1: 256, 2: 128}  # elements of a scale, by those of a code's byte


def name(optimizer: Optimizer) -> str:
    """Return the name of an optimizer's class."""
    return type(optimizer).__name__


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the elements are in other tensors: DTensor and its like."""
    return hasattr(tensor, "__tensor_flatten__")


def describe(tensor: torch.Tensor) -> str:
    """Return dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def padded(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, up to a whole number of cache lines."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the memory holds other numbers than the tensor."""
    return tensor.is_conj() or tensor.is_neg()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor without gaps, in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def shaped(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of one dimension as one that is laid out as another."""
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, on its device, that is laid out as another."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach())


def fetch(line: Transfers, target: torch.Tensor, source: torch.Tensor) -> None:
    """Queue a copy from the device, if there is anything to copy."""
    if target.numel():
        line.fetch(target, source)


def on_host(state: Any) -> Any:
    """Return the states of a parameter in host memory, with counts in double: torch's own end at 2^24."""
    if not isinstance(state, Mapping):
        return state
    return {
        name: value.detach().to("cpu", torch.float64 if name in NUMBERS else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in state.items()
    }


def is_compressed(name: str, states: Mapping[str, Any]) -> bool:
    """Whether a state is codes, or the scales of some."""
    return scale_name(name) in states or (name.endswith("_scale") and name.removesuffix("_scale") in states)


def part(state: Mapping[str, Any], piece: Piece, like: torch.Tensor) -> dict[str, Any]:
    """Return the states of a piece of a parameter: numbers of its own, and views of the arrays."""
    part: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            part[name] = value
        elif name in NUMBERS:
            part[name] = value.clone()
        elif is_compressed(name, state):
            codes = state[name.removesuffix("_scale")] if name.endswith("_scale") else value
            per_byte = 1 if codes.numel() == like.numel() else 2
            per = _PER_BLOCK[per_byte] if name.endswith("_scale") else per_byte
            part[name] = value[piece.start // per : -(-piece.stop // per)]
        else:
            part[name] = flat(value)[piece.start : piece.stop]
    return part


def signature(state: Mapping[str, Any] | None) -> list[Any]:
    """Return what may be wrong with states, other than the numbers in them."""
    return [
        (name, value.dtype, value.shape, value.stride(), value.data_ptr())
        if isinstance(value, torch.Tensor)
        else (name, type(value))
        for name, value in (state or {}).items()
    ]


def check_params(params: Sequence[torch.Tensor], where: str, first: int = 0) -> None:
    """Refuse parameters that can't be offloaded; those before `first` have been looked at by themselves."""
    for i, param in enumerate(params[first:], first):
        if is_wrapper(param):
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
