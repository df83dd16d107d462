"""The examples run as their docstrings say, learn what they claim, and complain in a sentence."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MNIST = ROOT.parent / "shared" / "data" / "mnist.npz"
PNG = b"\x89PNG\r\n\x1a\n"

# Threads of OpenBLAS and OpenMP wait by spinning: beside another busy process they make these runs 10 to 30 times slower.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def run_example(name: str, *args: str | Path, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example as a script, in the folder `cwd`, after the statement `before`."""
    start = f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r}); {before or 'pass'}; "
    start += f"sys.argv[0] = {name!r}; runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    command = [sys.executable, "-c", start] if before else [sys.executable, EXAMPLES / name]
    return subprocess.run([*command, *args], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)


def final_accuracy(done: subprocess.CompletedProcess[str]) -> float:
    """Return what the last line of stdout says, which must have just this form."""
    assert done.returncode == 0, done.stderr
    match = re.fullmatch(r"test accuracy: (\d{2}\.\d{2}|100\.00)%", done.stdout.split("\n")[-2])
    assert match, done.stdout
    assert done.stdout.endswith("\n")
    return float(match[1])


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test import the examples' modules."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def mnist_data(examples: None) -> ModuleType:
    return importlib.import_module("mnist_data")


@pytest.fixture
def mnist_numpy(examples: None) -> ModuleType:
    return importlib.import_module("mnist_numpy")


# ---- mnist_numpy ----------------------------------------------------------------------------------------------------------


def test_numpy_example_learns_the_digits_and_saves_a_picture(tmp_path: Path) -> None:
    done = run_example("mnist_numpy.py", "--epochs", "8", cwd=tmp_path)
    assert final_accuracy(done) > 93
    assert (tmp_path / "mnist_numpy.png").read_bytes().startswith(PNG)


def test_numpy_example_takes_every_option_and_runs_without_rich(tmp_path: Path) -> None:
    options = [
        "--epochs",
        "3",
        "--batch-size",
        "50",
        "--lr",
        "0.005",
        "--seed",
        "7",
        "--hidden",
        "40",
        "30",
        "20",
        "--plot",
        "curves.svg",
    ]
    done = run_example("mnist_numpy.py", *options, cwd=tmp_path, before="sys.modules['rich'] = None")
    assert final_accuracy(done) > 80
    assert "perceptron 64-40-30-20-10" in done.stdout
    assert "epoch 3/3, validation" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["curves.svg"]


@pytest.mark.skipif(not MNIST.exists(), reason="the real MNIST is not at ../shared/data/mnist.npz")
def test_numpy_example_reaches_97_5_percent_on_mnist(tmp_path: Path) -> None:
    done = run_example("mnist_numpy.py", "--data", MNIST, cwd=tmp_path)
    assert final_accuracy(done) >= 97.5
    assert "mnist: images of 28 x 28 pixels, 55,000 to learn from" in done.stdout


@pytest.mark.skipif(not MNIST.exists(), reason="the real MNIST is not at ../shared/data/mnist.npz")
def test_compressed_states_learn_as_much(tmp_path: Path) -> None:
    """Within 0.2 points of float32's accuracy, the mean of three seeds each."""

    def trained(*options: str) -> float:
        runs = [
            run_example("mnist_numpy.py", "--data", MNIST, "--epochs", "4", "--seed", str(seed), *options, cwd=tmp_path)
            for seed in range(3)
        ]
        return float(np.mean([final_accuracy(done) for done in runs]))

    assert abs(trained("--state-dtype", "q8") - trained()) <= 0.2


def test_numpy_example_has_the_gradients_of_autograd(mnist_numpy: ModuleType) -> None:
    rng = np.random.default_rng(3)
    params = mnist_numpy.init_params([17, 13, 11, 10], rng)
    for name in params:
        params[name] += rng.standard_normal(params[name].shape, np.float32) / 8
    images, labels = rng.standard_normal((29, 17), np.float32), rng.integers(0, 10, 29)
    values = mnist_numpy.forward(params, images)
    loss, grad = mnist_numpy.softmax_loss(values[-1], labels)
    grads = mnist_numpy.backward(params, values, grad)

    wanted = {name: torch.from_numpy(param).double().requires_grad_() for name, param in params.items()}
    x = torch.from_numpy(images).double()
    for i in range(3):
        x = (x if i == 0 else x.relu()) @ wanted[f"weight{i}"] + wanted[f"bias{i}"]
    wanted_loss = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels))
    wanted_loss.backward()
    assert loss == pytest.approx(wanted_loss.item(), rel=1e-6)
    assert grads.keys() == params.keys()
    for name, tensor in wanted.items():
        assert grads[name].dtype == np.float32
        assert tensor.grad is not None
        np.testing.assert_allclose(grads[name], tensor.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_numpy_example_gives_the_same_bits_for_the_same_seed(mnist_data: ModuleType, mnist_numpy: ModuleType) -> None:
    digits = mnist_data.load_sklearn()

    def trained(seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        params = mnist_numpy.init_params([64, 32, 10], rng)
        mnist_numpy.train(params, digits, Namespace(epochs=2, batch_size=100, lr=1e-3, state_dtype=None), rng)
        return [param.tobytes() for param in params.values()]

    assert trained(5) == trained(5)
    assert trained(5) != trained(6)


def test_learning_rate_falls_from_its_peak_to_zero(mnist_numpy: ModuleType) -> None:
    rate = mnist_numpy.cosine(0.5, 8)
    assert [rate(0), rate(4), rate(8), rate(9)] == pytest.approx([0.5, 0.25, 0, 0])


# ---- mnist_torch ----------------------------------------------------------------------------------------------------------


def test_torch_example_learns_the_digits_with_the_same_losses(tmp_path: Path) -> None:
    done = run_example("mnist_torch.py", "--epochs", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    match = re.fullmatch(r"same losses to rounding in the first 120 steps: largest difference (\d\.\de-\d\d)", last)
    assert match, done.stdout
    assert float(match[1]) <= 1e-5
    rows = re.findall(r"^ *(\S+AdamW) +\d+\.\d\d s +\d+ us +\d+\.\d s +(\d+\.\d\d)% *$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["torch.optim.AdamW", "gradstep.torch.AdamW"]
    assert all(float(accuracy) > 93 for _, accuracy in rows), rows


def test_torch_example_notices_another_formula(tmp_path: Path) -> None:
    swap = "import functools, gradstep.torch; "
    swap += "gradstep.torch.AdamW = functools.partial(gradstep.torch.AdamW, eps=2e-8); sys.modules['rich'] = None"
    done = run_example("mnist_torch.py", "--epochs", "6", cwd=tmp_path, before=swap)
    assert done.returncode == 1
    assert re.search(r"error: the losses of the first 60 steps differ by \d\.\de-\d\d, rounding explains 1e-05\n$", done.stderr)
    assert "same losses" not in done.stdout


# ---- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist_numpy.py", "mnist_torch.py"])
def test_missing_file_is_an_error_of_the_command_line(name: str, tmp_path: Path) -> None:
    done = run_example(name, "--data", "no-such-file.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith(f"{name}: error: argument --data: no-such-file.npz: No such file or directory\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "argument --epochs: must be at least 1, got 0"),
        ("--batch-size -3", "argument --batch-size: must be an integer without a sign, got '-3'"),
        ("--lr nan", "argument --lr: must be a positive number, got 'nan'"),
        ("--plot no/such/folder.png", "argument --plot: there is no folder no/such"),
        ("--plot curves.doc", "argument --plot: curves.doc must end in one of "),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: str, message: str, mnist_data: ModuleType, mnist_numpy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        mnist_numpy.make_options().parse_args(options.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def arrays(**changes: Any) -> dict[str, Any]:
    """Return tiny arrays of MNIST's form, with changes; None leaves one out."""
    images, labels = np.arange(24 * 16, dtype=np.uint8).reshape(24, 4, 4), np.arange(24, dtype=np.uint8) % 10
    whole = {"x_train": images, "y_train": labels, "x_test": images[:5], "y_test": labels[:5], **changes}
    return {name: array for name, array in whole.items() if array is not None}


def test_file_is_split_and_scaled(mnist_data: ModuleType, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "tiny.npz", **arrays())
    digits = mnist_data.load_mnist(tmp_path / "tiny.npz")
    assert str(digits) == "tiny: images of 4 x 4 pixels, 22 to learn from, 2 for validation, 5 for the test"
    assert digits.train.images.dtype == np.float32
    assert digits.train.images.mean() == pytest.approx(0, abs=1e-5)
    assert digits.train.images.std() == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(digits.test.images, digits.train.images[:5])
    np.testing.assert_array_equal(digits.validation.labels, [2, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "has no array y_test, it must have x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((24, 16), np.uint8)}, "x_train must be uint8 of shape (n, height, width), got uint8 (24, 16)"),
        ({"x_test": np.zeros((5, 4, 4))}, "x_test must be uint8 of shape (n, height, width), got float64 (5, 4, 4)"),
        ({"x_test": np.zeros((5, 4, 5), np.uint8)}, "x_train has images of another size than x_test"),
        ({"y_train": np.zeros(23, np.uint8)}, "y_train must be one integer an image, got uint8 (23,)"),
        ({"y_test": np.full(5, 10)}, "y_test must be digits from 0 to 9, got 10 to 10"),
        ({"y_test": np.array([None] * 5)}, "is not an intact .npz file of numbers"),
    ],
)
def test_arrays_that_are_not_mnist_are_named(
    changes: dict[str, Any], message: str, mnist_data: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(ArgumentTypeError) as error:
        mnist_data.load_mnist(path)
    assert str(error.value) in {f"{path} {message}", f"{path}: {message}"}


@pytest.mark.parametrize("kind", ["empty", "text", "npy", "cut", "spoiled"])
def test_files_that_are_no_archives_are_refused(kind: str, mnist_data: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez_compressed(path, **arrays())
    intact = path.read_bytes()
    if kind == "npy":
        np.save(tmp_path / "file.npy", np.arange(3))
    contents = {
        "empty": b"",
        "text": b"5,0,4,1\n",
        "npy": (tmp_path / "file.npy").read_bytes() if kind == "npy" else b"",
        "cut": intact[: len(intact) // 2],
        "spoiled": intact[:200] + bytes(40) + intact[240:],
    }
    path.write_bytes(contents[kind])
    with pytest.raises(ArgumentTypeError, match=r"is not an intact \.npz file of numbers"):
        mnist_data.load_mnist(path)


def test_folder_in_the_place_of_a_file_is_refused(mnist_data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="Is a directory"):
        mnist_data.load_mnist(tmp_path)
