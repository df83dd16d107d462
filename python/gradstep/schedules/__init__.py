"""Schedules for loops without torch: learning rates, and other settings, as functions of the step.

A schedule is called with the number of steps done so far, 0 before the first, and returns a float. The optimizers take one as
``lr=``, as they take any callable.

>>> import gradstep, numpy as np
>>> from gradstep import schedules
>>> lr = schedules.Linear(start=0.0, end=0.1, steps=10) >> schedules.Cosine(start=0.1, steps=90, end=0.01)
>>> w = np.ones(3)
>>> opt = gradstep.AdamW(w, lr=lr)
>>> lr(np.array([0, 5, 10, 55, 100])).round(3)
array([0.   , 0.05 , 0.1  , 0.055, 0.01 ])
"""

from gradstep.schedules.anneals import Cosine, Linear, PiecewiseLinear, Polynomial, WarmupStableDecay
from gradstep.schedules.base import Product, Scaled, Schedule, Sequence, from_dict
from gradstep.schedules.cycles import CosineRestarts, Cyclic, OneCycle
from gradstep.schedules.decays import (
    Constant,
    Exponential,
    InverseScaling,
    InverseSqrt,
    InverseTime,
    MultiStep,
    Noam,
    PiecewiseConstant,
    Step,
)
from gradstep.schedules.plateau import ReduceOnPlateau

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Exponential",
    "InverseScaling",
    "InverseSqrt",
    "InverseTime",
    "Linear",
    "MultiStep",
    "Noam",
    "OneCycle",
    "PiecewiseConstant",
    "PiecewiseLinear",
    "Polynomial",
    "Product",
    "ReduceOnPlateau",
    "Scaled",
    "Schedule",
    "Sequence",
    "Step",
    "WarmupStableDecay",
    "from_dict",
]
