"""Learning curves of one or several runs, as a picture that can be read without colour."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_post.training.run_log import read_metrics

PANELS = (
    ("reward", "Reward", "mean reward per completion"),
    ("eval/accuracy", "Held-out accuracy", "fraction solved, greedy"),
    ("kl", "KL to the reference", "nats per token"),
    ("entropy", "Entropy of the policy", "nats per token"),
    ("completions/mean_length", "Completion length", "tokens, mean"),
)
"""Metric, title and unit of each panel."""

WITHOUT_SAMPLING = {
    "reward": ("loss", "Loss", "as the method reduces it"),
    "kl": ("eval/loss", "Held-out loss", "as the method reduces it"),
    "entropy": ("rewards/margins", "Margin of the chosen", "implicit reward"),
}
"""What stands in the place of a panel that no run has anything for, where runs train on given completions or pairs."""

# Lightness and dash differ together, so that runs stay apart in print.
_STYLES = (("#000000", "-", "o"), ("#d55e00", "--", "s"), ("#56b4e9", "-.", "^"), ("#009e73", ":", "D"))
_SMOOTH_ABOVE = 60  # points; fewer are drawn as they are
_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def plot(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Draw reward, accuracy, KL, entropy and completion length against the training step.

    Of runs that sample nothing, losses and margins in their places. Long series are drawn faintly, with their running
    mean over it.

    Args:
        run_dirs: directories of the runs, drawn over each other.
        output: the picture, in a directory that exists; its ending gives the format. In the first run's directory if
            None: `curves.png`, or `comparison.png` of several runs.

    Returns:
        The path of the picture.

    Raises:
        ValueError: no run is given, one has not logged a step yet, or the ending of `output` names no format.
        FileNotFoundError: a directory holds no metrics.jsonl, or that of `output` does not exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not run_dirs:
        raise ValueError("run_dirs is empty; give the directory of at least one run")
    name = "curves.png" if len(run_dirs) == 1 else "comparison.png"
    output = Path(run_dirs[0]) / name if output is None else Path(output)
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"output {output} must end in one of {', '.join(_SUFFIXES)}, which gives its format")
    if output.parent != Path(run_dirs[0]) and not output.parent.is_dir():
        raise FileNotFoundError(f"output {output}: there is no directory {output.parent}; make it first")
    runs = {name: read_metrics(path) for name, path in zip(run_names(run_dirs), run_dirs, strict=True)}
    for name, rows in runs.items():
        if not rows:
            raise ValueError(f"run {name} has not logged a step yet; plot it once it has")

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3).flatten()

    def logged(metric: str) -> bool:
        return any(len(series(rows, metric)[0]) for rows in runs.values())

    for axes, panel in zip(grid, PANELS, strict=False):
        instead = WITHOUT_SAMPLING.get(panel[0], panel)
        metric, title, unit = panel if logged(panel[0]) or not logged(instead[0]) else instead
        drawn = [_draw(axes, rows, metric, index) for index, rows in enumerate(runs.values())]
        axes.set(title=title, xlabel="training step", ylabel=unit)
        axes.grid(True, color="0.85", linewidth=0.6)
        if metric == "eval/accuracy":
            axes.set_ylim(-0.03, 1.03)
        if not any(drawn):
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="0.4")
    _legend(grid[-1], list(runs))
    # Beside the target, then renamed: somebody may be looking at the picture of a run that is still going.
    temporary = output.with_name(f".{output.stem}.part{output.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return output


def run_names(run_dirs: Sequence[str | Path]) -> list[str]:
    """Short names for runs: the last part of each directory, or as many as it takes to tell them apart.

    Example:
        >>> run_names(["runs/a/seed0", "runs/b/seed0"])
        ['a/seed0', 'b/seed0']
    """
    parts = [Path(os.path.abspath(path)).parts for path in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({index})" for index, path in enumerate(run_dirs)]


def series(rows: Sequence[dict[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, without the rows that do not hold it as a number."""
    points = [(row["step"], row[metric]) for row in rows if isinstance(row.get(metric), int | float)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends.

    Example:
        >>> running_mean(np.array([0.0, 3.0, 6.0]), 3)
        array([1.5, 3. , 4.5])
    """
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _draw(axes: Any, rows: Sequence[dict[str, Any]], metric: str, index: int) -> bool:
    steps, values = series(rows, metric)
    color, dash, marker = _STYLES[index % len(_STYLES)]
    if len(steps) > _SMOOTH_ABOVE:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
        # An odd window, which is centred on its point.
        values = running_mean(values, 2 * (len(values) // 60) + 3)
        axes.plot(steps, values, color=color, linestyle=dash, linewidth=1.8)
    else:
        axes.plot(steps, values, color=color, linestyle=dash, linewidth=1.4, marker=marker, markersize=4)
    return len(steps) > 0


def _legend(axes: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for index in range(len(names)):
        color, dash, marker = _STYLES[index % len(_STYLES)]
        handles.append(Line2D([], [], color=color, ls=dash, marker=marker, markersize=4))
    axes.axis("off")
    axes.legend(handles, names, title="run", loc="upper left", frameon=False)
    axes.text(0.03, 0.02, "faint: single steps; strong: their running mean", transform=axes.transAxes, color="0.3")
