"""What tests of schedules share: each schedule with every setting away from its default, and some to compose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradstep.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseScaling,
    InverseSqrt,
    InverseTime,
    Linear,
    MultiStep,
    Noam,
    OneCycle,
    PiecewiseConstant,
    PiecewiseLinear,
    Polynomial,
    Product,
    ReduceOnPlateau,
    Scaled,
    Schedule,
    Sequence,
    Step,
    WarmupStableDecay,
)

N = 500
# Each schedule with every setting away from its default.
CASES: dict[str, Schedule] = {
    "Constant": Constant(value=0.3, steps=70),
    "Cosine": Cosine(start=0.3, steps=317, end=0.002),
    "CosineRestarts": CosineRestarts(start=0.3, steps=37, end=0.002, t_mult=2, gamma=0.7, cycles=3),
    "Cyclic": Cyclic(start=0.02, peak=0.3, steps_up=23, steps_down=41, mode="exp_range", gamma=0.99),
    "Exponential": Exponential(start=0.3, gamma=0.8, every=17, staircase=True),
    "InverseScaling": InverseScaling(start=0.3, power=0.4),
    "InverseSqrt": InverseSqrt(start=0.3, timescale=12.5),
    "InverseTime": InverseTime(start=0.3, rate=0.7, every=13, staircase=True),
    "Linear": Linear(start=0.01, end=0.3, steps=317),
    "MultiStep": MultiStep(start=0.3, milestones=(7, 50, 311), gamma=0.4),
    "Noam": Noam(model_size=48, warmup_steps=60),
    "OneCycle": OneCycle(start=0.03, peak=0.3, end=0.001, steps=501, pct_start=0.21, shape="linear", three_phase=True),
    "PiecewiseConstant": PiecewiseConstant(milestones=(7, 50, 311), values=(0.1, 0.3, 0.2, 0.01)),
    "PiecewiseLinear": PiecewiseLinear(milestones=(7, 50, 311), values=(0.1, 0.3, 0.01)),
    "Polynomial": Polynomial(start=0.3, steps=117, end=0.002, power=1.7, cycle=True),
    "Product": Product(schedules=(Linear(start=0.1, end=1.0, steps=10), Cosine(start=0.3, steps=30))),
    "ReduceOnPlateau": ReduceOnPlateau(
        start=0.3,
        mode="max",
        factor=0.4,
        patience=3,
        threshold=0.02,
        threshold_mode="abs",
        cooldown=2,
        floor=0.001,
        eps=1e-5,
        reduced=0.12,
        best=-1.5,
        bad_updates=2,
        cooldown_left=1,
    ),
    "Scaled": Scaled(schedule=Cosine(start=0.3, steps=30), factor=0.7),
    "Sequence": Sequence(schedules=(Linear(start=0.1, end=1.0, steps=10), Cosine(start=1.0, steps=30)), milestones=(15,)),
    "Step": Step(start=0.3, every=31, gamma=0.7),
    "WarmupStableDecay": WarmupStableDecay(
        peak=0.3, steps=317, warmup_steps=31, decay_steps=101, start=0.01, end=0.002, shape="1-sqrt"
    ),
}
each = pytest.mark.parametrize("schedule", CASES.values(), ids=CASES.keys())


def assert_equal(schedule: Callable[[Any], Any], expected: Any) -> None:
    """The values from step 0 on are those expected, but for roundings."""
    np.testing.assert_allclose(schedule(np.arange(len(expected))), expected, rtol=1e-12, atol=0)


A, B, C = Linear(start=0.1, end=0.3, steps=10), Cosine(start=0.3, steps=30, end=0.01), Exponential(start=0.01, gamma=0.9)
