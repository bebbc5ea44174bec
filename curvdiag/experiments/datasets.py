"""Public data sets in their standard formats, read from the folder that ``CURVDIAG_DATA`` names."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from curvdiag.errors import DataError

IDX_BYTES = 0x08
"""The code of unsigned bytes in the IDX format, the only type that MNIST uses."""


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
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != IDX_BYTES:
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex()}")
    head = 4 + 4 * raw[3]
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int).tolist()
    if len(raw) - head != int(np.prod(shape)):
        raise DataError(f"{path} promises {shape} bytes and holds {len(raw) - head}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())
