"""The text example sees the hot run diverge, learns in the clipped one, and has right gradients."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DATA = ROOT.parent / "shared" / "data"
NAMES = ("train", "dev", "test")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("text_monitor")


def run_example(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "text_monitor.py", *args]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.skipif(not all((DATA / f"sst2_{name}.tsv").exists() for name in NAMES), reason="SST-2 is not at ../shared/data")
def test_hot_run_is_given_up_and_clipping_cures_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run_example("--data", DATA, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    hot, clipped = done.stdout.split("\n2. ")
    assert re.search(r"^  exploding: step \d+: the gradient's norm is ", hot, re.MULTILINE)
    assert re.search(r"^  nonfinite_\w+: step \d+: ", hot, re.MULTILINE)
    assert "given up in epoch 1\n" in hot
    assert "given up" not in clipped and "nonfinite" not in clipped and "exploding" not in clipped
    for name in ("dev", "test"):
        accuracy = re.search(rf"^{name} accuracy: (\d\d\.\d\d)%$", clipped, re.MULTILINE)
        assert accuracy is not None and float(accuracy[1]) > 75, done.stdout
    wanted = [f"text_monitor_{name}.{end}" for name in ("clipped", "hot") for end in ("jsonl", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted


def test_text_example_has_the_gradients_of_autograd(example: ModuleType) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(3)
    params = example.init_params(words=20, size=5, hidden=7, rng=rng)
    for name in params:
        params[name] += rng.standard_normal(params[name].shape, np.float32) / 8
    words, positive = rng.integers(0, 20, (11, example.LENGTH)), rng.integers(0, 2, 11) == 1
    words[3:6, :20] = example.NO_WORD
    words[6] = example.NO_WORD
    logits, states = example.forward(params, words)
    loss, grad = example.logistic_loss(logits, positive)
    grads = example.backward(params, words, states, grad)

    wanted = {name: torch.from_numpy(param).double().requires_grad_() for name, param in params.items()}
    state = total = torch.zeros(11, 7, dtype=torch.float64)
    for place in range(example.LENGTH):
        inputs = wanted["embedding"][words[:, place]] @ wanted["weight_in"]
        state = torch.nn.functional.leaky_relu(inputs + state @ wanted["weight_rec"] + wanted["bias_rec"], 0.2)
        state = state * torch.from_numpy(words[:, place] != example.NO_WORD)[:, None]
        total = total + state
    targets = torch.from_numpy(positive).double()
    outputs = total @ wanted["weight_out"] + wanted["bias_out"]
    wanted_loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)
    wanted_loss.backward()
    assert loss == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert grads.keys() == params.keys()
    for name, tensor in wanted.items():
        assert grads[name].dtype == np.float32
        np.testing.assert_allclose(grads[name], tensor.grad.numpy(), rtol=1e-3, atol=1e-5)


def write_data(folder: Path, **texts: str) -> None:
    for name in NAMES:
        text = texts.get(name, "a good film\t1\na bad film\t0\n")
        (folder / f"sst2_{name}.tsv").write_text(text)


def test_sentences_become_numbers_from_the_end(example: ModuleType, tmp_path: Path) -> None:
    long = " ".join(["bad"] + ["good"] * example.LENGTH)
    write_data(tmp_path, train="a good film\t1\na bad bad film\t0\nso good\t1\n", dev=f"film unknown a\t0\n{long}\t1\n\t0\n")
    reviews, words = example.load_reviews(tmp_path)
    assert words == 4  # none, a, film, good: only these stand in two training sentences
    dev = reviews["dev"]
    assert dev.words[0].tolist() == [0] * (example.LENGTH - 2) + [2, 1]
    assert dev.words[1].tolist() == [3] * example.LENGTH
    assert dev.words[2].tolist() == [0] * example.LENGTH
    assert dev.positive.tolist() == [False, True, False]


@pytest.mark.parametrize(("text", "line"), [("good\t1\nbad 0\n", 2), ("good\t2\n", 1), ("", 1)])
def test_other_files_are_refused(text: str, line: int, example: ModuleType, tmp_path: Path) -> None:
    write_data(tmp_path, dev=text)
    with pytest.raises(ArgumentTypeError) as error:
        example.load_reviews(tmp_path)
    assert str(error.value) == f"{tmp_path / 'sst2_dev.tsv'}: line {line} must be a sentence, a tab, and 0 or 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --data"),
        (["--data", "no-such-folder"], "argument --data: there is no folder no-such-folder"),
        (["--data", "."], "argument --data: sst2_train.tsv: No such file or directory"),
        (["--data", ".", "--out", "nowhere"], "argument --out: there is no folder nowhere"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[Any], message: str, tmp_path: Path) -> None:
    done = run_example(*options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"text_monitor.py: error: {message}\n")
