"""Graphs of one group of samples that are traced, cut and compiled instead of kept by autograd.

What each keeps are the values that a program needs for its products. Each operator compares the products of a program
once with those of autograd's own graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from curvdiag.data import Batch, can_merge, merge, sample_count
from curvdiag.errors import CurvdiagError, CurvdiagWarning
from curvdiag.objective import Objective
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.kept_graph import KeptGraph
from curvdiag.operators.linear_part import UncompilableError
from curvdiag.operators.plan import GraphBytes, calibration, first_samples, foretell, largest, through
from curvdiag.operators.program import ALONG, GATHER, HESSIAN, Program, program_of, programs
from curvdiag.operators.tracing import Group, first_line
from curvdiag.sandbox import numerics
from curvdiag.weights import Weights


class TracedGraph(KeptGraph):
    """A symmetric matrix over the parameters, made by one group of samples: the values that its program keeps.

    Args:
        kinds: The products that it serves.
        trusted: The loss and its gradient are known to be finite.
    """

    can_batch = False
    recomputes = False
    checked = True

    def __init__(self, group: Group, program: Program, kinds: tuple[str, ...], *, trusted: bool) -> None:
        self.group, self.program, self.kinds = group, program, kinds
        self.objective, self.weights, self.batch, self.dtype = group.objective, group.weights, group.batch, group.dtype
        self.own: GradientGraph | None = None
        there = program.trace.gradients
        self.reached = [g is not None for g in there]
        self.values, found = program.values(group, kinds, gradient=not trusted)
        if not trusted:
            gradients = iter(found[1:])
            self._check_finite(found[0], [None if g is None else next(gradients) for g in there])

    def _build(self, live: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def _verify(self) -> None:
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Memory of the values."""
        return self.program.bytes(self.kinds)

    @property
    def sample_weights(self) -> Tensor:
        """One for each sample."""
        return torch.ones(sample_count(self.batch), dtype=self.objective.dtype, device=self.objective.device)

    def multiply(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """The Hessian's rows at ``positions`` times a vector that is zero elsewhere; None is zero."""
        return self._run(HESSIAN, positions, vectors, len(positions))

    def along(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """Derivative ``[B]`` of each sample's share of the objective: ``v . grad t_i / total_weight``; None is zero."""
        return self._run(ALONG, positions, vectors, 1)[0]

    def gather(
        self, coefficients: Tensor, positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """``sum_i c_i grad t_i`` over the parameters at ``positions``, for coefficients ``[B]``; None is zero."""
        return self._run(GATHER, positions, [coefficients.to(self.objective.dtype)], len(positions))

    def gauss_newton(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """The same with the Gauss-Newton matrix, on autograd's own graph, which is built and kept for it."""
        if self.own is None:
            self.own = GradientGraph(self.objective, self.weights, self.batch, self.dtype, trusted=True)
        return self.own.gauss_newton(vectors, positions, keep=True)

    def _run(self, kind: str, positions: Sequence[int], inputs: Sequence[Tensor], count: int) -> list[Tensor | None]:
        part = self.program.part(kind, positions)
        arguments = [*inputs, *(self.values[node] for node in part.kept)]
        whole = tuple(positions) == self.program.whole
        products: list[Tensor | None] = [None] * count
        for k, product in zip(part.outputs, self.program.run(kind, part, whole, arguments), strict=True):
            products[k] = product
        return products


class TracedGraphs:
    """Builds the graphs of one operator: traced where that is possible, else autograd's own.

    Args:
        kinds: The products that they serve.
    """

    func = TracedGraph

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds
        self.verified: set[Program] = set()

    def __call__(
        self, objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None, *, trusted: bool = False
    ) -> KeptGraph:
        group = Group.of(objective, weights, batch, dtype)
        found = program_of(group)
        if isinstance(found, Program) and found in self.verified:
            return TracedGraph(group, found, self.kinds, trusted=trusted)
        if isinstance(found, Program):
            # Autograd's own graph makes all checks, gives products to compare with, and is gone before the other.
            graph = self._verify(group, self._products(GradientGraph(objective, weights, batch, dtype)))
            if isinstance(graph, TracedGraph):
                return graph
            found = programs(objective)[group.key] = graph
        built = GradientGraph(objective, weights, batch, dtype, trusted=trusted)
        _warn(objective, f"compile=True has no effect and products walk autograd's own graphs: {found}")
        return built

    def serve(self, kinds: Iterable[str], kept: list[KeptGraph]) -> int:
        """Let the graphs serve these products too, which are compared anew; returns the bytes that this adds."""
        wanted, before = tuple(dict.fromkeys((*self.kinds, *kinds))), _bytes(kept)
        if wanted != self.kinds:
            self.kinds = wanted
            self.verified.clear()
            for index, graph in enumerate(kept):
                if isinstance(graph, TracedGraph):
                    kept[index] = self(graph.objective, graph.weights, graph.batch, graph.dtype, trusted=True)
        return _bytes(kept) - before

    def graph_bytes(
        self,
        objective: Objective,
        weights: Weights,
        pieces: Sequence[Batch],
        dtype: torch.dtype | None,
        budget: int,
        *,
        regroup: bool,
    ) -> GraphBytes:
        """Memory of graphs, from the shapes in a trace: exact for the largest group if all of it fits."""
        group = largest(pieces)
        if regroup:
            group = merge([piece for piece in pieces if piece is group or can_merge(piece, group)])
        count = sample_count(group)
        much = self._bytes(Group.of(objective, weights, group, dtype))
        if much is None:
            build = functools.partial(GradientGraph, objective, weights)
            return foretell(pieces, lambda batch: build(batch, dtype), cut=objective.can_regroup)
        few = calibration(count, cut=regroup)[0]
        if few == count or much / count * sum(map(sample_count, pieces)) <= budget:
            return GraphBytes(0.0, much / count)
        little = self._bytes(Group.of(objective, weights, first_samples(group, few), dtype))
        return through(few, little or 0, count, much)

    def _bytes(self, group: Group) -> int | None:
        program = program_of(group)
        return program.bytes(self.kinds) if isinstance(program, Program) else None

    def _verify(self, group: Group, truth: list[Tensor]) -> TracedGraph | str:
        """The graph if its products are those of autograd's, else why it cannot be used.

        Where compiled code fails the program runs without. A program from before that gives other products belongs to
        a model that has changed since (an attribute, a branch), which is then traced anew.
        """
        program = program_of(group)
        if not isinstance(program, Program):
            return program
        found = self._attempt(group, program, truth)
        if isinstance(found, str) and program.plain is None:
            program.plain = found
            found = self._attempt(group, program, truth)
            if not isinstance(found, str):
                _warn(group.objective, f"products of compile=True run without compiled code: {program.plain}")
        if isinstance(found, str) and program.used:
            del programs(group.objective)[group.key]
            return self._verify(group, truth)
        program.used = True
        self.verified.add(program)
        return found

    def _attempt(self, group: Group, program: Program, truth: list[Tensor]) -> TracedGraph | str:
        try:
            graph = TracedGraph(group, program, self.kinds, trusted=False)
            found = self._products(graph)
        except UncompilableError as problem:
            return str(problem)
        except (CurvdiagError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # whatever an operation or a compiler says about shapes it did not expect
            return f"it fails ({first_line(problem)})"
        error = max(_distance(one, other) for one, other in zip(found, truth, strict=True))
        accepted = max(torch.finfo(w.dtype).eps for w in group.weights.chosen) ** 0.5
        return graph if error <= accepted else f"a product differs from autograd's own by {error:.2g} of its norm"

    def _products(self, graph: KeptGraph) -> list[Tensor]:
        """One product of each kind, with a random vector."""
        objective, weights = graph.objective, graph.weights
        everything = range(len(weights.chosen))
        generator = torch.Generator().manual_seed(3)
        vector = torch.randn(objective.parameters.size, generator=generator)
        vector = vector.to(objective.device, graph.dtype or objective.dtype)
        found = [graph.whole(vector)] if HESSIAN in self.kinds else []
        if ALONG not in self.kinds:
            return found
        assert isinstance(graph, GradientGraph | TracedGraph)
        parts = [v.to(w.dtype) for v, w in zip(objective.parameters.views(vector), weights.chosen, strict=True)]
        with numerics(vector.device):
            dots = graph.along(parts, everything, keep=True)
            dots = torch.zeros_like(graph.sample_weights) if dots is None else dots
            gathered = graph.gather(torch.nn.functional.normalize(dots, dim=0), everything, keep=True)
        zeros = map(torch.zeros_like, weights.chosen)
        return [*found, dots, *(zero if g is None else g for g, zero in zip(gathered, zeros, strict=True))]


def _bytes(graphs: Iterable[KeptGraph]) -> int:
    """What traced ones among them keep."""
    return sum(graph.bytes for graph in graphs if isinstance(graph, TracedGraph))


def _distance(one: Tensor, truth: Tensor) -> float:
    """Relative to the norm of the truth; infinite where that is zero and the other is not."""
    error, size = float((one.double() - truth.double()).norm()), float(truth.double().norm())
    return error / size if size > 0 else 0.0 if error == 0 else float("inf")


def _warn(objective: Objective, text: str) -> None:
    said: set[str] = objective.__dict__.setdefault("_said_of_programs", set())
    if text not in said:
        said.add(text)
        warnings.warn(text, CurvdiagWarning, stacklevel=2)
