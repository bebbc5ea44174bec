"""Which quantities a monitor measures, and how thoroughly."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from curvdiag.errors import ArgumentError, CurvdiagError, LossError
from curvdiag.objective import Objective

Preset = Literal["light", "standard", "full"]

CURVATURE = (
    *("lambda_max", "trace", "density", "anisotropy", "layers"),
    *("layer_anisotropy", "preconditioned_lambda_max"),
)
NOISE = ("noise_scale", "noise_trace", "cwgd", "cwgd_diagonal", "alignment")
ONLY_BY_NAME = ("layer_anisotropy", "preconditioned_lambda_max", "cwgd_diagonal")
PRESETS = {
    "light": CURVATURE[:2],
    "standard": CURVATURE[:4],
    "full": tuple(name for name in CURVATURE + NOISE if name not in ONLY_BY_NAME),
}


@dataclass(frozen=True)
class Settings:
    """How thorough a measurement is.

    Attributes:
        preset: A set of quantities, ``"standard"`` if neither it nor ``measure`` is given. ``"light"``: top eigenvalue
            and trace. ``"standard"``: density and anisotropy as well. ``"full"``: each layer and gradient noise as
            well. None where ``measure`` is given.
        steps, probes: Of the density, which takes ``steps * probes`` products. The search for the five largest
            eigenpairs before it goes on while what it finds for the density pays, up to about ``steps`` more.
            CWGD takes as many steps, and its diagonal form as many probes. Published for that are about 20: with few,
            what the noise of the probes made up is in the notes.
        tol: Relative residual at which the top eigenvalue is taken, the preconditioned one and those of layers as well.
        seed: Of the probes, the same at each measurement, so that curves show the model's change and not the probes'.
            What a warm start is mixed with has the seed that many further.
        hessian: Further arguments of :class:`~curvdiag.operators.Hessian`.
        measure: Single quantities instead of a preset; those of :data:`ONLY_BY_NAME` are in none.
        quantities: What is measured, in order.
    """

    preset: Preset | None = None
    steps: int = 40
    probes: int = 3
    tol: float = 1e-2
    seed: int = 0
    hessian: Mapping[str, Any] = field(default_factory=dict)
    measure: Sequence[str] | None = None
    quantities: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.preset not in (None, *get_args(Preset)):
            raise ArgumentError(f"preset is 'light', 'standard' or 'full', not {self.preset!r}")
        if self.steps < 1 or self.probes < 1:
            raise ArgumentError(f"steps and probes are at least 1, not {self.steps} and {self.probes}")
        if self.measure is not None:
            if self.preset is not None:
                meant = ", ".join(PRESETS[self.preset])
                raise ArgumentError(f"give preset= or measure=, not both; preset={self.preset!r} measures {meant}")
            object.__setattr__(self, "quantities", _known(self.measure))
        else:
            object.__setattr__(self, "preset", self.preset or "standard")
            object.__setattr__(self, "quantities", PRESETS[str(self.preset)])

    def without_noise(self) -> tuple[str, ...]:
        """The quantities that need no gradients of single samples."""
        return tuple(name for name in self.quantities if name not in NOISE)

    def obstacle(self, objective: Objective) -> CurvdiagError | None:
        """Why the gradient noise of this objective cannot be measured; None where it can, or is not asked for.

        Of sharded weights, why what needs whole ones cannot.
        """
        whole = (*NOISE, "preconditioned_lambda_max") if objective.sharded else NOISE
        names = [name for name in self.quantities if name in whole]
        if not names:
            return None
        wanted = f"{', '.join(names)} {'needs' if len(names) == 1 else 'need'}"
        if objective.sharded:
            return ArgumentError(
                f"{wanted} whole weights, and these are spread over {objective.holders.count} ranks: measure it of "
                "checkpoints, where they are whole"
            )
        if not objective.per_sample:
            return LossError(f"{wanted} the loss of each sample: {objective.why()}")
        if objective.size < 3:
            return ArgumentError(f"{wanted} at least three samples, and the objective holds {objective.size}")
        if self.hessian.get("method") == "finite-difference":
            return ArgumentError(
                f"{wanted} the graphs of the exact Hessian: leave method='finite-difference' out of hessian="
            )
        if (precision := self.hessian.get("precision", "full")) != "full":
            return ArgumentError(
                f"{wanted} the graphs of the Hessian in full precision: leave precision={precision!r} out of hessian="
            )
        return None


def products_of(objective: Objective, given: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the Hessian, and what was chosen where they leave it open: sharded weights give differences."""
    if objective.sharded and "method" not in (given or {}):
        note = "the weights are sharded: products with the Hessian are finite differences of gradients"
        return {"method": "finite-difference", **(given or {})}, [note]
    return dict(given or {}), []


def _known(names: Sequence[str]) -> tuple[str, ...]:
    """The names in the order of measuring.

    Raises:
        ArgumentError: One is unknown, or there is none.
    """
    every = CURVATURE + NOISE
    listed = ", ".join(every)
    if isinstance(names, str):
        raise ArgumentError(f"measure= is a list of names, such as [{names!r}], not one string; it knows {listed}")
    chosen = list(names)
    if not chosen:
        raise ArgumentError(f"measure=[] measures nothing; name some of {listed}")
    for name in chosen:
        if name in every:
            continue
        hint = "."
        if name in PRESETS:
            hint = f"; it is a preset: preset={name!r}."
        elif isinstance(name, str) and (close := difflib.get_close_matches(name.lower(), every, 1)):
            hint = f"; did you mean {close[0]!r}?"
        raise ArgumentError(f"measure= does not know {name!r}{hint} It knows {listed}")
    return tuple(name for name in every if name in chosen)
