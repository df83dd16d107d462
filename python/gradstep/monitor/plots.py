"""Pictures of a training: loss curves, and how gradients flow through the parameters. Drawn with matplotlib, without pyplot."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradstep.monitor.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOWS = {"grad_norm": "gradient norm", "update_ratio": "update norm / parameter norm"}
_TRAINING, _VALIDATION, _RATE = "#1d3557", "#f77f00", "#8d99ae"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that no pyplot knows of.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise ImportError("the monitor's pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def draw_losses(axes: Axes, history: Table, validation: Table, *, log: bool, smooth: int) -> None:
    """Draw training and validation loss, and the learning rate on an axis of its own.

    Raises:
        ValueError: if there is no loss to draw.
    """
    drawn = False
    if "loss" in history:
        steps, losses = _known(history, "loss")
        faint = smooth > 1 and len(losses) >= smooth
        axes.plot(steps, losses, color=_TRAINING, lw=1, alpha=0.3 if faint else 1, label=None if faint else "training")
        if faint:
            means = np.convolve(losses, np.full(smooth, 1 / smooth), "valid")
            axes.plot(steps[smooth - 1 :], means, color=_TRAINING, lw=1.5, label=f"training, mean of {smooth}")
        drawn = len(steps) > 0
    if "loss" in validation:
        steps, losses = _known(validation, "loss")
        axes.plot(steps, losses, "o-", color=_VALIDATION, ms=3, lw=1.5, label="validation")
        drawn = drawn or len(steps) > 0
    if not drawn:
        raise ValueError("the monitor has no loss to draw")
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.spines["top"].set_visible(False)
    if "lr" in history:
        rates = axes.twinx()
        rates.plot(*_known(history, "lr"), color=_RATE, lw=1, ls="--", label="learning rate")
        rates.set_ylabel("learning rate", color=_RATE)
        rates.set_ylim(bottom=0)
        rates.spines["top"].set_visible(False)
        axes.plot([], [], color=_RATE, lw=1, ls="--", label="learning rate")  # for the legend
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    axes.margins(x=0.01)


def draw_flow_over_time(figure: Figure, axes: Axes, table: Table, keys: Sequence[Hashable], name: str) -> None:
    """Draw a heat map of parameters over steps on a logarithmic scale: zeros black, missing and NaN grey, infinity red."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    values = _matrix(table, keys, name)
    low, high = _range(values)
    colors = mpl.colormaps["viridis"].with_extremes(under="black", over="red", bad="lightgrey")
    shown = np.ma.masked_invalid(np.where(values == 0, low / 10, np.where(np.isinf(values), high * 10, values)))
    steps = table["step"]
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    rows = np.arange(len(keys) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, shown, norm=LogNorm(low, high), cmap=colors, rasterized=True)
    figure.colorbar(mesh, ax=axes, pad=0.01)
    axes.set_title(_FLOWS[name], loc="left")
    axes.set_xlabel("step")
    axes.label_outer()
    axes.invert_yaxis()
    _label(axes.yaxis, keys)


def draw_flow_over_layers(axes: Axes, table: Table, keys: Sequence[Hashable], name: str) -> None:
    """Draw the median over all steps, the range of the middle 80%, and the newest value, of each parameter in order."""
    values = _matrix(table, keys, name)
    values[~np.isfinite(values)] = np.nan
    places = np.arange(len(keys))
    quantiles = np.array([np.nanquantile(row, [0.1, 0.5, 0.9]) if np.isfinite(row).any() else [np.nan] * 3 for row in values])
    axes.fill_between(places, quantiles[:, 0], quantiles[:, 2], color=_TRAINING, alpha=0.15, lw=0, label="80% of the steps")
    axes.plot(places, quantiles[:, 1], "o-", color=_TRAINING, ms=3, lw=1.5, label="median")
    axes.plot(places, values[:, -1], "o--", color=_VALIDATION, ms=3, lw=1, label="newest")
    if np.any(values > 0):
        axes.set_yscale("log", nonpositive="clip")
    axes.set_title(_FLOWS[name], loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", rotation=90)
    _label(axes.xaxis, keys)
    axes.legend(frameon=False)


def flow_names() -> list[str]:
    """Return the names of the columns that show how gradients flow."""
    return list(_FLOWS)


def _known(table: Table, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and values where the value is a finite number."""
    steps, values = table["step"], table[name]
    known = np.isfinite(values)
    return steps[known], values[known]


def _matrix(table: Table, keys: Sequence[Hashable], name: str) -> NDArray[np.float64]:
    """Return a column of each parameter, as the rows of a matrix."""
    return np.stack([table[key, name] for key in keys])


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least and the largest of the positive finite values, apart from each other."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size == 0:
        return 0.1, 1.0
    low, high = float(positive.min()), float(positive.max())
    return (low, high) if low < high else (low / 2, high * 2)


def _label(axis: Any, keys: Sequence[Hashable]) -> None:
    """Name parameters along an axis, at most 40 of them."""
    stride = -(-len(keys) // 40)
    axis.set_ticks(range(0, len(keys), stride), [str(key) for key in keys[::stride]], fontsize=7)
