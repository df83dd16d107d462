"""The contenders: gradstep's faces, and what people had before."""

from __future__ import annotations

from collections.abc import Sequence

from .apex_adam import ApexAdam
from .base import Contender, Run, UnsupportedError
from .beside import Off, Throughout
from .deepspeed_adam import DeepSpeedAdam
from .device_copy import DeviceCopy
from .gradstep_faces import Function, Object, TorchClass
from .in_graph import GradstepGraph, TorchGraph
from .low_bit import low_bit
from .no_math import NoMath
from .numba_loop import NumbaLoop
from .numpy_expression import NumpyExpression
from .optax_jit import OptaxJit
from .torch_compile import TorchCompile, TorchCompileStep
from .torch_lamb import PytorchOptimizer
from .torch_optim import TorchOptim

__all__ = [
    "LIMIT",
    "LIMITS",
    "Contender",
    "DeviceCopy",
    "Off",
    "Run",
    "Throughout",
    "UnsupportedError",
    "contenders",
    "cuda_contenders",
]

LIMIT = NoMath()
"""Measured in every case: what the machine can do."""

LIMITS = frozenset({LIMIT.name, DeviceCopy.name})
"""Names of what is no step."""

_LOOP = TorchOptim("loop", "torch.optim, one operation after the other (foreach=False)")
_FOREACH = TorchOptim("foreach", "torch.optim, one operation for all tensors (foreach=True)")
_FUSED = TorchOptim("fused", "torch.optim, one kernel a tensor (fused=True)")


def contenders(isas: Sequence[str] = ()) -> dict[str, Contender]:
    """Return all contenders on the CPU by name, gradstep's once for each of `isas` if there are any."""
    ours = [face(isa) for face in (Function, Object, TorchClass) for isa in (isas or (None,))]
    others = (
        NumpyExpression(),
        NumbaLoop(),
        _LOOP,
        _FOREACH,
        _FUSED,
        TorchCompile(),
        PytorchOptimizer(),
        OptaxJit(),
        DeepSpeedAdam(),
    )
    return {contender.name: contender for contender in (*ours, *others)}


def cuda_contenders() -> dict[str, Contender]:
    """Return all contenders on a GPU, by name."""
    everyone = (
        TorchClass(),
        GradstepGraph(TorchClass(capturable=True), "gradstep-graph"),
        _LOOP,
        _FOREACH,
        _FUSED,
        TorchGraph(TorchOptim("fused", _FUSED.about, capturable=True), "torch-fused-graph"),
        TorchCompile(on_request=False),
        TorchCompileStep(),
        ApexAdam(),
        *low_bit(),
    )
    return {contender.name: contender for contender in everyone}
