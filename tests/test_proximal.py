"""Penalties and constraints reach the optimum: optimality conditions, and scikit-learn's solutions of the same problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradstep

RUNS_ON_GPU = True

RNG = np.random.default_rng(11)
SAMPLES, FEATURES, TASKS = 120, 24, 3
X = RNG.standard_normal((SAMPLES, FEATURES)) @ (np.eye(FEATURES) + 0.2 * RNG.standard_normal((FEATURES, FEATURES)))
TRUE = np.where(RNG.random((FEATURES, TASKS)) < 0.4, 1.0, 0.0) * (RNG.random((FEATURES, 1)) < 0.5) * 2.0
TRUE[0] = -3.0
Y = X @ TRUE + 0.3 * RNG.standard_normal((SAMPLES, TASKS))
RATE = 1 / np.linalg.eigvalsh(X.T @ X / SAMPLES).max()


def gradient(w: Any, y: Any) -> Any:
    """Of the mean of squared residuals over two."""
    return X.T @ (X @ w - y) / SAMPLES


def loss(w: Any, y: Any) -> float:
    return float(np.square(X @ w - y).sum() / (2 * SAMPLES))


def minimize(start: Any, y: Any, steps: int = 4000, **options: Any) -> Any:
    w = start.copy()
    opt = gradstep.SGD([w], lr=RATE, **options)
    for _ in range(steps):
        opt.step([gradient(w, y)])
    return w


@pytest.mark.parametrize("alpha", [0.02, 0.3])
def test_lasso(alpha: float, isa: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    y = Y[:, 0]
    w = minimize(np.zeros(FEATURES), y, l1=alpha)
    theirs = linear_model.Lasso(alpha, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X, y).coef_
    objective = [loss(v, y) + alpha * np.abs(v).sum() for v in (w, theirs)]
    assert objective[0] == pytest.approx(objective[1], rel=1e-6)
    g, zero = gradient(w, y), w == 0
    assert 0 < zero.sum() < FEATURES
    assert np.array_equal(zero, theirs == 0)
    np.testing.assert_allclose(g[~zero], -alpha * np.sign(w[~zero]), atol=1e-9)
    assert (np.abs(g[zero]) <= alpha).all()


@pytest.mark.parametrize(("alpha", "share"), [(0.2, 0.7), (0.5, 0.2)])
def test_elastic_net(alpha: float, share: float, isa: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    y, l1, l2 = Y[:, 1], alpha * share, alpha * (1 - share)
    w = minimize(np.zeros(FEATURES), y, l1=l1, l2=l2)
    model = linear_model.ElasticNet(alpha, l1_ratio=share, fit_intercept=False, tol=1e-14, max_iter=100_000)
    theirs = model.fit(X, y).coef_
    objective = [loss(v, y) + l1 * np.abs(v).sum() + l2 / 2 * np.square(v).sum() for v in (w, theirs)]
    assert objective[0] == pytest.approx(objective[1], rel=1e-6)
    g, zero = gradient(w, y) + l2 * w, w == 0
    assert 0 < zero.sum() < FEATURES
    np.testing.assert_allclose(g[~zero], -l1 * np.sign(w[~zero]), atol=1e-9)
    assert (np.abs(g[zero]) <= l1).all()


def test_ridge(isa: str) -> None:
    w = minimize(np.zeros(FEATURES), Y[:, 0], l2=0.3)
    exact = np.linalg.solve(X.T @ X / SAMPLES + 0.3 * np.eye(FEATURES), X.T @ Y[:, 0] / SAMPLES)
    np.testing.assert_allclose(w, exact, atol=1e-9)


def test_group_lasso(isa: str) -> None:
    """Rows are features, of all tasks at once: scikit-learn's MultiTaskLasso."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    alpha = 0.4
    w = minimize(np.zeros((FEATURES, TASKS)), Y, group_lasso=alpha)
    model = linear_model.MultiTaskLasso(alpha, fit_intercept=False, tol=1e-14, max_iter=100_000)
    theirs = model.fit(X, Y).coef_.T
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    objective = [loss(v, Y) + alpha * np.linalg.norm(v, axis=1).sum() for v in (w, theirs)]
    assert objective[0] == pytest.approx(objective[1], rel=1e-6)
    g, zero = gradient(w, Y), norms[:, 0] == 0
    assert 0 < zero.sum() < FEATURES
    np.testing.assert_allclose(g[~zero], -alpha * w[~zero] / norms[~zero], atol=1e-9)
    assert (np.linalg.norm(g[zero], axis=1) <= alpha).all()


@pytest.mark.parametrize("bounds", [(0, None), (None, 0.5), (-0.4, 0.9)])
def test_bounds(bounds: tuple[float | None, float | None], isa: str) -> None:
    """The gradient is 0 inside, and points out of the box at its walls."""
    w = minimize(np.zeros((FEATURES, TASKS)), Y, bounds=bounds)
    low, high = (-np.inf if bounds[0] is None else bounds[0]), (np.inf if bounds[1] is None else bounds[1])
    assert w.min() >= low
    assert w.max() <= high
    g, at_low, at_high = gradient(w, Y), w == low, w == high
    assert at_low.any() == (bounds[0] is not None)
    assert at_high.any() == (bounds[1] is not None)
    assert (g[at_low] >= 0).all()
    assert (g[at_high] <= 0).all()
    inside = ~(at_low | at_high)
    assert inside.any()
    np.testing.assert_allclose(g[inside], 0, atol=1e-9)


def test_max_norm(isa: str) -> None:
    """The gradient is 0 for rows inside the ball, and points outwards along the row at its surface."""
    limit = 2.0
    w = minimize(np.full((FEATURES, TASKS), 0.1), Y, max_norm=limit)
    norms, g = np.linalg.norm(w, axis=1), gradient(w, Y)
    assert norms.max() <= limit * (1 + 1e-15)
    surface = norms > limit * (1 - 1e-12)
    assert 0 < surface.sum() < FEATURES
    np.testing.assert_allclose(g[~surface], 0, atol=1e-9)
    pressure = -(g * w).sum(axis=1, keepdims=True) / limit**2
    assert (pressure[surface] > 0).all()
    np.testing.assert_allclose(g[surface], -(pressure * w)[surface], atol=1e-9)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (gradstep.AdamW, {"weight_decay": 0.0, "l1": 0.5}),
        (gradstep.Adagrad, {"l1": 0.02}),
        (gradstep.RMSprop, {"l1": 0.5}),
        (gradstep.Lion, {"weight_decay": 0.0, "l1": 0.5}),
    ],
)
def test_other_rules_stay_in_the_box_and_make_zeros(make: Callable[..., Any], options: dict[str, Any]) -> None:
    w = np.full((FEATURES, TASKS), 0.5)
    opt = make([w], lr=0.01, bounds=(0, 1.5), **options)
    for _ in range(600):
        opt.step([gradient(w, Y)])
    assert w.min() == 0
    assert w.max() <= 1.5
    assert 0.1 < (w == 0).mean() < 0.9
    assert loss(w, Y) < loss(np.full((FEATURES, TASKS), 0.5), Y)
