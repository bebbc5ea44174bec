"""The evolution of a spectral density over training, as a heatmap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.plotting.eigenvalue_axis import atoms, choose_axis
from curvdiag.plotting.style import INK, operator_label, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.record.series import DensitySeries


def heatmap(
    series: DensitySeries,
    ax: Axes | None = None,
    *,
    time: str = "auto",
    scale: str = "auto",
    range: tuple[float, float] | None = None,
    width: float | None = None,
    lambda_max: bool = False,
    time_axis: str = "x",
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """Eigenvalue density over training: one grid, one kernel width, logarithmic colours.

    Each measurement fills the time up to halfway to its neighbours; a small tick inside the frame marks the
    step at which it was made. Colours begin at a twentieth of the height that one single eigenvalue has, so
    outliers of the spectrum are seen; what lies below is white. On a symmetric-log axis colours give the
    density per decade of the axis, with kernels that are equally wide along it.

    Args:
        series: Densities over the run (``operator``, ``block``, ``steps``, ``epochs``, ``densities``).
        ax: Where to draw; a new figure if not given.
        time: ``"steps"``, ``"epochs"``, or ``"auto"``: epochs where each measurement has its own.
        scale: Of the eigenvalues: ``"linear"``, ``"symlog"``, or ``"auto"``, chosen from the data.
        range: Lowest and highest eigenvalue shown; all if not given.
        width: Standard deviation of the kernels, in eigenvalues (linear) or decades (symmetric-log);
            an eightieth of the axis if not given.
        lambda_max: Also draw the largest Ritz value as a line.
        time_axis: ``"x"``, or ``"y"`` for eigenvalues from left to right.
        colorbar: Whether the figure gets one.
        title: ``None`` for the operator's name, ``""`` for none.

    Raises:
        ArgumentError: The series is empty, or an argument is not one of these.
    """
    from matplotlib.colors import LogNorm

    if time_axis not in ("x", "y"):
        raise ArgumentError(f'time_axis is "x" or "y", not {time_axis!r}')
    axis = choose_axis(series.densities, scale, range, width)
    times, label = time_of(series, time)
    edges = axis.edges()
    centres = 0.5 * (edges[1:] + edges[:-1])
    image = np.stack([axis.smooth(density, centres) for density in series.densities], axis=1)
    floor = min(axis.one_eigenvalue(density.size) for density in series.densities) / 20
    top = max(float(image.max()), 10 * floor)

    ax = own_axes(ax, 7.0, 4.2)
    grid: tuple[Any, ...] = (cell_edges(times), axis.eigenvalue(edges), image)
    if time_axis == "y":
        grid = (grid[1], grid[0], image.T)
    mesh = ax.pcolormesh(*grid, norm=LogNorm(floor, top), cmap=ink_map(), shading="flat", rasterized=True)
    axis.apply(ax, "y" if time_axis == "x" else "x")
    mark_times(ax, times, time_axis)
    if lambda_max:
        largest = np.array([atoms(density)[0].max() for density in series.densities])
        line = (times, largest) if time_axis == "x" else (largest, times)
        style: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.5, "markerfacecolor": "white"}
        ax.plot(*line, "o-" if len(times) <= 60 else "-", color=INK, label=r"$\lambda_{\max}$", **style)
        ax.legend(loc="best", framealpha=0.9, fontsize="small")
    name = operator_label(series.operator)
    (ax.set_xlabel if time_axis == "x" else ax.set_ylabel)(label)
    (ax.set_ylabel if time_axis == "x" else ax.set_xlabel)(f"{name} eigenvalue")
    ax.set_title(f"{operator_label(series.operator, series.block)}: eigenvalue density" if title is None else title)
    if colorbar:
        bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, extend="min")
        bar.set_label(f"density, {axis.unit}")
    return ax


def time_of(series: DensitySeries, time: str) -> tuple[np.ndarray, str]:
    """Where the measurements lie in time, and the label of that axis."""
    if time not in ("auto", "steps", "epochs"):
        raise ArgumentError(f'time is "auto", "steps" or "epochs", not {time!r}')
    steps, epochs = np.asarray(series.steps, dtype=np.float64), np.asarray(series.epochs, dtype=np.float64)
    usable = bool(np.isfinite(epochs).all() and (np.diff(epochs) > 0).all())
    if time == "epochs" and not usable:
        raise ArgumentError('not every measurement has an epoch of its own; use time="steps"')
    return (epochs, "epoch") if usable and time != "steps" else (steps, "optimizer step")


def cell_edges(times: np.ndarray) -> np.ndarray:
    """Borders halfway between measurements; the outer cells end as far out, though not before time 0."""
    if len(times) == 1:
        return np.array([times[0] - 0.5, times[0] + 0.5])
    middle = 0.5 * (times[1:] + times[:-1])
    first = 2 * times[0] - middle[0]
    return np.concatenate([[max(first, 0.0) if times[0] >= 0 else first], middle, [2 * times[-1] - middle[-1]]])


def mark_times(ax: Axes, times: np.ndarray, time_axis: str) -> None:
    """Ticks at the measurements, inside the frame on the side of the time axis."""
    from matplotlib.ticker import MaxNLocator

    along = ax.xaxis if time_axis == "x" else ax.yaxis
    if len(times) == 1:
        along.set_ticks(times.tolist())
    elif times[-1] - times[0] >= 2:  # half epochs and half steps would be ticks that mean nothing
        along.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    if time_axis == "x":
        ax.plot(times, np.zeros(len(times)), "|", transform=ax.get_xaxis_transform(), **RUG)
    else:
        ax.plot(np.zeros(len(times)), times, "_", transform=ax.get_yaxis_transform(), **RUG)


RUG: dict[str, Any] = {"color": INK, "markersize": 9, "markeredgewidth": 0.7, "clip_on": True}


def ink_map() -> Any:
    """Pale to black, monotone in lightness, from a tint that is told from white paper; white below."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    colours = matplotlib.colormaps["magma_r"](np.linspace(0.08, 1.0, 256))
    return LinearSegmentedColormap.from_list("ink", colours, N=256).with_extremes(under="white", bad="white")
