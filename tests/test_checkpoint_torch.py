"""Checkpoints of the torch classes: names, settings and states that only torch has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gradstep

from .saving_cases import ADAMW


def torch_case(**options: Any) -> tuple[Any, list[Any], Any]:
    pytest.importorskip("torch", reason="torch is not installed")
    from .saving_cases import Torch

    face = Torch()
    params = face.params()
    opt = face.make(ADAMW, params, **options)
    face.step(opt, params, (1, 2), {})
    return face, params, opt


def test_named_parameters(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    def model(*names: str) -> Any:
        return torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in names})

    first = model("a", "b")
    opt = gradstep.torch.AdamW(first.named_parameters())
    first["b"](first["a"](torch.ones(1, 3))).sum().backward()
    opt.step()
    opt.save(tmp_path / "a")
    load = gradstep.torch.AdamW.load
    assert load(tmp_path / "a", model("a", "b").named_parameters()).steps == 1
    assert load(tmp_path / "a", model("a", "b").parameters()).steps == 1
    with pytest.raises(ValueError, match=r"param_groups\[0\] has the parameter 'c.weight' where .* has 'a.weight'"):
        load(tmp_path / "a", model("c", "d").named_parameters())


def test_what_schedulers_leave_in_groups(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    face, params, opt = torch_case()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20)
    opt.param_groups[0]["tag"] = ("mine", [1, None])
    opt.step()
    scheduler.step()
    opt.save(tmp_path / "a")
    other = face.cls(ADAMW).load(tmp_path / "a", face.copy(params))
    ours, theirs = ({**o.param_groups[0], "params": None} for o in (opt, other))
    assert ours == theirs and "max_momentum" in theirs and theirs["tag"] == ("mine", [1, None])


def test_settings_that_are_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for lr in (torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)):
        face, params, opt = torch_case(lr=lr)
        opt.save(tmp_path / "a")
        found = face.cls(ADAMW).load(tmp_path / "a", face.copy(params)).param_groups[0]["lr"]
        assert torch.equal(found, lr) and found.dtype == lr.dtype and found.shape == lr.shape


def test_flags_of_torch(tmp_path: Path) -> None:
    face, params, opt = torch_case(fused=True, maximize=True)
    opt.save(tmp_path / "a")
    other = face.cls(ADAMW).load(tmp_path / "a", face.copy(params))
    assert other.param_groups[0]["fused"] is True and other.param_groups[0]["maximize"] is True
    assert face.cls(ADAMW).load(tmp_path / "a", face.copy(params), fused=None).param_groups[0]["fused"] is None
    for state in other.state.values():
        assert state["step"].dtype.is_floating_point and state["step"].itemsize == 8


def test_states_that_torch_makes_itself(tmp_path: Path) -> None:
    """Adagrad's, which are there before the first step; and those of a torch class, momentum that is None among them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    p = torch.nn.Parameter(torch.ones(3))
    gradstep.torch.Adagrad([p], initial_accumulator_value=0.5).save(tmp_path / "a")
    other = gradstep.torch.Adagrad.load(tmp_path / "a", [p])
    assert (other.state[p]["sum"] == 0.5).all() and other.state[p]["step"] == 0
    sgd = torch.optim.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    sgd.step()
    sgd.state[p]["momentum_buffer"] = None
    opt = gradstep.torch.SGD([p])
    opt.load_state_dict(sgd.state_dict())
    opt.save(tmp_path / "a")
    other = gradstep.torch.SGD.load(tmp_path / "a", [p])
    assert other.state[p] == {"momentum_buffer": None} and other.param_groups[0]["lr"] == 0.1


def test_conjugated_states(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    p = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    opt = gradstep.torch.AdamW([p])
    p.grad = p.detach().clone()
    opt.step()
    expected = opt.state[p]["exp_avg"].clone()
    opt.state[p]["exp_avg"] = expected.conj().resolve_conj().conj()
    opt.save(tmp_path / "a")
    assert torch.equal(gradstep.torch.AdamW.load(tmp_path / "a", [p]).state[p]["exp_avg"], expected)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    _, params, opt = torch_case()
    opt.param_groups[0][3] = 1
    with pytest.raises(TypeError, match=r"AdamW.save: param_groups\[0\] has the key 3, which is no text"):
        opt.save(tmp_path / "a")
    del opt.param_groups[0][3]
    opt.state[params[1]][7] = 1
    with pytest.raises(TypeError, match=r"AdamW.save: state\[1\] has the key 7, which is no text"):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_tensors_in_a_numpy_optimizer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    p, q = torch.linspace(0, 1, 5), torch.linspace(0, 1, 5)
    opt = gradstep.AdamW([p], lr=0.1)
    opt.step([torch.ones(5)])
    opt.save(tmp_path / "a")
    q.copy_(p)
    other = gradstep.AdamW.load(tmp_path / "a", [q])
    for o in (opt, other):
        o.step([torch.ones(5)])
    assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"params\[0\] has dtype float64, .* has float32"):
        gradstep.AdamW.load(tmp_path / "a", [q.double()])
