"""Speed beside the other libraries, as ratios in one run: ``make bench`` or ``python benchmarks/run.py --quick``."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import measure
import overhead
import report
import torch
from measure import Pauses, Timing, relative
from nets import NETS, Batches, gradient, product_by_differences
from noise import covariance_products, moments_rows
from optimizers import optimizer_rows
from peers import Peer, peers
from report import Row, row_of
from rich.console import Console
from torch import nn

from curvdiag import Hessian, Objective, spectral_density

PARTS = ("products", "noise", "slq", "monitor", "optimizers")
HERE = Path(__file__).parent
KEPT = {"MLP": 2.3, "ResNet": 2.7, "GPT": 2.3}
REBUILT, EXTRA, MARGIN, MEASUREMENTS = 4.0, 0.4, 0.02, 10
STEPS, PROBES = 80, 4
# Two single-precision products of the same matrix, summed in different orders.
AGREEMENT = 1e-4


class Bench:
    """One net with everything that is timed on it."""

    def __init__(self, name: str, make: Callable[[], tuple[nn.Module, Batches]], *, quick: bool) -> None:
        torch.manual_seed(0)
        self.name = name
        model, batches = make()
        model.eval()
        objective = Objective(model, nn.CrossEntropyLoss(), batches=batches)
        self.model, self.batches, self.objective = model, batches, objective
        self.kept, self.rebuilt = Hessian(objective), Hessian(objective, memory=0)
        self.peers = peers(model, batches, quick=quick)
        self.vector = torch.randn(objective.parameters.size)
        self.vector /= self.vector.norm()
        self.unit = lambda: gradient(model, batches)
        self.ours = self.kept @ self.vector
        self.theirs = {"rebuilt": self.rebuilt @ self.vector}
        for peer in self.peers:
            self.theirs[peer.name] = peer.flat(peer.multiply(peer.prepare(self.vector)))
        # Where two disagree, a third that shares no code with either says who is right.
        self.referee = lambda: product_by_differences(model, batches, self.vector)

    def agrees(self, name: str) -> bool:
        return relative(self.theirs[name], self.ours) <= AGREEMENT

    def faster(self, name: str, ours: float, theirs: float) -> bool | None:
        """Whether we are; None where the peer computes something else, which is no comparison."""
        if self.agrees(name):
            return ours < theirs
        return None if relative(self.ours, self.referee()) <= AGREEMENT else False

    def products(self, rounds: int) -> list[Row]:
        candidates: dict[str, Callable[[], object]] = {
            "kept": lambda: self.kept @ self.vector,
            "rebuilt": lambda: self.rebuilt @ self.vector,
        }
        for peer in self.peers:
            candidates[peer.name] = _product(peer, peer.prepare(self.vector))
        timings = measure.alternate(self.unit, candidates, rounds=rounds)
        section = "Hessian product H @ v"
        kept, rebuilt = timings["kept"], timings["rebuilt"]
        plan = self.kept.plan
        note = "" if plan is None or not plan.rebuilt else "not all graphs fitted into memory"
        rows = [
            row_of(section, self.name, "curvdiag, graphs kept", kept, KEPT[self.name], note),
            row_of(section, self.name, "curvdiag, graphs rebuilt", rebuilt, REBUILT, self._difference("rebuilt")),
        ]
        for peer in self.peers:
            rows.append(row_of(section, self.name, peer.name, timings[peer.name], None, self._difference(peer.name)))
        return rows

    def slq(self, steps: int, rounds: int) -> list[Row]:
        section = f"A whole step of stochastic Lanczos quadrature, {STEPS} steps and {PROBES} probes"
        ours, product = self._own_slq(steps)
        extra = ours - product
        low, high = extra.quartiles
        note = "the whole density over all its steps"
        rows = [
            Row(section, self.name, "curvdiag", ours.mean, *ours.quartiles, note=_short(note, steps)),
            Row(
                section,
                self.name,
                "curvdiag, beyond the bare product",
                extra.mean,
                low,
                high,
                f"at most {EXTRA}",
                extra.mean <= EXTRA,
                f"against {product.mean:.2f} for H @ v in the same minute",
            ),
        ]
        taken: dict[str, list[float]] = {peer.name: [] for peer in self.peers}
        for _ in range(rounds):
            for peer in self.peers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ratio = measure.once(self.unit, _density(peer), peer.steps)
                taken[peer.name].append(ratio)
        for peer in self.peers:
            timing = Timing(tuple(taken[peer.name]))
            note = f"{peer.steps} steps, 1 probe" + (f"; {peer.note}" if peer.note else "")
            if not self.agrees(peer.name):
                note = f"{note}; {self._difference(peer.name)}"
            rows.append(
                Row(
                    section,
                    self.name,
                    peer.name,
                    timing.median,
                    *timing.quartiles,
                    f"more than {ours.mean:.2f}",
                    self.faster(peer.name, ours.mean, timing.median),
                    note,
                )
            )
        return rows

    def _own_slq(self, steps: int) -> tuple[Timing, Timing]:
        """Our step and the bare product, stretch by stretch of the same density."""
        spectral_density(self.kept, steps=2, probes=PROBES)
        pauses = Pauses((self.unit, lambda: self.kept @ self.vector), every=max(1, steps // 8))
        pauses.run(lambda tick: spectral_density(self.kept, steps=steps, probes=PROBES, progress=tick))
        return pauses.ratios(steps * PROBES)

    def _difference(self, name: str) -> str:
        text = f"product differs from curvdiag's by {relative(self.theirs[name], self.ours):.0e}"
        if self.agrees(name):
            return text
        truth = self.referee()
        return (
            f"void: {text}; from central differences in float64, curvdiag's differs by "
            f"{relative(self.ours, truth):.0e}, its own by {relative(self.theirs[name], truth):.0e}"
        )


def monitor_rows(fraction: float, *, seconds: float, pairs: int, tell: Callable[[str], None]) -> list[Row]:
    tell(f"monitor: {2 * pairs + 1} training runs of about {seconds:g} s, a share of {fraction:.0%} asked for")
    found = overhead.measure(fraction, seconds=seconds, pairs=pairs)
    section, net = "The monitor's share of a training run", "digits MLP"
    asked, target = f"OverheadBudget({fraction:g})", fraction + MARGIN
    note = f"{pairs} runs of {statistics.median(found.plain):.0f} s, preset standard with 20 steps and 3 probes"
    unrest = f"runs without the monitor differ by {found.unrest:.1%}"
    rows = []
    for what, shares, remark in (("own clock", found.own, note), ("wall clock", found.wall, unrest)):
        timing = Timing(shares)
        holds = timing.median <= target
        text = f"at most {target:.0%}"
        rows.append(
            Row(section, net, f"{asked}, {what}", timing.median, *timing.quartiles, text, holds, remark, "share")
        )
    fewest = min(found.measurements)
    counted = Timing(tuple(map(float, found.measurements)))
    rows.append(
        Row(
            section,
            net,
            f"{asked}, measurements",
            fewest,
            *counted.quartiles,
            f"at least {MEASUREMENTS}",
            fewest >= MEASUREMENTS,
            "in the run with the fewest",
            "count",
        )
    )
    return rows


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 170)
    about = report.environment()
    console.print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}")
    begun = time.perf_counter()

    def tell(text: str) -> None:
        console.print(f"{time.perf_counter() - begun:5.0f} s  {text}", style="dim", highlight=False)

    products: list[Row] = []
    noise: list[Row] = []
    densities: list[Row] = []
    shares: list[Row] = []
    steps_taken: list[Row] = []
    steps = 16 if options.quick else STEPS
    if {"products", "noise", "slq"} & set(options.only):
        for name, make in NETS.items():
            tell(f"{name}: operators and peers")
            bench = Bench(name, make, quick=options.quick)
            if "products" in options.only:
                tell(f"{name}: products")
                products += bench.products(options.rounds)
            if "noise" in options.only:
                tell(f"{name}: covariance, Gauss-Newton matrix, moments")
                noise += covariance_products(name, bench.model, bench.objective, bench.kept, bench.unit, options.rounds)
                noise += moments_rows(name, bench.model, bench.batches, bench.unit, options.rounds)
            if "slq" in options.only:
                tell(f"{name}: densities")
                densities += bench.slq(steps, options.slq_rounds)
            del bench
    if "monitor" in options.only:
        for fraction in (0.1, 0.05) if options.long else (0.1,):
            length = options.seconds * (0.1 / fraction)
            shares += monitor_rows(fraction, seconds=length, pairs=options.pairs, tell=tell)

    if "optimizers" in options.only:
        tell("steps of the optimizers")
        steps_taken = optimizer_rows(options.rounds)
    rows = products + noise + densities + shares + steps_taken
    tell("done")
    console.print()
    report.show(rows, console)
    failed = [row for row in rows if row.holds is False]
    console.print(f"\n{len(failed)} of {sum(row.holds is not None for row in rows)} targets missed")
    if options.quick:
        console.print("Not saved: a --quick run never is")
        return 0
    if set(options.only) != set(PARTS):
        whole = report.with_earlier(rows, about, HERE / "results")
        if whole is None:
            console.print("Not saved: there is no whole run of today in this environment for these parts to go into")
            return 0
        rows = whole
    setting = {key: value for key, value in vars(options).items() if key != "quick"}
    path = report.save(rows, setting, about, HERE / "results")
    page = HERE.parent / "docs" / "benchmarks.md"
    report.refresh(rows, about, page)
    console.print(f"Saved {path.relative_to(HERE.parent)} and {page.relative_to(HERE.parent)}", soft_wrap=True)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it runs; figures mean little")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="turns of each product (5)")
    parser.add_argument("--slq-rounds", type=int, help="turns of each peer's density (2)")
    parser.add_argument("--pairs", type=int, help="training runs with the monitor (3)")
    parser.add_argument("--seconds", type=float, help="length of each training run (20)")
    parser.add_argument("--long", action="store_true", help="the monitor with a share of 5 %% as well")
    options = parser.parse_args()
    options.only = [part for part in options.only.split(",") if part]
    if not options.only or set(options.only) - set(PARTS):
        parser.error(f"--only takes some of {','.join(PARTS)}, separated by commas")
    usual = {"rounds": (5, 1), "slq_rounds": (2, 1), "pairs": (3, 1), "seconds": (20.0, 5.0)}
    for name, (whole, quick) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    return options


def _product(peer: Peer, argument: object) -> Callable[[], object]:
    return lambda: peer.multiply(argument)


def _density(peer: Peer) -> Callable[[], object]:
    return lambda: peer.density(peer.steps)


def _short(note: str, steps: int) -> str:
    return note if steps == STEPS else f"{note}; {steps} steps only (--quick)"


if __name__ == "__main__":
    sys.exit(main())
