"""The test of C against H: is gradient noise shaped like curvature, and if not, how?

Zhang, Yang and Tu, "On the Superlinear Relationship between SGD Noise Covariance and Loss Landscape Curvature"
(arXiv:2602.05600) fit ``C_ii ~ H_ii^gamma`` in the eigenbasis of H, in sample. Here the basis comes from one half of
the samples and the numbers from the other; the published fit stands beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvdiag.data import Batch
from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, LossError, TooLargeError
from curvdiag.objective import Objective
from curvdiag.parameters import Selection
from curvdiag.scaling.alignment import alignment, windows
from curvdiag.scaling.alike import free_on_each, on_all
from curvdiag.scaling.blocks import Basis, Block, KroneckerBlock, Method, open_block
from curvdiag.scaling.duality import Duality, activity_weight_duality
from curvdiag.scaling.haar import random_coupling
from curvdiag.scaling.power_law import Directions, DirectionSamples, measure_power_law
from curvdiag.scaling.result import Bounds, ScalingResult
from curvdiag.scaling.verdict import Verdict, judge
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.lanczos import Progress

Array = NDArray[np.float64]

# Directions in the windows of the published alignment, and in the matrix V^T C V that is kept for its picture.
TOP, BULK, COUPLED = 100, 900, 100
# With fewer samples to a direction than this in the half that gives the basis, the mixing of directions is noted.
SAMPLES_A_DIRECTION = 25


@collectively
def scaling_test(
    objective: Objective,
    block: Selection | None = None,
    basis: Literal["hessian", "parameter"] = "hessian",
    directions: int | None = None,
    *,
    counts: Sequence[int] | None = None,
    method: Method = "auto",
    holdout: bool = True,
    squares: bool = True,
    duality: bool = True,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: Seed = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ScalingResult:
    """Measure ``C_ii = v_i^T C v_i`` and ``E[h^2]_ii`` against ``H_ii = v_i^T H v_i``, direction by direction.

    The basis ``v`` is that of the Hessian over one random half of the samples; the numbers, and the interval from a
    bootstrap over samples with the basis held fixed, come from the other half. What the fit estimates is the exponent
    of ``v^T C v`` against ``v^T H v`` in the population, in that basis. Where C is proportional to H it is 1 in every
    basis. Alignment of C with H (windows, commutator, cosine, coupling, spectra) is measured on all samples.

    An exponent near 1 does not show that C is proportional to H: eigenvectors from few samples mix directions, and
    that pulls it towards 1, the more the further down the spectrum. Nor does an in-sample exponent above 1, as
    published, show that C is superlinear. Made-up problems tell how much (:mod:`curvdiag.experiments.mixing`: 400
    directions over four decades, 2.4 samples to a direction, as on the published MNIST net). Where the truth is 1.5,
    the held-out fit to all directions gives 1.2, and that in sample 1.1. Where it is 1 and samples differ in weight (a
    log-normal of 2), they give 1.0 and 1.25; on the first 100 directions 1.1 to 1.35, and 1.6.

    Args:
        objective: Its losses must be known for each sample.
        block: Glob, list of globs or predicate of ``(name, tensor)``; the whole model by default.
        basis: ``"hessian"``, eigenvectors, or ``"parameter"``, the coordinates, where exact diagonals can be had.
        directions: How many, those of largest curvature; by default at most 1,000 with matrices, 50 without.
        counts: Numbers of directions to fit; by default 10, 20, 50, 100 and so on.
        method: ``"dense"`` makes H and C as float64 matrices; ``"kronecker"`` does so through the factors of one fully
            connected layer; ``"matrix-free"`` needs products only; ``"auto"`` takes the best that fits.
        holdout: False leaves out the held-out fit, and repeats the in-sample fit in its place.
        squares: Whether to measure ``E[h^2]_ii``. It is cheap, but for ``"dense"`` and ``"matrix-free"`` on layers such
            as recurrent ones, where it takes a Hessian product for each sample and direction.
        duality: Whether to try the activity-weight duality too, where the block is a fully connected layer (by its
            factors) and the targets are class labels. All that is behind the layer must see nothing but its output.
        bootstrap: Replicates for the intervals; 0 for none.
        level: Of the intervals.
        seed: For the halves, the bootstrap, and the random vectors.
        dtype: Type of the ``"matrix-free"`` products; the others are in float64.
        progress: Called with (done, planned) within each stage.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        TooLargeError: Dense matrices do not fit, or a parameter basis was asked for where the diagonal of H cannot be
            had exactly; the message says what to do.
        ArgumentError: An argument is out of its range, H has no positive eigenvalue, or the weights are sharded.
        DistributedError: Another rank failed, or was given other arguments.
    """
    if objective.shards is not None:
        raise objective.shards.refuse_whole()
    if not objective.per_sample:
        raise LossError(f"the test of C against H needs the loss of each sample: {objective.why()}")
    if basis not in ("hessian", "parameter"):
        raise ArgumentError(f"basis is 'hessian' or 'parameter', not {basis!r}")
    if directions is not None and (isinstance(directions, bool) or directions < 3):
        raise ArgumentError(f"a power law needs at least 3 directions, not {directions}")
    number = resolve_seed(seed)
    target = objective if block is None else objective.restricted_to(block)
    given = f"{basis=}, {directions=}, {counts=}, {method=}, {holdout=}, {squares=}, {duality=}, {bootstrap=}, "
    target.ranks.agree("arguments", given + f"{level=}, seed={number}, {dtype=}")
    whole = open_block(target, method, squares=squares, dtype=dtype, progress=progress)
    fit = functools.partial(measure_power_law, counts=counts, bootstrap=bootstrap, level=level, seed=number)
    held_out, start, notes = None, None, []
    if holdout:
        first, second = target.split(number)
        frame = _frame(whole.over(first), basis, directions)
        held_out, start = fit(whole.over(second).along(frame.vectors)), frame.vectors
        few = first.size < SAMPLES_A_DIRECTION * len(frame.curvatures)
        notes += [*frame.notes, f"held out: basis from {first.size:,} samples, numbers along it from {second.size:,}"]
        notes[-1] += "; so few to a direction mix directions, and pull the held-out exponent towards 1" if few else ""
    # The other way round, a basis that starts from all samples, the half that is held out would know of what it judges.
    frame = _frame(whole, basis, directions, start)
    samples = whole.along(frame.vectors)
    beside = counts or (None if held_out is None else _counts(held_out, frame))
    in_sample = fit(samples, biased=True, counts=beside)
    if held_out is None:
        notes += [*frame.notes, "no samples were held out: the held-out fit only repeats the in-sample one"]
    shared = _shared(whole, frame, samples, basis, number, progress)
    measured = held_out or in_sample
    return ScalingResult(
        block=_name(target, block),
        basis=basis,
        method=whole.method,
        size=whole.size,
        samples=whole.samples,
        held_out=measured,
        in_sample=in_sample,
        bounds=Bounds.of(measured, whole.largest_curvature() if squares else None),
        duality=_duality(whole, frame.vectors, samples, notes) if duality else None,
        verdict=judge(held_out) if held_out else Verdict("undecided", ("only a held-out fit can decide",)),
        notes=tuple(notes),
        **shared,
    )


def _frame(block: Block, basis: str, directions: int | None, start: Tensor | None = None) -> Basis:
    """The leading directions of a block on its own samples, as many as were asked for and have positive curvature."""
    count = min(block.size, directions or block.default_directions)
    found = block.coordinates(count) if basis == "parameter" else block.eigenvectors(count, start)
    return found.positive(directions)


def _shared(
    whole: Block, frame: Basis, samples: DirectionSamples, basis: str, seed: int, progress: Progress | None
) -> dict[str, Any]:
    """What C and H have in common on all samples, beside what matrices with random eigenvectors would."""
    together = alignment(whole.hessian, whole.covariance, seed=seed, progress=progress)
    coupling, values = _coupling(samples), frame.curvatures.cpu().numpy()
    leading = coupling[:COUPLED, :COUPLED]
    spectra, noise = whole.spectra(), whole.noise_eigenvalues()
    # Without the eigenvalues of C, those that it has inside the window are turned at random.
    known = (
        {"eigenvalues": np.linalg.eigvalsh(leading)} if noise is None else {"eigenvalues": noise, "size": whole.size}
    )
    random = random_coupling(count=len(leading), seed=seed, **known)
    if basis == "parameter":  # windows are spanned by eigenvectors
        axes = whole.eigenvectors(min(whole.size, TOP + BULK)).positive(None)
        coupling, values = _projected(whole.covariance, axes.vectors), axes.curvatures.cpu().numpy()
    return {
        "windows": windows(coupling, values, top=TOP, bulk=BULK, spectrum=noise, size=whole.size, seed=seed),
        "commutator": together.commutator,
        "commutator_baseline": together.commutator_baseline,
        "cosine": together.cosine,
        "cosine_baseline": together.cosine_baseline,
        "coupling": leading,
        "coupling_baseline": random,
        "curvature_spectrum": None if spectra is None else spectra[0],
        "noise_spectrum": None if spectra is None else spectra[1],
    }


def _duality(whole: Block, directions: Tensor, samples: DirectionSamples, notes: list[str]) -> Duality | None:
    """The activity-weight duality of a fully connected layer with class labels; None for anything else."""
    if not isinstance(whole, KroneckerBlock):
        return None
    ranks, batches = whole.objective.ranks, whole.objective.batches
    labels = [part for part in map(_labels, batches) if part is not None]
    if not all(ranks.gather(len(labels) == len(batches), "search for labels")):
        return None
    weight, covariance = whole.objective.weights().chosen[0], whole.covariance
    classes = ranks.concatenate(torch.cat(labels).to(weight.device), 0, "labels")
    try:
        layer = whole.layer.gathered(free_on_each(whole.objective))  # the partner may be on any rank
        factors = layer.activations, classes, layer.output_gradients, layer.output_hessians
        found = functools.partial(
            activity_weight_duality, weight, *factors, directions=directions, covariance=covariance, along=samples
        )
        return on_all(ranks, "activity-weight duality", found, (ArgumentError, TooLargeError))
    except (ArgumentError, TooLargeError) as error:
        notes.append(f"no activity-weight duality: {error}")
        return None


def _labels(batch: Batch) -> Tensor | None:
    """The class labels of a batch of inputs and targets, one for each sample."""
    targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    known = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.dtype.is_floating_point
    return targets if known else None


def _coupling(samples: DirectionSamples) -> Array:
    """``V^T C V`` from the slopes of all samples."""
    centred = samples.slopes - samples.slopes.mean(0)
    return (centred.T @ centred / len(centred)).numpy()


def _projected(matrix: Tensor, vectors: Tensor) -> Array:
    return (vectors.T @ (matrix @ vectors)).cpu().numpy()


def _counts(held_out: Directions, frame: Basis) -> list[int]:
    """Numbers of directions for the in-sample fit: those of the held-out one, and on in its steps to the last."""
    last = len(frame.curvatures)
    steps = [step * 10**power for power in range(1, 7) for step in (1, 2, 5)]
    held = held_out.noise_fits["ols"].counts.tolist()
    return sorted({*(count for count in held + steps if count < last), last})


def _name(target: Objective, block: Selection | None) -> str:
    """The selection as it was given; for a predicate the parameters that it chose."""
    if block is None:
        return ""
    if callable(block):
        return ", ".join(target.parameters.names)
    return block if isinstance(block, str) else ", ".join(block)
