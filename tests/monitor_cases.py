"""What tests of the monitor share: statistics of steps made up, and monitors that do not warn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradstep.monitor import Event, Monitor, Thresholds
from gradstep.stats import Stats, StepStats

NAN, INF = math.nan, math.inf


def one(grad_norm: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Return the fields of healthy statistics, with changes."""
    return {
        "grad_norm": grad_norm,
        "grad_norm_clipped": grad_norm,
        "update_norm": 0.01,
        "param_norm": 10.0,
        "grad_max": 0.5,
        "grad_nans": 0,
        "grad_infs": 0,
        "grad_zeros": 0,
        "size": 100,
        "clip_factor": 1.0,
        "skipped": False,
        **changes,
    }


def stats(
    step: int, grad_norm: float = 1.0, parameters: Mapping[Any, dict[str, Any]] | None = None, **changes: Any
) -> StepStats:
    parts = {key: Stats(**fields) for key, fields in (parameters or {}).items()}
    return StepStats(**one(grad_norm, **changes), step=step, parameters=parts)


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def quiet(**settings: Any) -> Monitor:
    return Monitor(thresholds=Thresholds(**settings), warn=False)
