"""A density on several ranks, both ways side by side: what ``objective.plan(world_size=...)`` prints."""

from __future__ import annotations

from dataclasses import dataclass

from curvdiag.errors import ArgumentError
from curvdiag.memory import human_bytes
from curvdiag.results import Result
from curvdiag.spectrum.hardware import Hardware, Rates, hardware_of
from curvdiag.spectrum.scale import Run, Share, Work, data_parallel, sharded

ROWS = ("each rank", "samples", "weights", "copies", "vectors", "graphs", "gathered", "activations", "in a product",
        "peak", "sent", "collectives", "a product", "the density")  # fmt: skip
"""What is told of each way, in this order; a way has those that concern it."""


@dataclass(frozen=True)
class ScalePlan(Result):
    """What each rank takes, for each way that was asked for.

    Attributes:
        size: ``P``.
        samples: ``N``.
        steps, probes: Of the Lanczos runs.
        ranks: How many.
        where: What the ranks run on, in words.
        shares: One for each way.
    """

    size: int
    samples: int
    steps: int
    probes: int
    ranks: int
    where: str
    shares: tuple[Share, ...]

    @property
    def data_parallel(self) -> Share | None:
        """All weights on every rank, if asked for."""
        return next((share for share in self.shares if not share.sharded), None)

    @property
    def sharded(self) -> Share | None:
        """A part of the weights on each rank, if asked for."""
        return next((share for share in self.shares if share.sharded), None)

    def __str__(self) -> str:
        columns = [_column(share) for share in self.shares]
        names = [name for name in ROWS if any(name in column for column in columns)]
        texts = [[name, *(column.get(name, "") for column in columns)] for name in names]
        widths = [max(len(row[i]) for row in texts) for i in range(len(columns) + 1)]
        lines = ["   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in texts]
        head = (
            f"density of {self.size:,} parameters, {self.samples:,} samples, {self.steps} steps, {self.probes} "
            f"probe{'s' * (self.probes != 1)}, on {self.ranks:,} rank{'s' * (self.ranks != 1)}{self.where}"
        )
        notes = [f"{share.way}: {note}" for share in self.shares for note in share.notes]
        return "\n".join([head, *(f"  {line}".rstrip() for line in lines), *(f"  note  {note}" for note in notes)])


def plan_ranks(
    work: Work,
    run: Run,
    ranks: int,
    *,
    sharding: bool | None = None,
    hardware: str | Hardware | None = None,
    rates: Rates | None = None,
    reshard: bool = True,
) -> ScalePlan:
    """What a density takes on so many ranks.

    Args:
        work: What it is made of.
        run: What is asked for.
        ranks: How many.
        sharding: Only with sharded weights, or only without; both by default.
        hardware: A name of :data:`~curvdiag.spectrum.hardware.HARDWARE`, or a description of another.
        rates: What a rank reaches; each that is known takes the place of the hardware's.
        reshard: As ``reshard_after_forward`` of ``fully_shard``.

    Raises:
        ArgumentError: The number of ranks is not positive, or the hardware is not known.
    """
    check_ranks(ranks)
    given = rates or Rates()
    named = None if hardware is None else hardware_of(hardware)
    reached = given if named is None else given.over(named.rates(ranks))
    ways = []
    if sharding is not True:
        ways.append(data_parallel(work, ranks, reached, run))
    if sharding is not False:
        ways.append(sharded(work, ranks, reached, run, reshard=reshard))
    where = "" if named is None else f", {named.name}"
    return ScalePlan(work.size, work.samples, run.steps, run.probes, ranks, where, tuple(ways))


def check_ranks(ranks: int) -> None:
    """Raises ArgumentError where there cannot be so many ranks."""
    if isinstance(ranks, bool) or int(ranks) != ranks or ranks < 1:
        raise ArgumentError(f"world_size is a positive number of ranks, not {ranks!r}")


def duration(seconds: float) -> str:
    """``75 -> "75 s"``, in the unit that suits."""
    if seconds < 1:
        return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 86400:,.0f} days"


def _column(share: Share) -> dict[str, str]:
    """What is told of one way, by row."""
    found = {"each rank": share.way, "samples": f"{share.samples:,}"}
    for name, count in share.memory.items():
        found[name] = human_bytes(count)
    found["vectors"] += f", {share.at_once} probe{'s' * (share.at_once != 1)} at once"
    peak = human_bytes(share.peak)
    if share.free is not None:
        peak += f" of {human_bytes(share.free)}{'' if share.fits else ': does not fit'}"
    found["peak"] = peak
    found["sent"] = f"{human_bytes(share.sent)} for a product"
    found["collectives"] = _count(share.collectives)
    found["a product"] = _times(share)
    found["the density"] = f"{share.products:,} products" + (
        "" if share.seconds is None else f", {duration(share.seconds)}"
    )
    return found


def _count(collectives: float) -> str:
    if collectives and collectives < 1:
        return f"1 for {1 / collectives:.0f} products"
    return f"{collectives:,.0f} for a product"


def _times(share: Share) -> str:
    if share.compute is None:
        return "unknown: give hardware= or flops="
    computing = f"{duration(share.compute)} computing"
    if share.ranks == 1:
        return computing
    if share.communication is None:
        return f"{computing}; give bandwidth= for sending"
    return f"{computing}, {duration(share.communication)} sending"
