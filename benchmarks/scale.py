"""What a few ranks on this machine send, take and hold, over what the plan for scale says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import Row
from settings import Settings

SECTION = "Scale: several processes on this machine, over what is foretold"
RANKS = (1, 2, 3)
EXACT, TWICE, ROOM = 0.01, 2.0, 1.25
"""How far bytes, seconds and memory may be from what is foretold: a share, and factors either way."""
IO = Path("/proc/self/io")


def scale_rows(settings: Settings) -> list[Row]:
    """Rows for bytes that collectives send, time of products both ways, and memory by ranks."""
    if not IO.exists():
        return [Row(SECTION, "", "not measured: needs Linux's /proc", 0.0, 0.0, 0.0, unit="none")]
    found = {}
    for ranks in (2,) if settings.quick else RANKS:
        settings.tell(f"scale: {ranks} rank{'s' * (ranks > 1)}")
        found[ranks] = launched(ranks)
    return rows_of(found)


def launched(ranks: int) -> dict[str, Any]:
    """What ``scale_ranks.py`` finds on so many ranks, a thread each."""
    script = Path(__file__).with_name("scale_ranks.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [*command, str(script), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{ranks} ranks failed:\n{done.stderr[-2000:]}")
        read: dict[str, Any] = json.loads(out.read_text())
        return read


def rows_of(found: dict[int, dict[str, Any]]) -> list[Row]:
    """What ranks found, as ratios to what was foretold."""
    rows = []
    for ranks, one in found.items():
        if ranks > 1:
            wire = one["wire"]
            speed = f"{wire['bandwidth'] / 1e9:.2f} GB/s, {1e6 * wire['latency']:.0f} µs a step"
            for name in ("all-reduce", "all-gather"):
                note = f"the ring's share; {speed}" if name == "all-reduce" else "the ring's share"
                rows.append(_bytes(ranks, f"bytes sent in an {name}", wire[name], note))
            note = "gloo reduces everything, then keeps a part: 2 is expected"
            rows.append(_bytes(ranks, "bytes sent in a reduce-scatter", wire["reduce-scatter"], note, 2.0))
            rows.append(_bytes(ranks, "bytes sent for a product, data-parallel", one["data-parallel"]["sent"]))
            rows.append(_bytes(ranks, "bytes sent for a product, sharded", one["sharded"]["sent"]))
        for way in ("data-parallel", "sharded"):
            rows.append(_time(ranks, way, one[way]))
        held = one["memory"]
        note = (
            f"{held['peak'] / 1e6:.0f} MB, foretold {held['foretold'] / 1e6:.0f} MB, of which "
            f"{held['constant'] / 1e6:.0f} MB on any number of ranks; all weights are {held['weights'] / 1e6:.0f} MB"
        )
        ratio = held["peak"] / held["foretold"]
        what, target = "peak memory of a rank, sharded", f"within {ROOM - 1:.0%} either way"
        holds = 1 / ROOM <= ratio <= ROOM
        rows.append(Row(SECTION, _name(ranks), what, ratio, ratio, ratio, target, holds, note, "times"))
    return rows


def _bytes(ranks: int, what: str, ratio: float, note: str = "", expected: float = 1.0) -> Row:
    holds = abs(ratio / expected - 1) <= EXACT
    target = f"{expected:g}, within {EXACT:.0%}"
    return Row(SECTION, _name(ranks), what, ratio, ratio, ratio, target, holds, note, "times")


def _time(ranks: int, way: str, found: dict[str, float]) -> Row:
    ratio = found["seconds"] / found["predicted"]
    moving = found["predicted"] - found["computing"]
    note = (
        f"{1e3 * found['seconds']:.3g} ms, foretold {1e3 * found['computing']:.3g} ms computing and "
        f"{1e3 * moving:.3g} ms sending"
    )
    holds = 1 / TWICE <= ratio <= TWICE
    target = f"within {TWICE:g} times either way"
    what = f"time of a product, {way}"
    return Row(SECTION, _name(ranks), what, ratio, ratio, ratio, target, holds, note, "times", seconds=found["seconds"])


def _name(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"
