"""What the examples learn, handwritten digits, and the options that they share.

The digits are MNIST's from a file, or the small ones that come with scikit-learn.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = 10
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Examples:
    """Images as float32 of shape (n, height, width), and the digit that each one shows."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """What to learn from, what to watch progress on, and what to look at once, at the end."""

    name: str
    train: Examples
    validation: Examples
    test: Examples

    def __str__(self) -> str:
        height, width = self.train.images.shape[1:]
        parts = f"{len(self.train):,} to learn from, {len(self.validation):,} for validation, {len(self.test):,} for the test"
        return f"{self.name}: images of {height} x {width} pixels, {parts}"


def make_parser(description: str, *, epochs: tuple[int, int], lr: float) -> ArgumentParser:
    """Return a parser of the options that the examples share; `epochs` are the defaults for many images and for few."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    arrays = ", ".join(ARRAYS)
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help=f"MNIST: {arrays} (default: scikit-learn's small digits)")
    default = f"default: {epochs[0]}, with fewer than 10,000 images {epochs[1]}"
    parser.add_argument("--epochs", type=positive_int, help=f"passes over the training images ({default})")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--lr", type=positive_float, default=lr, help="learning rate, the highest (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of initial weights and shuffling (default: %(default)s)")
    parser.set_defaults(default_epochs=epochs)
    return parser


def parse_args(parser: ArgumentParser) -> tuple[Namespace, Digits]:
    """Parse the command line and load the digits; the parser reports what is wrong with either."""
    args = parser.parse_args()
    try:
        digits = load_sklearn() if args.data is None else load_mnist(args.data)
    except ArgumentTypeError as error:
        parser.error(f"argument --data: {error}")
    many, few = args.default_epochs
    args.epochs = args.epochs or (many if len(digits.train) >= 10_000 else few)
    return args, digits


def positive_int(text: str) -> int:
    """Read an option that must be an integer from 1 on."""
    value = natural(text)
    if value == 0:
        raise ArgumentTypeError("must be at least 1, got 0")
    return value


def natural(text: str) -> int:
    """Read an option that must be an integer from 0 on."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"must be an integer without a sign, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Read an option that must be a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def load_mnist(path: Path) -> Digits:
    """Read the four arrays of MNIST; the last twelfth of the training images becomes the validation set.

    Raises:
        ArgumentTypeError: if the file is missing, or holds something else.
    """
    arrays = _read(path)
    for kind in ("train", "test"):
        _check(f"{path}: ", kind, arrays[f"x_{kind}"], arrays[f"y_{kind}"])
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ArgumentTypeError(f"{path}: x_train has images of another size than x_test")
    return _split(path.stem, arrays, held_out=len(arrays["y_train"]) // 12)


def load_sklearn() -> Digits:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels, split at random, the same way every time.

    Raises:
        ArgumentTypeError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ArgumentTypeError("digits without a file come from scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits().images, load_digits().target
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:-360], order[-360:]
    arrays = {"x_train": images[train], "y_train": labels[train], "x_test": images[test], "y_test": labels[test]}
    return _split("digits", arrays, held_out=180)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            missing = [name for name in ARRAYS if f"{name}.npy" not in archive.namelist()]
        if missing:
            raise ArgumentTypeError(f"{path} has no array {missing[0]}, it must have {', '.join(ARRAYS)}")
        with np.load(path) as arrays:
            return {name: arrays[name] for name in ARRAYS}
    except OSError as error:
        raise ArgumentTypeError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ArgumentTypeError(f"{path} is not an intact .npz file of numbers") from None


def _check(where: str, kind: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim != 3 or min(images.shape[1:]) < 4:
        raise ArgumentTypeError(f"{where}x_{kind} must be uint8 of shape (n, height, width), got {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or len(labels) < 2:
        raise ArgumentTypeError(f"{where}y_{kind} must be one integer an image, got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ArgumentTypeError(f"{where}y_{kind} must be digits from 0 to 9, got {labels.min()} to {labels.max()}")


def _split(name: str, arrays: dict[str, NDArray[Any]], held_out: int) -> Digits:
    seen = len(arrays["y_train"]) - max(held_out, 1)
    images, labels = arrays["x_train"].astype(np.float32), arrays["y_train"].astype(np.int64)
    mean, deviation = images[:seen].mean(), images[:seen].std()

    def normalize(images: NDArray[np.float32]) -> NDArray[np.float32]:
        images -= mean
        images /= max(deviation, np.float32(1))
        return images

    images, test_images = normalize(images), normalize(arrays["x_test"].astype(np.float32))
    return Digits(
        name,
        train=Examples(images[:seen], labels[:seen]),
        validation=Examples(images[seen:], labels[seen:]),
        test=Examples(test_images, arrays["y_test"].astype(np.int64)),
    )
