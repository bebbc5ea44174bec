"""Looking at figures: their lines by label, and whether any text lies over another."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def lines_of(ax: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in ax.lines}


def line(ax: Axes, start: str) -> Any:
    (found,) = [one for label, one in lines_of(ax).items() if label.startswith(start)]
    return found


def assert_no_text_over_another(figure: Any) -> None:
    FigureCanvasAgg(figure).draw()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for axes in figure.axes
        for text in [
            axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts,
            *axes.get_xticklabels(), *axes.get_yticklabels(),
        ]
        if text.get_text().strip() and text.get_visible() and in_view(axes, text)
    ]  # fmt: skip
    boxes += [("suptitle", figure._suptitle.get_window_extent())] if figure.get_suptitle() else []
    legends = [("legend", axes.get_legend().get_window_extent()) for axes in figure.axes if axes.get_legend()]
    assert len(boxes) > 5
    for (a, one), (b, two) in itertools.combinations([*boxes, *legends], 2):
        assert not one.overlaps(two), f"{a!r} lies over {b!r}"
    for text, box in [*boxes, *legends]:
        assert figure.bbox.containsx(box.x0 + 1), text
        assert figure.bbox.containsx(box.x1 - 1), text
        assert figure.bbox.containsy(box.y0 + 1), text
        assert figure.bbox.containsy(box.y1 - 1), text


def in_view(axes: Axes, text: Any) -> bool:
    """Tick labels beyond the limits are not drawn."""
    for labels, limits, at in (
        (axes.get_xticklabels(), axes.get_xlim(), 0),
        (axes.get_yticklabels(), axes.get_ylim(), 1),
    ):
        if text in labels:
            return axes.axison and min(limits) <= text.get_position()[at] <= max(limits)
    return axes.axison or text in axes.texts
