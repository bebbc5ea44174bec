"""The runs of the comparison of optimizers: the same tuning for all, and trainings that are what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from curvdiag.errors import ArgumentError
from curvdiag.experiments.lpnorm import QUICK
from curvdiag.experiments.lpnorm_methods import HIGH_ANISOTROPY, METHODS, P_MAX, PUBLISHED
from curvdiag.experiments.lpnorm_summary import choose
from curvdiag.experiments.lpnorm_tasks import CIFAR10, DIGITS, Task, cifar_conv_net, digit_samples, has_cifar10
from curvdiag.experiments.lpnorm_training import WARM_UP, Job, Run, train, warm_up_cosine
from curvdiag.experiments.lpnorm_tuning import Range, Setting, Trial, ranked

pytest.importorskip("sklearn")

SMALL = replace(DIGITS, **QUICK)


def job(method: str, *, lr: float | None = None, task: Task = SMALL, seed: int = 3, **options: bool) -> Job:
    search = METHODS[method].search
    options = {"final": True, **options}
    return Job(task, method, search.lr if lr is None else lr, search.weight_decay, seed, **options)


# Tuning


def test_every_method_tries_as_many_settings_at_the_same_places_of_ranges_of_the_same_width() -> None:
    def places(search: Range) -> list[tuple[float, float]]:
        return [
            (math.log10(one.lr / search.lr), math.log10(one.weight_decay / search.weight_decay))
            for one in search.settings(12, seed=5)
        ]

    first = places(METHODS["SGD"].search)
    for method in METHODS.values():
        assert np.allclose(places(method.search), first, atol=1e-12)
    lr, decay = np.array(first).T
    assert lr.min() >= -1.5
    assert lr.max() <= 1.5
    assert np.allclose(np.diff(np.sort(lr)), 3 / 12), "learning rates are evenly spaced"
    assert decay.min() >= -1.5
    assert decay.max() <= 1.5
    gaps = np.diff([-1.5, *np.sort(decay), 1.5])
    assert gaps.max() < 3 * 2 / 12, "no large part of the decays is left out"
    assert abs(np.corrcoef(lr, decay)[0, 1]) < 0.3, "neither is searched along with the other"
    assert METHODS["SGD"].search.settings(12, 5) != METHODS["SGD"].search.settings(12, 6)
    with pytest.raises(ArgumentError, match="at least one"):
        METHODS["SGD"].search.settings(0, 0)


def test_ranges_begin_at_or_below_the_published_rates() -> None:
    published = {"SGD-M": 0.05, "AdamW": 0.001, "Lion": 0.0001, PUBLISHED: 0.001}
    for name, rate in published.items():
        assert 0 <= METHODS[name].search.place(Setting(rate, 1.0)) < 0.5, name


def test_the_best_setting_has_the_highest_mean_accuracy_then_the_lowest_loss() -> None:
    a, b, c = Setting(0.1, 0.0), Setting(0.2, 0.0), Setting(0.3, 0.0)
    trials = [Trial(a, 0.9, 0.5), Trial(a, 0.7, 0.5), Trial(b, 0.82, 0.6), Trial(b, 0.8, 0.6), Trial(c, 0.5, 0.1)]
    assert ranked(trials) == [b, a, c]
    assert ranked([Trial(a, 0.8, 0.5), Trial(b, 0.8, 0.4), Trial(c, 0.8, math.nan)]) == [b, a, c]
    assert 0.1 + 0.7 < 0.2 + 0.6  # though they are as many images
    equal = [Trial(a, 0.1, 0.4), Trial(a, 0.7, 0.4), Trial(b, 0.2, 0.5), Trial(b, 0.6, 0.5)]
    assert ranked(equal) == ranked(equal[::-1]) == [a, b]
    assert ranked([Trial(c, 0.8, math.inf), Trial(a, 0.8, 9.0)]) == [a, c]
    with pytest.raises(ArgumentError, match="no trial"):
        ranked([])


def test_a_best_rate_at_either_end_of_its_range_is_said_to_be_there() -> None:
    search = Range(lr=0.1, weight_decay=1e-3)
    at = {place: search.at_edge(Setting(0.1 * 10 ** (3 * (place - 0.5)), 1.0)) for place in (0.05, 0.15, 0.85, 0.95)}
    assert at == {0.05: True, 0.15: False, 0.85: False, 0.95: True}


# Runs


def test_the_rate_goes_up_in_a_line_and_down_half_a_cosine() -> None:
    factor = warm_up_cosine(steps=20, warm_up=4)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(12) == pytest.approx(0.5)
    assert factor(16) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert factor(19) > 0
    assert factor(20) == pytest.approx(0, abs=1e-15)


def test_test_images_are_never_learnt_from_nor_validated_on() -> None:
    samples = digit_samples()
    assert (len(samples.classes), len(samples.test_classes)) == (797, 1000)
    rows, validation = samples.split(512, seed=1)
    assert sorted(torch.cat([rows, validation]).tolist()) == list(range(797))
    assert rows.tolist() != samples.split(512, seed=2)[0].tolist()
    # All images of the data set are different, so none is on both sides.
    both = torch.cat([samples.images, samples.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


@pytest.mark.skipif(not has_cifar10(), reason="CURVDIAG_DATA names no folder with CIFAR-10")
def test_the_cifar_subset_is_normalised_and_split() -> None:
    samples = CIFAR10.samples()
    assert samples.images.shape == samples.test_images.shape == (5000, 3, 32, 32)
    assert samples.images.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert samples.images.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert samples.classes.bincount().min() > 400
    assert CIFAR10.net()(samples.images[:2]).shape == (2, 10)


def test_the_titles_say_how_large_the_nets_are() -> None:
    assert sum(p.numel() for p in cifar_conv_net().parameters()) == 24_346
    for task in (DIGITS, CIFAR10):
        assert f"{sum(p.numel() for p in task.net().parameters()):,} parameters" in task.title
        assert task.epochs % task.test_every == task.epochs % task.measure_every == 0


def reference(task: Task, lr: float, decay: float, seed: int) -> tuple[list[float], list[float]]:
    """SGD with momentum, written out: training losses, and test accuracies, by epoch."""
    samples = digit_samples()
    rows = torch.randperm(797, generator=torch.Generator().manual_seed(seed))[: task.train_size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.net()
    order, steps, warm = torch.Generator().manual_seed(seed), task.epochs * 2, WARM_UP * 2
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    losses, accuracies, step = [], [], 0
    for _ in range(task.epochs):
        total = 0.0
        for chosen in torch.randperm(task.train_size, generator=order).split(task.batch_size):
            loss = nn.functional.cross_entropy(model(samples.images[rows][chosen]), samples.classes[rows][chosen])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            shape = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
            with torch.no_grad():
                for p, g, v in zip(model.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.9).add_(g + decay * p)
                    p.sub_(lr * shape * v)
            total += float(loss.detach()) * len(chosen)
            step += 1
        losses.append(total / task.train_size)
        model.eval()
        with torch.no_grad():
            right = model(samples.test_images).argmax(1) == samples.test_classes
        model.train()
        accuracies.append(float(right.double().mean()))
    return losses, accuracies


def test_a_run_is_what_a_loop_written_out_gives() -> None:
    asked = job("SGD-M", lr=0.1)
    found = train(asked)
    losses, accuracies = reference(SMALL, 0.1, asked.weight_decay, seed=3)
    assert found.curves is not None
    assert found.curves.train_loss == pytest.approx(losses, rel=1e-5)
    assert found.curves.accuracy == pytest.approx(accuracies, abs=2e-3)
    assert found.curves.tested_at == [1, 2]
    assert (found.accuracy, found.loss) == (found.curves.accuracy[-1], found.curves.loss[-1])
    assert found.curves.rate == pytest.approx([1, 1])
    assert found.curves.p == found.curves.anisotropy == []


def test_a_run_repeats_bit_for_bit_and_leaves_random_state_and_threads_alone() -> None:
    torch.manual_seed(17)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    one, two = (train(job("LPSGDM, AnisotropyP")) for _ in range(2))
    assert one.curves == two.curves
    assert one.curves != train(job("LPSGDM, AnisotropyP", seed=4)).curves
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_watching_the_curvature_changes_nothing() -> None:
    plain, watched = train(job(PUBLISHED)).curves, train(job(PUBLISHED, watch=True)).curves
    assert plain is not None
    assert watched is not None
    assert plain.train_loss == watched.train_loss
    assert plain.accuracy == watched.accuracy
    assert plain.anisotropy == []
    assert watched.measured_at == [0, 2]
    assert all(1 <= a <= 3022 for a in watched.anisotropy)


def test_p_is_noted_as_the_steps_had_it() -> None:
    longer = replace(SMALL, epochs=5)
    cosine = train(job(PUBLISHED, task=longer)).curves
    assert cosine is not None
    assert cosine.p == pytest.approx([2 + 4 * (1 + math.cos(math.pi * s / 4)) / 2 for s in range(5)])
    followed = train(job("LPSGDM, AnisotropyP", task=longer)).curves
    assert followed is not None
    assert followed.measured_at == [0, 2, 4]
    size, smooth, expected = 3022, None, []
    for a in followed.anisotropy:
        factor = min(max(math.log(a / size) / math.log(HIGH_ANISOTROPY), 0), 1)
        smooth = factor if smooth is None else 0.5 * smooth + 0.5 * factor
        expected += 2 * [2 + (P_MAX - 2) * smooth]
    assert followed.p == pytest.approx(expected[:5])
    assert max(followed.p) < P_MAX, "or this would show nothing"
    constant = train(job("LPSGDM, constant p")).curves
    assert constant is not None
    assert constant.p == [P_MAX, P_MAX]


def test_the_rate_is_noted_as_anisotropy_changed_it() -> None:
    curves = train(job("SGD-M, AnisotropyLR", task=replace(SMALL, epochs=4))).curves
    assert curves is not None
    assert curves.rate[:2] == pytest.approx([1, 1])
    assert curves.rate[2] == pytest.approx(curves.rate[3])
    assert abs(curves.rate[2] - 1) > 1e-3


def test_a_run_that_blows_up_ends_early_and_is_never_chosen() -> None:
    broken = train(job("SGD", lr=1e30, final=False))
    assert not math.isfinite(broken.loss)
    assert 0 <= broken.accuracy <= 1
    good = train(job("SGD", lr=0.1, final=False))
    assert choose([broken, replace(good, accuracy=broken.accuracy)], "SGD")[0] == Setting(good.lr, good.weight_decay)
    assert Run.from_dict(json.loads(json.dumps(broken.to_dict()))).key == broken.key
    final = train(job("SGD", lr=1e30, task=replace(SMALL, measure_every=1), watch=True))
    assert final.curves is not None
    assert len(final.curves.train_loss) == final.curves.tested_at[-1] == 1
    assert math.isfinite(final.curves.anisotropy[0])
    assert math.isnan(final.curves.anisotropy[1])
