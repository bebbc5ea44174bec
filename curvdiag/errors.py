"""Every error and warning that curvdiag raises, under one root.

A message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations


class CurvdiagError(Exception):
    """Root of all errors raised on purpose by curvdiag."""


class DataError(CurvdiagError, ValueError):
    """The data cannot be used: empty, one-shot, ambiguous, or with sizes that disagree."""


class LossError(CurvdiagError, ValueError):
    """The criterion or loss returns something that is not a mean over samples."""


class NonFiniteError(CurvdiagError, ArithmeticError):
    """A loss, gradient or product is NaN or infinite."""


class NotDeterministicError(CurvdiagError):
    """The same weights and the same batch give two different losses."""


class ParameterError(CurvdiagError, ValueError):
    """A parameter selection matches nothing, or selects what has no real curvature."""


class SecondDerivativeError(CurvdiagError):
    """A second derivative is missing or wrong, and is not to be taken for zero."""


class StaleWeightsError(CurvdiagError):
    """The weights changed under an operator that shares them with the model."""


class TooLargeError(CurvdiagError, MemoryError):
    """A dense object or a set of batches does not fit into memory; the message gives its size."""


class ArgumentError(CurvdiagError, ValueError):
    """An argument is out of its range or of the wrong shape."""


class StoreError(CurvdiagError):
    """A run file cannot be opened, read or written."""


class UnwritableStoreError(StoreError):
    """A run file cannot be written at present: read-only, a full disk, held by another process."""


class CheckpointError(CurvdiagError):
    """A checkpoint cannot be read, or does not fit the model; the message says why."""


class MissingExtraError(CurvdiagError, ImportError):
    """A package of an optional part of curvdiag is not installed; the message gives the pip command."""


class DistributedError(CurvdiagError):
    """Another rank failed, or the ranks do not do the same; every one of them raises it."""


class RankFailedError(DistributedError):
    """Another rank failed in what all of them do together, and so they all gave it up; they are still in step."""


class RankLostError(DistributedError):
    """A rank is gone, or has not answered within the timeout of the process group."""


def out_of_step(error: BaseException) -> bool:
    """Whether it says that ranks are gone or disagree, which no training should outlive."""
    return isinstance(error, DistributedError) and not isinstance(error, RankFailedError)


class CurvdiagWarning(UserWarning):
    """Root of all warnings given by curvdiag."""
