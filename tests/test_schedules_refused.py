"""Settings of schedules that can't be, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from gradstep import schedules
from gradstep.schedules import (
    Constant,
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
    Sequence,
    Step,
    WarmupStableDecay,
)

from .schedule_cases import A, B, C

LINEAR: dict[str, Any] = {"start": 0.1, "end": 0.3, "steps": 10}
PLATEAU: dict[str, Any] = {"start": 0.1}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(**{**LINEAR, "start": -0.1}), ValueError, "Linear: start must not be negative, got -0.1"),
        (lambda: Linear(**{**LINEAR, "end": math.nan}), ValueError, "Linear: end must be finite, got nan"),
        (lambda: Linear(**{**LINEAR, "end": -math.inf}), ValueError, "Linear: end must be finite, got -inf"),
        (lambda: Linear(**{**LINEAR, "end": "0.1"}), TypeError, "Linear: end must be a number, got '0.1'"),
        (lambda: Linear(**{**LINEAR, "end": True}), TypeError, "Linear: end must be a number, got True"),
        (lambda: Linear(**{**LINEAR, "steps": 0}), ValueError, "Linear: steps must be at least 1, got 0"),
        (lambda: Linear(**{**LINEAR, "steps": 2.0}), TypeError, "Linear: steps must be an integer, got 2.0"),
        (lambda: Linear(**{**LINEAR, "steps": True}), TypeError, "Linear: steps must be an integer, got True"),
        (lambda: Constant(value=0.1, steps=-3), ValueError, "Constant: steps must be at least 1, got -3"),
        (lambda: Exponential(start=0.1, gamma=0), ValueError, "Exponential: gamma must be positive, got 0"),
        (
            lambda: Exponential(start=0.1, gamma=0.5, staircase=1),
            TypeError,
            "Exponential: staircase must be True or False, got 1",
        ),
        (lambda: Step(start=0.1, every=3, gamma=math.nan), ValueError, "Step: gamma must be finite, got nan"),
        (
            lambda: MultiStep(start=0.1, milestones=(3, 3)),
            ValueError,
            "MultiStep: milestones must increase, got 3 after 3",
        ),
        (lambda: MultiStep(start=0.1, milestones=(0,)), ValueError, "MultiStep: milestones[0] must be at least 1, got 0"),
        (
            lambda: MultiStep(start=0.1, milestones="12"),
            TypeError,
            "MultiStep: milestones must be a sequence, got '12'",
        ),
        (
            lambda: MultiStep(start=0.1, milestones=5),
            TypeError,
            "MultiStep: milestones must be a sequence, got 5",
        ),
        (
            lambda: PiecewiseConstant(milestones=(3, 5), values=(1.0, -2.0, 3.0)),
            ValueError,
            "PiecewiseConstant: values[1] must not be negative, got -2.0",
        ),
        (
            lambda: PiecewiseConstant(milestones=(3, 5), values=(1.0, 2.0)),
            ValueError,
            "PiecewiseConstant: values must be one more than milestones, got 2 and 2",
        ),
        (
            lambda: PiecewiseLinear(milestones=(0, 5), values=(1.0,)),
            ValueError,
            "PiecewiseLinear: values must be as many as milestones, got 1 and 2",
        ),
        (
            lambda: PiecewiseLinear(milestones=(5, 2), values=(1.0, 2.0)),
            ValueError,
            "PiecewiseLinear: milestones must increase, got 2 after 5",
        ),
        (lambda: PiecewiseLinear(milestones=(), values=()), ValueError, "PiecewiseLinear: milestones must not be empty"),
        (lambda: InverseTime(start=0.1, rate=-1), ValueError, "InverseTime: rate must not be negative, got -1"),
        (lambda: InverseScaling(start=0.1, power=-1), ValueError, "InverseScaling: power must not be negative, got -1"),
        (lambda: InverseSqrt(start=0.1, timescale=0.0), ValueError, "InverseSqrt: timescale must be positive, got 0.0"),
        (lambda: Noam(model_size=64, warmup_steps=0), ValueError, "Noam: warmup_steps must be at least 1, got 0"),
        (lambda: Polynomial(start=0.1, steps=9, power=0), ValueError, "Polynomial: power must be positive, got 0"),
        (
            lambda: WarmupStableDecay(peak=0.1, steps=10, warmup_steps=6, decay_steps=5),
            ValueError,
            "WarmupStableDecay: warmup_steps + decay_steps must be at most steps = 10, got 6 + 5",
        ),
        (
            lambda: WarmupStableDecay(peak=0.1, steps=10, warmup_steps=-1, decay_steps=5),
            ValueError,
            "WarmupStableDecay: warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: WarmupStableDecay(peak=0.1, steps=10, warmup_steps=1, decay_steps=5, shape="sqrt"),
            ValueError,
            "WarmupStableDecay: shape must be one of 'linear', 'cosine', '1-sqrt', got 'sqrt'",
        ),
        (lambda: OneCycle(peak=0.1, steps=9, pct_start=1.5), ValueError, "OneCycle: pct_start must be in [0, 1], got 1.5"),
        (
            lambda: OneCycle(peak=0.1, steps=9, pct_start=0.6, three_phase=True),
            ValueError,
            "OneCycle: pct_start must be in [0, 0.5] with three_phase, got 0.6",
        ),
        (lambda: Cyclic(start=0.1, peak=0.3, steps_up=0), ValueError, "Cyclic: steps_up must be at least 1, got 0"),
        (
            lambda: Cyclic(start=0.1, peak=0.3, steps_up=5, mode="square"),
            ValueError,
            "Cyclic: mode must be one of 'triangular', 'triangular2', 'exp_range', got 'square'",
        ),
        (lambda: CosineRestarts(start=0.1, steps=9, t_mult=0), ValueError, "CosineRestarts: t_mult must be at least 1, got 0"),
        (
            lambda: CosineRestarts(start=0.1, steps=9, t_mult=1.5),
            TypeError,
            "CosineRestarts: t_mult must be an integer, got 1.5",
        ),
        (lambda: ReduceOnPlateau(**PLATEAU, factor=1.0), ValueError, "ReduceOnPlateau: factor must be in [0, 1), got 1.0"),
        (
            lambda: ReduceOnPlateau(**PLATEAU, floor=0.2),
            ValueError,
            "ReduceOnPlateau: floor must be at most start = 0.1, got 0.2",
        ),
        (
            lambda: ReduceOnPlateau(**PLATEAU, mode="lower"),
            ValueError,
            "ReduceOnPlateau: mode must be one of 'min', 'max', got 'lower'",
        ),
        (lambda: ReduceOnPlateau(**PLATEAU, patience=-1), ValueError, "ReduceOnPlateau: patience must be at least 0, got -1"),
        (lambda: ReduceOnPlateau(**PLATEAU, best=math.nan), ValueError, "ReduceOnPlateau: best must not be NaN"),
        (
            lambda: ReduceOnPlateau(**PLATEAU, best="1"),
            TypeError,
            "ReduceOnPlateau: best must be a number or None, got '1'",
        ),
        (lambda: C >> A, ValueError, "Exponential has no end, so Linear can't follow it: Sequence takes milestones"),
        (lambda: A >> C >> B, ValueError, "Sequence has no end, so Cosine can't follow it: Sequence takes milestones"),
        (
            lambda: Sequence(schedules=(A, B), milestones=()),
            ValueError,
            "Sequence: milestones must be one fewer than schedules, got 0 and 2",
        ),
        (
            lambda: Sequence(schedules=(), milestones=()),
            ValueError,
            "Sequence: milestones must be one fewer than schedules, got 0 and 0",
        ),
        (
            lambda: Sequence(schedules=(A, B, C), milestones=(20, 10)),
            ValueError,
            "Sequence: milestones must increase, got 10 after 20",
        ),
        (
            lambda: Sequence(schedules=(A, abs), milestones=(5,)),
            TypeError,
            "Sequence: schedules[1] must be a schedule, got <built-in function abs>",
        ),
        (
            lambda: Sequence(schedules=(OneCycle(peak=0.1, steps=9), A), milestones=(10,)),
            ValueError,
            "OneCycle: step must be less than steps = 9, got 9",
        ),
        (lambda: A * -1, ValueError, "Scaled: factor must not be negative, got -1.0"),
        (lambda: math.nan * A, ValueError, "Scaled: factor must be finite, got nan"),
        (lambda: Product(schedules=()), ValueError, "Product: schedules must not be empty"),
        (lambda: schedules.from_dict([1]), TypeError, "from_dict: a schedule must be a dict, got [1]"),
        (lambda: schedules.from_dict({"type": "Linear"}), ValueError, "from_dict: Linear must have the setting 'start'"),
        (
            lambda: schedules.from_dict({"type": "Linear", **LINEAR, "gamma": 1}),
            ValueError,
            "from_dict: Linear has no setting 'gamma'",
        ),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["Sine", None, 3, ["Linear"], "Schedule"])
def test_from_dict_names_the_types(name: Any) -> None:
    with pytest.raises(ValueError) as caught:
        schedules.from_dict({"type": name})
    assert str(caught.value).startswith("from_dict: type must be one of 'Constant', 'Cosine', 'CosineRestarts', ")
    assert str(caught.value).endswith(f"'WarmupStableDecay', got {name!r}")


def test_settings_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        Linear(0.1, 0.3, 10)
