"""DeepSpeed's CPUAdam. It is compiled when it is first used, by the C++ compiler of this machine, which takes a minute."""

from __future__ import annotations

import functools
from typing import Any

from ..formats import FLOAT32
from ..problem import Problem
from .base import Contender, Run, UnsupportedError
from .torch_arrays import adopt


class DeepSpeedAdam(Contender):
    """Adam and AdamW in float32, on torch's threads."""

    name = "deepspeed"
    about = "DeepSpeed's CPUAdam, compiled on first use (a minute); only when named"
    package = "deepspeed"
    peer = "gradstep-torch"
    on_request = True

    def prepare(self, problem: Problem) -> Run:
        if problem.rule.name not in ("adam", "adamw"):
            raise UnsupportedError(f"DeepSpeed's CPUAdam has no {problem.rule.name}")
        if problem.form != FLOAT32:
            raise UnsupportedError(f"DeepSpeed's CPUAdam is not for {problem.form}")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: Any = functools.partial(DeepSpeedCPUAdam, adamw_mode=problem.rule.name == "adamw")
        optimizer, _ = adopt(cpu_adam, problem)
        for state in optimizer.state.values():
            state["step"] = 0
        return Run(optimizer.step, lambda: problem.params)

    def set_threads(self, n: int) -> None:
        import torch

        torch.set_num_threads(n)
