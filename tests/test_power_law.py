"""The power laws between noise and curvature: lines as other libraries fit them, exact laws exactly, errors as seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.scaling import bootstrap, fits
from curvdiag.scaling.power_law import DirectionSamples, measure_power_law


def cloud(rows=3, points=40, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, points))
    return x, 1.3 * x - 0.4 + 0.3 * generator.standard_normal((rows, points))


def drawn(samples=1000, directions=20, exponent=1.0, decades=2.0, seed=0, squares=False):
    """Gaussian gradients of covariance ``H^exponent`` and rank-one Hessians of mean ``H``, along H's eigenvectors."""
    generator = np.random.default_rng(seed)
    curvature = np.logspace(0, -decades, directions)
    slopes = curvature ** (exponent / 2) * generator.standard_normal((samples, directions))
    hessians = curvature * generator.standard_normal((samples, directions)) ** 2
    more = torch.from_numpy(hessians * curvature.sum()) if squares else None
    return DirectionSamples(torch.from_numpy(slopes), torch.from_numpy(hessians), more)


def exact(curvature, noise, samples=40, square=None):
    """Every sample has the same Hessian and a gradient of the same length, so nothing is left to chance."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(samples // 2)[:, None]
    rows = torch.ones_like(signs)
    tensors = [None if v is None else torch.as_tensor(np.array(v)) for v in (curvature, noise, square)]
    return DirectionSamples(signs * tensors[1].sqrt(), rows * tensors[0], None if square is None else rows * tensors[2])


class TestLines:
    def test_least_squares_is_that_of_numpy(self):
        x, y = cloud()
        slope, intercept = fits.least_squares(x, y)
        for k in range(3):
            np.testing.assert_allclose((slope[k], intercept[k]), np.polyfit(x[k], y[k], 1), rtol=1e-12)
            assert fits.r_squared(x[k], y[k], (slope[k], intercept[k])) == pytest.approx(
                stats.linregress(x[k], y[k]).rvalue ** 2, abs=1e-12
            )

    @pytest.mark.parametrize("points", [3, 4, 41, 282])
    def test_theil_sen_is_that_of_scipy(self, points):
        x, y = cloud(points=points)
        slope, intercept = fits.theil_sen(x, y)
        for k in range(3):
            reference = stats.theilslopes(y[k], x[k])
            np.testing.assert_allclose((slope[k], intercept[k]), (reference.slope, reference.intercept), rtol=1e-12)

    def test_theil_sen_on_some_of_the_pairs_stays_near_that_of_all(self):
        x, y = cloud(rows=1, points=900)
        reference = stats.theilslopes(y[0], x[0])
        assert float(fits.theil_sen(x, y)[0][0]) == pytest.approx(reference.slope, abs=0.005)

    def test_theil_sen_ignores_a_quarter_of_wrong_points(self):
        x = np.linspace(0, 1, 40)[None]
        y = 2 * x + 1
        y[0, ::4] += 50
        assert fits.theil_sen(x, y)[0] == pytest.approx(2, abs=0.1)
        assert fits.least_squares(x[:, 8:], y[:, 8:])[1] > 10

    @pytest.mark.parametrize("ratio", [0.2, 1.0, 7.0])
    def test_deming_without_covariance_is_the_textbook_formula(self, ratio):
        x, y = cloud()
        for k in range(3):
            sxx, sxy, _, syy = np.cov(x[k], y[k]).ravel()
            rest = syy - ratio * sxx
            expected = (rest + np.sqrt(rest**2 + 4 * ratio * sxy**2)) / (2 * sxy)
            slope, intercept = fits.deming(x, y, 0.3, 0.3 * ratio)
            assert slope[k] == pytest.approx(expected, rel=1e-10)
            assert intercept[k] == pytest.approx(y[k].mean() - expected * x[k].mean(), rel=1e-10)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("covariance", [-0.1, 0.05, 0.14])
    def test_deming_minimises_what_it_says(self, covariance, sign):
        x, y = cloud()
        y = sign * y
        slope, _ = fits.deming(x, y, 0.1, 0.25, covariance)
        for k in range(3):
            rest = np.cov(x[k], y[k])

            places = np.r_[np.linspace(-20, 20, 40_001), slope[k]]
            distance = (rest[1, 1] - 2 * places * rest[0, 1] + places**2 * rest[0, 0]) / (
                0.25 - 2 * places * covariance + 0.1 * places**2
            )
            assert distance[-1] <= distance.min()
            assert abs(places[distance[:-1].argmin()] - slope[k]) <= 1e-3

    @pytest.mark.parametrize("errors", [(0.1, 0.1, 0.1), (0.0, 0.0, 0.0)])
    def test_deming_is_least_squares_where_errors_move_points_along_their_line(self, errors):
        x = np.linspace(0, 1, 9)
        np.testing.assert_allclose(fits.deming(x, x + 2, *errors), (1, 2), rtol=1e-9)

    def test_deming_without_error_in_x_is_least_squares(self):
        x, y = cloud()
        np.testing.assert_allclose(fits.deming(x, y, 0.0, 1.0), fits.least_squares(x, y), rtol=1e-12)

    def test_the_parabola_is_that_of_numpy(self):
        x, y = cloud()
        low, high = fits.local_slopes(x, y + 0.2 * x**2, (-1.0, 2.0))
        for k in range(3):
            slope = np.polyder(np.polyfit(x[k], y[k] + 0.2 * x[k] ** 2, 2))
            np.testing.assert_allclose((low[k], high[k]), np.polyval(slope, (-1.0, 2.0)), rtol=1e-10)

    @pytest.mark.parametrize("fit", [fits.least_squares, fits.theil_sen, lambda x, y: fits.deming(x, y, 1, 2, 0.3)])
    def test_points_that_are_missing_are_left_out_row_by_row(self, fit):
        x, y = cloud()
        holed = y.copy()
        holed[0, 3], holed[1, 10:20] = np.nan, np.nan
        slope, intercept = fit(x, holed)
        keep = [np.delete(np.arange(40), 3), np.r_[:10, 20:40], np.arange(40)]
        for k, these in enumerate(keep):
            np.testing.assert_allclose((slope[k], intercept[k]), fit(x[k][these], y[k][these]), rtol=1e-12)
        bends = fits.local_slopes(x, holed, (0, 1))
        np.testing.assert_allclose(bends[0][1], fits.local_slopes(x[1][keep[1]], y[1][keep[1]], (0, 1))[0], rtol=1e-10)


class TestBootstrap:
    def test_a_replicate_is_the_moments_of_samples_drawn_again(self):
        samples = drawn(samples=60, directions=5)
        slopes, curvatures = samples.slopes.numpy() + 3.0, samples.curvatures.numpy()
        moments = bootstrap.Moments(slopes, curvatures, None)
        moments.draw(7, seed=4)
        (index,) = bootstrap.resampled_means([np.arange(60.0)[:, None]], 7, seed=4)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([4, 2])))
        for r, rows in enumerate(generator.integers(60, size=(7, 60))):
            assert index[r, 0] == pytest.approx(rows.mean())
            np.testing.assert_allclose(10 ** moments.replicates["noise"][r], slopes[rows].var(0), rtol=1e-10)
            np.testing.assert_allclose(10 ** moments.replicates["curvature"][r], curvatures[rows].mean(0), rtol=1e-10)

    def test_replicates_do_not_depend_on_how_many_are_held_at_a_time(self, monkeypatch):
        columns = [np.random.default_rng(0).standard_normal((50, 3))]
        (whole,) = bootstrap.resampled_means(columns, 101, seed=1)
        monkeypatch.setattr(bootstrap, "CHUNK", 50 * 7)
        np.testing.assert_allclose(bootstrap.resampled_means(columns, 101, seed=1)[0], whole, rtol=1e-12)

    def test_the_interval_of_a_mean_is_student_s(self):
        values = np.random.default_rng(0).standard_normal((30, 1))
        (means,) = bootstrap.resampled_means([values], 20_000, seed=0)
        low, high = bootstrap.corrected_interval(values.mean(), means[:, 0], 0.9, 30)
        reference = stats.t.interval(0.9, 29, values.mean(), values.std() / np.sqrt(30))
        np.testing.assert_allclose((low, high), reference, atol=0.01)

    def test_the_interval_moves_against_the_bias(self):
        replicates = np.random.default_rng(0).normal(1.5, 0.1, 10_000)
        low, high = bootstrap.corrected_interval(np.float64(2.0), replicates, 0.95, 10_000)
        assert (low + high) / 2 == pytest.approx(2.5, abs=0.005)
        assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.02)

    def test_many_replicates_without_a_fit_give_no_interval(self):
        replicates = np.r_[np.full(11, np.nan), np.arange(89.0)]
        assert np.isnan(bootstrap.corrected_interval(np.float64(1.0), replicates, 0.95, 50)).all()


class TestMeasurement:
    @pytest.mark.parametrize("exponent", [0.7, 1.0, 2.0])
    def test_exact_laws_are_recovered_exactly_by_every_line_at_every_count(self, exponent):
        curvature = np.logspace(1, -2, 60)
        result = measure_power_law(
            exact(curvature, 0.3 * curvature**exponent, square=5 * curvature**1.5), bootstrap=100
        )
        for laws, slope, factor in ((result.noise_fits, exponent, 0.3), (result.square_fits, 1.5, 5)):
            assert list(laws) == ["ols", "theil-sen", "deming"]
            for method, law in laws.items():
                assert law.method == method
                assert law.counts.tolist() == [10, 20, 50, 60]
                np.testing.assert_allclose(law.exponent, slope, rtol=1e-9)
                np.testing.assert_allclose(law.intercept, np.log10(factor), atol=1e-9)
                np.testing.assert_allclose(law.r_squared, 1, atol=1e-9)
                np.testing.assert_allclose((law.low, law.high), slope, rtol=1e-9)
        assert result.departure.scatter < 1e-9
        assert result.departure.scatter_p > 0.01
        assert (result.departure.imbalance_p > 0.01) == (exponent == 1)

    def test_fits_are_of_the_logarithms_over_the_first_directions(self):
        samples = drawn(samples=200, squares=True)
        result = measure_power_law(samples, counts=[5, 12, 20], bootstrap=0)
        x, y = samples.curvature.log10().numpy(), samples.noise.log10().numpy()
        np.testing.assert_allclose(result.noise, samples.noise.numpy(), rtol=1e-12)
        np.testing.assert_allclose(result.square, samples.square.numpy(), rtol=1e-12)
        for j, count in enumerate((5, 12, 20)):
            line = result.noise_fits["ols"].exponent[j], result.noise_fits["ols"].intercept[j]
            np.testing.assert_allclose(line, np.polyfit(x[:count], y[:count], 1), rtol=1e-10)
            reference = stats.theilslopes(y[:count], x[:count]).slope
            assert result.noise_fits["theil-sen"].exponent[j] == pytest.approx(reference, rel=1e-10)

    def test_standard_errors_are_those_seen(self):
        repeated = [measure_power_law(drawn(samples=400, seed=s), bootstrap=0, methods=["ols"]) for s in range(300)]
        for name in ("curvature", "noise"):
            seen = np.std([getattr(r, name) for r in repeated], axis=0)
            told = np.mean([getattr(r, f"{name}_error") for r in repeated], axis=0)
            np.testing.assert_allclose(told, seen, rtol=0.2)
            assert np.mean(told / seen) == pytest.approx(1, abs=0.04)

    def test_deming_does_not_flatten_where_least_squares_does(self):
        fitted = [measure_power_law(drawn(50, 100, decades=1.5, seed=s), bootstrap=0).noise_fits for s in range(60)]
        ols, deming = (np.mean([f[m].exponent[-1] for f in fitted]) for m in ("ols", "deming"))
        error = np.std([f["deming"].exponent[-1] for f in fitted]) / 60**0.5
        assert ols < 1 - 5 * error
        assert abs(deming - 1) < 3 * error

    def test_a_large_mean_gradient_changes_nothing(self):
        samples = drawn()
        moved = DirectionSamples(samples.slopes + 1e7, samples.curvatures)
        one, other = (measure_power_law(s, bootstrap=100, methods=["ols"]) for s in (samples, moved))
        np.testing.assert_allclose(one.noise, other.noise, rtol=1e-6)
        np.testing.assert_allclose(one.noise_fits["ols"].low, other.noise_fits["ols"].low, rtol=1e-6)


class TestRange:
    def test_directions_without_positive_curvature_or_noise_are_left_out_and_counted(self):
        curvature = np.logspace(1, -2, 60)
        noise = 2 * curvature
        curvature[30], noise[45] = -1.0, 0.0
        result = measure_power_law(exact(curvature, noise), bootstrap=100)
        assert np.flatnonzero(~result.used).tolist() == [30, 45]
        assert result.left_out == 2
        assert result.reach == result.resolved == 60
        np.testing.assert_allclose(result.noise_fits["ols"].exponent, 1, rtol=1e-9)
        assert result.departure.points == 58

    def test_the_range_ends_where_more_than_five_percent_are_left_out(self):
        curvature = np.logspace(1, -2, 60)
        curvature[40:43] = 0.0
        curvature[50:] *= -1
        result = measure_power_law(exact(curvature, np.ones(60)), counts=[10, 30, 55], bootstrap=0)
        assert result.reach == 42  # 2 of 42 are 4.8 %; 3 of 43 are 7.0 %, and never fewer than 5 % after that.
        assert result.noise_fits["ols"].counts.tolist() == [10, 30, 42]

    def test_an_early_gap_does_not_end_the_range_if_later_directions_make_up_for_it(self):
        curvature = np.logspace(1, -2, 60)
        curvature[1] = -1.0
        assert measure_power_law(exact(curvature, np.ones(60)), bootstrap=0).reach == 60

    def test_intervals_end_where_directions_are_not_resolved(self):
        generator = torch.Generator().manual_seed(0)
        curvature = torch.logspace(0, -2, 40, dtype=torch.float64)
        error = torch.full((40,), 0.1, dtype=torch.float64)
        error[30:] = 0.8
        noise = torch.randn(1000, 40, generator=generator, dtype=torch.float64)
        noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
        samples = DirectionSamples(noise.flip(0) * curvature.sqrt(), curvature * (1 + error * 1000**0.5 * noise))
        result = measure_power_law(samples, bootstrap=100)
        assert (result.reach, result.resolved) == (40, 31)
        law = result.noise_fits["ols"]
        assert law.counts.tolist() == [10, 20, 31, 40]
        assert np.isfinite(law.low[:3]).all()
        assert np.isnan(law.low[3])
        assert np.isfinite(law.exponent[3])
        assert result.departure.count == 31

    def test_nothing_positive_gives_no_fit_and_no_error(self):
        result = measure_power_law(exact(-np.ones(5), np.ones(5)), bootstrap=100)
        assert (result.reach, result.resolved, result.left_out) == (0, 0, 5)
        assert len(result.noise_fits["ols"].counts) == 0
        assert result.departure is None

    def test_default_counts_run_up_to_what_is_in_reach(self):
        counts = measure_power_law(exact(np.logspace(1, -2, 320), np.ones(320)), bootstrap=0).noise_fits["ols"].counts
        assert counts.tolist() == [10, 20, 50, 100, 200, 320]
        few = measure_power_law(exact(np.logspace(1, -2, 4), np.ones(4)), bootstrap=0).noise_fits["ols"].counts
        assert few.tolist() == [4]


class TestArguments:
    def test_the_same_seed_gives_the_same_numbers(self):
        one, same, other = (measure_power_law(drawn(), bootstrap=200, seed=s).to_dict() for s in (3, 3, 4))
        assert json.dumps(one) == json.dumps(same)
        assert one["noise_fits"]["ols"]["exponent"] == other["noise_fits"]["ols"]["exponent"]
        assert one["noise_fits"]["ols"]["low"] != other["noise_fits"]["ols"]["low"]

    def test_a_generator_advances(self):
        generator = torch.Generator().manual_seed(0)
        one, other = (measure_power_law(drawn(), bootstrap=100, seed=generator, methods=["ols"]) for _ in range(2))
        assert one.noise_fits["ols"].low[0] != other.noise_fits["ols"].low[0]

    def test_without_a_bootstrap_there_are_no_intervals(self):
        result = measure_power_law(drawn(squares=True), bootstrap=0)
        for law in (*result.noise_fits.values(), *result.square_fits.values()):
            assert np.isnan(law.low).all()
            assert np.isnan(law.high).all()
            assert np.isfinite(law.exponent).all()
        assert result.departure is None

    def test_biased_marks_the_result_and_changes_no_number(self):
        held_out, biased = (measure_power_law(drawn(), bootstrap=100, biased=b).to_dict() for b in (False, True))
        assert (held_out.pop("biased"), biased.pop("biased")) == (False, True)
        assert json.dumps(held_out) == json.dumps(biased)

    def test_a_higher_level_gives_a_wider_interval(self):
        widths = []
        for level in (0.8, 0.95, 0.99):
            law = measure_power_law(drawn(), bootstrap=200, level=level, methods=["ols"]).noise_fits["ols"]
            widths.append(float(law.high[-1] - law.low[-1]))
        assert widths[1] / widths[0] == pytest.approx(stats.norm.ppf(0.975) / stats.norm.ppf(0.9), rel=0.01)
        assert widths[2] > widths[1]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"counts": [2, 10]}, "at least 3"),
            ({"counts": []}, "at least 3"),
            ({"bootstrap": 50}, "at least 100 or 0"),
            ({"level": 1.0}, "between 0 and 1"),
            ({"methods": ["lasso"]}, "theil-sen"),
        ],
    )
    def test_refusals_say_what_is_allowed(self, arguments, says):
        with pytest.raises(ArgumentError, match=says):
            measure_power_law(drawn(), **arguments)

    def test_too_little_or_broken_data_is_refused(self):
        with pytest.raises(ArgumentError, match="at least 3 directions"):
            measure_power_law(drawn(directions=2))
        samples = drawn()
        samples.slopes[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="slopes"):
            measure_power_law(samples)
        with pytest.raises(ArgumentError, match="curvatures are"):
            DirectionSamples(torch.zeros(3, 4), torch.zeros(3, 5))
