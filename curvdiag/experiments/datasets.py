"""Public data sets in their standard formats, read from the folder that ``CURVDIAG_DATA`` names."""

from __future__ import annotations

import gzip
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvdiag.errors import DataError

IDX_BYTES = 0x08
"""The code of unsigned bytes in the IDX format, the only type that MNIST uses."""

CIFAR_IMAGE = (3, 32, 32)
CIFAR_ADMITTED = {
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
"""What a CIFAR-10 file names, beside built-in types: an array, in the words of old and of new NumPy."""


def data_folder() -> Path | None:
    """The folder of data sets, or None where there is none."""
    named = os.environ.get("CURVDIAG_DATA", "")
    return Path(named) if named and Path(named).is_dir() else None


def mnist(*, train: bool = True) -> tuple[Tensor, Tensor]:
    """Images ``[N, 28, 28]`` as bytes, and their classes ``[N]``.

    Raises:
        DataError: The folder or a file in it is missing, or a file is not what its name says.
    """
    folder = data_folder()
    if folder is None:
        raise DataError("set CURVDIAG_DATA to a folder that holds mnist/train-images-idx3-ubyte.gz and its companions")
    part = "train" if train else "t10k"
    images = read_idx(folder / "mnist" / f"{part}-images-idx3-ubyte.gz")
    classes = read_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte.gz")
    return images, classes.long()


def read_idx(path: Path) -> Tensor:
    """A tensor of bytes from a gzipped file in the IDX format.

    Raises:
        DataError: There is no such file, or it is not one of unsigned bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != IDX_BYTES:
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex()}")
    head = 4 + 4 * raw[3]
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int).tolist()
    if len(raw) - head != int(np.prod(shape)):
        raise DataError(f"{path} promises {shape} bytes and holds {len(raw) - head}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())


def cifar10(*, train: bool = True) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` as bytes, and their classes ``[N]``: 50,000 to learn from, or 10,000 to test.

    Raises:
        DataError: The folder or a file in it is missing, or a file is not what its name says.
    """
    folder = data_folder()
    if folder is None:
        raise DataError("set CURVDIAG_DATA to a folder that holds cifar-10-batches-py/data_batch_1 and its companions")
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    parts = [read_cifar10(folder / "cifar-10-batches-py" / name) for name in names]
    return torch.cat([images for images, _ in parts]), torch.cat([classes for _, classes in parts])


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` as bytes and classes ``[N]`` from one file of the Python version of CIFAR-10.

    The format is a pickle, which could run any code; here it may name nothing but :data:`CIFAR_ADMITTED`.

    Raises:
        DataError: There is no such file, or it is not one of CIFAR-10.
    """
    try:
        with path.open("rb") as file:
            held = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except Exception as error:  # a broken pickle raises almost anything
        raise DataError(f"{path} is not a whole pickle: {type(error).__name__}: {error}") from error
    images = held.get(b"data") if isinstance(held, dict) else None
    classes = held.get(b"labels") if isinstance(held, dict) else None
    if not isinstance(images, np.ndarray) or not isinstance(classes, list):
        raise DataError(f"{path} is not a file of CIFAR-10: it holds no 'data' array with a list of 'labels'")
    if images.dtype != np.uint8 or images.shape != (len(classes), np.prod(CIFAR_IMAGE)):
        raise DataError(
            f"{path}: {len(classes)} labels need as many rows of 3,072 bytes, and the data are {images.dtype} of shape "
            f"{images.shape}"
        )
    if not all(isinstance(one, int) and 0 <= one < 10 for one in classes):
        raise DataError(f"{path}: the labels of CIFAR-10 are whole numbers from 0 to 9, and some of these are not")
    return torch.from_numpy(images.reshape(-1, *CIFAR_IMAGE).copy()), torch.tensor(classes, dtype=torch.long)


class _ArraysOnly(pickle.Unpickler):
    """Admits the types of :data:`CIFAR_ADMITTED`, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CIFAR_ADMITTED:
            raise DataError(f"names {module}.{name}, which no file of CIFAR-10 does; nothing of it was run")
        # The old place of NumPy's internals still answers, with a warning.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
