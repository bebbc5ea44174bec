"""The GPU part: eager and compiled products and quadrature beside curvlinops and hessian-eigenthings.

Everything ends with a wait for the device, so that what is timed has been done. On the CPU the same code runs with
tiny nets, for tests.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import measure
import torch
from gpu_nets import gpu_nets
from measure import Timing, relative
from nets import Batches, gradient
from products import pays_after
from report import Row, attempted, row_of
from settings import Settings
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from curvdiag import Hessian, Objective, spectral_density

OURS, COMPILED = "curvdiag, graphs kept", "curvdiag, graphs kept, compiled"
LIMITS = {("ResNet-18", COMPILED): 1.5}
"""Most gradients for a product, by net and way."""
LEEWAY = 1e-3
"""Two single-precision products of the same matrix, some through convolutions in another order."""
TIMES = {"hessian-eigenthings": 1.6, "curvlinops": 4.0}
"""How many times as long as ours their step of quadrature is to take, at least."""
CALLS = 5
"""Products between two waits: a wait stops the queue, which no run of Lanczos does."""
PRODUCTS, STEPS, WAITS = "GPU: product H @ v", "GPU: a whole step of quadrature", "GPU: waits for the device"
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "cudaMemcpy")
"""What a profile shows where the host waits, or copies and so waits."""


def gpu_rows(settings: Settings) -> list[Row]:
    """All nets, one after the other; one row that says so where no GPU is at hand."""
    device = settings.device
    if device == "cuda" and not torch.cuda.is_available():
        return [Row(PRODUCTS, "", "no GPU at hand", 0.0, 0.0, 0.0, unit="none")]
    # cuDNN uses TF32 unless told otherwise, and whoever does would be compared with those who do not.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    makers = gpu_nets(device)
    unknown = set(settings.nets) - set(makers)
    if unknown:
        raise ValueError(f"the nets of the GPU part are {', '.join(makers)}, not {', '.join(sorted(unknown))}")
    rows = []
    for name in settings.nets or makers:
        settings.tell(f"GPU: {name}")
        rows += attempted("gpu", name, lambda name=name: net_rows(name, makers[name], settings))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def net_rows(name: str, make: Callable[[], tuple[nn.Module, Batches]], settings: Settings) -> list[Row]:
    """Products, densities and waits of one net."""
    torch.manual_seed(0)
    model, batches = make()
    net = Net(name, model.eval(), batches, settings)
    return [*net.products(), *net.densities(), *net.waits()]


class Net:
    """One net on the device, with our operators and theirs."""

    def __init__(self, name: str, model: nn.Module, batches: Batches, settings: Settings) -> None:
        self.name, self.model, self.batches, self.settings = name, model, batches, settings
        self.device = settings.device
        self.objective = Objective(model, nn.CrossEntropyLoss(), batches=batches)
        self.kept = Hessian(self.objective)
        self.vector = torch.randn(self.kept.size, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.vector /= self.vector.norm()
        self.ours = self.kept @ self.vector
        self.ready: dict[str, float] = {}
        self.absent: dict[str, str] = {}
        self.ways: dict[str, Callable[[Tensor], Tensor]] = {OURS: lambda v: self.kept @ v}
        self.tell("compiling ours")
        begun = time.perf_counter()
        self.compiled = Hessian(self.objective, compile=True)
        self.ways[COMPILED] = lambda v: self.compiled @ v
        self._ready(COMPILED, begun)
        self.rough: dict[str, Hessian] = {}
        for precision in ("bfloat16",) if self.device == "cpu" else ("tf32", "bfloat16"):
            name = f"curvdiag, graphs kept, {precision}"
            self.rough[name] = rough = Hessian(self.objective, precision=precision)
            self.ways[name] = lambda v, rough=rough: rough @ v
        self.linear, self.things = self._others()

    def _others(self):  # type: ignore[no-untyped-def]
        """Their operators, each None where its library is not installed; what they cannot do is noted."""
        things, linear = None, None
        if find_spec("hessian_eigenthings") is None:
            self.absent["hessian-eigenthings"] = "not installed"
        else:
            things = eigenthings(self.model, self.batches)
            self.ways["hessian-eigenthings"] = lambda v: things.matvec(v).detach()
        if find_spec("curvlinops") is None:
            self.absent["curvlinops"] = "not installed"
        else:
            linear = curvlinops(self.model, self.batches)
            self.ways["curvlinops"] = lambda v: (linear @ v).detach()
            compiled, name = torch.compile(lambda v: linear @ v), "curvlinops, compiled"
            self.ways[name] = lambda v: compiled(v).detach()
            self.tell("compiling curvlinops")
            try:
                self._ready(name, time.perf_counter())
            except Exception as error:  # it is their product that does not compile; ours are measured all the same
                self.absent[name] = f"fails: {type(error).__name__}: {error}".splitlines()[0][:200]
                del self.ways[name]
        return linear, things

    def tell(self, text: str) -> None:
        self.settings.tell(f"GPU: {self.name}: {text}")

    def unit(self) -> None:
        """One gradient, done."""
        gradient(self.model, self.batches)
        self.wait()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def products(self) -> list[Row]:
        """Each way in turns; the note says how far its product is from ours and how long compiling took."""
        self.tell("products")
        count = 1 if self.device == "cpu" else CALLS
        candidates = {name: self._several(way, count) for name, way in self.ways.items()}
        timings = measure.alternate(self.unit, candidates, rounds=self.settings.rounds)
        each = {name: timing / count for name, timing in timings.items()}
        second = measure.seconds(self.unit)
        rows = []
        for name, timing in each.items():
            notes = []
            if name in self.ready:
                gain = (each[OURS if name == COMPILED else "curvlinops"].median - timing.median) * second
                notes.append(f"ready after {self.ready[name]:.0f} s, {pays_after(self.ready[name], gain)}")
            apart = relative(self.ways[name](self.vector), self.ours)
            if name in self.rough:
                notes.append(f"says that its relative error is {self.rough[name].precision_error:.0e}")
            void = apart > LEEWAY and not name.startswith("curvdiag")
            notes.append("" if name == OURS else f"product differs from curvdiag's by {apart:.0e}")
            note = ("void: " if void else "") + "; ".join(filter(None, notes))
            row = row_of(PRODUCTS, self.name, name, timing, LIMITS.get((self.name, name)), note)
            wrong = name == COMPILED and apart > LEEWAY
            rows.append(replace(row, target="the same product", holds=False) if wrong else row)
        return rows + [
            Row(PRODUCTS, self.name, name, 0.0, 0.0, 0.0, note=why, unit="none") for name, why in self.absent.items()
        ]

    def densities(self) -> list[Row]:
        """A step of one probe; ours eager and compiled, theirs with the steps that fit into the time."""
        self.tell("densities")
        steps, few = (4, 3) if self.device == "cpu" or self.settings.quick else (40, 5)
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "curvdiag": (lambda: spectral_density(self.kept, steps=steps, probes=1), steps),
            "curvdiag, compiled": (lambda: spectral_density(self.compiled, steps=steps, probes=1), steps),
        }
        if self.things is not None:
            runs["hessian-eigenthings"] = lambda: eigenthings_density(self.things, steps), steps
        if self.linear is not None:
            runs["curvlinops"] = lambda: curvlinops_density(self.linear, few), few
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.settings.slq_rounds + 1):
            for name, (call, count) in runs.items():
                taken[name].append(measure.once(self.unit, self._done(call), count))
        timings = {name: Timing(tuple(values[1:])) for name, values in taken.items()}  # the first was a warm-up
        ours = timings["curvdiag"].median
        rows = []
        for name, timing in timings.items():
            times = TIMES.get(name)
            note = f"{runs[name][1]} steps, 1 probe" + (f"; {timing.median / ours:.1f} times ours" if times else "")
            target = f"at least {times:g} times ours" if times else ""
            holds = timing.median > times * ours if times else None
            if times and relative(self.ways[name](self.vector), self.ours) > LEEWAY:
                holds, note = None, f"void: it multiplies with another matrix; {note}"
            rows.append(Row(STEPS, self.name, name, timing.median, *timing.quartiles, target, holds, note))
        return rows

    def waits(self) -> list[Row]:
        """Ten more steps are to bring no further wait of the host into the profile, and none where all are refused."""
        rows = []
        for name, operator in (("curvdiag", self.kept), ("curvdiag, compiled", self.compiled)):
            few, many = (waits_in(operator, steps, self.device) for steps in (10, 20))
            refused = refused_wait(operator, self.device)
            note = f"in the profiles of 20 and of 10 steps: {many} and {few}"
            note += f"; {refused}" if refused else "; none where the driver refuses them"
            more, what = many - few, f"{name}, waits in ten Lanczos steps"
            holds = more <= 0 and not refused
            rows.append(Row(WAITS, self.name, what, more, more, more, "at most 0", holds, note, "count"))
        return rows

    def _several(self, way: Callable[[Tensor], Tensor], count: int) -> Callable[[], None]:
        return self._done(lambda: [way(self.vector) for _ in range(count)])

    def _done(self, call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            self.wait()

        return run

    def _ready(self, name: str, begun: float) -> None:
        """Two products, since some compile again for what they see the second time."""
        self._several(self.ways[name], 2)()
        self.ready[name] = time.perf_counter() - begun


def waits_in(operator: Hessian, steps: int, device: str) -> int:
    """Events in the profile of a density in which the host waits for the device."""
    spectral_density(operator, steps=2, probes=1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiled:
        spectral_density(operator, steps=steps, probes=1)
    # An asynchronous copy is no wait.
    names = [event.key for event in profiled.key_averages() for _ in range(event.count)]
    return sum(any(n.startswith(w) for w in WAITING) and not n.startswith("cudaMemcpyAsync") for n in names)


def refused_wait(operator: Hessian, device: str) -> str:
    """What PyTorch says of a wait between the first and the last step, where it refuses all; empty if there is none."""
    if device != "cuda":
        return ""

    def strict(done: int, planned: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < planned else "default")

    try:
        spectral_density(operator, steps=10, probes=1, progress=strict)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return f"a wait inside the loop: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def curvlinops(model: nn.Module, batches: Batches):  # type: ignore[no-untyped-def]
    from curvlinops import HessianLinearOperator

    twin = copy.deepcopy(model)
    params = [p for p in twin.parameters() if p.requires_grad]
    return HessianLinearOperator(twin, nn.CrossEntropyLoss(), params, batches, check_deterministic=False)


def curvlinops_density(operator, steps: int) -> object:  # type: ignore[no-untyped-def]
    from curvlinops import lanczos_approximate_spectrum

    return lanczos_approximate_spectrum(operator, steps, num_repeats=1, boundaries=(-1.0, 1.0))


def eigenthings(model: nn.Module, batches: Batches):  # type: ignore[no-untyped-def]
    import hessian_eigenthings as library

    loss = library.supervised_loss(nn.CrossEntropyLoss())
    return library.HessianOperator(copy.deepcopy(model), batches, loss)


def eigenthings_density(operator, steps: int) -> object:  # type: ignore[no-untyped-def]
    import hessian_eigenthings as library

    return library.spectral_density(operator, num_runs=1, lanczos_steps=steps, seed=0)
