"""Watch a training explode, and cure it: a recurrent network in plain NumPy that learns the sentiment of film reviews.

The network reads a sentence word by word, h <- leaky_relu(W_in e + W_rec h + b), and judges it by the sum of all h. Its gradient is a
product of as many matrices as the sentence has words, so it grows without bound once W_rec is too large, and a hot learning rate
makes it so. The same training is run twice:

1. with a hot learning rate: the monitor sees the gradients explode and the loss diverge, and the run is given up;
2. with the same learning rate and `clip_norm=1.0`, which limits every gradient's norm within the optimizer's one sweep: it learns.

The data are sst2_train.tsv, sst2_dev.tsv and sst2_test.tsv of the Stanford Sentiment Treebank, a sentence and a 0 or 1 a line:

    python examples/text_monitor.py --data ../shared/data

It takes about ten seconds on one core, and needs matplotlib for the pictures of the two runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import gradstep
from gradstep.monitor import EarlyStopping, Event, JSONLinesWriter, Monitor, Thresholds
from mnist_data import natural, positive_float, positive_int

Array: TypeAlias = NDArray[np.float32]
Params: TypeAlias = dict[str, Array]

LENGTH = 25  # words of a sentence that are read, the last ones
NO_WORD = 0  # the number of an empty place, and of what is in none but one training sentence
LEAK = np.float32(0.2)


# ---- the data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reviews:
    """Sentences as numbers of words, shape (n, LENGTH), empty places first; and whether each is positive."""

    words: NDArray[np.int64]
    positive: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.positive)


def read_sentences(path: Path) -> tuple[list[list[str]], NDArray[np.bool_]]:
    """Read lines of a sentence, a tab, and 0 or 1.

    Raises:
        ArgumentTypeError: if the file is missing, or holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    rows = [line.rpartition("\t") for line in lines]
    bad = next((i for i, (_, _, label) in enumerate(rows) if label not in {"0", "1"}), 0 if not rows else None)
    if bad is not None:
        raise argparse.ArgumentTypeError(f"{path}: line {bad + 1} must be a sentence, a tab, and 0 or 1")
    return [sentence.split() for sentence, _, _ in rows], np.array([label == "1" for _, _, label in rows])


def load_reviews(folder: Path) -> tuple[dict[str, Reviews], int]:
    """Return the reviews "train", "dev" and "test", and how many numbers there are for words.

    Raises:
        ArgumentTypeError: if a file is missing, or holds something else.
    """
    parts = {name: read_sentences(folder / f"sst2_{name}.tsv") for name in ("train", "dev", "test")}
    counts = Counter(word for sentence in parts["train"][0] for word in set(sentence))
    numbers = {word: i for i, word in enumerate(sorted(word for word, n in counts.items() if n > 1), NO_WORD + 1)}
    reviews = {}
    for name, (sentences, positive) in parts.items():
        words = np.full((len(sentences), LENGTH), NO_WORD)
        for row, sentence in zip(words, sentences, strict=True):
            known = [numbers[word] for word in sentence if word in numbers][-LENGTH:]
            row[LENGTH - len(known) :] = known
        reviews[name] = Reviews(words, positive)
    return reviews, len(numbers) + 1


# ---- the network ----------------------------------------------------------------------------------------------------------


def init_params(words: int, size: int, hidden: int, rng: np.random.Generator) -> Params:
    """Return initial parameters; the recurrent matrix is half an orthogonal one, so that early gradients do not grow."""
    orthogonal = np.linalg.qr(rng.standard_normal((hidden, hidden)))[0]
    return {
        "embedding": rng.standard_normal((words, size), np.float32) * np.float32(1 / math.sqrt(size)),
        "weight_in": rng.standard_normal((size, hidden), np.float32) * np.float32(1 / math.sqrt(size)),
        "weight_rec": (0.5 * orthogonal).astype(np.float32),
        "bias_rec": np.zeros(hidden, np.float32),
        "weight_out": rng.standard_normal(hidden, np.float32) * np.float32(1 / math.sqrt(hidden)),
        "bias_out": np.zeros(1, np.float32),
    }


def forward(params: Params, words: NDArray[np.int64]) -> tuple[Array, list[Array]]:
    """Return the logits of being positive, and h after each place, zeros first. In empty places h stays zero."""
    states = [np.zeros((len(words), len(params["bias_rec"])), np.float32)]
    inputs = params["embedding"][words] @ params["weight_in"]
    inputs += params["bias_rec"]
    for place in range(LENGTH):
        before = inputs[:, place] + states[-1] @ params["weight_rec"]
        before *= words[:, place, None] != NO_WORD
        states.append(np.maximum(before, LEAK * before))
    return np.sum(states, axis=0, dtype=np.float32) @ params["weight_out"] + params["bias_out"], states


def logistic_loss(logits: Array, positive: NDArray[np.bool_]) -> tuple[float, Array]:
    """Return the mean cross-entropy and its gradient for the logits."""
    signs = np.where(positive, np.float32(1), np.float32(-1))
    loss = np.logaddexp(0, -signs * logits).mean(dtype=np.float64)
    return float(loss), -signs / (1 + np.exp(signs * logits)) / np.float32(len(signs))


def backward(params: Params, words: NDArray[np.int64], states: list[Array], grad: Array) -> Params:
    """Return the gradients of all parameters from that of the logits; `states` is what `forward` returned."""
    grads = {name: np.zeros_like(param) for name, param in params.items()}
    grads["weight_out"] = np.sum(states, axis=0, dtype=np.float32).T @ grad
    grads["bias_out"] = grad.sum(keepdims=True)
    to_inputs = np.empty((len(words), LENGTH, len(params["bias_rec"])), np.float32)
    each = np.outer(grad, params["weight_out"])  # what every state gets from the sum
    to_state = each
    for place in reversed(range(LENGTH)):
        here = to_inputs[:, place]
        np.multiply(to_state, np.where(states[place + 1] > 0, np.float32(1), LEAK), out=here)
        here *= words[:, place, None] != NO_WORD
        grads["weight_rec"] += states[place].T @ here
        to_state = here @ params["weight_rec"].T + each
    flat = to_inputs.reshape(-1, to_inputs.shape[-1])
    grads["bias_rec"] = flat.sum(axis=0)
    grads["weight_in"] = params["embedding"][words].reshape(len(flat), -1).T @ flat
    np.add.at(grads["embedding"], words.ravel(), flat @ params["weight_in"].T)
    return grads


def evaluate(params: Params, reviews: Reviews) -> tuple[float, float]:
    """Return mean loss, and the share of reviews whose sentiment is judged right."""
    logits = forward(params, reviews.words)[0]
    return logistic_loss(logits, reviews.positive)[0], float(((logits > 0) == reviews.positive).mean())


# ---- training -------------------------------------------------------------------------------------------------------------


def train(
    params: Params, reviews: dict[str, Reviews], args: argparse.Namespace, clip_norm: float | None, monitor: Monitor
) -> None:
    """Train until the monitor sees divergence, the dev accuracy rises no more, or the epochs are over; keep the best."""
    optimizer = gradstep.SGD(params, lr=args.lr, momentum=0.9, clip_norm=clip_norm)
    stopping = EarlyStopping(patience=3, mode="max")
    monitor.watch["validation/accuracy"] = [stopping]
    best = params
    rng = np.random.default_rng(args.seed)
    train = reviews["train"]
    for epoch in range(1, args.epochs + 1):
        order = rng.permutation(len(train))
        for first in range(0, len(order), args.batch_size):
            chosen = order[first : first + args.batch_size]
            logits, states = forward(params, train.words[chosen])
            loss, grad = logistic_loss(logits, train.positive[chosen])
            stats = optimizer.step(backward(params, train.words[chosen], states, grad), stats=True)
            monitor.record(stats, loss=loss, lr=args.lr)
            if monitor.diverged:
                print(f"given up in epoch {epoch}")
                return
        loss, accuracy = evaluate(params, reviews["dev"])
        monitor.validate(loss=loss, accuracy=accuracy)
        print(f"epoch {epoch}: loss {monitor.history['loss'][-100:].mean():.3f}, dev accuracy {stopping.best:.2%} at best")
        if stopping.improved:
            best = {name: param.copy() for name, param in params.items()}
        if monitor.stop:
            break
    for name, param in best.items():
        params[name][...] = param


def run(title: str, reviews: dict[str, Reviews], words: int, args: argparse.Namespace, clip_norm: float | None) -> Params:
    """Train once from the same start, tell what the monitor saw, and save its picture and its records."""
    print(f"\n{title}")
    params = init_params(words, args.embedding, args.hidden, np.random.default_rng(args.seed))
    name = "clipped" if clip_norm else "hot"
    writer = JSONLinesWriter(args.out / f"text_monitor_{name}.jsonl", parameters=True, existing="overwrite")

    def tell(event: Event) -> None:
        print(f"  {event.kind}: {event}")

    begin = time.perf_counter()
    thresholds = Thresholds(exploding_after=5)  # the hot run does not live much longer
    # Overflow is what that run is about, and the monitor tells of it: NumPy need not.
    with np.errstate(all="ignore"), Monitor(thresholds=thresholds, writers=[writer], on_event=tell, warn=False) as monitor:
        train(params, reviews, args, clip_norm, monitor)
    monitor.save(args.out / f"text_monitor_{name}.png", log=True, smooth=20)
    clipped = float((monitor.history["clip_factor"] < 1).mean())
    print(f"{monitor.step} steps in {time.perf_counter() - begin:.1f} s, {clipped:.0%} of them clipped")
    return params


# ---- the command ----------------------------------------------------------------------------------------------------------


def folder(text: str) -> Path:
    """Check that there is such a folder."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def make_options() -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=folder, required=True, metavar="DIR", help="folder with sst2_{train,dev,test}.tsv")
    parser.add_argument("--epochs", type=positive_int, default=10, help="most passes over the data (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="sentences a step (default: %(default)s)")
    parser.add_argument("--lr", type=positive_float, default=0.2, help="learning rate, a hot one (default: %(default)s)")
    parser.add_argument("--clip-norm", type=positive_float, default=1.0, help="limit of the second run (default: %(default)s)")
    parser.add_argument("--embedding", type=positive_int, default=32, help="numbers for a word (default: %(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=64, help="size of the state h (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of initial weights and shuffling (default: %(default)s)")
    parser.add_argument("--out", type=folder, default=".", metavar="DIR", help="where pictures and records go (default: here)")
    return parser


def main() -> None:
    """Run the command."""
    parser = make_options()
    args = parser.parse_args()
    try:
        reviews, words = load_reviews(args.data)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --data: {error}")
    print(f"SST-2: {', '.join(f'{len(part):,} sentences for {name}' for name, part in reviews.items())}, {words:,} words")
    run(f"1. learning rate {args.lr:g}", reviews, words, args, clip_norm=None)
    params = run(f"2. learning rate {args.lr:g}, clip_norm {args.clip_norm:g}", reviews, words, args, args.clip_norm)
    print(f"dev accuracy: {evaluate(params, reviews['dev'])[1]:.2%}")
    print(f"test accuracy: {evaluate(params, reviews['test'])[1]:.2%}")


if __name__ == "__main__":
    main()
