"""A picture of bandwidth over size, under the roof of what the machine can do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contenders import LIMIT
from .formats import DTYPES
from .records import Record
from .rules import RULES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = tuple[str, str, int]
"""Rule, dtype, threads."""

_COLORS = {
    "gradstep": "#c1121f",
    "gradstep-object": "#f77f00",
    "gradstep-torch": "#780000",
    "numpy": "#8d99ae",
    "numba": "#2a9d8f",
    "torch-loop": "#a2d2ff",
    "torch-foreach": "#5390d9",
    "torch-fused": "#1d3557",
    "optax": "#9d4edd",
    "deepspeed": "#6a994e",
}
_ROOF = "#3d3d3d"


def panels_of(records: Sequence[Record]) -> dict[Panel, list[Record]]:
    """Return the records of rules alone on one tensor, by rule, dtype and threads: those with the most sizes, if they are two at least."""
    panels: dict[Panel, list[Record]] = defaultdict(list)
    for record in records:
        if record.kind == "one" and not record.chain and record.rule in RULES and record.dtype in DTYPES:
            panels[record.rule, record.dtype, record.threads].append(record)
    sizes = {panel: len({record.elements for record in members}) for panel, members in panels.items()}
    most = max(sizes.values(), default=0)
    return {panel: members for panel, members in panels.items() if sizes[panel] == most and most > 1}


def plot(records: Sequence[Record], machine: Mapping[str, Any], path: Path) -> None:
    """Draw the records of `panels_of` to the file `path`.

    Raises:
        ValueError: if there is nothing to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = panels_of(records)
    if not panels:
        raise ValueError("a picture needs cases of one tensor in two sizes at least")
    rows = list(dict.fromkeys(panel[:2] for panel in panels))
    columns = sorted({panel[2] for panel in panels})
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(5.6 * len(columns) + 1.8, 4.4 * len(rows) + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for i, (rule, dtype) in enumerate(rows):
        for j, threads in enumerate(columns):
            members = panels.get((rule, dtype, threads), [])
            handles.update(_draw(axes[i, j], members, machine["caches"]))
            axes[i, j].set_title(f"{rule}, {dtype}, {threads} thread{'s' * (threads > 1)}", fontsize=11, loc="left")
        axes[i, 0].set_ylabel("GB/s that the rule has to move")
    for ax in axes[-1]:
        ax.set_xlabel("parameters")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=10)
    figure.suptitle(f"One optimizer step on {machine['processor']}", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(ax: Axes, records: Sequence[Record], caches: Mapping[str, int]) -> dict[str, Any]:
    lines: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.elements):
        lines[record.contender].append(record)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.grid(which="major", color="#e6e6e6", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    handles: dict[str, Any] = {}
    roof = lines.pop(LIMIT.name, [])
    for i, (name, members) in enumerate(lines.items()):
        ours = name.startswith("gradstep")
        color = _COLORS.get(name, f"C{i}")
        sizes = [record.elements for record in members]
        width, z = (2.6, 3) if ours else (1.4, 4)
        (handles[name],) = ax.plot(
            sizes,
            [record.gb_per_s for record in members],
            color=color,
            linewidth=width,
            marker="o",
            markersize=width + 1.5,
            zorder=z,
        )
        fastest = [record.bytes / record.quartiles[0] / 1e9 for record in members]
        slowest = [record.bytes / record.quartiles[1] / 1e9 for record in members]
        ax.fill_between(sizes, slowest, fastest, color=color, alpha=0.15, linewidth=0, zorder=2)
    if roof:
        sizes, speeds = [record.elements for record in roof], [record.gb_per_s for record in roof]
        (handles["no math: the limit"],) = ax.plot(sizes, speeds, color=_ROOF, linewidth=2, linestyle=(0, (4, 2)), zorder=5)
        ax.margins(x=0.03)
        top = 1.6 * max(record.gb_per_s for record in records)
        ax.fill_between(sizes, speeds, top, color="#f2f2f2", linewidth=0, zorder=0)
        ax.set_ylim(max(0.25, 0.6 * min(record.gb_per_s for record in records)), top)
    if records:
        _mark_caches(ax, records[0], caches)
    return handles


def _mark_caches(ax: Axes, record: Record, caches: Mapping[str, int]) -> None:
    """Draw a line at the size whose arrays fill each cache."""
    low, high = ax.get_xlim()
    for name, size in caches.items():
        elements = size / (DTYPES[record.dtype].numpy.itemsize * (2 + len(RULES[record.rule].states)))
        if low < elements < high:
            ax.axvline(elements, color="#bdbdbd", linewidth=0.9, linestyle=":", zorder=1)
            ax.annotate(
                name, (elements, 0.01), xycoords=("data", "axes fraction"), xytext=(-3, 0), textcoords="offset points",
                ha="right", va="bottom", fontsize=9, color="#7d7d7d",
            )  # fmt: skip
