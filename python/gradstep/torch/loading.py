"""Loading state dicts with the dtypes that they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


@contextmanager
def exact_dtypes(optimizer: Optimizer) -> Iterator[None]:
    """Have `torch.optim.Optimizer.load_state_dict` keep the dtypes of states, inside a ``with`` block.

    By itself it casts every tensor but ``step`` to the dtype of its parameter: states of float32 would lose bits, codes and
    remainders their meaning. Hooks see what they have always seen; those that run after the loading find the exact states.
    """
    given: dict[str, Any] = {}

    def note(_: Optimizer, state_dict: dict[str, Any]) -> None:
        given.update(state_dict)

    def restore(_: Optimizer) -> None:
        keys = [key for group in given["param_groups"] for key in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            state = given["state"].get(key)
            for name, value in state.items() if isinstance(state, Mapping) else ():
                loaded = optimizer.state[param][name]
                if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                    optimizer.state[param][name] = value if name == "step" else value.to(param.device)

    handles = [
        optimizer.register_load_state_dict_pre_hook(note),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
