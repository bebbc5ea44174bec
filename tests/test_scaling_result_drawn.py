"""What measures and what draws agree on the fields of a result."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from matplotlib.figure import Figure
from scaling_results import directions, scaling_result, window
from torch import nn

from curvdiag import plotting
from curvdiag.objective import Objective
from curvdiag.plotting.scaling_page import HEIGHT, WIDTH
from curvdiag.scaling.alignment import Window
from curvdiag.scaling.measure import scaling_test
from curvdiag.scaling.power_law import Directions, DirectionSamples, PowerLaw, measure_power_law
from curvdiag.scaling.result import ScalingResult
from curvdiag.scaling.verdict import Verdict
from figures import assert_no_text_over_another, line, new_axes


def test_the_made_up_results_of_these_tests_have_the_fields_of_the_real_ones() -> None:
    made = directions()
    for real, example in (
        (ScalingResult, scaling_result()),
        (Directions, made),
        (PowerLaw, made.noise_fits["ols"]),
        (Window, window("top", 0, 9)),
        (Verdict, scaling_result().verdict),
    ):
        assert {field.name for field in fields(real)} == set(vars(example)), real.__name__


def test_measured_directions_draw_themselves() -> None:
    rng = torch.Generator().manual_seed(0)
    scale = torch.logspace(1, -1, 20, dtype=torch.float64)
    curvatures = scale * torch.rand(400, 20, generator=rng, dtype=torch.float64)
    slopes = scale**0.75 * torch.randn(400, 20, generator=rng, dtype=torch.float64)
    measured = measure_power_law(DirectionSamples(slopes, curvatures), bootstrap=100, biased=True)
    ax = measured.plot(new_axes())
    np.testing.assert_array_equal(line(ax, "$C_{ii}$, in-sample").get_data(), (measured.curvature, measured.noise))
    fit = measured.noise_fits["ols"]
    assert f"= {fit.exponent[-1]:.3f} [{fit.low[-1]:.3f}, {fit.high[-1]:.3f}]" in line(ax, r"$\gamma$").get_label()
    plotting.exponent(measured, new_axes()).figure.savefig("/dev/null", format="png")


def test_a_measured_result_fills_the_page() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 6)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    objective = Objective(model, nn.CrossEntropyLoss(), (inputs, inputs[:, :3].argmax(1)))
    result = scaling_test(objective, "0.weight", bootstrap=100)
    figure = plotting.scaling_page(result, Figure(figsize=(WIDTH, HEIGHT), layout="constrained"))
    assert_no_text_over_another(figure)
    words = "\n".join(text.get_text() for ax in figure.axes for text in ax.texts)
    assert result.verdict.word in words
    assert "30 parameters, 200 samples" in figure.get_suptitle()
    plotting.exponents_by_layer({"0.weight": result}, new_axes()).figure.savefig("/dev/null", format="png")
    result.plot(new_axes(), square=True).figure.savefig("/dev/null", format="png")
