"""The monitor's pictures: loss curves, and how gradients flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstep.monitor import Monitor

from .monitor_cases import NAN, one, stats


@pytest.fixture
def full() -> Monitor:
    """A monitor that has seen all kinds of values."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monitor = Monitor(warn=False)
    for step in range(1, 31):
        parts = {f"layer{i}": one(10.0 ** -(i % 3) / step, update_norm=0.1 / step) for i in range(4)}
        parts["dead"] = one(0.0, grad_zeros=100, update_norm=0.0)
        parts["fresh"] = one(1.0, param_norm=0.0 if step == 1 else 1.0)
        if step % 2:
            parts["rare"] = one(NAN if step == 9 else 1.0)
        monitor.record(stats(step, parameters=parts), loss=NAN if step == 5 else 1 / step, lr=0.1 / step)
        if step % 10 == 0:
            monitor.validate(loss=2 / step)
    return monitor


def test_loss_curves(full: Monitor) -> None:
    axes, rates = full.plot_losses(log=True, smooth=4).axes
    faint, smooth, validation, _ = axes.lines
    np.testing.assert_array_equal(faint.get_xdata(), [step for step in range(1, 31) if step != 5])
    np.testing.assert_allclose(smooth.get_ydata()[0], (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    np.testing.assert_array_equal(validation.get_xydata(), [[10, 0.2], [20, 0.1], [30, 2 / 30]])
    np.testing.assert_array_equal(rates.lines[0].get_ydata(), full.history["lr"])
    assert axes.get_yscale() == "log"
    assert full.plot_losses().axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("over", ["steps", "parameters"])
def test_gradient_flow(full: Monitor, over: Any, tmp_path: Path) -> None:
    figure = full.plot_gradients(over=over)
    axes = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in axes] == ["gradient norm", "update norm / parameter norm"]
    axis = axes[-1].yaxis if over == "steps" else axes[-1].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == full.keys
    figure.savefig(tmp_path / "flow.png")
    if over == "steps":
        values = axes[0].collections[0].get_array()
        assert values.shape == (7, 30)
        assert values[0, 2] == pytest.approx(1 / 3)
        assert (values[4] < values[:4].min()).all()  # dead: under the scale
        assert values.mask[6].tolist() == [bool(step % 2 == 0 or step == 9) for step in range(1, 31)]
        assert axes[1].collections[0].get_array()[5, 0] > axes[1].collections[0].norm.vmax


def test_pictures_are_saved_and_pyplot_is_left_alone(full: Monitor, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    full.save(tmp_path / "all.png", log=True, smooth=3)
    full.save(tmp_path / "all.svg")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert plt.get_fignums() == []


def test_picture_of_losses_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monitor = Monitor()
    monitor.validate(loss=1.0, step=3)
    monitor.save(tmp_path / "losses.pdf")
    assert (tmp_path / "losses.pdf").stat().st_size > 0


def test_nothing_to_draw_is_an_error(full: Monitor) -> None:
    monitor = Monitor(keep_parameters=0)
    with pytest.raises(ValueError, match="^the monitor has no loss to draw$"):
        monitor.plot_losses()
    monitor.record(stats(1, parameters={"w": one()}))
    with pytest.raises(ValueError, match="^Monitor.plot_gradients: no statistics of parameters have been kept$"):
        monitor.plot_gradients()
    with pytest.raises(ValueError, match="^Monitor.plot_gradients: over must be one of 'steps', 'parameters', got 'time'$"):
        full.plot_gradients(over="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^Monitor.save: smooth must be at least 1, got 0$"):
        full.save("never.png", smooth=0)


def test_pictures_say_that_they_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="^the monitor's pictures need matplotlib: pip install matplotlib$"):
        Monitor().plot_losses()
