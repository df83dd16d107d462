"""Train a multilayer perceptron, written in plain NumPy, with a gradstep optimizer.

It shows all that a NumPy loop needs: the parameters are a dict of arrays, `gradstep.AdamW` takes that dict once, and every step
takes the gradients in a dict of the same names and moves the parameters in place. The learning rate is a function of the step.

Run it on MNIST (98.5% in ten seconds on two cores), or without a file on scikit-learn's small digits:

    python examples/mnist_numpy.py --data ../shared/data/mnist.npz
    python examples/mnist_numpy.py

With `--state-dtype q8` the states of the optimizer take a quarter of the memory, with `q4` an eighth.

It saves loss and accuracy curves as a picture. The same seed gives the same result on the same number of BLAS threads. Beside
other work on the same cores set OPENBLAS_NUM_THREADS=1: most of the time goes into NumPy's matrix products, whose threads wait
for each other by spinning.
Needs scikit-learn for the small digits, matplotlib for the picture; shows a progress bar if rich is installed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import gradstep
from gradstep.formats import FORMATS
from mnist_data import CLASSES, Digits, Examples, make_parser, parse_args, positive_int
from terminal import progress_bar

Array: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]
Params: TypeAlias = dict[str, Array]


# ---- the network ----------------------------------------------------------------------------------------------------------


def init_params(sizes: list[int], rng: np.random.Generator) -> Params:
    """Return He-initialized weights and zero biases of the layers between `sizes` (arXiv:1502.01852)."""
    params: Params = {}
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        params[f"weight{i}"] = rng.standard_normal((inputs, outputs), np.float32) * np.float32(math.sqrt(2 / inputs))
        params[f"bias{i}"] = np.zeros(outputs, np.float32)
    return params


def forward(params: Params, images: Array) -> list[Array]:
    """Return the input of each layer, and last the logits."""
    layers = len(params) // 2
    values = [images]
    for i in range(layers):
        value = values[-1] @ params[f"weight{i}"]
        value += params[f"bias{i}"]
        values.append(value if i == layers - 1 else np.maximum(value, 0, out=value))
    return values


def softmax_loss(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Return the mean cross-entropy and its gradient for the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    grad = np.exp(shifted)
    totals = grad.sum(axis=1, keepdims=True)
    loss = float((np.log(totals[:, 0]) - shifted[rows, labels]).mean())
    grad /= totals
    grad[rows, labels] -= 1
    grad /= np.float32(len(labels))
    return loss, grad


def backward(params: Params, values: list[Array], grad: Array) -> Params:
    """Return the gradients of all parameters from that of the logits; `values` is what `forward` returned."""
    grads: Params = {}
    for i in reversed(range(len(params) // 2)):
        grads[f"weight{i}"] = values[i].T @ grad
        grads[f"bias{i}"] = grad.sum(axis=0)
        if i > 0:
            grad = grad @ params[f"weight{i}"].T
            grad *= values[i] > 0
    return grads


# ---- training -------------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What happened: the curves, by step and by epoch, and where the time went."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    validation_accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def newest(self) -> str:
        """The newest validation accuracy, as a text."""
        return f"{self.validation_accuracies[-1]:.2%}" if self.validation_accuracies else "--"


def cosine(peak: float, steps: int) -> Callable[[int], float]:
    """Return a learning rate that falls from `peak` to 0 along a half cosine (arXiv:1608.03983)."""
    return lambda step: peak * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))


def batches(examples: Examples, size: int, rng: np.random.Generator) -> Iterator[tuple[Array, Labels]]:
    """Yield all examples once, shuffled, flat images first."""
    order = rng.permutation(len(examples))
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        yield examples.images[chosen].reshape(len(chosen), -1), examples.labels[chosen]


def evaluate(params: Params, examples: Examples) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    logits = forward(params, examples.images.reshape(len(examples), -1))[-1]
    return softmax_loss(logits, examples.labels)[0], accuracy(logits, examples.labels)


def accuracy(logits: Array, labels: Labels) -> float:
    """Return the share of images whose largest logit is the right one."""
    return float((logits.argmax(axis=1) == labels).mean())


def train_step(params: Params, optimizer: gradstep.AdamW, images: Array, labels: Labels, history: History) -> None:
    """Learn from one batch."""
    values = forward(params, images)
    loss, grad = softmax_loss(values[-1], labels)
    grads = backward(params, values, grad)
    begin = time.perf_counter()
    optimizer.step(grads)
    history.step_seconds += time.perf_counter() - begin
    history.losses.append(loss)
    history.accuracies.append(accuracy(values[-1], labels))


def train(params: Params, digits: Digits, args: argparse.Namespace, rng: np.random.Generator) -> History:
    """Train `params` in place."""
    total = args.epochs * math.ceil(len(digits.train) / args.batch_size)
    optimizer = gradstep.AdamW(params, lr=cosine(args.lr, total), weight_decay=0.1, state_dtype=args.state_dtype)
    history = History()
    begin = time.perf_counter()
    with progress_bar(total) as advance:
        for epoch in range(1, args.epochs + 1):
            for images, labels in batches(digits.train, args.batch_size, rng):
                train_step(params, optimizer, images, labels, history)
                advance(f"epoch {epoch}/{args.epochs}, validation {history.newest}")
            loss, right = evaluate(params, digits.validation)
            history.validation_losses.append(loss)
            history.validation_accuracies.append(right)
    history.seconds = time.perf_counter() - begin
    return history


# ---- the picture ----------------------------------------------------------------------------------------------------------


def picture_file(text: str) -> Path:
    """Check that a picture can be saved there, before the training rather than after it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise argparse.ArgumentTypeError("the picture needs matplotlib: pip install matplotlib") from None
    path, formats = Path(text), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise argparse.ArgumentTypeError(f"{path} must end in one of {', '.join(formats)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def plot(path: Path, title: str, history: History, test_accuracy: float) -> None:
    """Save the curves of loss and accuracy."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    epochs = np.arange(1, len(history.validation_losses) + 1)
    steps = len(history.losses) // len(epochs)
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for axes, training, validation in (
        (left, history.losses, history.validation_losses),
        (right, history.accuracies, history.validation_accuracies),
    ):
        x, y = running_mean(training, steps)
        axes.plot(x, y, color="tab:blue", lw=1.2, label="training, mean over half an epoch")
        axes.plot(epochs, validation, "o-", color="tab:orange", ms=3, lw=1.5, clip_on=False, label="validation")
        axes.set_xlabel("epoch")
        axes.set_xlim(0, len(epochs))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("cross-entropy", loc="left")
    left.set_yscale("log")
    left.legend(frameon=False)
    right.axhline(test_accuracy, color="black", ls="--", lw=1, label=f"test at the end: {test_accuracy:.2%}")
    right.set_title("accuracy", loc="left")
    right.set_ylim(max(0.0, 1 - 2.5 * max(0.02, 1 - min(history.validation_accuracies))), 1)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.legend(frameon=False)
    figure.savefig(path)


def running_mean(values: list[float], steps_per_epoch: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the means over half an epoch, and the epochs at which they end."""
    window = max(steps_per_epoch // 2, 1)
    totals = np.cumsum([0.0, *values])
    means = (totals[window:] - totals[:-window]) / window
    return np.arange(window, len(values) + 1) / steps_per_epoch, means


# ---- the command ----------------------------------------------------------------------------------------------------------


def make_options() -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = make_parser(__doc__ or "", epochs=(8, 30), lr=2e-3)
    parser.add_argument("--hidden", type=positive_int, nargs="+", default=[512, 256], help="hidden sizes (default: 512 256)")
    parser.add_argument("--state-dtype", choices=FORMATS, help="format of the optimizer's states (default: float32)")
    parser.add_argument("--plot", type=picture_file, default="mnist_numpy.png", help="the picture (default: %(default)s)")
    return parser


def main() -> None:
    """Run the command."""
    args, digits = parse_args(make_options())
    sizes = [digits.train.images[0].size, *args.hidden, CLASSES]
    rng = np.random.default_rng(args.seed)
    params = init_params(sizes, rng)
    title = f"perceptron {'-'.join(map(str, sizes))}, {sum(param.size for param in params.values()):,} parameters"
    print(digits, title, sep="\n")
    history = train(params, digits, args, rng)
    test_accuracy = evaluate(params, digits.test)[1]
    plot(args.plot, f"{digits.name}: {title}, gradstep.AdamW", history, test_accuracy)
    steps = len(history.losses)
    print(f"{args.epochs} epochs in {history.seconds:.1f} s; {history.step_seconds:.2f} s of it in {steps:,} optimizer steps")
    print(f"curves: {args.plot}")
    print(f"test accuracy: {test_accuracy:.2%}")


if __name__ == "__main__":
    main()
