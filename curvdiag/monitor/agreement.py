"""What monitors on several ranks must have in common: compared in words, once, before anything is measured."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curvdiag.distributed import Ranks
from curvdiag.errors import DistributedError
from curvdiag.monitor.cadence import Cadence
from curvdiag.monitor.description import rule
from curvdiag.monitor.settings import Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


def in_common(
    settings: Settings, cadence: Cadence, optimizer: Optimizer | None, steps_done: int, **others: Any
) -> dict[str, str]:
    """What must be the same on all ranks, in words by name."""
    return {
        "cadences": cadence_in_words(cadence),
        "quantities": ", ".join(settings.quantities),
        **{name: str(getattr(settings, name)) for name in ("steps", "probes", "seed", "tol")},
        "options of the Hessian": _plainly(dict(sorted(settings.hessian.items()))),
        "optimizers": "none" if optimizer is None else rule(optimizer),
        "counts of steps": str(steps_done),
        **{name: str(value) for name, value in others.items()},
    }


def require_agreement(ranks: Ranks, told: Mapping[str, str]) -> None:
    """Refuse to measure where the ranks have not the same in mind; a collective.

    Raises:
        DistributedError: On all of them, with who has what.
    """
    if ranks.alone:
        return
    everybody = ranks.gather(dict(told), "comparison of monitors")
    different = [name for name in everybody[0] if len({one[name] for one in everybody}) > 1]
    if different:
        listed = "; ".join(
            f"different {name}: " + ", ".join(f"{one[name]} on rank {i}" for i, one in enumerate(everybody))
            for name in different
        )
        raise DistributedError(
            f"the monitors of the ranks cannot measure together, with {listed}. Give CurvatureMonitor the same "
            "arguments on every rank, and load the same checkpoint"
        )


def cadence_in_words(cadence: Cadence) -> str:
    """What tells one cadence from another, without addresses; of a function its code, and what it closes over."""
    code = getattr(cadence, "__code__", None)
    if code is None:
        return _plainly(cadence)
    held = [getattr(cadence, "__defaults__", None)]
    for cell in getattr(cadence, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not yet bound
            held.append(None)
    told = zlib.crc32(_plainly((code.co_code, code.co_consts, code.co_names, held)).encode())
    return f"{code.co_qualname} ({told:08x})"


def _plainly(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
