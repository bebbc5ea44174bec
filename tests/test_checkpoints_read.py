"""Every usual layout of a checkpoint is read, nothing in it is run, and what is none says so in one line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import STATE, net, prefixed, taken
from safetensors.torch import save_file
from torch import nn

from curvdiag.checkpoints.load import load
from curvdiag.checkpoints.match import weights_in
from curvdiag.checkpoints.read import read
from curvdiag.errors import CheckpointError, MissingExtraError

OTHERS = {"criterion.weight": torch.ones(3), "metric.total": torch.zeros(())}
WHOLE: dict[str, Any] = {
    "state dict": STATE,
    "model": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(6, 4)}}, "param_groups": []}},
    "state_dict": {"state_dict": STATE, "arch": "resnet", "best": torch.tensor(0.3)},
    "model_state_dict": {"model_state_dict": STATE, "loss": 0.5},
    "another name": {"generator": STATE, "step": torch.tensor(3)},
    "two deep": {"trainer": {"model": STATE}},
    "beside numbers": {**STATE, "epoch": 3},
    "DistributedDataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": {"state_dict": prefixed("_orig_mod.module.")},
    "Lightning": {"state_dict": {**prefixed("net."), **OTHERS}, "global_step": 3},
    "compiled in Lightning": {"state_dict": {**prefixed("model._orig_mod."), **OTHERS}},
    "beside an average": {"model": STATE, "ema": net(8).state_dict()},
}


@pytest.mark.parametrize("layout", WHOLE)
def test_a_file_of_torch_is_read_however_the_weights_lie_in_it(tmp_path: Path, layout: str) -> None:
    torch.save(WHOLE[layout], tmp_path / "a.pt")
    taken(tmp_path / "a.pt")


def test_parts_wrapped_inside_the_model_are_found_on_either_side(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self, between: str) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)
            body: nn.Module = nn.Linear(2, 2)
            for name in reversed(between.split(".") if between else []):
                body = nn.ModuleDict({name: body})
            self.body = body

    for saved, loaded in (("", "module"), ("_orig_mod", ""), ("module", "_orig_mod.module")):
        source, target = Wrapped(saved), Wrapped(loaded)
        torch.save(source.state_dict(), tmp_path / "a.pt")
        load(target, weights_in(read(tmp_path / "a.pt"), target))
        pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_weights_of_the_part_are_enough_for_a_model_around_it(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    model = nn.ModuleDict({"backbone": net(6)})
    load(model, weights_in(read(tmp_path / "a.pt"), model))
    assert torch.equal(model.state_dict()["backbone.0.weight"], STATE["0.weight"])


def test_an_old_file_of_torch_is_read_without_mapping(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    taken(tmp_path / "a.pt")


def test_a_file_is_mapped_and_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    load_file, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: (asked.append(k), load_file(*a, **k))[1])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    taken(tmp_path / "a.pt")
    assert asked == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_safetensors_are_read_with_what_they_say(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", metadata={"step": "30", "epoch": "1.5"})
    contents = taken(tmp_path / "a.safetensors")
    assert (contents.step, contents.epoch) == (30, 1.5)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    taken(tmp_path / "a.bin")
    assert read(tmp_path / "a.bin", weights=False).step == 30


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path, kind: str) -> None:
    names = list(STATE)
    base = "model" if kind == "safetensors" else "pytorch_model"
    files = [f"{base}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    for file, part in zip(files, (names[:3], names[3:]), strict=True):
        piece = {name: STATE[name] for name in part}
        save_file(piece, tmp_path / file) if kind == "safetensors" else torch.save(piece, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: files[names.index(name) >= 3] for name in names}}
    (tmp_path / f"{base}.{kind}.index.json").write_text(json.dumps(index))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 7, "epoch": 0.25, "log_history": []}))
    contents = taken(tmp_path)
    assert (contents.step, contents.epoch) == (7, 0.25)
    taken(tmp_path / f"{base}.{kind}.index.json")
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {files[1]} of the 2 files"):
        read(tmp_path)
    index["weight_map"]["0.bias"] = "../secret.bin"
    (tmp_path / f"{base}.{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read(tmp_path)


def test_what_a_checkpoint_says_of_itself() -> None:
    from curvdiag.checkpoints.read import EPOCH_KEYS, STEP_KEYS, number, whole_number

    assert whole_number({"step": torch.tensor(4), "global_step": True}, STEP_KEYS) == 4
    assert whole_number({"iter_num": 10.0}, STEP_KEYS) == 10
    assert whole_number({"step": 0.5}, STEP_KEYS) is None
    assert whole_number({"step": -1}, STEP_KEYS) is None
    assert number({"epoch": "many", "current_epoch": 1.5}, EPOCH_KEYS) == 1.5


def test_a_buffer_named_step_is_no_step(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2), "step": torch.tensor(12)}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").step is None


# What is no checkpoint


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harm_was_done",)


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def broken(name: str, folder: Path) -> Path:
    path = folder / "a.pt"
    if name in ("cut", "cut old"):
        torch.save(STATE, path, _use_new_zipfile_serialization=name == "cut")
        cut(path)
    elif name == "cut safetensors":
        path = folder / "a.safetensors"
        save_file(STATE, path)
        cut(path)
    elif name == "program":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x", "y")
    elif name == "folder":
        path = folder / "nothing"
        path.mkdir()
    elif name == "distributed":
        path = folder / "dcp"
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"x")
    elif name == "json":
        path = folder / "model.safetensors.index.json"
        path.write_text("{")
    elif name == "gone":
        path = folder / "gone.pt"
    else:
        path.write_bytes(RAW[name]) if name in RAW else torch.save(SAVED[name], path)
    return path


RAW = {"empty": b"", "text": b"learning rate 0.2", "pickle": pickle.dumps({"a": 1}, 2), "noise": bytes(range(128, 256))}
SAVED: dict[str, Any] = {
    "module": nn.Linear(2, 2),
    "arguments": {"model": STATE, "args": argparse.Namespace(lr=0.1)},
    "harm": {"model": STATE, "x": Harm()},
    "tensor": torch.ones(3),
    "numbers": {"loss": 0.3, "step": 4},
    "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
}
MESSAGES = {
    "empty": "is empty",
    "text": "is no checkpoint",
    "noise": "is no checkpoint",
    "pickle": "cannot be read as a file of torch.save",
    "cut": "is cut off or damaged",
    "cut old": "is cut off or damaged",
    "cut safetensors": "is no whole safetensors file",
    "program": "TorchScript",
    "zip": "cannot be read as a file of torch.save",
    "folder": "neither model.safetensors nor pytorch_model.bin",
    "distributed": "dcp_to_torch_save",
    "json": "is no JSON",
    "gone": "No such file",
    "module": r"torch.nn.modules.linear.Linear.*weights_only=True.*add_safe_globals",
    "arguments": r"argparse.Namespace.*weights_only=True.*add_safe_globals",
    "harm": "could do harm.*no code of it was run",
    "tensor": "holds a Tensor and no weights by name",
    "numbers": "no weights by name; it holds 'loss', 'step'",
    "optimizer": "no weights by name; it holds 'state', 'param_groups'",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_no_checkpoint_says_so_in_one_line_and_is_not_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = broken(name, tmp_path)
    with pytest.raises(CheckpointError, match=MESSAGES[name]) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm_was_done").exists()


def test_a_class_that_the_task_allows_is_read(tmp_path: Path) -> None:
    path = broken("arguments", tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        taken(path)


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'curvdiag\[safetensors\]'"):
        read(tmp_path / "a.safetensors")
