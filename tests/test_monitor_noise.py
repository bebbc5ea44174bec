"""The monitor measures gradient noise beside curvature, and single quantities by name."""

from __future__ import annotations

import math

import pytest
import torch
from nets import make
from oracles import criterion_loss, dense_hessian
from torch import nn
from torch.nn import functional as F

from curvdiag import (
    CurvatureMonitor,
    Estimate,
    Hessian,
    NoiseCovariance,
    Objective,
    anisotropy,
    measure_spectrum,
)
from curvdiag.errors import ArgumentError, LossError
from curvdiag.monitor import quantities
from curvdiag.monitor.settings import CURVATURE, NOISE, ONLY_BY_NAME, PRESETS
from curvdiag.noise.cwgd import cwgd
from curvdiag.noise.noise_scale import noise_scale
from curvdiag.scaling.alignment import alignment
from curvdiag.spectrum import MEASURES

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

STEPS, PROBES, TOL = 8, 3, 1e-6
KEYS = {
    "lambda_max": {"curv/hessian/lambda_max", "curv/hessian/lambda_max_residual"},
    "trace": {"curv/hessian/trace"},
    "density": {"curv/hessian/lambda_min", "curv/hessian/frobenius_norm"},
    "anisotropy": {f"curv/anisotropy/{name}" for name in MEASURES} - {"curv/anisotropy/condition_number"},  # indefinite
    "layers": {f"curv/layer/{name}/{what}" for name in "024" for what in ("lambda_max", "trace")},
    "layer_anisotropy": {
        f"curv/layer/{layer}/anisotropy/{name}" for layer in "024" for name in MEASURES.keys() - {"top_ratio"}
    }
    - {f"curv/layer/{layer}/anisotropy/condition_number" for layer in "02"},  # indefinite
    "noise_scale": {f"noise/{name}" for name in ("scale", "scale_curvature", "gradient_square")}
    | {f"noise/gradient_{name}" for name in ("square_probe", "curvature", "curvature_probe")}
    | {"noise/trace_hc"},
    "noise_trace": {"noise/trace"},
    "cwgd": {"noise/cwgd"},
    "cwgd_diagonal": {"noise/cwgd_diagonal"},
    "alignment": {f"align/{name}{end}" for name in ("cosine", "commutator") for end in ("", "_baseline")},
}
ALWAYS = {"curv/cost/seconds", "curv/cost/gradients", "curv/cost/matvecs", "curv/overhead"}


def objective(**options):
    """A little trained, so that there is a gradient to be told from its noise."""
    model, batch = make("mlp-tanh", dtype=torch.float64)
    return Objective(model, F.cross_entropy, batch, **options)


def watch(target=None, **options):
    options = {"steps": STEPS, "probes": PROBES, "tol": TOL, "strict": True, **options}
    return CurvatureMonitor(target or objective(), **options)


def same(one, other):
    if isinstance(other, Estimate):
        assert isinstance(one, Estimate)
        assert one.samples == other.samples
        one, other = (one.value, one.standard_error), (other.value, other.standard_error)
    assert one == pytest.approx(other, rel=1e-9, nan_ok=True)


# What is measured


def test_full_is_what_the_functions_give_when_they_are_called_one_by_one():
    target = objective()
    found = watch(target, preset="full", seed=4).measure()
    hessian = Hessian(target)
    spectrum = measure_spectrum(hessian, 5, steps=STEPS, probes=PROBES, tol=TOL, seed=4)
    top, density = spectrum.eigenpairs, spectrum.density
    scale = noise_scale(target, curvature=True, starts=quantities.STARTS, seed=4)
    weighted = cwgd(target, starts=quantities.CWGD_STARTS, steps=STEPS, max_steps=STEPS, seed=4)
    aligned = alignment(hessian, NoiseCovariance(target), probes=quantities.ALIGNMENT_PROBES, seed=4)
    measures = anisotropy(density, top)
    expected = {
        "curv/hessian/lambda_max": float(top.values[0]),
        "curv/hessian/lambda_max_residual": float(top.residuals[0]),
        "curv/hessian/lambda_min": density.lambda_min,
        "curv/hessian/trace": density.trace(),
        "curv/hessian/frobenius_norm": density.frobenius_norm(),
        "noise/scale": scale.b_simple,
        "noise/scale_curvature": scale.b_noise,
        "noise/gradient_square": scale.gradient_square,
        "noise/gradient_square_probe": scale.probe_square,
        "noise/gradient_curvature": scale.population_curvature,
        "noise/gradient_curvature_probe": scale.gradient_curvature,
        "noise/trace_hc": scale.trace_hc,
        "noise/trace": scale.trace,
        "noise/cwgd": weighted.value,
        "align/cosine": aligned.cosine,
        "align/commutator": aligned.commutator,
        "align/cosine_baseline": aligned.cosine_baseline,
        "align/commutator_baseline": aligned.commutator_baseline,
    }
    expected |= {key: getattr(measures, key.rpartition("/")[2]) for key in KEYS["anisotropy"]}
    for key, value in expected.items():
        same(found.scalars[key], value)
    assert set(found.scalars) == set(expected) | KEYS["layers"] | ALWAYS
    estimated = {
        "noise/scale",
        "noise/scale_curvature",
        "noise/gradient_square",
        "noise/trace_hc",
        "noise/trace",
        "noise/cwgd",
        "align/cosine",
        "align/commutator",
    }
    assert all(isinstance(found.scalars[key], Estimate) for key in estimated)
    assert math.isfinite(found["noise/trace"])
    for text in [f"noise scale: {note}" for note in scale.notes] + [f"CWGD: {note}" for note in weighted.notes]:
        assert text in found.notes


def test_the_noise_is_that_of_one_backward_pass_for_each_sample():
    target = objective()
    found = watch(target, measure=list(NOISE)).measure()
    inputs, targets = target.batches[0]
    parameters = list(target.model.parameters())
    rows = []
    for x, t in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(target.model(x[None]), t[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    rows = torch.stack(rows)
    n, centred = len(rows), rows - rows.mean(0)
    assert found["noise/trace"] == pytest.approx(float(centred.square().sum()) / (n - 1), rel=1e-9)
    covariance = centred.T @ centred / n
    curvature = dense_hessian(target.model, criterion_loss(F.cross_entropy, (inputs, targets)))
    exact = float((curvature * covariance).sum() / curvature.norm() / covariance.norm())
    cosine = found.scalars["align/cosine"]
    assert abs(cosine.value - exact) < 4 * cosine.standard_error < 0.5
    gradient = rows.mean(0)
    ratio = float((curvature * covariance).sum() / (gradient @ curvature @ gradient))
    scale = found.scalars["noise/scale_curvature"]
    assert abs(scale.value - ratio) < 4 * scale.standard_error


@pytest.mark.parametrize("names", [[name] for name in KEYS] + [["cwgd", "trace"], ["alignment", "lambda_max", "cwgd"]])
def test_measure_gives_the_keys_of_its_names_and_no_other(names):
    full = watch(measure=list(KEYS)).measure()
    found = watch(measure=names).measure()
    assert set(found.scalars) == ALWAYS.union(*(KEYS[name] for name in names))
    for key in set(found.scalars) - ALWAYS:
        if "lambda_max" in key:  # one eigenpair is looked for with fewer products than five
            continue
        if key == "curv/hessian/trace":  # Hutchinson's where no density is measured, else that of the deflated density
            one, other = found.scalars[key], full.scalars[key]
            assert abs(one.value - other.value) < 4 * math.hypot(one.standard_error, other.standard_error)
            continue
        same(found.scalars[key], full.scalars[key])
    blocks = {"density": {""}, "layers": {"0", "2", "4"}}
    expected = set().union(*(blocks.get(name, set()) for name in names))
    assert {block for _, block in found.densities} == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_set_of_names(preset):
    one, other = watch(preset=preset).measure(), watch(measure=PRESETS[preset][::-1]).measure()
    for key in (one.scalars.keys() | other.scalars.keys()) - ALWAYS:
        same(one.scalars[key], other.scalars[key])
    assert {*CURVATURE, *NOISE} == {*PRESETS["full"], *ONLY_BY_NAME} == set(quantities.QUANTITIES)
    assert set(quantities.QUANTITIES) - set(KEYS) == {"preconditioned_lambda_max"}  # needs an optimizer


def test_all_products_are_counted_and_h_and_c_share_their_graphs(monkeypatch):
    rows, made = [], []
    for kind in (Hessian, NoiseCovariance):
        multiply, start = kind._multiply, kind.__init__

        def counted(self, v, multiply=multiply):
            rows.append(len(v))
            return multiply(self, v)

        def kept(self, *args, start=start, **options):
            start(self, *args, **options)
            made.append(self)

        monkeypatch.setattr(kind, "_multiply", counted)
        monkeypatch.setattr(kind, "__init__", kept)
    together = Hessian._multiply_blocks
    monkeypatch.setattr(
        Hessian, "_multiply_blocks", lambda self, v, at: rows.extend(map(len, v)) or together(self, v, at)
    )
    found = watch(preset="full").measure()
    assert found["curv/cost/matvecs"] == sum(rows)
    assert sum(isinstance(one, Hessian) for one in made) == 1
    assert sum(isinstance(one, NoiseCovariance) for one in made) >= 2  # one for the sums, one for the alignment
    assert len({id(one._engine) for one in made}) == 1


def test_the_trace_of_c_alone_makes_no_hessian(monkeypatch):
    monkeypatch.setattr(quantities, "Hessian", None)
    assert watch(measure=["noise_trace"]).measure()["curv/cost/matvecs"] == 0


# What is refused


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["noise_sclae"], "'noise_sclae'; did you mean 'noise_scale'?"),
        (["trace", "Alignment"], "'Alignment'; did you mean 'alignment'?"),
        (["xyz"], "does not know 'xyz'. It knows"),
        ([3], "does not know 3. It knows"),
        (["full"], "it is a preset: preset='full'"),
        ("cwgd", "a list of names, such as ['cwgd']"),
        ([], "measures nothing"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(names, words):
    with pytest.raises(ArgumentError) as caught:
        watch(measure=names)
    assert words in str(caught.value)
    for name in KEYS:
        assert name in str(caught.value)


def test_preset_and_measure_together_are_refused():
    with pytest.raises(ArgumentError, match=r"not both.*'light' measures lambda_max, trace"):
        watch(preset="light", measure=["cwgd"])


def mean_only():
    model, batch = make("mlp-tanh", dtype=torch.float64)
    return Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch=batch)


def coupled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    batch = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    return Objective(model, F.cross_entropy, batch, mode="train")


def two_samples():
    model, (inputs, targets) = make("mlp-tanh", dtype=torch.float64)
    return Objective(model, F.cross_entropy, (inputs[:2], targets[:2]))


OBSTACLES = {
    "a mean only": (mean_only, {}, LossError, "loss of each sample"),
    "BatchNorm in train mode": (coupled, {}, LossError, "BatchNorm in train mode"),
    "two samples": (two_samples, {}, ArgumentError, "at least three samples"),
    "finite differences": (objective, {"hessian": {"method": "finite-difference"}}, ArgumentError, "finite-difference"),
    "bfloat16": (objective, {"hessian": {"precision": "bfloat16"}}, ArgumentError, "in full precision"),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_without_single_samples_full_leaves_noise_out_with_one_note(why, tmp_path):
    make_objective, options, _, words = OBSTACLES[why]
    with watch(make_objective(), store=tmp_path / "run.db", preset="full", **options) as monitor:
        first, second = monitor.measure(), monitor.measure()
        events = [event.message for event in monitor.run.events()]
    assert not [key for key in first.scalars if key.startswith(("noise/", "align/"))]
    assert {"curv/hessian/trace", "curv/hessian/lambda_max"} < set(first.scalars)
    (note,) = [note for note in first.notes if note.startswith("left out")]
    for word in (words, *(name for name in NOISE if name in PRESETS["full"])):
        assert word in note
    assert note in events
    assert not [note for note in second.notes if note.startswith("left out")]


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("why", OBSTACLES)
def test_noise_that_is_asked_for_by_name_and_cannot_be_is_refused_at_once(why, name):
    make_objective, options, error, words = OBSTACLES[why]
    with pytest.raises(error) as caught:
        watch(make_objective(), measure=["trace", name], **options)
    assert f"{name} needs" in str(caught.value)
    assert words in str(caught.value)
    watch(make_objective(), measure=["trace"], **options).measure()
