"""Train a small convolutional network twice at once: with `torch.optim.AdamW` and with `gradstep.torch.AdamW`.

Both networks begin with the same weights and see the same batches, in turns. That shows what replacing the class changes:

* Not the result. The losses of the two agree to 1e-5 over the first 200 steps (1e-6 is usual), which is rounding: the classes
  compute the same formula in another order. Twice the eps, or a learning rate 1.0001 times the other's, is seen.
  The network is smooth on purpose. With ReLU in the place of GELU the losses part after some dozens of steps, as they do between
  torch's own fused and unfused AdamW: sooner or later rounding puts an input on the other side of a corner, one network gets
  a gradient that the other does not, and Adam makes a full step of it.
* The time. It is taken around `optimizer.step()` alone, and around the whole loop.

Run it on MNIST, or without a file on scikit-learn's small digits:

    python examples/mnist_torch.py --data ../shared/data/mnist.npz
    python examples/mnist_torch.py

It exits with status 1 if the losses differ by more than rounding.
Needs torch, and scikit-learn for the small digits; shows a progress bar and a table if rich is installed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import gradstep.torch
from mnist_data import CLASSES, Digits, Examples, make_parser, parse_args
from terminal import print_table, progress_bar

Batch = tuple[Tensor, Tensor]

CHECKED_STEPS = 200
ROUNDING = 1e-5


@dataclass
class Side:
    """One of the two: a network, its optimizer, and what is known of them so far."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: float = 0.0


def make_network(digits: Digits, seed: int) -> nn.Module:
    """Return a network of two convolutions, each of which halves the image, and two dense layers."""
    torch.manual_seed(seed)
    pixels = math.prod(math.ceil(size / 4) for size in digits.train.images.shape[1:])
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * pixels, 128),
        nn.GELU(),
        nn.Linear(128, CLASSES),
    )


def make_sides(digits: Digits, args: argparse.Namespace) -> list[Side]:
    """Return the two sides, alike but for the class of their optimizer."""
    theirs, ours = (make_network(digits, args.seed) for _ in range(2))
    return [
        Side(
            "torch.optim.AdamW" + " (fused)" * args.fused,
            theirs,
            torch.optim.AdamW(theirs.parameters(), lr=args.lr, weight_decay=0.05, fused=args.fused or None),
        ),
        Side("gradstep.torch.AdamW", ours, gradstep.torch.AdamW(ours.parameters(), lr=args.lr, weight_decay=0.05)),
    ]


def tensors(examples: Examples) -> Batch:
    """Return images, with a dimension for their one channel, and labels."""
    return torch.from_numpy(examples.images).unsqueeze(1), torch.from_numpy(examples.labels)


def batches(examples: Examples, size: int, seed: int) -> Iterator[Batch]:
    """Yield shuffled batches, epoch after epoch, without an end."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = tensors(examples)
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(size):
            yield images[chosen], labels[chosen]


def train_step(side: Side, images: Tensor, labels: Tensor) -> None:
    """Learn from one batch."""
    begin = time.perf_counter()
    side.optimizer.zero_grad()
    loss = nn.functional.cross_entropy(side.network(images), labels)
    loss.backward()
    before = time.perf_counter()
    side.optimizer.step()
    end = time.perf_counter()
    side.losses.append(loss.item())
    side.step_seconds += end - before
    side.seconds += end - begin


def train(digits: Digits, args: argparse.Namespace) -> list[Side]:
    """Train the two side by side; who goes first changes from step to step."""
    sides = make_sides(digits, args)
    steps = args.epochs * math.ceil(len(digits.train) / args.batch_size)
    stream = itertools.islice(batches(digits.train, args.batch_size, args.seed), steps)
    with progress_bar(steps) as advance:
        for i, (images, labels) in enumerate(stream):
            for side in sides if i % 2 == 0 else reversed(sides):
                train_step(side, images, labels)
            advance("side by side")
    return sides


def largest_difference(sides: list[Side], steps: int) -> float:
    """Return how far apart the losses are at most in the first steps; infinity if one is no number."""
    theirs, ours = (side.losses[:steps] for side in sides)
    differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


@torch.no_grad()
def accuracy(network: nn.Module, examples: Examples) -> float:
    """Return the share of images that the network recognizes."""
    images, labels = tensors(examples)
    return float((network(images).argmax(dim=1) == labels).double().mean())


def summarize(sides: list[Side], digits: Digits) -> None:
    """Print a table of both sides."""
    header = ("", "in step()", "per step()", "whole loop", "test accuracy")
    rows = [
        (
            side.name,
            f"{side.step_seconds:.2f} s",
            f"{side.step_seconds / len(side.losses) * 1e6:.0f} us",
            f"{side.seconds:.1f} s",
            f"{accuracy(side.network, digits.test):.2%}",
        )
        for side in sides
    ]
    print_table(f"{len(sides[0].losses):,} steps of each", header, rows)


def main() -> None:
    """Run the command."""
    parser = make_parser(__doc__ or "", epochs=(3, 30), lr=1e-3)
    parser.add_argument("--fused", action="store_true", help="let torch use its fused kernel, not its default, a loop")
    args, digits = parse_args(parser)
    print(digits)
    sides = train(digits, args)
    summarize(sides, digits)
    steps = len(sides[0].losses)
    checked = min(steps, CHECKED_STEPS)
    difference = largest_difference(sides, checked)
    print(f"largest difference of the losses in all {steps:,} steps: {largest_difference(sides, steps):.1e}")
    if difference > ROUNDING:
        sys.exit(f"error: the losses of the first {checked} steps differ by {difference:.1e}, rounding explains {ROUNDING:.0e}")
    print(f"same losses to rounding in the first {checked} steps: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
