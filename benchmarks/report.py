"""Rows as a table on the terminal, as JSON and as a page of the documentation."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measure import Timing
from peers import PACKAGES
from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- results: written by `make bench` -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Row:
    """One figure: its unit is the gradient unless ``unit`` says otherwise; ``low`` and ``high`` are quartiles.

    ``holds`` is None where there is no target, or where what it compares is not the same thing.
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
        return f"{x:.1%}" if self.unit == "share" else f"{x:.0f}" if self.unit == "count" else f"{x:.2f}"


def row_of(section: str, net: str, what: str, timing: Timing, target: float | None, note: str = "") -> Row:
    """A row from a timing, with the most that it may be."""
    text = "" if target is None else f"at most {target:.3g}"
    holds = None if target is None else timing.median <= target
    return Row(section, net, what, timing.median, *timing.quartiles, text, holds, note)


def environment() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine or its user."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "scipy", "curvdiag", *PACKAGES)},
    }


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("net", "what", box=None, header_style="bold", pad_edge=False)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("quartiles", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("holds")
    table.add_column("note", overflow="fold")
    section = ""
    for row in rows:
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
    return folder / f"{about['date']}-{system}-{about['threads']}-threads.json"


def with_earlier(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> list[Row] | None:
    """The day's saved rows in the same environment, with these in the place of theirs; None where there are none."""
    path = path_of(about, folder)
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["environment"] != about:
        return None
    found = {(row["section"], row["net"], row["what"]): Row(**row) for row in saved["rows"]}
    found |= {(row.section, row.net, row.what): row for row in rows}
    return list(found.values())


def save(rows: Sequence[Row], setting: dict[str, Any], about: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(about, folder)
    whole = {"environment": about, "setting": setting, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return path


def refresh(rows: Sequence[Row], about: dict[str, Any], page: Path) -> None:
    """Put the rows between the page's two marks; what stands outside is left alone."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page.name} needs the lines {BEGIN} and {END}, once each and in this order")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    lines = [_line(about), ""]
    section = ""
    for row in rows:
        if row.section != section:
            heading = ["", f"### {row.section}", ""] if section else [f"### {row.section}", ""]
            lines += [
                *heading,
                "| net | what | figure | quartiles | target | holds | note |",
                "|---|---|---|---|---|---|---|",
            ]
            section = row.section
        cells = (row.net, row.what, row.figure, row.spread, row.target, row.verdict, row.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    page.write_text("\n".join([head + BEGIN, "", *lines, "", END]) + tail, encoding="utf-8")


def _line(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {about[name]}" for name in ("torch", "numpy", *PACKAGES))
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['system']}, "
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
