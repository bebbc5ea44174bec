"""What TensorBoard reads back is what was measured."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from logged import Training, collected, renamed
from PIL import Image

from curvdiag.errors import ArgumentError
from curvdiag.loggers import TensorBoardLogger
from curvdiag.loggers.evolution import Evolution
from curvdiag.loggers.histogram import histogram
from curvdiag.spectrum import SpectralDensity

HEATMAP = "curv/hessian/heatmap"
pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def scalars(reader):
    """Everything by tag: step, value."""
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def expected(history):
    found = {}
    for measurement in history:
        for tag, value in renamed(measurement.scalars).items():
            found.setdefault(tag, []).append((measurement.step, pytest.approx(value, rel=1e-6, nan_ok=True)))
    return found


def test_scalars_at_their_steps(tmp_path):
    training = Training(loggers=[TensorBoardLogger(tmp_path)], preset="full", measure=None).step(2)
    training.monitor.record({"mine": 0.5, "not a number": math.nan, "infinite": math.inf})
    training.close()
    reader = read(tmp_path)
    mine = {"mine": 0.5, "not a number": math.nan, "infinite": math.inf}
    found = scalars(reader)
    assert {tag: found.pop(tag) for tag in mine} == {
        tag: [(2, pytest.approx(v, nan_ok=True))] for tag, v in mine.items()
    }
    assert found == expected(training.history)
    assert {"curv/hessian/lambda_max", "noise/scale", "curv/train/lr/0", "curv/train/loss"} <= found.keys()


def test_densities_as_histograms_of_all_eigenvalues(tmp_path):
    training = Training(loggers=[TensorBoardLogger(tmp_path)]).step(2).close()
    reader = read(tmp_path)
    tags = {"curv/hessian/density", *(f"curv/layer/{k}/density" for k in (0, 2, 4))}
    assert set(reader.Tags()["histograms"]) == tags
    for tag, key in [("curv/hessian/density", ("hessian", "")), ("curv/layer/2/density", ("hessian", "2"))]:
        events = reader.Histograms(tag)
        assert [event.step for event in events] == [1, 2]
        for event, measurement in zip(events, training.history, strict=True):
            density, found = measurement.densities[key], event.histogram_value
            assert found.num == density.size == pytest.approx(sum(found.bucket))
            assert (found.min, found.max) == pytest.approx((density.lambda_min, density.lambda_max))
            assert found.sum == pytest.approx(density.trace().value)
            assert found.sum_squares == pytest.approx(density.squared_frobenius_norm().value)
            for k in (10, 32, 50):
                below = density.count(-math.inf, found.bucket_limit[k], tolerance=0.0).value
                assert sum(found.bucket[: k + 1]) == pytest.approx(below)


def test_the_heatmap_as_images_drawn_at_each_doubling_and_at_the_end(tmp_path):
    training = Training(loggers=[TensorBoardLogger(tmp_path)], measure=["density"]).step(9)
    training.close()
    images = read(tmp_path).Images(HEATMAP)
    assert [event.step for event in images] == [2, 4, 8, 9]
    picture = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    assert picture.shape == (504, 840, 3)
    assert np.array_equal(picture, drawn(training.history)), "it is the heatmap of all measurements"
    assert not np.array_equal(picture, drawn(training.history[:8]))


def drawn(history):
    evolution = Evolution()
    for measurement in history:
        evolution.add(measurement)
    return evolution.draw()


@pytest.mark.parametrize(("steps", "images"), [(1, [1]), (2, [2]), (3, [2, 3])])
def test_a_short_run_has_its_picture_once(steps, images, tmp_path):
    Training(loggers=[TensorBoardLogger(tmp_path)], measure=["density"]).step(steps).close()
    assert [event.step for event in read(tmp_path).Images(HEATMAP)] == images


def test_a_run_without_densities_has_no_picture(tmp_path):
    Training(loggers=[TensorBoardLogger(tmp_path)], measure=["trace"]).step(2).close()
    tags = read(tmp_path).Tags()
    assert (tags["images"], tags["histograms"]) == ([], [])


def test_the_configuration_stands_beside(tmp_path):
    Training(loggers=[TensorBoardLogger(tmp_path)], name="first", config={"lr": 0.1}, measure=["trace"]).step().close()
    (event,) = read(tmp_path).Tensors("curvdiag/config/text_summary")
    config = json.loads(event.tensor_proto.string_val[0].decode())
    assert (config["name"], config["lr"], config["curvdiag"]["measure"]) == ("first", 0.1, ["trace"])


def test_a_writer_of_the_users_own_is_used_and_left_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        training = Training(loggers=[TensorBoardLogger(writer)]).step().close()
        assert writer.file_writer is not None
        writer.add_scalar("train/loss", 7.0, 1)
    found = scalars(read(tmp_path))
    assert found.pop("train/loss") == [(1, 7.0)], "that of the user's own"
    assert found == expected(training.history)


def test_what_is_written_can_be_watched_while_the_run_lasts(tmp_path):
    training = Training(loggers=[TensorBoardLogger(tmp_path)], measure=["trace"]).step(2)
    assert [step for step, _ in scalars(read(tmp_path))["curv/hessian/trace"]] == [1, 2]
    training.close()


def test_a_resumed_run_shows_nothing_that_lies_beyond_the_checkpoint(tmp_path):
    options = {"measure": ["density"], "loggers": [TensorBoardLogger(tmp_path / "runs")]}
    first = Training(tmp_path / "run.db", **options).step(4)
    state = first.monitor.state_dict()
    first.step(4)
    first.monitor.record({"late": 1.0})
    first.close()
    options["loggers"] = [TensorBoardLogger(tmp_path / "runs")]
    second = Training(tmp_path / "run.db", **options)
    second.monitor.load_state_dict(state)
    second.monitor.cadence = lambda step: step == 6
    second.step(2).close()
    reader = read(tmp_path / "runs")
    found = scalars(reader)
    assert "late" not in found or found["late"] == []
    assert [step for step, _ in found["curv/hessian/frobenius_norm"]] == [1, 2, 3, 4, 6]
    assert [event.step for event in reader.Images(HEATMAP)] == [2, 4, 6]
    last = Image.open(io.BytesIO(reader.Images(HEATMAP)[-1].encoded_image_string))
    assert np.array_equal(np.asarray(last), drawn([*first.history[:4], *second.history])), "the past is in the picture"


def test_a_monitor_that_goes_back_within_a_process_goes_on_in_the_same_folder(tmp_path):
    training = Training(loggers=[TensorBoardLogger(tmp_path)], measure=["density"]).step(2)
    state = training.monitor.state_dict()
    training.step(3)
    training.monitor.load_state_dict(state)
    training.step(2).close()
    reader = read(tmp_path)
    assert [step for step, _ in scalars(reader)["curv/hessian/frobenius_norm"]] == [1, 2, 3, 4]
    assert [event.step for event in reader.Images(HEATMAP)] == [2, 4]


def test_a_folder_that_cannot_be_written_to_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    training = Training(loggers=[TensorBoardLogger(tmp_path / "file" / "runs")], measure=["trace"])
    (message,) = collected(lambda: training.step(2).close())
    assert "TensorBoardLogger" in message
    assert len(training.history) == 2


def test_what_is_neither_a_folder_nor_a_writer_is_refused():
    with pytest.raises(ArgumentError, match="a folder or a SummaryWriter, not 3"):
        TensorBoardLogger(3)


# Histograms


def density(nodes, weights=None, deflated=(), size=100):
    nodes = np.atleast_2d(np.asarray(nodes, dtype=np.float64))
    left = 1 - len(deflated) / size
    weights = np.full(nodes.shape, left / nodes.shape[1]) if weights is None else np.atleast_2d(weights)
    return SpectralDensity(nodes, weights, size, np.asarray(deflated, dtype=np.float64))


@pytest.mark.parametrize(
    "given",
    [
        density([0.0, 0.0, 0.0]),
        density([2.0]),
        density([-3.0, 1.0, 4.0]),
        density([[-1e-3, 0.0, 1e-3], [0.0, 2e-3, 4e-3]], deflated=(500.0, 900.0)),
        density([1e-20, 1e20]),
    ],
    ids=["zero", "one value", "plain", "outliers", "wide"],
)
def test_a_histogram_counts_every_eigenvalue_between_increasing_edges(given):
    found = histogram(given)
    assert np.all(np.diff(found.edges) > 0)
    assert np.isfinite(found.edges).all()
    assert found.counts.shape == (64,)
    assert found.counts.sum() == pytest.approx(given.size)
    assert found.edges[0] <= found.low <= found.high <= found.edges[-1]
    for outlier in given.deflated:
        (bin,) = np.flatnonzero((found.edges[:-1] <= outlier) & (outlier < found.edges[1:]))
        assert found.counts[bin] == pytest.approx(1.0), "an eigenvalue that stands alone is one"


def test_a_bulk_that_outliers_dwarf_does_not_end_in_one_bin():
    bulk = np.linspace(-1.0, 1.0, 40)
    found = histogram(density(bulk, deflated=(1000.0,)))
    assert (found.counts > 0).sum() > 10
