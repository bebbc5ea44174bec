"""The page itself: one HTML file with its scripts, its styles and its data, that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.extras import require
from curvdiag.plotting.style import LINES
from curvdiag.report.contents import bundle
from curvdiag.report.encoding import script_json

if TYPE_CHECKING:
    from curvdiag.record.queries import RunKey

SCRIPTS = (
    "decode.js", "theme.js", "lines.js", "edge.js", "spectrum.js", "layers.js", "sections.js", "tables.js", "page.js",
)  # fmt: skip
DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot", "5px,2px")


def write_report(store_path: str | os.PathLike[str], output: str | os.PathLike[str], run: RunKey = None) -> Path:
    """Write the runs of a file as one self-contained page, also while one of them goes on.

    Args:
        store_path: The run file.
        output: The page, an HTML file; what is there is replaced.
        run: Number or name of the run; without it the page holds all runs (the latest 20), to choose from.

    Returns:
        Where it was written.

    Raises:
        StoreError: The run file is missing, damaged or no run file, or the page cannot be written.
        ArgumentError: There is no such run, it holds nothing yet, or the page would replace the run file.
        MissingExtraError: plotly is not installed.
    """
    from curvdiag.record import RunStore
    from curvdiag.record.export import replace_whole

    plotly_script()  # before the long part
    if Path(output).expanduser().resolve() == Path(store_path).expanduser().resolve():
        raise ArgumentError(f"the page would replace the run file {store_path}; give it another name (-o FILE.html)")
    with RunStore(store_path, readonly=True) as store:
        data = bundle(store, run)
    names = {one["id"]: one["name"] for one in data["runs"]}
    title = names[data["chosen"]] if len(names) == 1 else data["file"]
    text = page(title, data)

    def write(file: IO[Any]) -> None:
        file.write(text)

    return replace_whole(Path(output), write, "w")


def page(title: str, data: dict[str, Any] | None, *, live: bool = False) -> str:
    """The page with its data, or with none, to ask for them where they are served (``live``)."""
    options = {"live": live, "lines": [line[0] for line in LINES], "dashes": DASHES, "colours": colours()}
    parts = {
        "title": html.escape(f"{title} - curvdiag"),
        "policy": html.escape(policy(live)),
        "style": asset("style.css"),
        "options": script_json(options),
        "data": script_json(data),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts()),
    }
    pieces = asset("page.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:  # one pass, so that nothing in the data is taken for a place to fill
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def policy(live: bool) -> str:
    """The content security policy: these very scripts, and no request but, served, for the data."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts())
    rules = [
        "default-src 'none'",
        "script-src " + " ".join(f"'sha256-{one}'" for one in hashes),
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
        *(["connect-src 'self'"] if live else []),
    ]
    return "; ".join(rules)


@cache
def plotly_script() -> str:
    """plotly.js, from the installed package.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    require("plotly", extra="report")
    text = str(require("plotly.offline", extra="report").get_plotlyjs())
    return text.replace("</script", "<\\/script").replace("\r\n", "\n").replace("\r", "\n")


def scripts() -> list[str]:
    """All scripts of the page, in their order."""
    return [plotly_script(), *(asset(name) for name in SCRIPTS)]


def asset(name: str) -> str:
    return files("curvdiag.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def colours() -> list[str]:
    """Of densities from low to high, pale to black, as in the figures of :mod:`curvdiag.plotting`."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(one) for one in matplotlib.colormaps["magma_r"](np.linspace(0.08, 1.0, 24))]
