"""apex's FusedAdam: one kernel over lists of tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ..problem import Problem
from .base import Contender, Run, UnsupportedError
from .torch_arrays import adopt
from .torch_chain import around


class ApexAdam(Contender):
    """Adam and AdamW with float32 states, for parameters of any float."""

    name = "apex"
    about = "apex's FusedAdam, with torch's operations around it"
    package = "apex"
    peer = "gradstep-torch"
    whole = True
    stores = True

    def installed(self) -> bool:
        # Another package has the same name.
        spec = importlib.util.find_spec(self.package)
        return any((Path(folder) / "optimizers").is_dir() for folder in (spec and spec.submodule_search_locations) or ())

    def where(self) -> str:
        return "see github.com/NVIDIA/apex"

    def prepare(self, problem: Problem) -> Run:
        if problem.rule.name not in ("adam", "adamw"):
            raise UnsupportedError(f"apex's FusedAdam has no {problem.rule.name}")
        if problem.form.options or problem.form.dtype == "float64":
            raise UnsupportedError(f"apex's FusedAdam is not for {problem.form}")
        fused: Any = importlib.import_module("apex.optimizers").FusedAdam
        optimizer, params = adopt(functools.partial(fused, adam_w_mode=problem.rule.name == "adamw"), problem)
        return Run(around(optimizer.step, params, problem, foreach=True), lambda: problem.params)
