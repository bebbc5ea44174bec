"""The tables of ``docs/scale.md``, from the formulas and from saved results: ``python benchmarks/scale_page.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import Row

from curvdiag.memory import human_bytes
from curvdiag.spectrum.decoder import LLAMA_1B, LLAMA_7B, LLAMA_70B
from curvdiag.spectrum.hardware import HARDWARE
from curvdiag.spectrum.scale import Run, Share
from curvdiag.spectrum.scale_plan import duration, plan_ranks

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "scale.md", ROOT / "benchmarks" / "results" / "scale.json"
SEQUENCES, LENGTH = 512, 2048
RUN = Run(steps=40, probes=3)
MODELS = {"1.1B": LLAMA_1B, "7B": LLAMA_7B, "70B": LLAMA_70B}
PLACES = {
    "1.1B": (("H100", 8), ("H200", 8)),
    "7B": (("A100", 8), ("H100", 8), ("H100", 64)),
    "70B": (("H100", 8), ("A100", 64), ("H100", 64)),
}
HEADS = ("weights", "hardware", "way", "peak of a rank", "fits", "sent for a product", "a product", "120 products")


def foretold() -> list[str]:
    """A line for each model, hardware and way."""
    lines = [_cells(*HEADS), "|---" * len(HEADS) + "|"]
    for name, shape in MODELS.items():
        for hardware, ranks in PLACES[name]:
            work = shape.work(SEQUENCES, LENGTH, checkpointing=True)
            for share in plan_ranks(work, RUN, ranks, hardware=hardware).shares:
                lines.append(_line(name, f"{ranks} x {hardware}", share))
    return lines


def nominal() -> list[str]:
    """The makers' figures, a line for each GPU."""
    heads = ("GPU", "float32", "memory", "its rate", "to its node", "into the network")
    lines = [_cells(*heads), "|---" * len(heads) + "|"]
    for one in HARDWARE.values():
        rates = (f"{one.memory_bandwidth / 1e12:.3g} TB/s", *(f"{x / 1e9:.0f} GB/s" for x in (one.link, one.network)))
        lines.append(_cells(one.name, f"{one.flops / 1e12:.3g} TFLOP/s", human_bytes(one.memory), *rates))
    return lines


def sizes() -> list[str]:
    """What one sequence holds in each model."""
    heads = ("weights", "numbers", "one vector", "its graph, exact", "a gradient's activations", "checkpointed")
    lines = [_cells(*heads), "|---" * len(heads) + "|"]
    for name, shape in MODELS.items():
        counts = (shape.graph(LENGTH), shape.activations(LENGTH), shape.checkpointed(LENGTH))
        held = (human_bytes(4 * count) for count in counts)
        lines.append(_cells(name, f"{shape.units().size:,}", human_bytes(4 * shape.units().size), *held))
    return lines


def checked(path: Path = RESULTS) -> list[str]:
    """What several processes were last measured to take."""
    if not path.exists():
        return ["Not measured yet."]
    saved = json.loads(path.read_text(encoding="utf-8"))
    return measured([Row(**row) for row in saved["rows"]], saved["environment"])


def save(rows: Sequence[Row], about: dict[str, Any], path: Path = RESULTS) -> bool:
    """Save those of the part ``scale`` in a file of their own, with their environment; false where there are none."""
    own = [asdict(row) for row in rows if row.part == "scale" and row.unit != "none"]
    if own:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": about, "rows": own}, indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    return bool(own)


def measured(rows: Sequence[Row], about: dict[str, Any]) -> list[str]:
    """A line for each figure, and where it comes from."""
    heads = ("ranks", "what", "over what is foretold", "wanted", "holds", "in figures")
    lines = [f"{about['date']}, {about['cpu']}, {about['cores']} cores, gloo, torch {about['torch']}.", ""]
    lines += [_cells(*heads), "|---" * len(heads) + "|"]
    return lines + [_cells(r.net.split()[0], r.what, f"{r.value:.3f}", r.target, r.verdict, r.note) for r in rows]


SECTIONS = {"sizes": sizes, "nominal": nominal, "foretold": foretold, "checked": checked}
"""What stands between ``<!-- name -->`` and ``<!-- end of name -->``."""


def written(text: str) -> str:
    """The page with its tables made again."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE.name} needs the lines {begin} and {end}, once each")
        head, tail = text.split(begin)[0], text.split(end)[1]
        text = "\n".join([head + begin, "", *make(), "", end]) + tail
    return text


def refresh(page: Path = PAGE) -> None:
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


def _line(name: str, hardware: str, share: Share) -> str:
    times = ("", "")
    if share.fits and share.compute is not None and share.communication is not None and share.seconds is not None:
        each = f"{duration(share.compute)} computing, {duration(share.communication)} sending"
        times = (each, duration(share.seconds))
    peak = f"{human_bytes(share.peak)} of {human_bytes(share.free or 0.0)}"
    return _cells(name, hardware, share.way, peak, "yes" if share.fits else "no", human_bytes(share.sent), *times)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    refresh()
