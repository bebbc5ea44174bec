"""Exact second moments of one fully connected layer, from its inputs and from what the rest does to its outputs.

A layer ``z = W a + b`` that sees one vector ``a_i`` of each sample makes that sample's loss a function ``f_i(W a_i)``.
With ``delta_i`` its gradient and ``A_i`` its Hessian in the outputs ``z``, whatever the net behind the layer is,

    g_i = delta_i a_i^T,    h_i = A_i kron a_i a_i^T,    h_i^2 = A_i^2 kron |a_i|^2 a_i a_i^T,

so that no matrix of the size of the block is needed for a sample. (For piecewise linear nets ``A_i = J^T H_out J``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag.data import Batch, sample_count
from curvdiag.distributed import ALONE, Ranks
from curvdiag.errors import ArgumentError, LossError, TooLargeError
from curvdiag.memory import human_bytes
from curvdiag.objective import Objective
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.graphs import GraphEngine
from curvdiag.scaling.alike import along_same, free_here, of_all, on_all
from curvdiag.scaling.power_law import DirectionSamples
from curvdiag.weights import Weights

# Numbers that a chunk of an intermediate product may hold (128 MiB of float64).
CHUNK = 1 << 24


@dataclass(frozen=True)
class KroneckerLayer:
    """One weight matrix ``[out, in]`` as a block; a vector of it is ``weight.reshape(-1)``. All in float64.

    Of several ranks each holds the factors of its own samples. What is asked for is that of all of them: moments are
    summed, what lies along directions is told one rank after the other, and all ranks ask.

    Attributes:
        activations: ``a_i`` ``[N, in]``, the layer's inputs.
        output_gradients: ``delta_i`` ``[N, out]``, with the samples' weights ``N / Z``.
        output_hessians: ``A_i`` ``[N, out, out]``, with the same weights.
        ranks: The processes that measure together.
        total: ``N`` of all ranks; by default that of this one.
    """

    activations: Tensor
    output_gradients: Tensor
    output_hessians: Tensor
    ranks: Ranks = ALONE
    total: int | None = None

    @classmethod
    def of(cls, objective: Objective) -> KroneckerLayer:
        """The layer whose weight is all that the objective's parameters hold.

        Raises:
            ArgumentError: The block is not one weight of a linear layer that each forward pass calls once, with one
                vector for each sample; or the loss depends on the weight in another way too.
            LossError: The losses are not known for each sample.
            TooLargeError: The output Hessians do not fit into the free memory.
        """
        if not objective.per_sample:
            raise LossError(f"the test needs the loss of each sample: {objective.why()}")
        layer = _layer(objective)
        _check_memory(objective, layer)
        weights = objective.weights(dtype=torch.float64)

        def of_these_samples() -> KroneckerLayer:
            parts = [_look(objective, weights, layer, batch) for batch in objective.batches]
            scale = objective.size / objective.total_weight
            activations, gradients, hessians = (torch.cat(column) for column in zip(*parts, strict=True))
            found = cls(activations, gradients * scale, hessians * scale, objective.ranks, objective.size)
            _verify(found, objective, weights)
            return found

        return on_all(objective.ranks, "look at a fully connected layer", of_these_samples, (ArgumentError,))

    @property
    def size(self) -> int:
        """``D``, the number of weights."""
        return self.activations.shape[1] * self.output_gradients.shape[1]

    @property
    def samples(self) -> int:
        """``N``, of all ranks."""
        return len(self.activations) if self.total is None else self.total

    def gathered(self, free: int) -> KroneckerLayer:
        """The same layer with the samples of all ranks on each of them, one rank's after the other's.

        Args:
            free: Bytes that are free on each rank.

        Raises:
            TooLargeError: They do not fit into these.
        """
        if self.ranks.alone:
            return self
        factors = self.activations, self.output_gradients, self.output_hessians
        need = 3 * 8 * self.samples * sum(factor[0].numel() for factor in factors)
        if need > free:
            raise TooLargeError(
                f"the factors of {self.samples:,} samples need {human_bytes(need)} to be put together on each rank, "
                f"more than the {human_bytes(free)} free; measure on fewer samples"
            )
        inputs, gradients, hessians = (self.ranks.concatenate(factor, 0, "factors of a layer") for factor in factors)
        return KroneckerLayer(inputs, gradients, hessians)

    def hessian(self) -> Tensor:
        """``H = (1/N) sum_i A_i kron a_i a_i^T`` ``[D, D]``."""
        return self._sum(self.output_hessians)

    def squared(self) -> Tensor:
        """``E[h^2] = (1/N) sum_i A_i^2 kron |a_i|^2 a_i a_i^T`` ``[D, D]``."""
        squares = self.output_hessians @ self.output_hessians
        return self._sum(squares * self.activations.square().sum(1)[:, None, None])

    def covariance(self) -> Tensor:
        """``C = (1/N) sum_i g_i g_i^T - g g^T`` ``[D, D]``, from centred gradients."""
        mean = self.gradient()

        def add_up() -> Tensor:
            out = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.activations.device)
            for part in self._chunks(self.size):
                rows = torch.einsum("no,ni->noi", self.output_gradients[part], self.activations[part]).flatten(1)
                rows -= mean
                out.addmm_(rows.T, rows, alpha=1 / self.samples)
            return out

        return self.ranks.sum("covariance of a layer", add_up)

    def gradient(self) -> Tensor:
        """``g = (1/N) sum_i delta_i a_i^T`` ``[D]``."""
        return self.ranks.sum(
            "gradient of a layer",
            lambda: (self.output_gradients.T @ self.activations).reshape(-1) / self.samples,
        )

    def along(self, vectors: Tensor, *, squares: bool = True) -> DirectionSamples:
        """Slopes, curvatures and squares of every sample along the columns of ``[D, n]``.

        With ``u = V_k a_i`` they are ``delta . u``, ``u^T A u`` and ``|a|^2 |A u|^2``.
        """
        with along_same(self.ranks, vectors):
            own = self._along(vectors, squares)
        return of_all(self.ranks, own, self.activations.device)

    def _along(self, vectors: Tensor, squares: bool) -> DirectionSamples:
        outputs, inputs = self.output_gradients.shape[1], self.activations.shape[1]
        count = len(self.activations)
        found = [torch.empty(count, vectors.shape[1], dtype=torch.float64) for _ in range(2 + squares)]
        few = max(1, min(vectors.shape[1], 64))
        for start in range(0, vectors.shape[1], few):
            group = vectors[:, start : start + few].to(self.activations)
            images = group.reshape(outputs, inputs, -1).transpose(0, 1).reshape(inputs, -1)
            for part in self._chunks(outputs * group.shape[1]):
                a, curved = self.activations[part], self.output_hessians[part]
                u = (a @ images).reshape(len(a), outputs, -1)
                curved_u = curved @ u
                cells = [torch.einsum("no,nok->nk", self.output_gradients[part], u), (u * curved_u).sum(1)]
                if squares:
                    cells.append(curved_u.square().sum(1) * a.square().sum(1)[:, None])
                for whole, cell in zip(found, cells, strict=True):
                    whole[part, start : start + few] = cell.cpu()
        return DirectionSamples(found[0], found[1], found[2] if squares else None)

    def largest_curvature(self) -> float | None:
        """``kappa_max``, the largest eigenvalue of any ``h_i``; None where one of them has a negative eigenvalue."""
        with self.ranks.together("largest curvature of a sample"):
            values = torch.cat([torch.linalg.eigvalsh(self.output_hessians[part]) for part in self._chunks(1024)])
            largest = (values[:, -1] * self.activations.square().sum(1)).max()
            own = float(values[:, 0].min()), float(values[:, -1].abs().max()), float(largest)
        lowest, sizes, curvatures = zip(*self.ranks.gather(own), strict=True)
        return None if min(lowest) < -1e-9 * max(sizes) else max(curvatures)

    def _sum(self, factors: Tensor) -> Tensor:
        """``(1/N) sum_i F_i kron a_i a_i^T`` for symmetric ``F_i`` ``[N, out, out]``."""
        outputs, inputs = self.output_gradients.shape[1], self.activations.shape[1]
        # Both factors are symmetric: one product of their upper triangles is a quarter of the work.
        upper, places = _triangle(outputs, factors.device)
        pairs, columns = _triangle(inputs, factors.device)

        def add_up() -> Tensor:
            out = torch.zeros(upper.shape[1], pairs.shape[1], dtype=torch.float64, device=factors.device)
            for part in self._chunks(upper.shape[1] + pairs.shape[1]):
                a = self.activations[part]
                out.addmm_(factors[part][:, *upper].T, a[:, pairs[0]] * a[:, pairs[1]], alpha=1 / self.samples)
            return out

        out = self.ranks.sum("sum of outer products", add_up)
        return out[places[:, None, :, None], columns[None, :, None]].reshape(self.size, self.size)

    def _chunks(self, width: int) -> list[slice]:
        """Runs of the samples held here whose intermediate products of ``width`` numbers each stay small."""
        count, step = len(self.activations), max(1, CHUNK // max(width, 1))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The upper triangle of a symmetric matrix ``[2, k]``, and where in it each entry of the whole is."""
    upper = torch.triu_indices(size, size, device=device)
    places = torch.empty(size, size, dtype=torch.long, device=device)
    places[upper[0], upper[1]] = places[upper[1], upper[0]] = torch.arange(upper.shape[1], device=device)
    return upper, places


def _layer(objective: Objective) -> nn.Linear:
    """The linear layer that the block is the weight of."""
    names = objective.parameters.names
    aliases = objective.parameters.aliases[0]
    if len(names) == 1 and len(aliases) == 1 and aliases[0].rpartition(".")[2] == "weight":
        module = objective.model.get_submodule(aliases[0].rpartition(".")[0])
        if isinstance(module, nn.Linear):
            return module
    raise ArgumentError(f"a Kronecker layer is the weight of one nn.Linear, and nothing else; the block is {names[:4]}")


def _check_memory(objective: Objective, layer: nn.Linear) -> None:
    """Whether the factors of each rank's samples fit; the same answer on all of them."""
    numbers = layer.out_features**2 + 2 * layer.out_features + layer.in_features
    need, free = 2 * 8 * objective.local_size * numbers, free_here(objective)
    if objective.ranks.least(free - need, "free memory") < 0:
        raise TooLargeError(
            f"the output Hessians of {objective.local_size:,} samples in {layer.out_features:,} outputs need "
            f"{human_bytes(need)}, more than the {human_bytes(free)} free"
            f"{'' if need > free else ' on another rank'}; measure on fewer samples, or use method='matrix-free'"
        )


def _look(objective: Objective, weights: Weights, layer: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, output gradients and output Hessians of one batch, from one backward pass for each output."""
    seen: list[tuple[Tensor, Tensor]] = []

    def cut_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append((inputs[0].detach(), leaf))
        return leaf.clone()  # what follows may write into it

    def measure() -> tuple[Tensor, Tensor, Tensor]:
        totals = objective.totals(batch, torch.float64)
        count = sample_count(batch)
        if len(seen) != 1 or seen[0][0].ndim != 2 or len(seen[0][0]) != count or totals.shape != (count,):
            raise ArgumentError(
                "a Kronecker layer is called once in a forward pass, with one vector for each sample; this one was "
                f"called {len(seen)} times with {[tuple(a.shape) for a, _ in seen][:3]} for {count} samples"
            )
        activations, leaf = seen[0]
        gradient = _derivative(totals.sum(), leaf, keep=True)
        rows = [_derivative(column.sum(), leaf, keep=False) for column in gradient.unbind(1)]
        return activations, gradient.detach(), torch.stack(rows, 1)

    handle = layer.register_forward_hook(cut_here)
    try:
        activations, gradient, hessian = objective.inside(weights, measure, twice=True)
    finally:
        handle.remove()
    return activations, gradient, (hessian + hessian.transpose(1, 2)) / 2


def _derivative(value: Tensor, leaf: Tensor, *, keep: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(value, leaf, retain_graph=True, create_graph=keep, allow_unused=True)[0]
    return torch.zeros_like(leaf) if found is None else found


def _verify(layer: KroneckerLayer, objective: Objective, weights: Weights) -> None:
    """One random vector through the operators' own graphs: does the loss use the weight in no other way?"""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, layer.size, generator=generator, dtype=torch.float64).to(objective.device)
    engine: GraphEngine[GradientGraph] = GraphEngine(objective, weights, torch.float64, None, None)
    product, slopes = engine.multiply(vector, [0])[0], engine.sample_dots(vector, [0])[0] * objective.size
    outputs, inputs = layer.output_gradients.shape[1], layer.activations.shape[1]
    u = layer.activations @ vector.reshape(outputs, inputs).T
    curved = torch.einsum("nop,np->no", layer.output_hessians, u)
    own = (curved.T @ layer.activations).reshape(-1) / layer.samples
    order = (slopes.sort().values, (layer.output_gradients * u).sum(1).sort().values)  # graphs merge batches
    for what, (truth, found) in {"a Hessian product": (product, own), "slopes": order}.items():
        error = float((truth - found).norm()) / max(float(truth.norm()), 1e-300)
        if error > 1e-6:
            raise ArgumentError(
                f"the loss depends on this layer's weight in another way than through its output, or on other samples: "
                f"{what} from the layer's factors are off by {error:.2g}"
            )
