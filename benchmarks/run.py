"""Speed beside the other libraries, as ratios in one run: ``make bench`` or ``python benchmarks/run.py --quick``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import report
from deflation import deflation_rows
from eigen import eigen_rows
from figure import draw
from gpt2 import gpt2_rows
from gpu import gpu_rows
from growth import growth_rows
from layers import layer_rows
from memory import memory_rows
from nets import NETS
from noise import noise_rows
from optimizers import optimizer_rows
from overhead import monitor_rows
from products import batched_rows, compiled_rows, product_rows
from report import FAILED, Row, attempted
from rich.console import Console
from scale import scale_rows
from scale_page import refresh as refresh_scale
from scale_page import save as save_scale
from settings import Settings, Subject
from slq import slq_rows
from whole_runs import whole_run_rows

HERE = Path(__file__).parent
BY_NET: dict[str, Callable[[Subject, Settings], list[Row]]] = {
    "products": product_rows,
    "compiled": compiled_rows,
    "noise": noise_rows,
    "slq": slq_rows,
    "peers": whole_run_rows,
    "layers": layer_rows,
}
"""Parts that measure each of the three nets."""
ONCE: dict[str, Callable[[Settings], list[Row]]] = {
    "batched": batched_rows,
    "eigen": eigen_rows,
    "deflation": deflation_rows,
    "memory": memory_rows,
    "growth": growth_rows,
    "gpt2": gpt2_rows,
    "monitor": monitor_rows,
    "optimizers": optimizer_rows,
    "gpu": gpu_rows,
    "scale": scale_rows,
}
"""Parts with nets of their own."""
PARTS = ("products", "compiled", "batched", "noise", "slq", "peers", "eigen", "deflation", "layers", "memory",
         "growth", "gpt2", "monitor", "optimizers", "gpu", "scale")  # fmt: skip
"""All of them, in the order of the page."""


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 170)
    about = report.environment()
    console.print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}")
    begun = time.perf_counter()

    def tell(text: str) -> None:
        console.print(f"{time.perf_counter() - begun:5.0f} s  {text}", style="dim", highlight=False)

    chosen = {field.name: getattr(options, field.name) for field in fields(Settings) if hasattr(options, field.name)}
    rows = measured(options.only, Settings(**chosen, tell=tell))
    tell("done")
    console.print()
    report.show(rows, console)
    failed = [row for row in rows if row.holds is False]
    console.print(f"\n{len(failed)} of {sum(row.holds is not None for row in rows)} targets missed")
    if options.quick or options.device == "cpu":  # the GPU part on a CPU measures nothing
        console.print("Not saved: a --quick run never is")
        return int(any(row.section == FAILED for row in rows))
    if save_scale(rows, about):
        refresh_scale()
    if set(options.only) != set(PARTS) or options.nets:
        whole = report.with_earlier(rows, about, HERE / "results")
        if whole is None and options.only == ["gpu"] and "gpu" in about:
            whole = rows  # a machine with a GPU need not measure anything else
        if whole is None:
            console.print("Not saved: there is no whole run of today in this environment for these parts to go into")
            return 0
        rows = in_order(whole)
    setting = {key: value for key, value in vars(options).items() if key not in ("quick", "device")}
    path = report.save(rows, setting, about, HERE / "results")
    page, figure = HERE.parent / "docs" / "benchmarks.md", HERE.parent / "figures" / "benchmarks.png"
    written = [path]
    if "gpu" not in about:  # the page is about machines without; it takes the GPU part from the other's results
        report.refresh(rows, about, page, report.from_gpu(HERE / "results"))
        draw(path, figure)
        written += [page, figure]
    console.print(f"Saved {', '.join(str(file.relative_to(HERE.parent)) for file in written)}", soft_wrap=True)
    return int(any(row.section == FAILED for row in rows))


def measured(parts: list[str], settings: Settings) -> list[Row]:
    """The rows of some parts, in the order of the page; each net is made once and dropped before the next."""
    rows: list[Row] = []
    by_net = [part for part in PARTS if part in parts and part in BY_NET]
    for name, make in NETS.items():
        if not by_net or (settings.nets and name not in settings.nets):
            continue
        subject = Subject(name, make, quick=settings.quick)
        for part in by_net:
            settings.tell(f"{name}: {part}")
            rows += attempted(part, name, lambda part=part, subject=subject: BY_NET[part](subject, settings))
        del subject
    for part in PARTS:
        if part in parts and part in ONCE:
            settings.tell(part)
            rows += attempted(part, "", lambda part=part: ONCE[part](settings))
    return in_order(rows)


def in_order(rows: list[Row]) -> list[Row]:
    """By part, and within one by section; rows of unknown parts come first."""
    place = {part: index for index, part in enumerate(PARTS)}
    return report.in_sections(sorted(rows, key=lambda row: place.get(row.part, -1)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it runs; figures mean little")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="turns of each product (5)")
    parser.add_argument("--slq-rounds", type=int, help="turns of each peer's density (2)")
    parser.add_argument("--pairs", type=int, help="training runs with the monitor (3)")
    parser.add_argument("--seconds", type=float, help="length of each training run (20)")
    parser.add_argument("--long", action="store_true", help="the monitor with a share of 5 %% as well")
    parser.add_argument(
        "--nets", default="", help="only these nets, of parts that measure several; the others' figures stay"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.nets = [net for net in options.nets.split(",") if net]
    options.only = [part for part in options.only.split(",") if part]
    if not options.only or set(options.only) - set(PARTS):
        parser.error(f"--only takes some of {','.join(PARTS)}, separated by commas")
    usual = {"rounds": (5, 1), "slq_rounds": (2, 1), "pairs": (3, 1), "seconds": (20.0, 5.0)}
    for name, (whole, quick) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    return options


if __name__ == "__main__":
    sys.exit(main())
