"""What every optimizer here owes a training loop: torch's habits, and clear refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from update_rules import SHAPES, arrays, parameters, set_gradients

from curvdiag.optim import GSGD, LPSGD, LPSGDM, Lion, SignSGD, Stacey, buckets


def gsgd(params, **options):
    return GSGD(params, total_steps=10, **options)


MAKERS = pytest.mark.parametrize("make", [LPSGD, LPSGDM, Lion, SignSGD, gsgd, Stacey])


def run(optimizer, tensors, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(tensors, step)
        optimizer.step()


@MAKERS
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_run_resumes_bit_for_bit(make, through_a_file):
    whole, half = parameters(0, torch.float32), parameters(0, torch.float32)
    options = {"lr": 0.01, "weight_decay": 0.1}
    one = make(whole, **options)
    run(one, whole, 6)
    first = make(half, **options)
    run(first, half, 3)
    state = first.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second = make(half, lr=7.0)
    second.load_state_dict(state)
    run(second, half, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


@MAKERS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_by_themselves(make, duplicate):
    tensors = parameters(0)
    optimizer = make(tensors)
    run(optimizer, tensors, 2)
    others, twin = duplicate((tensors, optimizer))
    kept = arrays(tensors)
    run(twin, others, 2, first=2)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(tensors), kept, strict=True))
    run(optimizer, tensors, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@MAKERS
def test_closures_are_called_with_gradients_and_their_loss_returned(make):
    theta = torch.ones(3, requires_grad=True)
    optimizer = make([theta], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 3
    assert bool((theta < 1).all())
    assert optimizer.step() is None


@MAKERS
@pytest.mark.parametrize("foreach", [True, False])
def test_ascent_on_a_function_is_descent_on_its_negative(make, foreach):
    up, down = parameters(0), parameters(0)
    one, other = make(up, maximize=True, foreach=foreach), make(down, foreach=foreach)
    for step in range(3):
        set_gradients(up, step)
        set_gradients(down, step)
        for tensor in down:
            tensor.grad.neg_()
        one.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


@MAKERS
@pytest.mark.parametrize("foreach", [True, False])
def test_gradients_are_left_alone_and_nothing_without_one_moves(make, foreach):
    tensors, idle = parameters(0), torch.ones(3, requires_grad=True)
    set_gradients(tensors, 0)
    before = arrays([t.grad for t in tensors])
    make([*tensors, idle], weight_decay=0.1, maximize=True, foreach=foreach).step()
    assert all(np.array_equal(a, b) for a, b in zip(arrays([t.grad for t in tensors]), before, strict=True))
    assert idle.tolist() == [1, 1, 1]
    optimizer = make([idle], foreach=foreach)
    optimizer.step()
    assert not optimizer.state.get(idle)


@MAKERS
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_gradients_and_empty_tensors_make_no_nan(make, dtype, foreach):
    theta, empty = torch.ones(4, dtype=dtype, requires_grad=True), torch.ones(0, 2, dtype=dtype, requires_grad=True)
    optimizer = make([theta, empty], foreach=foreach)
    for _ in range(2):
        theta.grad, empty.grad = torch.zeros_like(theta), torch.zeros_like(empty)
        optimizer.step()
    assert theta.tolist() == [1, 1, 1, 1]


@MAKERS
@pytest.mark.parametrize("foreach", [True, False])
def test_layouts_dtypes_and_devices_mix_in_one_group(make, foreach):
    values = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(1))

    def tensors():
        strided = torch.stack([values, values], -1)[..., 0]
        return [values.clone(), values.T.contiguous().T, strided, values.double(), values.to(torch.bfloat16)]

    together = [t.requires_grad_() for t in tensors()]
    apart = [t.contiguous().requires_grad_() for t in tensors()]
    for t in together:
        t.grad = gradient.to(t.dtype).T.contiguous().T if t.dim() == 2 else gradient
    for t in apart:
        t.grad = gradient.to(t.dtype)
    nowhere = torch.ones(3, device="meta", requires_grad=True)
    nowhere.grad = torch.ones(3, device="meta")
    stacey = make is Stacey  # Its norm is one for all, so it has no parts to compare with.
    make(together if stacey else [*together, nowhere], weight_decay=0.1, foreach=foreach).step()
    for part in [apart] if stacey else [[t] for t in apart]:
        make(part, weight_decay=0.1, foreach=foreach).step()
    for one, other in zip(together, apart, strict=True):
        # The sum in the norm has another order there, and the steps are about 0.1.
        torch.testing.assert_close(one, other, rtol=1e-6 if stacey else 0, atol=1e-7 if stacey else 0)


@MAKERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_change_no_bit(make, dtype, monkeypatch):
    """Whole tensors, slices of a CPU's size and of another, channels_last, and what cannot be sliced."""
    shapes = (*SHAPES, (101, 31), (1024,), (1025,), (4, 30, 5, 7), (7,))
    found = []
    for size, foreach in ((1024, False), (1024, None), (300, True)):
        monkeypatch.setattr(buckets, "CPU_ELEMENTS", size)
        tensors = parameters(0, dtype, shapes)
        tensors[5] = tensors[5].detach().t().contiguous().t().requires_grad_()
        tensors[8] = tensors[8].detach().to(memory_format=torch.channels_last).requires_grad_()
        optimizer = make(tensors, weight_decay=0.1, foreach=foreach)
        for step in range(2):
            set_gradients(tensors, step)
            tensors[8].grad = tensors[8].grad.to(memory_format=torch.channels_last)
            optimizer.step()
        found.append([*tensors, *(value for state in optimizer.state.values() for value in state.values())])
    # The sum in the norm of Stacey has another order.
    rtol, atol = (torch.finfo(dtype).eps, 1e-6) if make is Stacey else (0, 0)
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=rtol, atol=atol)


@MAKERS
@pytest.mark.parametrize("turned", [False, True])
def test_temporaries_are_small(make, turned, monkeypatch):
    """In parts a step asks for a few arrays of the size of a part; one by one for some of the size of the weights."""
    monkeypatch.setattr(buckets, "CPU_ELEMENTS", 8192)
    largest = {}
    for foreach in (None, False):
        weights = torch.ones(700, 700)
        theta = (weights.T if turned else weights).requires_grad_()
        theta.grad = torch.ones_like(theta)
        optimizer = make([theta], weight_decay=0.1, foreach=foreach)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        largest[foreach] = max(event.cpu_memory_usage for event in profile.events())
    assert largest[None] <= 4 * (4 * 8192 * torch.get_num_threads())
    assert largest[False] >= 4 * 490_000


@MAKERS
@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_does_not_wait_for_its_device(make, foreach):
    """Nothing can be read from the device ``meta``; whatever waits for a device reads from it."""
    tensors = [torch.ones(shape, device="meta", requires_grad=True) for shape in ((3, 4), (5,), ())]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = make(tensors, weight_decay=0.1, foreach=foreach)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(tensors[2].detach())


@MAKERS
def test_a_gradient_scaler_unscales_and_skips(make):
    theta, plain = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer, other = make([theta]), make([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, math.inf, 2.0):
        scaler.scale((factor * theta.square()).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor < math.inf:
            plain.grad = 2 * factor * plain.detach()
            other.step()
    assert torch.equal(theta, plain)
    assert scaler.get_scale() == 4


@MAKERS
def test_schedulers_of_torch_drive_the_rate(make):
    theta, plain = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer, other = make([theta], lr=0.1), make([plain], lr=torch.tensor(0.1))
    for driven in (optimizer, other):
        schedule = torch.optim.lr_scheduler.ExponentialLR(driven, 0.5)
        for _ in range(3):
            driven.param_groups[0]["params"][0].grad = torch.ones(3)
            driven.step()
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)
    torch.testing.assert_close(theta, plain, rtol=1e-6, atol=0)


@MAKERS
def test_named_parameters_and_groups_are_kept(make):
    model = nn.Linear(2, 3)
    optimizer = make(model.named_parameters(), lr=0.5)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer = make([model.weight], lr=0.5)
    optimizer.add_param_group({"params": [model.bias], "lr": 0.25, "weight_decay": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert type(optimizer).__name__ in repr(optimizer)


@pytest.mark.parametrize("make", [LPSGD, LPSGDM])
@pytest.mark.parametrize("p", [2.0, 3.0, 6.0])
def test_autograd_passes_through_the_steps(make, p):
    """Three steps on a quadratic, with respect to start, curvature and learning rate, against differences."""

    def after(start, curvature, rate):
        theta = start.clone()
        optimizer = make([theta], lr=rate, p=p, eps=1e-3, weight_decay=0.1, differentiable=True)
        for _ in range(3):
            theta.grad = curvature * optimizer.param_groups[0]["params"][0].clone()
            optimizer.step()
        return theta

    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([1.0, -0.5], [0.3, 2.0], 0.1)]
    assert torch.autograd.gradcheck(after, inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@MAKERS
def test_a_step_on_a_gpu_is_that_on_the_cpu_and_does_not_wait(make):
    here = parameters(0, torch.float32, [(300, 70), (9,)])
    there = [tensor.detach().cuda().requires_grad_() for tensor in here]
    one, other = make(here, weight_decay=0.1), make(there, torch.tensor(0.001, device="cuda"), weight_decay=0.1)
    one.param_groups[0]["lr"] = 0.001
    for step in range(3):
        set_gradients(here, step)
        for tensor, twin in zip(there, here, strict=True):
            tensor.grad = twin.grad.cuda()
        one.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            other.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for tensor, twin in zip(there, here, strict=True):
        torch.testing.assert_close(tensor.cpu(), twin, rtol=1e-5, atol=1e-5)


def test_a_compiled_step_is_the_same():
    ours, theirs = (parameters(0, torch.float32, [(3, 4), (5,)]) for _ in range(2))
    one, other = LPSGDM(ours, weight_decay=0.1), LPSGDM(theirs, weight_decay=0.1)
    compiled = torch.compile(lambda: one.step(), backend="aot_eager")
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        compiled()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Tagged(torch.Tensor):
    """A subclass, of which nobody promises that lists of it work."""


@MAKERS
@pytest.mark.parametrize("foreach", [True, None])
def test_subclasses_of_tensors_are_left_whole_and_alone(make, foreach, monkeypatch):
    ours, theirs = (parameters(0, torch.float32, [(10,), (3,)]) for _ in range(2))
    set_gradients(theirs, 1)
    ours = [tensor.detach().as_subclass(Tagged).requires_grad_() for tensor in ours]
    for one, other in zip(ours, theirs, strict=True):
        one.grad = other.grad.clone().as_subclass(Tagged)
    make(theirs, weight_decay=0.1, foreach=False).step()
    monkeypatch.setattr(buckets, "CPU_ELEMENTS", 4)
    monkeypatch.setattr(buckets, "_slices", None)
    make(ours, weight_decay=0.1, foreach=foreach).step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.detach().as_subclass(torch.Tensor), other.detach())


@MAKERS
def test_options_that_a_checkpoint_lacks_are_those_of_the_optimizer(make):
    """A checkpoint of plain SGD, or one that is older than an option."""
    (theta,) = parameters(0, shapes=[(3,)])
    optimizer = make([theta], weight_decay=0.25)
    options = dict(optimizer.param_groups[0])
    optimizer.load_state_dict(torch.optim.SGD([theta], lr=0.5).state_dict())
    set_gradients([theta], 0)
    optimizer.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0)
    for key in set(options) - {"lr", "weight_decay", "params", "steps_taken", "foreach", "maximize", "differentiable"}:
        assert group[key] == options[key]


def test_a_compiled_step_follows_a_changing_p():
    ours, theirs = (parameters(0, torch.float32, [(3, 4), (5,)]) for _ in range(2))
    one, other = LPSGD(ours, weight_decay=0.1), LPSGD(theirs, weight_decay=0.1)
    compiled = torch.compile(lambda: one.step(), backend="eager")
    for step, p in enumerate((6.0, 4.0, 3.0, 2.0)):
        for optimizer, tensors, call in ((one, ours, compiled), (other, theirs, other.step)):
            set_gradients(tensors, step)
            optimizer.param_groups[0]["p"] = p
            call()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
