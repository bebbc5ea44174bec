"""The benchmark's own arithmetic: ratios, saved rows, the forward mode that ours is compared with, the figure."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from curvdiag import GaussNewton, NoiseCovariance, Objective

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = ("measure", "report", "settings", "nets", "routes", "figure", "growth", "layers", "eigen", "memory", "gpu")


@pytest.fixture(scope="module")
def bench():
    """Its modules, which import each other by bare names, as scripts do; other tests have a ``nets`` of their own."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


class Clock:
    """A clock that only the calls move, on a machine that slows down from call to call."""

    def __init__(self, drift: float = 1.0) -> None:
        self.now, self.speed, self.drift = 0.0, 1.0, drift

    def call(self, work: float):
        def run() -> None:
            self.now += work * self.speed
            self.speed *= self.drift

        return run

    def perf_counter(self) -> float:
        return self.now


def row(bench, what="x", part="a", section="S", value=1.0, **more):
    return bench.report.Row(section, "MLP", what, value, value, value, part=part, **more)


@pytest.mark.parametrize("drift", [1.0, 1.02])
def test_pairs_give_the_ratio_of_the_work_on_a_machine_that_slows_down(bench, monkeypatch, drift):
    clock = Clock(drift)
    monkeypatch.setattr(bench.measure, "time", clock)
    timing = bench.measure.paired(clock.call(3.0), clock.call(2.0), budget=200.0)
    assert len(timing.ratios) >= 9
    assert timing.median == pytest.approx(1.5, rel=2e-3)


def test_turns_give_multiples_of_the_unit(bench, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench.measure, "time", clock)
    found = bench.measure.alternate(clock.call(0.5), {"a": clock.call(1.0), "b": clock.call(4.0)}, rounds=3)
    assert found["a"].ratios == pytest.approx((2.0,) * 3)
    assert (found["b"] / 4).median == pytest.approx(2.0)
    assert (found["b"] - found["a"]).median == pytest.approx(6.0)


def test_a_part_measured_again_replaces_its_rows_and_leaves_the_others(bench, tmp_path):
    about = {"date": "2026-01-01", "system": "Linux x", "threads": 2}
    old = [row(bench, "gone"), row(bench, "same", value=2.0), row(bench, "kept", part="b", holds=False)]
    bench.report.save(old, {}, about, tmp_path)
    found = bench.report.with_earlier([row(bench, "same", value=3.0, at=7.0), row(bench, "new")], about, tmp_path)
    assert {(r.what, r.value, r.holds, r.at) for r in found} == {
        ("same", 3.0, None, 7.0),
        ("kept", 1.0, False, None),
        ("new", 1.0, None, None),
    }
    assert bench.report.with_earlier(old, about | {"threads": 1}, tmp_path) is None


def test_rows_without_a_part_are_replaced_by_their_name(bench, tmp_path):
    about = {"date": "2026-01-01", "system": "Linux x", "threads": 2}
    bench.report.save([row(bench, "x", part=""), row(bench, "y", part="")], {}, about, tmp_path)
    found = bench.report.with_earlier([row(bench, "x", value=5.0)], about, tmp_path)
    assert [(r.what, r.value) for r in found] == [("x", 5.0), ("y", 1.0)]


def test_sections_stay_together_in_the_order_of_their_first_rows(bench):
    rows = [row(bench, str(i), section=s) for i, s in enumerate("abab")]
    assert [r.what for r in bench.report.in_sections(rows)] == ["0", "2", "1", "3"]


def test_results_that_are_no_numbers_are_not_saved(bench, tmp_path):
    about = {"date": "2026-01-01", "system": "Linux x", "threads": 2}
    with pytest.raises(ValueError, match="JSON"):
        bench.report.save([row(bench, value=float("nan"))], {}, about, tmp_path)


def test_a_part_that_fails_leaves_a_row_that_says_so(bench, capsys):
    def fail():
        raise ValueError("no such thing\nand more")

    (found,) = bench.report.attempted("slq", "GPT", fail)
    assert (found.section, found.what, found.net, found.verdict) == (bench.report.FAILED, "slq", "GPT", "NO")
    assert found.note == "ValueError: no such thing"
    assert found.part == "slq"
    assert "Traceback" in capsys.readouterr().err


def test_the_page_has_a_column_for_each_point_and_the_gpu_of_another_machine(bench, tmp_path):
    about = {
        "date": "2026-01-01",
        "cpu": "C",
        "cores": 2,
        "threads": 2,
        "system": "Linux x",
        "python": "3",
        "torch": "2",
        **dict.fromkeys(("numpy", *bench.report.PACKAGES), "1"),
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.report.BEGIN}\nstale\n{bench.report.END}\nafter\n")
    series = [row(bench, "a step", section="Growth", at=n, seconds=n / 1e4, value=n / 10) for n in (10.0, 2000.0)]
    here, there = row(bench, section="GPU: none", unit="none"), row(bench, section="GPU: product", value=1.25)
    elsewhere = about | {"gpu": "A Board"}
    bench.report.save([there], {}, elsewhere, tmp_path)
    bench.report.refresh([row(bench), *series, here], about, page, bench.report.from_gpu(tmp_path))
    text = page.read_text()
    assert "| what | 10 | 2,000 |" in text
    assert "| a step | 1.00 (1 ms) | 200.00 (200 ms) |" in text
    assert "A Board" in text
    assert "GPU: none" not in text
    assert "stale" not in text
    assert text.index("Growth") < text.index("GPU: product") < text.index("after")


def test_an_unknown_net_of_the_gpu_part_is_refused(bench):
    with pytest.raises(ValueError, match="ResNet-18"):
        bench.gpu.gpu_rows(bench.settings.Settings(device="cpu", nets=["ResNet-19"]))


@pytest.mark.long
def test_the_gpu_part_runs_on_a_cpu_with_tiny_nets(bench):
    pytest.importorskip("curvlinops")
    pytest.importorskip("hessian_eigenthings")
    said: list[str] = []
    settings = bench.settings.Settings(quick=True, rounds=1, slq_rounds=1, device="cpu", nets=["MLP"], tell=said.append)
    found = {(r.section, r.what): r for r in bench.gpu.gpu_rows(settings)}
    assert bench.report.FAILED not in {section for section, _ in found}
    assert {what for section, what in found if section == bench.gpu.PRODUCTS} >= {
        bench.gpu.OURS,
        bench.gpu.COMPILED,
        "curvlinops",
        "curvlinops, compiled",
        "hessian-eigenthings",
    }
    assert found[bench.gpu.WAITS, "curvdiag, waits in ten Lanczos steps"].value == 0


@pytest.mark.parametrize("net", ["mlp", "tokens"])
def test_forward_mode_gives_the_same_matrices(bench, net):
    torch.manual_seed(0)
    if net == "mlp":
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        batches = [(torch.randn(4, 6).double(), torch.randint(3, (4,))) for _ in range(2)]
    else:
        model = bench.nets.GPT(7, 5, 1, 8, 2)
        batches = [(torch.randint(7, (2, 5)), torch.randint(7, (2, 5))) for _ in range(2)]
    model = model.double().eval()
    objective = Objective(model, nn.CrossEntropyLoss(), batches=batches)
    found = bench.routes.forward_mode(model, batches)
    v = torch.randn(objective.parameters.size, dtype=torch.float64)
    for name, operator in (("C @ v", NoiseCovariance(objective)), ("GGN @ v", GaussNewton(objective))):
        assert bench.measure.relative(found[name](v), operator @ v) < 1e-10


def test_every_layer_of_the_benchmark_is_in_its_net_once(bench):
    for name, make in bench.nets.NETS.items():
        parameters = Objective(*_without_data(make, nn.CrossEntropyLoss())).parameters
        taken = [parameters.names[i] for glob in bench.layers.LAYERS[name].values() for i in parameters.select(glob)]
        assert len(taken) == len(set(taken))
        assert len(taken) > len(parameters.names) // 2


def _without_data(make, criterion):
    model, batches = make()
    return model, criterion, (batches[0][0][:1], batches[0][1][:1])


def test_quality_counts_the_eigenvalues_that_lapack_has(bench):
    matrix = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.1], dtype=torch.float64))
    basis = torch.eye(4, dtype=torch.float64)
    values = np.array([5.0, 4.0])
    right = bench.eigen.quality(matrix, torch.tensor([5.0, 4.0]), basis[:, :2], values)
    assert right == "all of LAPACK's values, largest residual 0.0e+00 of the largest"
    wrong = bench.eigen.quality(matrix, torch.tensor([5.0, 1.0]), basis[:, [0, 2]], values)
    assert wrong.startswith("1 of")
    rough = bench.eigen.quality(matrix, torch.tensor([5.0, 4.5]), basis[:, :2], values)
    assert bench.eigen.residual_of(rough) == pytest.approx(0.1)


def test_the_peak_of_a_case_that_fails_is_no_figure(bench):
    with pytest.raises(RuntimeError, match="nonsense"):
        bench.memory.in_own_process("nonsense")


def test_the_figure_is_drawn_from_saved_rows_and_without_some_of_them(bench, tmp_path):
    sections = bench.growth.SECTIONS
    rows = [
        row(bench, "curvdiag, graphs kept", section="Hessian product H @ v"),
        row(bench, "curvlinops", section="Hessian product H @ v", note="void: product differs"),
        *(row(bench, "curvdiag, a step", section=sections["samples"], at=n, seconds=n / 1e3) for n in (8.0, 16.0)),
        *(row(bench, "curvdiag, a step", section=sections["steps"], at=n, seconds=1.0) for n in (10.0, 20.0)),
    ]
    path = bench.report.save(rows, {}, {"date": "2026-01-01", "system": "Linux x", "threads": 2}, tmp_path)
    bench.report.save(rows[:1], {}, {"date": "2025-12-31", "system": "Linux x", "threads": 2}, tmp_path)
    assert bench.figure.newest(tmp_path) == path
    out = tmp_path / "figures" / "benchmarks.png"
    bench.figure.draw(path, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(path.read_text())["rows"]) == len(rows)
