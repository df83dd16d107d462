"""Train a small convolutional network twice at once: with `torch.optim.AdamW` and with `gradstep.torch.AdamW`.

Both networks begin with the same weights and see the same batches, in turns. That shows what replacing the class changes:

* Not the result. Each loss of one network is compared with that of the other. In float64 the two agree to 1e-12 over 100 steps
  (rounding alone is about 1e-15 there). In float32 they agree to 1e-5 over the first 20 steps. After that they may part, as
  any two programs do that round differently (torch's own fused and unfused AdamW, for one): where a ReLU is within rounding of
  its corner, one network gets a gradient that the other does not, and Adam makes a full step of it however small it is. The
  accuracies at the end differ by chance, as those of two seeds do.
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
from mnist_data import CLASSES, Digits, Examples, make_parser, parse_args
from terminal import print_table, progress_bar
from torch import Tensor, nn

import gradstep.torch

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Claim:
    """How far the losses agree, at the least, in how many first steps."""

    dtype: torch.dtype
    steps: int
    bound: float


DOUBLE = Claim(torch.float64, steps=100, bound=1e-12)
SINGLE = Claim(torch.float32, steps=20, bound=1e-5)


@dataclass
class Side:
    """One of the two: a network, its optimizer, and what is known of them so far."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: float = 0.0


def make_network(digits: Digits, seed: int, dtype: torch.dtype) -> nn.Module:
    """Return a network of two convolutions, each of which halves the image, and two dense layers."""
    torch.manual_seed(seed)
    pixels = math.prod(math.ceil(size / 4) for size in digits.train.images.shape[1:])
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * pixels, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    ).to(dtype)


def make_sides(digits: Digits, args: argparse.Namespace, dtype: torch.dtype) -> list[Side]:
    """Return the two sides, alike but for the class of their optimizer."""
    theirs, ours = (make_network(digits, args.seed, dtype) for _ in range(2))
    return [
        Side(
            "torch.optim.AdamW" + " (fused)" * args.fused,
            theirs,
            torch.optim.AdamW(theirs.parameters(), lr=args.lr, weight_decay=0.05, fused=args.fused or None),
        ),
        Side("gradstep.torch.AdamW", ours, gradstep.torch.AdamW(ours.parameters(), lr=args.lr, weight_decay=0.05)),
    ]


def tensors(examples: Examples, dtype: torch.dtype) -> Batch:
    """Return images, with a dimension for their one channel, and labels."""
    return torch.from_numpy(examples.images).to(dtype).unsqueeze(1), torch.from_numpy(examples.labels)


def batches(examples: Examples, size: int, seed: int, dtype: torch.dtype) -> Iterator[Batch]:
    """Yield shuffled batches, epoch after epoch, without an end."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = tensors(examples, dtype)
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(size):
            yield images[chosen], labels[chosen]


def name_of(dtype: torch.dtype) -> str:
    """Return the name without torch's prefix."""
    return str(dtype).removeprefix("torch.")


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


def train(digits: Digits, args: argparse.Namespace, dtype: torch.dtype, steps: int) -> list[Side]:
    """Train two networks of type `dtype` side by side; who goes first changes from step to step."""
    sides = make_sides(digits, args, dtype)
    stream = itertools.islice(batches(digits.train, args.batch_size, args.seed, dtype), steps)
    with progress_bar(steps) as advance:
        for i, (images, labels) in enumerate(stream):
            for side in sides if i % 2 == 0 else reversed(sides):
                train_step(side, images, labels)
            advance(name_of(dtype))
    return sides


def largest_difference(sides: list[Side], steps: int | None = None) -> float:
    """Return how far apart the losses are at most in the first steps, or in all."""
    theirs, ours = (side.losses[:steps] for side in sides)
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True))


def check(claim: Claim, sides: list[Side]) -> bool:
    """Print how far the losses are apart, and return whether `claim` holds."""
    difference = largest_difference(sides, claim.steps)
    holds = difference <= claim.bound  # a NaN does not pass
    steps = min(claim.steps, len(sides[0].losses))
    verdict = "rounding" if holds else "MORE THAN ROUNDING"
    report(claim.dtype, f"the first {steps}", difference, f"{verdict}: the bound is {claim.bound:.0e}")
    return holds


def report(dtype: torch.dtype, steps: str, difference: float, remark: str) -> None:
    """Print a line about a difference of losses."""
    print(f"{name_of(dtype)}: the losses of {steps} steps differ by at most {difference:.1e} ({remark})")


@torch.no_grad()
def accuracy(network: nn.Module, examples: Examples) -> float:
    """Return the share of images that a float32 network recognizes."""
    images, labels = tensors(examples, torch.float32)
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
    print_table(f"{digits.name}, {len(sides[0].losses):,} steps in float32", header, rows)


def main() -> None:
    """Run the command."""
    parser = make_parser(__doc__ or "", epochs=(3, 30), lr=1e-3)
    parser.add_argument("--fused", action="store_true", help="let torch use its fused kernel, not its default, a loop")
    args, digits = parse_args(parser)
    print(digits)
    agree = check(DOUBLE, train(digits, args, torch.float64, DOUBLE.steps))
    steps = args.epochs * math.ceil(len(digits.train) / args.batch_size)
    sides = train(digits, args, torch.float32, steps)
    agree &= check(SINGLE, sides)
    report(torch.float32, f"all {steps:,}", largest_difference(sides), "no bound: rounding grows as training goes on")
    summarize(sides, digits)
    if not agree:
        sys.exit("error: the losses of the two differ by more than rounding")
    print("same losses to rounding: yes")


if __name__ == "__main__":
    main()
