"""CIFAR-10 is read from its standard files, and from nothing that only looks like one."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from curvdiag.errors import DataError
from curvdiag.experiments.datasets import cifar10, data_folder, read_cifar10

FOLDER = "cifar-10-batches-py"
needs_cifar = pytest.mark.skipif(
    data_folder() is None or not (data_folder() / FOLDER).is_dir(), reason="CURVDIAG_DATA names no folder with CIFAR-10"
)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings, which is how the original files were made."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_string


def as_python2(held: Any, *, numpy_module: bytes = b"numpy.core.multiarray") -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(held)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"c" + numpy_module + b"\n")


def batch(count: int = 4, seed: int = 0) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"testing batch 1 of 1",
        b"labels": rng.integers(0, 10, count).tolist(),
        b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"%d.png" % i for i in range(count)],
    }


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_file_in_the_original_format_is_read_pixel_by_pixel(tmp_path: Path, module: bytes) -> None:
    held = batch()
    path = tmp_path / "data_batch_1"
    path.write_bytes(as_python2(held, numpy_module=module))
    assert module in path.read_bytes()
    images, classes = read_cifar10(path)
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 32, 32)
    assert classes.tolist() == held[b"labels"]
    assert classes.dtype == torch.int64
    for image, channel, row, column in ((0, 0, 0, 0), (1, 2, 3, 4), (3, 1, 31, 30)):
        # The format: 1,024 red bytes, then green, then blue, each row by row.
        assert int(images[image, channel, row, column]) == int(held[b"data"][image, 1024 * channel + 32 * row + column])


def test_the_five_training_files_come_in_order_and_the_test_file_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FOLDER).mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    held = [batch(i + 1, seed=i) for i in range(6)]
    for name, one in zip(names, held, strict=True):
        (tmp_path / FOLDER / name).write_bytes(as_python2(one))
    monkeypatch.setenv("CURVDIAG_DATA", str(tmp_path))
    images, classes = cifar10()
    assert classes.tolist() == [label for one in held[:5] for label in one[b"labels"]]
    assert images.shape == (15, 3, 32, 32)
    assert np.array_equal(images.reshape(15, -1).numpy(), np.concatenate([one[b"data"] for one in held[:5]]))
    assert cifar10(train=False)[1].tolist() == held[5][b"labels"]
    (tmp_path / FOLDER / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"no file .*data_batch_3"):
        cifar10()
    monkeypatch.delenv("CURVDIAG_DATA")
    with pytest.raises(DataError, match="CURVDIAG_DATA"):
        cifar10()


class Harm:
    """Would make a file when unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({**batch(), b"extra": Harm(made)}, protocol=4))
    with pytest.raises(DataError, match=r"data_batch_1 names .*nothing of it was run"):
        read_cifar10(path)
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists(), "the file is a harmful one indeed"


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([1, 2], "holds no 'data' array"),
        ({b"data": batch()[b"data"]}, "list of 'labels'"),
        ({b"labels": [1], b"data": [1, 2, 3]}, "no 'data' array"),
        ({**batch(), b"labels": [1, 2, 3]}, "3 labels need as many rows"),
        ({**batch(), b"data": np.zeros((4, 3071), np.uint8)}, r"\(4, 3071\)"),
        ({**batch(), b"data": np.zeros((4, 3072), np.float32)}, "float32"),
        ({**batch(), b"labels": [0, 1, 2, 10]}, "from 0 to 9"),
        ({**batch(), b"labels": [0, 1, 2, -1]}, "from 0 to 9"),
        ({**batch(), b"labels": [0, 1, 2, b"3"]}, "from 0 to 9"),
    ],
)
def test_what_is_not_cifar_is_said_to_be_so(tmp_path: Path, held: Any, words: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(as_python2(held))
    with pytest.raises(DataError, match=words) as caught:
        read_cifar10(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_a_broken_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(as_python2(batch())[:keep])
    with pytest.raises(DataError, match="test_batch is not a whole pickle"):
        read_cifar10(path)


@needs_cifar
def test_the_real_files_hold_what_is_known_of_them() -> None:
    images, classes = cifar10()
    assert images.shape == (50_000, 3, 32, 32)
    assert classes.bincount().tolist() == [5_000] * 10
    # The channel means that everybody normalises with.
    means = images.numpy().mean((0, 2, 3), dtype=np.float64) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    images, classes = cifar10(train=False)
    assert images.shape == (10_000, 3, 32, 32)
    assert classes.bincount().tolist() == [1_000] * 10
    assert classes[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane
