"""The contenders: gradstep's faces, and what people had before."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Contender, Run, UnsupportedError
from .beside import Off, Throughout
from .deepspeed_adam import DeepSpeedAdam
from .gradstep_faces import Function, Object, TorchClass
from .no_math import NoMath
from .numba_loop import NumbaLoop
from .numpy_expression import NumpyExpression
from .optax_jit import OptaxJit
from .torch_compile import TorchCompile
from .torch_lamb import PytorchOptimizer
from .torch_optim import TorchOptim

__all__ = ["LIMIT", "Contender", "Off", "Run", "Throughout", "UnsupportedError", "contenders"]

LIMIT = NoMath()
"""Measured in every case: what the machine can do."""


def contenders(isas: Sequence[str] = ()) -> dict[str, Contender]:
    """Return all contenders by name, gradstep's once for each of `isas` if there are any."""
    ours = [face(isa) for face in (Function, Object, TorchClass) for isa in (isas or (None,))]
    others = (
        NumpyExpression(),
        NumbaLoop(),
        TorchOptim("loop", "torch.optim, one operation after the other (foreach=False)"),
        TorchOptim("foreach", "torch.optim, one operation for all tensors (foreach=True)"),
        TorchOptim("fused", "torch.optim, one kernel a tensor (fused=True)"),
        TorchCompile(),
        PytorchOptimizer(),
        OptaxJit(),
        DeepSpeedAdam(),
    )
    return {contender.name: contender for contender in (*ours, *others)}
