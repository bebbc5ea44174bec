"""The numbers of ``docs/scale.md`` are those of the formulas and of the saved measurements, and so are its claims."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from curvdiag.spectrum.decoder import LLAMA_1B, LLAMA_7B, LLAMA_70B
from curvdiag.spectrum.hardware import HARDWARE
from curvdiag.spectrum.scale_plan import plan_ranks

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = ("report", "scale", "scale_page")


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


def share(bench, shape, ranks, hardware, way="sharded"):
    page = bench.scale_page
    work = shape.work(page.SEQUENCES, page.LENGTH, checkpointing=True)
    return getattr(plan_ranks(work, page.RUN, ranks, hardware=hardware), way)


def test_the_tables_of_the_page_are_those_that_the_formulas_give(bench):
    text = bench.scale_page.PAGE.read_text(encoding="utf-8")
    assert bench.scale_page.written(text) == text, "run benchmarks/scale_page.py"
    assert "has not been run" in " ".join(text.split())


def test_what_the_page_says_of_its_tables_holds(bench):
    graph = 4 * LLAMA_7B.graph(bench.scale_page.LENGTH)
    assert graph > HARDWARE["H100"].memory
    assert share(bench, LLAMA_1B, 8, "H200", "data_parallel").fits
    assert not any(share(bench, LLAMA_7B, ranks, "H200", "data_parallel").fits for ranks in (8, 512))
    assert share(bench, LLAMA_7B, 8, "H100").fits
    assert share(bench, LLAMA_7B, 8, "A100").fits
    assert share(bench, LLAMA_70B, 64, "H100").fits
    assert not share(bench, LLAMA_70B, 32, "H100").fits
    node = share(bench, LLAMA_70B, 8, "H100")
    assert 4 < node.peak / node.free < 5
    wide = share(bench, LLAMA_7B, 64, "H100")
    assert wide.compute > 5 * wide.communication
    assert 0.5 < wide.compute / (10 * wide.communication) < 2


def test_the_example_of_the_page_says_what_a_tenth_of_the_batch_takes(bench):
    page = bench.scale_page
    whole = plan_ranks(LLAMA_7B.work(640, page.LENGTH, checkpointing=True), page.RUN, 8, hardware="H100").sharded
    tenth = plan_ranks(LLAMA_7B.work(64, page.LENGTH, checkpointing=True), page.RUN, 8, hardware="H100").sharded
    assert whole.seconds / tenth.seconds == pytest.approx(10, rel=0.02)


def found(**changes):
    wire = {"all-reduce": 1.0, "all-gather": 1.0, "reduce-scatter": 2.0, "bandwidth": 1e9, "latency": 1e-4}
    way = {"predicted": 0.2, "computing": 0.15, "seconds": 0.25, "sent": 1.0}
    held = {"peak": 1.1e8, "foretold": 1e8, "constant": 2e7, "weights": 5e7}
    return {"wire": wire, "data-parallel": way, "sharded": dict(way), "memory": held} | changes


def test_what_was_measured_is_told_as_ratios_and_misses_are_seen(bench):
    rows = bench.scale.rows_of({1: found(), 2: found()})
    assert all(row.holds for row in rows)
    assert [row.value for row in rows if row.what.startswith("time")] == pytest.approx([1.25] * 4)
    assert not any(row.what.startswith("bytes") for row in rows if row.net == "1 rank")
    worse = found()
    worse["wire"]["all-reduce"], worse["sharded"]["seconds"] = 1.02, 0.41
    worse["memory"]["peak"], worse["data-parallel"]["sent"] = 1.3e8, 0.9
    missed = {row.what for row in bench.scale.rows_of({2: worse}) if not row.holds}
    assert missed == {
        "bytes sent in an all-reduce",
        "bytes sent for a product, data-parallel",
        "time of a product, sharded",
        "peak memory of a rank, sharded",
    }


def test_measurements_are_saved_with_their_environment_and_written_into_the_page(bench, tmp_path):
    rows = bench.report.attempted("scale", "", lambda: bench.scale.rows_of({2: found()}))
    about = {"date": "2026-01-01", "cpu": "a processor", "cores": 2, "torch": "2.13"}
    path = tmp_path / "scale.json"
    assert not bench.scale_page.save([bench.report.Row("S", "", "x", 1.0, 1.0, 1.0, part="slq")], about, path)
    assert bench.scale_page.checked(path) == ["Not measured yet."]
    assert bench.scale_page.save(rows, about, path)
    lines = bench.scale_page.checked(path)
    assert lines[0].startswith("2026-01-01, a processor, 2 cores")
    assert sum(line.startswith("| 2 |") for line in lines) == len(rows)
