"""Two batch sizes from the gradients of several ranks and micro-batches, whatever their sizes and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

RankAccumulation = Literal["mean", "sum", "samples", "global"]

WAYS = ("mean", "sum", "samples", "global")


class MicroBatches(NamedTuple):
    """What is known on the host of one rank's micro-batches of a step, and how their gradients were weighted.

    A micro-batch of ``b`` samples adds ``c`` times its mean gradient to ``.grad``, and the ranks' sums are averaged.
    ``c`` is ``unit / divisor``, with ``unit`` 1 or ``b``.

    Attributes:
        sizes: Samples of each.
        divisor: What their gradients were divided by.
        unit_is_size: Whether ``unit`` is ``b``.
    """

    sizes: tuple[float, ...]
    divisor: float
    unit_is_size: bool

    def sums(self, ranks: int) -> tuple[float, float, float, float, float]:
        """``sum 1/b``, their number, ``sum a``, ``sum a^2/b`` with ``a = c / ranks``, and ``sum b``."""
        shares = [(b if self.unit_is_size else 1.0) / self.divisor / ranks for b in self.sizes]
        return (
            sum(1 / b for b in self.sizes),
            float(len(self.sizes)),
            sum(shares),
            sum(a * a / b for a, b in zip(shares, self.sizes, strict=True)),
            sum(self.sizes),
        )


def micro_batches(sizes: Sequence[float], accumulation: str, divisor: float | None) -> MicroBatches:
    """The weights of one rank's micro-batches; those of ``"global"`` without its divisor, which all ranks make up."""
    of = {"mean": divisor or float(len(sizes)), "sum": 1.0, "samples": sum(sizes), "global": 1.0}[accumulation]
    return MicroBatches(tuple(sizes), of, accumulation in ("samples", "global"))


class TwoNorms(NamedTuple):
    """Squared norms of mean gradients over a small and a large batch, and the two numbers of samples."""

    small: float
    large: float
    small_batch: float
    large_batch: float


def two_norms(row: Sequence[float], accumulation: str, ranks: int) -> TwoNorms:
    """What the sums over all ranks say.

    The small norm is the mean over all micro-batches of all ranks of their mean gradients' squared norms, whose noise
    is ``tr C`` times the mean of ``1/b``. The large gradient is ``G = sum_m a_m g_m``, so that
    ``E|G|^2 = (sum a)^2 |g|^2 + tr C sum a^2/b``.

    Args:
        row: Sums over the ranks: of the squared norms of the micro-batches' mean gradients, the five of
            :meth:`MicroBatches.sums`, and the squared norm of the reduced gradient.
        accumulation: As in :class:`~curvdiag.noise.rank_noise_scale.RankNoiseScale`.
        ranks: Their number.
    """
    own, inverses, count, weight, spread, samples, reduced = row
    if accumulation == "global":  # the divisor is the number of samples over that of ranks
        divisor = samples / ranks
        own, weight, spread = own * divisor**2, weight / divisor, spread / divisor**2
    return TwoNorms(own / count, reduced / weight**2, count / inverses, weight**2 / spread)
