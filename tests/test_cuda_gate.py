"""On a GPU: the torch classes agree with the formulas in float64, each rule, whole step and format. The gate of the benchmarks says so,
and compute-sanitizer looks on (bench/gpu.sh)."""

from __future__ import annotations

import pytest

from gradstep.bench import cuda, plan
from gradstep.bench.chains import CHAINS
from gradstep.bench.check import check
from gradstep.bench.contenders import cuda_contenders
from gradstep.bench.formats import FORMATS
from gradstep.bench.memory import TorchMemory
from gradstep.bench.rules import RULES

from .bench_cases import FLOAT32, whole

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(cuda.missing()), reason=cuda.missing())]

faces = pytest.mark.parametrize("face", ["gradstep-torch", "gradstep-graph"])


def agrees(face, rule, form):
    return check(cuda_contenders()[face], rule, form, TorchMemory("cuda"))


@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@faces
def test_rule(face, rule, dtype):
    assert agrees(face, rule, dtype) is None


@pytest.mark.parametrize("step", [*CHAINS, "norm"])
def test_whole_step(step):
    assert agrees("gradstep-torch", whole(step), FLOAT32) is None


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if not form.plain], ids=str)
def test_format(form):
    assert agrees("gradstep-torch", RULES["adamw"], form) is None


@pytest.mark.parametrize("step", ["clip", "unscale-clip", "zero"])
def test_whole_step_in_a_graph(step):
    assert agrees("gradstep-graph", whole(step), FLOAT32) is None
