"""One operator working on the graphs of another."""

from __future__ import annotations

import dataclasses
from typing import Any

from curvdiag.errors import ArgumentError
from curvdiag.objective import Objective
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.traced_graph import TracedGraph, TracedGraphs


def borrowed(graphs: Any, objective: Objective, given: bool, *kinds: str) -> GraphEngine[GradientGraph]:
    """The engine of an operator that holds graphs of gradients.

    Args:
        given: Whether the borrower was given settings that the graphs come with.
        kinds: Products that compiled graphs must serve for it.

    Raises:
        ArgumentError: It holds other graphs, belongs to another objective, or is not in full precision.
    """
    engine = getattr(graphs, "_engine", None)
    if not isinstance(engine, GraphEngine) or engine.kind not in (GradientGraph, TracedGraph):
        raise ArgumentError(
            f"graphs= takes a Hessian(method='exact'), NoiseCovariance or EmpiricalFisher, not {graphs!r}, which holds "
            "no graph of per-sample gradients"
        )
    if graphs.objective is not objective:
        raise ArgumentError("graphs= holds graphs of another objective: make both operators from the same one")
    if graphs.precision != "full":
        raise ArgumentError(
            f"the graphs are in {graphs.precision}, and its error was measured for another matrix: make the operator "
            f"that lends them in full precision, or leave graphs= out and give precision={graphs.precision!r}"
        )
    if given:
        raise ArgumentError(
            "graphs= comes with its dtype, share, memory, micro_batch, batched, precision and outputs: leave these out"
        )
    if isinstance(engine.build, TracedGraphs):
        more = engine.build.serve(kinds, engine.kept)
        engine.plan = dataclasses.replace(engine.plan, bytes_kept=engine.plan.bytes_kept + more)
    return engine
