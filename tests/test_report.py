"""The report's data are what the run holds, and its page is one file that no name in a run can break out of."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import ENDING, HOSTILE, LAYERS, density, full, large, small

from curvdiag.cli import main
from curvdiag.errors import ArgumentError, MissingExtraError, StoreError
from curvdiag.estimate import Estimate
from curvdiag.plotting.eigenvalue_axis import choose_axis
from curvdiag.record import RunStore
from curvdiag.report import bundle, serve, write_report
from curvdiag.report.grids import CELLS
from curvdiag.report.page import plotly_script
from curvdiag.report.thinning import evenly, extremes


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full(tmp_path_factory.mktemp("runs") / "run.db")


@pytest.fixture(scope="module")
def written(run_file: Path) -> str:
    return write_report(run_file, run_file.with_name("report.html")).read_text(encoding="utf-8")


def unpack(text: str, dtype: str = "<f8") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def only_run(path: Path) -> dict[str, Any]:
    with RunStore(path, readonly=True) as store:
        data = bundle(store)
    (run,) = data["held"].values()
    return dict(run)


def embedded(page: str, name: str = "data") -> Any:
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def test_the_grid_of_bytes_gives_back_each_density_to_its_resolution(run_file: Path) -> None:
    with RunStore(run_file, readonly=True) as store:
        series = store.densities()
    axis = choose_axis(series.densities)
    (found,) = [one for one in only_run(run_file)["densities"] if not one["block"]]
    levels = unpack(found["levels"], "u1").reshape(len(series), CELLS).astype(float)
    logs = found["floor"] + (levels - 1) * (found["top"] - found["floor"]) / 254
    positions = np.linspace(*found["positions"], CELLS)
    np.testing.assert_allclose(axis.eigenvalue(positions), unpack(found["centres"]), rtol=1e-9, atol=1e-12)
    half_a_level = 0.5 * (found["top"] - found["floor"]) / 254
    for one, row, level in zip(series.densities, logs, levels, strict=True):
        wanted = np.log(axis.smooth(one, positions))
        seen = level > 0
        assert seen.sum() > 50
        assert np.abs(row - wanted)[seen].max() < half_a_level + 0.02
        assert (wanted[~seen] < found["floor"] + 0.02).all()
    assert unpack(found["steps"]).tolist() == series.steps.tolist()
    assert unpack(found["highest"])[3] == pytest.approx(series.densities[3].lambda_max)
    assert unpack(found["lowest"])[3] == pytest.approx(series.densities[3].lambda_min)


def test_an_outlier_of_one_eigenvalue_is_seen_and_emptiness_is_not(run_file: Path) -> None:
    (found,) = [one for one in only_run(run_file)["densities"] if not one["block"]]
    centres, levels = unpack(found["centres"]), unpack(found["levels"], "u1").reshape(-1, CELLS)
    top = density(0).lambda_max
    assert levels[0][np.abs(centres - top).argmin()] > 0
    assert levels[0][np.abs(centres - 3 * top).argmin()] == 0


def test_an_axis_has_enough_round_ticks_however_short_it_is(run_file: Path) -> None:
    for one in only_run(run_file)["densities"]:
        places, labels = zip(*one["ticks"], strict=True)
        values = np.array([float(label.replace("\u2212", "-")) for label in labels])
        assert 5 <= len(values) <= 16
        assert 0 in values
        at = np.interp(places, np.linspace(*one["positions"], CELLS), unpack(one["centres"]))
        np.testing.assert_allclose(at, values, rtol=0.01, atol=0.01)


def test_scalars_are_exact_and_their_bands_are_those_of_their_estimates(run_file: Path) -> None:
    run = only_run(run_file)
    by_name = {one["name"]: one for one in run["scalars"]}
    with RunStore(run_file, readonly=True) as store:
        assert set(by_name) == set(store.scalar_names())
        for name in ("curv/hessian/lambda_max", "noise/scale", f"curv/layer/{ENDING}/lambda_max"):
            series = store.scalars(name)
            np.testing.assert_array_equal(unpack(by_name[name]["values"]), series.values)
            np.testing.assert_array_equal(unpack(run["axes"][by_name[name]["axis"]]["steps"]), series.steps)
        traced = store.scalars("curv/hessian/trace")
    estimate = Estimate(traced.values[5], traced.standard_errors[5], int(traced.samples[5]))
    low, high = estimate.interval()
    trace = by_name["curv/hessian/trace"]
    assert unpack(trace["band"], "<f4")[5] == pytest.approx((high - low) / 2, rel=1e-6)
    assert unpack(trace["errors"], "<f4")[5] == pytest.approx(estimate.standard_error, rel=1e-6)
    assert "band" not in by_name["curv/hessian/lambda_max"]


def test_of_two_samples_the_error_is_told_and_no_interval(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        store.new_run().record(0, {"curv/hessian/trace": Estimate(1.0, 0.5, 2)})
    (trace,) = only_run(tmp_path / "run.db")["scalars"]
    assert unpack(trace["errors"], "<f4") == [0.5]
    assert np.isnan(unpack(trace["band"], "<f4")).all()


def test_a_long_series_keeps_its_ends_and_its_spikes() -> None:
    values = np.sin(np.arange(100_000) / 3000.0)
    values[54_321] = 50.0
    values[70_000:90_000] = np.nan
    kept = extremes(values, 500)
    assert len(kept) <= 500
    assert {0, 54_321, 99_999} <= set(kept.tolist())
    assert np.isnan(values[kept]).any()
    assert (np.diff(kept) > 0).all()
    assert evenly(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert evenly(7, 10).tolist() == list(range(7))


def test_a_page_asks_for_nothing_and_runs_only_its_own_scripts(written: str) -> None:
    head = written[: written.index("<style>")]
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)"', head)[0])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    assert re.findall(r"'sha256-(.*?)'", policy) == hashes
    assert plotly_script() in scripts
    markup = re.sub(r"<(script|style).*?</\1>", "", written, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="([^#"]*)"', markup) == ["data:,"]


def test_names_of_a_run_stay_text_in_the_markup_and_in_the_data(written: str) -> None:
    assert html.escape(HOSTILE) in written
    assert written.count(HOSTILE) == 0
    assert ENDING not in written
    assert written.count("<script") == written.count("</script")
    data = embedded(written)
    assert data["runs"][0]["name"] == HOSTILE
    run = data["held"]["1"]
    assert run["config"]["nested"][ENDING] == HOSTILE
    assert run["events"][0][2] == f"about {ENDING}"
    assert {one["block"] for one in run["densities"]} == {"", *LAYERS}


def test_what_json_cannot_say_is_said_in_words(written: str) -> None:
    assert embedded(written)["held"]["1"]["config"]["nan"] == "NaN"


def test_a_page_with_all_runs_or_with_the_one_asked_for(tmp_path: Path) -> None:
    path = small(tmp_path / "run.db", "first", "second", "third")
    with RunStore(path) as store:
        store.new_run("begun")
    data = embedded(write_report(path, tmp_path / "all.html").read_text())
    assert [one["name"] for one in data["runs"]] == ["first", "second", "third"]
    assert data["chosen"] == 3
    assert set(data["held"]) == {"1", "2", "3"}
    for chosen in ("second", "2", 2):
        page = write_report(path, tmp_path / "one.html", chosen).read_text()
        assert [one["name"] for one in embedded(page)["runs"]] == ["second"]
        assert "<title>second - curvdiag</title>" in page
    with pytest.raises(ArgumentError, match=r"'begun'.*no measurement yet"):
        write_report(path, tmp_path / "none.html", "begun")
    with pytest.raises(ArgumentError, match="no run 'fourth'"):
        write_report(path, tmp_path / "none.html", "fourth")
    assert not (tmp_path / "none.html").exists()


def test_five_hundred_measurements_of_twenty_layers_make_less_than_15_megabytes(tmp_path: Path) -> None:
    path = large(tmp_path / "run.db")
    page = write_report(path, tmp_path / "report.html")
    assert page.stat().st_size < 15e6
    run = embedded(page.read_text())["held"]["1"]
    assert len(run["densities"]) == 21
    assert all(one["measured"] == 500 and len(unpack(one["steps"])) == 500 for one in run["densities"])


def test_what_is_not_finite_is_left_out_of_the_densities(tmp_path: Path) -> None:
    broken = dataclasses.replace(density(1), nodes=np.full((4, 40), np.nan))
    zero = dataclasses.replace(density(1), nodes=np.zeros((4, 40)))
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run()
        for step, one in enumerate((density(0), broken, density(2))):
            run.record(step, {"train/loss": np.nan}, {("hessian", ""): one, ("c", "a"): broken, ("c", "b"): zero})
    found = {one["block"]: one for one in only_run(tmp_path / "run.db")["densities"]}
    assert set(found) == {"", "b"}
    assert unpack(found[""]["steps"]).tolist() == [0, 2]
    assert unpack(found["b"]["levels"], "u1").max() == 255


def test_however_long_a_run_is_its_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvdiag.report.contents.GRID_BYTES", 40 * CELLS * 6)
    monkeypatch.setattr("curvdiag.report.contents.VALUES", 1000)
    run = only_run(full(tmp_path / "run.db", times=45))
    assert {len(unpack(one["steps"])) for one in run["densities"]} == {40}
    assert {one["measured"] for one in run["densities"]} == {45}
    assert max(len(unpack(one["values"])) for one in run["scalars"]) <= 1000 // len(run["scalars"]) < 30
    assert {one["measured"] for one in run["scalars"]} == {45}


def test_the_command_writes_the_page_and_says_where(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_file.with_name("other.html")
    assert curvdiag("report", run_file, "-o", output, "--run", "1") == 0
    assert re.search(r"wrote .*other\.html \(\d\.\d MB\)", " ".join(capsys.readouterr().out.split()))
    assert output.read_text().startswith("<!DOCTYPE html>")


def test_what_cannot_be_reported_is_said_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt, empty = tmp_path / "corrupt.db", tmp_path / "empty.db"
    corrupt.write_bytes(b"no database at all" * 100)
    RunStore(empty).close()
    good = small(tmp_path / "good.db", "a")
    for arguments, words in {
        (tmp_path / "missing.db",): "there is no run file",
        (corrupt,): "not a run file",
        (empty,): "no measurement yet",
        (good, "--run", "b"): "there is no run 'b'",
        (good, "-o", tmp_path / "nowhere" / "page.html"): "nowhere",
        (good, "-o", good): "would replace the run file",
    }.items():
        assert curvdiag("report", *arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("curvdiag: error:")
        assert words in told
        assert told.count("\n") == 1
    for path in (tmp_path / "missing.db", corrupt):
        assert curvdiag("watch", path, "--port", "0") == 2
        assert "curvdiag: error:" in capsys.readouterr().err
        with pytest.raises(StoreError):
            serve(path, 0)


def test_without_plotly_the_error_gives_the_pip_command(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plotly_script.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    try:
        for attempt in (lambda: write_report(run_file, tmp_path / "page.html"), lambda: serve(run_file, 0)):
            with pytest.raises(MissingExtraError, match=r"pip install 'curvdiag\[report\]'"):
                attempt()
    finally:
        plotly_script.cache_clear()
