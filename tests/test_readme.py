"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def training_script() -> dict[str, object]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "criterion": nn.CrossEntropyLoss(), "probe_batch": batch, "optimizer": optimizer}


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_a_code_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = training_script()
    exec(block, names)
    if "monitor" in names:
        monitor: Any = names["monitor"]
        steps, optimizer = monitor.steps_done, names["optimizer"]
        names["criterion"](names["model"](names["probe_batch"][0]), names["probe_batch"][1]).backward()  # type: ignore
        optimizer.step()  # type: ignore[attr-defined]
        assert monitor.steps_done == steps + 1
        assert monitor.measure() is not None
        for schedule in (names[name] for name in ("rates", "exponents") if name in names):
            schedule.step()  # type: ignore[attr-defined]
            assert schedule.history[-1].seen  # type: ignore[attr-defined]
        monitor.close()
    expected = {name for name in ("run.db", "density.png", "scaling.png") if f'"{name}"' in block}
    assert {path.name for path in tmp_path.iterdir()} == expected != set()


def test_every_file_that_it_links_to_is_there() -> None:
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
