"""Sums over gradients, on the device, with the bits of the engine's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_LANES = 32
_LEAVES = 16
_BLOCK = _LANES * _LANES * _LEAVES
_BLOCKS = 256

_AT_ONCE = _BLOCK * 512
"""Elements that are in memory as float64 at the same time."""


@dataclass(frozen=True)
class Found:
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
) -> dict[int, Found]:
    """Return what is known of gradients. The sums have the bits that the engine's have: they are taken along its tree.

    Args:
        grads: of one dimension, on any devices.
        wide: those that a step scales in float64, not in float32.
        scale: number that the gradients are multiplied by.
        drops: whether elements that are not finite are left out of what clipping goes by.
        counts: whether the counts are asked for.
    """
    found: dict[int, Found] = {}
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
                found[i] = Found(each, all_of_it, is_finite, largest, nans, infs, zeros)
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
