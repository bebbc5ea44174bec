"""Weights fit the model or are refused with a short list of what does not, and the model gets its own back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import STATE, net, prefixed, taken
from torch import nn

from curvdiag.checkpoints.load import load, weights_kept
from curvdiag.checkpoints.match import weights_in
from curvdiag.checkpoints.read import read
from curvdiag.errors import CheckpointError

SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    r"of 9 tensors 1 missing: 3\.bias\. Build the model": lambda s: s.pop("3.bias"),
    r"8 unexpected: 4\.weight, 5\.weight, 6\.weight, 7\.weight, 8\.weight and 3 more": lambda s: s.update(
        {f"{i}.weight": torch.ones(1) for i in range(4, 12)}
    ),
    r"1 of another shape or kind: 0\.weight is float32 \[6, 5\] and float32 \[6, 4\] in the model": lambda s: s.update(
        {"0.weight": torch.ones(6, 5)}
    ),
    r"0\.weight is int8 \[6, 4\] and float32": lambda s: s.update({"0.weight": torch.ones(6, 4, dtype=torch.int8)}),
    r"1 missing: 0\.bias; 1 unexpected: a": lambda s: (s.pop("0.bias"), s.update(a=torch.ones(1))),
    r"1 missing: 1\.running_mean": lambda s: s.pop("1.running_mean"),
}


@pytest.mark.parametrize("message", SPOILED)
def test_what_does_not_fit_is_listed(tmp_path: Path, message: str) -> None:
    state = dict(STATE)
    SPOILED[message](state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        taken(tmp_path / "a.pt")


def test_of_a_stranger_some_names_of_both_are_shown(tmp_path: Path) -> None:
    torch.save({f"layer{i}.w": torch.ones(2) for i in range(9)}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"nothing of the model: it has layer0.w, .* and 4 more; the model has 0.w"
    ):
        taken(tmp_path / "a.pt")


def test_of_several_weights_that_fit_one_is_chosen_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {**prefixed("student."), **{f"teacher.{k}": v + 1 for k, v in STATE.items()}}},
               tmp_path / "a.pt")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"several sets .* 'state_dict.(student|teacher)'.*--part"):
        taken(tmp_path / "a.pt")
    taken(tmp_path / "a.pt", "student")
    taken(tmp_path / "a.pt", "state_dict.student")
    with pytest.raises(CheckpointError, match=r"no weights of the model at 'ema'; it has weights at .*student"):
        taken(tmp_path / "a.pt", "ema")


class Tied(nn.Module):
    """With tied weights, and a buffer that it keeps out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)


def test_tied_weights_count_once_and_must_agree(tmp_path: Path) -> None:
    weight = torch.arange(15.0).view(5, 3)
    for state in ({"embed.weight": weight}, {"head.weight": weight}, {"head.weight": weight, "mask": torch.ones(2)}):
        torch.save(state, tmp_path / "a.pt")
        model = Tied()
        load(model, weights_in(read(tmp_path / "a.pt"), model))
        assert torch.equal(model.embed.weight, weight)
        assert model.head.weight is model.embed.weight
    torch.save({"embed.weight": weight, "head.weight": weight + 1}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"1 tied in the model and different here: embed\.weight and head\.weight"
    ):
        load(model, weights_in(read(tmp_path / "a.pt"), model))


def test_what_changes_nothing_may_be_missing_and_what_the_model_ignores_may_be_there(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}
    torch.save({**state, "0.masked_bias": torch.ones(1)}, tmp_path / "a.pt")
    model = net(6)
    with pytest.raises(CheckpointError, match=r"of 9 tensors 1 unexpected: 0\.masked_bias"):
        load(model, weights_in(read(tmp_path / "a.pt"), model))
    model._keys_to_ignore_on_load_unexpected = [r"masked_bias$"]  # type: ignore[assignment]
    load(model, weights_in(read(tmp_path / "a.pt"), model))
    assert torch.equal(model[1].running_var, STATE["1.running_var"])


class Stateful(nn.Linear):
    """With a state of its own in its checkpoints."""

    def get_extra_state(self) -> Any:
        return {"scale": getattr(self, "scale", 1)}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


def test_a_state_of_a_modules_own_is_loaded_and_put_back(tmp_path: Path) -> None:
    saved, model = Stateful(2, 2), Stateful(2, 2)
    saved.scale, model.scale = 5, 3
    torch.save({"model": saved.state_dict()}, tmp_path / "a.pt")
    with weights_kept(model):
        load(model, weights_in(read(tmp_path / "a.pt"), model))
        assert model.scale == 5
    assert model.scale == 3
