"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_pages import run_on_ranks
from tiny_transformers import gpt2, tokens
from torch import nn

from curvdiag import RunStore

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def training_script() -> dict[str, object]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "criterion": nn.CrossEntropyLoss(), "probe_batch": batch, "optimizer": optimizer}


def lightning_script() -> dict[str, object]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
    return {"module": Module(), "loader": torch.utils.data.DataLoader(data, 4)}


def transformers_script() -> dict[str, object]:
    from transformers import TrainingArguments

    batch = tokens(8)
    samples = [{key: values[i] for key, values in batch.items()} for i in range(8)]
    arguments = TrainingArguments(output_dir="out", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    return {"model": gpt2(), "probe_batches": [batch], "dataset": samples, "arguments": arguments}


SCRIPTS = {"from lightning": lightning_script, "from transformers": transformers_script}


@pytest.mark.filterwarnings("default::curvdiag.errors.CurvdiagWarning")  # a net of 15 weights learns in no time
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_a_code_block_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in block:
        Path("script.py").write_text(block)
        run_on_ranks(["--standalone", "--nproc-per-node=2", "script.py"])
        assert "eigen" in capfd.readouterr().out
        return
    script = next((made for name, made in SCRIPTS.items() if name in block), training_script)
    names = script()
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
    if script is not training_script:
        with RunStore(tmp_path / "run.db", readonly=True) as store:
            assert len(store.scalars("curv/hessian/lambda_max")) >= 1
        return
    expected = {name for name in ("run.db", "density.png", "scaling.png", "logs") if f'"{name}"' in block}
    assert {path.name for path in tmp_path.iterdir()} == expected != set()


def test_every_file_that_it_links_to_is_there() -> None:
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
