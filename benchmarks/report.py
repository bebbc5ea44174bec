"""Rows as a table on the terminal, as JSON and as a page of the documentation."""

from __future__ import annotations

import datetime
import json
import os
import platform
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measure import Timing
from peers import PACKAGES
from rich.console import Console
from rich.table import Table

FAILED = "Parts that failed"
BEGIN, END = "<!-- results: written by `make bench` -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Row:
    """One figure: its unit is the gradient unless ``unit`` says otherwise; ``low`` and ``high`` are quartiles.

    ``holds`` is None where there is no target, or where what it compares is not the same thing. ``at`` is what grows
    along a series of rows (parameters, samples, steps, probes), ``seconds`` what the figure took. ``part`` is the part
    of the benchmark that made the row.
    """

    section: str
    net: str
    what: str
    value: float
    low: float
    high: float
    target: str = ""
    holds: bool | None = None
    note: str = ""
    unit: str = "gradients"
    at: float | None = None
    seconds: float | None = None
    part: str = ""

    @property
    def figure(self) -> str:
        return self._written(self.value)

    @property
    def spread(self) -> str:
        return "" if self.low == self.high else f"{self._written(self.low)} to {self._written(self.high)}"

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "void" if self.target else ""
        return "yes" if self.holds else "NO"

    def _written(self, x: float) -> str:
        if self.unit == "none":
            return ""
        return f"{x:.1%}" if self.unit == "share" else f"{x:.0f}" if self.unit == "count" else f"{x:.2f}"


def row_of(section: str, net: str, what: str, timing: Timing, target: float | None, note: str = "") -> Row:
    """A row from a timing, with the most that it may be."""
    text = "" if target is None else f"at most {target:.3g}"
    holds = None if target is None else timing.median <= target
    return Row(section, net, what, timing.median, *timing.quartiles, text, holds, note)


def attempted(part: str, net: str, make: Callable[[], list[Row]]) -> list[Row]:
    """The rows of one part; if it fails, its traceback and a row that says so, and the others go on."""
    try:
        rows = make()
    except Exception as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows = [Row(FAILED, net, part, 0.0, 0.0, 0.0, "runs to its end", False, words, "none")]
    return [replace(row, part=part) for row in rows]


def environment() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine or its user."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "scipy", "curvdiag", *PACKAGES)},
    }


def show(rows: Sequence[Row], console: Console) -> None:
    """As a table on the terminal."""
    table = Table("net", "what", box=None, header_style="bold", pad_edge=False)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("quartiles", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("holds")
    table.add_column("note", overflow="fold")
    section = ""
    for row in in_sections(rows):
        if row.section != section:
            table.add_row()
            table.add_row("", f"[bold]{row.section}[/bold]")
            section = row.section
        colour = {"yes": "green", "NO": "bold red", "void": "yellow", "": "none"}[row.verdict]
        verdict = f"[{colour}]{row.verdict}[/{colour}]" if row.verdict else ""
        table.add_row(row.net, row.what, row.figure, row.spread, row.target, verdict, row.note)
    console.print(table)


def path_of(about: dict[str, Any], folder: Path) -> Path:
    """Where a day's results on one kind of machine are saved."""
    system = about["system"].lower().replace(" ", "-")
    device = "gpu" if "gpu" in about else f"{about['threads']}-threads"
    return folder / f"{about['date']}-{system}-{device}.json"


def from_gpu(folder: Path) -> tuple[dict[str, Any], list[Row]] | None:
    """The environment and the rows of the GPU part from the newest results of a machine with one."""
    for path in sorted(folder.glob("[0-9]*-gpu.json"), reverse=True):
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in saved["rows"] if row["section"].startswith("GPU")]
        if rows:
            return saved["environment"], rows
    return None


def with_earlier(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> list[Row] | None:
    """The day's saved rows in the same environment, with these in the place of theirs; None where there are none.

    All rows of a net that a part has measured again go, also those that are no longer made.
    """
    path = path_of(about, folder)
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["environment"] != about:
        return None
    again = {(row.part, row.net) for row in rows if row.part}
    fresh = {_key(row): row for row in rows}
    found: dict[tuple[str, str, str], Row] = {}
    for row in (Row(**row) for row in saved["rows"]):
        if _key(row) in fresh or (row.part, row.net) not in again:
            found[_key(row)] = fresh.get(_key(row), row)
    return list((found | fresh).values())


def in_sections(rows: Sequence[Row]) -> list[Row]:
    """All rows of a section together, the sections in the order of their first rows."""
    sections = list(dict.fromkeys(row.section for row in rows))
    return sorted(rows, key=lambda row: sections.index(row.section))


def _key(row: Row) -> tuple[str, str, str]:
    return row.section, row.net, row.what


def save(rows: Sequence[Row], setting: dict[str, Any], about: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(about, folder)
    plain = [{key: value for key, value in asdict(row).items() if value is not None or key == "holds"} for row in rows]
    whole = {"environment": about, "setting": setting, "rows": plain}
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def refresh(
    rows: Sequence[Row],
    about: dict[str, Any],
    page: Path,
    gpu: tuple[dict[str, Any], list[Row]] | None = None,
) -> None:
    """Put the rows between the page's two marks; what stands outside is left alone.

    Args:
        gpu: Rows of a machine with a GPU, and its environment; they take the place of the row that says there is none.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page.name} needs the lines {BEGIN} and {END}, once each and in this order")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    own = [row for row in rows if gpu is None or not row.section.startswith("GPU")]
    lines = [_line(about), *tables(own)]
    if gpu is not None:
        lines += ["", f"The GPU part, on another machine: {_line(gpu[0])}", *tables(gpu[1])]
    page.write_text("\n".join([head + BEGIN, "", *lines, "", END]) + tail, encoding="utf-8")


def tables(rows: Sequence[Row]) -> list[str]:
    """Each section with its heading."""
    lines: list[str] = []
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    for section, found in sections.items():
        table = series_table(found) if all(row.at is not None for row in found) else plain_table(found)
        lines += ["", f"### {section}", "", *table]
    return lines


def plain_table(rows: Sequence[Row]) -> list[str]:
    """A line for each row."""
    lines = [_cells("net", "what", "figure", "quartiles", "target", "holds", "note"), "|---" * 7 + "|"]
    return lines + [_cells(r.net, r.what, r.figure, r.spread, r.target, r.verdict, r.note) for r in rows]


def series_table(rows: Sequence[Row]) -> list[str]:
    """A line for each series, and a column for each of its points: the figure and what it took."""
    places = sorted({row.at for row in rows if row.at is not None})
    lines = [_cells("what", *(f"{place:,.0f}" for place in places)), "|---" * (len(places) + 1) + "|"]
    for what in dict.fromkeys(row.what for row in rows):
        at = {row.at: f"{row.figure} ({1e3 * (row.seconds or 0):.3g} ms)" for row in rows if row.what == what}
        lines.append(_cells(what, *(at.get(place, "") for place in places)))
    return lines


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _line(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {about[name]}" for name in ("torch", "numpy", *PACKAGES))
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['gpu'] + ', ' if 'gpu' in about else ''}{about['system']}, "
        f"Python {about['python']}, {packages}."
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
