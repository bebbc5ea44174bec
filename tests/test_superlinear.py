"""The published set-up on MNIST, where the data are; and how MNIST is read."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from curvdiag.errors import ArgumentError, DataError
from curvdiag.experiments import superlinear
from curvdiag.experiments.datasets import data_folder, mnist, read_idx

needs_mnist = pytest.mark.skipif(
    data_folder() is None or not (data_folder() / "mnist").is_dir(), reason="CURVDIAG_DATA names no folder with MNIST"
)


def exponents(results: list, side: str) -> np.ndarray:
    """``[runs, counts]``."""
    fits = [getattr(one, side).noise_fits["ols"] for one in results]
    assert all(tuple(fit.counts) == superlinear.COUNTS for fit in fits)
    return np.array([fit.exponent for fit in fits])


def check_against_orientation(loss: str, seeds: range, tmp_path: Path) -> None:
    results = superlinear.compare(loss, seeds)
    published, held_out = exponents(results, "in_sample"), exponents(results, "held_out")
    for count, value in superlinear.ORIENTATION[loss].items():
        # A single run each, of unknown seed: the mean over seeds lies within the spread that seeds have.
        assert published[:, superlinear.COUNTS.index(count)].mean() == pytest.approx(value, abs=0.06)
    growth = published[:, -1] - published[:, 2]
    assert (growth > 0.15).all(), "in sample the exponent grows with the number of directions, in every run"
    held_growth = held_out[:, -1] - held_out[:, 2]
    assert (held_growth < growth - 0.1).all(), "and held out much less of that growth is left"
    assert all(one.bounds.lower_holds.all() and one.bounds.upper_holds.all() for one in results)
    figure = superlinear.draw({loss: results})
    figure.savefig(tmp_path / "figure.png")
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert {"reference, in-sample"} < set(labels)
    assert len(labels) == 3


@needs_mnist
def test_cross_entropy_gives_the_exponents_of_the_earlier_run(tmp_path: Path) -> None:
    check_against_orientation("cross-entropy", range(1), tmp_path)


@needs_mnist
@pytest.mark.long
@pytest.mark.parametrize("loss", superlinear.LOSSES)
def test_four_seeds_of_each_loss_agree_with_the_earlier_run(loss: str, tmp_path: Path) -> None:
    check_against_orientation(loss, range(4), tmp_path)


@needs_mnist
def test_the_mlp_and_its_data_are_as_published() -> None:
    inputs, targets = superlinear.some_digits(classes=3, per_class=20)
    assert inputs.shape == (60, 784)
    assert float(inputs.min()) == 0
    assert float(inputs.max()) == 1
    assert targets.bincount().tolist() == [20, 20, 20]
    assert [tuple(p.shape) for p in superlinear.published_mlp().parameters()] == [(50, 784), (50, 50), (10, 50)]
    assert mnist()[0].shape == (60_000, 28, 28)
    assert mnist(train=False)[1].shape == (10_000,)


def test_softmax_mse_is_the_mean_over_classes() -> None:
    logits, targets = torch.tensor([[2.0, 0.0, -1.0]]).log_softmax(1), torch.tensor([1])
    p = logits.exp()[0]
    expected = (p[0] ** 2 + (p[1] - 1) ** 2 + p[2] ** 2) / 3
    assert float(superlinear.softmax_mse(logits, targets)[0]) == pytest.approx(float(expected), rel=1e-6)


def test_idx_files_are_read_and_broken_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    head = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(head + images.tobytes()))
    assert torch.equal(read_idx(path), torch.from_numpy(images))
    for content, words in (
        (gzip.compress(head + images.tobytes()[:-1]), "holds 23"),
        (gzip.compress(b"GIF8" + images.tobytes()), "not an IDX file"),
        (b"not gzip", "gzip"),
        (gzip.compress(b"")[:10] + b"\xff" * 20, "not a whole gzip"),  # a header, and then no deflate stream
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_idx(path)
    with pytest.raises(DataError, match="no file"):
        read_idx(tmp_path / "nothing.gz")
    monkeypatch.delenv("CURVDIAG_DATA", raising=False)
    with pytest.raises(DataError, match="CURVDIAG_DATA"):
        mnist()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ArgumentError, match="softmax-mse"):
        superlinear.train("hinge")
    with pytest.raises(ArgumentError, match="10 classes"):
        superlinear.some_digits(classes=11)
