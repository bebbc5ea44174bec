"""The loss of a Transformers model, taken apart into samples: one number and one weight for each sequence.

Nothing of Transformers is imported: what a model's own loss is, is found out by asking the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvdiag.data import Batch, place, read_batches, sample_count
from curvdiag.distributed import Group, ranks_of
from curvdiag.errors import ArgumentError, DataError, LossError, NonFiniteError
from curvdiag.objective import Objective
from curvdiag.parameters import Selection
from curvdiag.sandbox import Mode, sandbox, unwrap, with_tensors
from curvdiag.weights import Weights

IGNORED = -100
"""The label of what is not predicted, in all of Transformers."""

KINDS = ("shifted tokens", "labels", "squares", "logistic")


def huggingface_objective(
    model: nn.Module,
    batches: Any,
    *,
    label_smoothing: float = 0.0,
    params: Selection | None = None,
    mode: Mode = "eval",
    keep_bytes: int | None = None,
    group: Group = None,
) -> Objective:
    """The objective of a Transformers model, or of any other whose forward takes ``labels`` and gives loss and logits.

    Its value on a batch is ``model(**batch).loss``, or what the Trainer makes of it with ``label_smoothing_factor``.
    A sample is a sequence, and counts by the labels that it predicts (those that are not -100, for a causal language
    model without the first), so that gradient noise and C are known; a classifier's samples count 1 each.

    The Trainer divides the sum over all micro-batches of a step by the number of labels in all of them
    (``num_items_in_batch``), so its step is one of this mean over the tokens of the whole batch. Where a model does not
    take ``num_items_in_batch`` it averages the means of the micro-batches instead, which gives their tokens other
    weights; this objective counts every predicted token of all its batches alike.

    Args:
        model: Also wrapped by PEFT, ``torch.compile``, DDP or accelerate's autocast. Causal and masked language models,
            sequence-to-sequence models and classifiers (of tokens, sequences, images); regression too.
        batches: One batch or several, as a collator yields them. Without ``labels`` a causal language model is to
            predict its ``input_ids``, padding (``attention_mask`` 0, or without a mask the ``pad_token_id``) ignored.
        label_smoothing: As the Trainer's ``label_smoothing_factor``.
        params, mode, keep_bytes, group: As in :class:`~curvdiag.Objective`.

    Raises:
        DataError: A batch is no mapping, or has no labels that the model could be trained on.
        LossError: The model gives no loss, or another than the cross-entropy, squared or logistic error of its logits.
        ArgumentError: ``label_smoothing`` is out of its range, or there are no classes to smooth over.
    """
    if not 0 <= label_smoothing <= 1:
        raise ArgumentError(f"label_smoothing is a share between 0 and 1, not {label_smoothing}")
    if mode not in ("eval", "train"):
        raise ArgumentError(f"mode is 'eval' or 'train', not {mode!r}")
    network, ranks = unwrap(model), ranks_of(group)
    with ranks.together("making of an objective"):
        read, notes = read_batches(batches, pairs=False, keep_bytes=keep_bytes)
        kept = [prepared(network, batch, index) for index, batch in enumerate(read)]
        kinds = own_kinds(network, kept, mode)
    kind = kind_of_all(network, ranks.gather(kinds, "comparison of losses"))
    if label_smoothing and kind in ("squares", "logistic"):
        raise ArgumentError(f"label_smoothing={label_smoothing} smooths over classes, and the model has none: {kind}")
    loss = SampleLoss(kind, float(label_smoothing))
    objective = Objective.from_loss(
        network, loss, batches=kept, weight=loss.counts, params=params, mode=mode, keep_bytes=keep_bytes, group=group
    )
    objective.notes = (*notes, *objective.notes)
    return objective


@dataclass(frozen=True)
class SampleLoss:
    """``loss(model, batch)`` with one loss for each sample, the mean over what is predicted in it.

    Attributes:
        kind: One of :data:`KINDS`. ``"shifted tokens"``: position ``t`` predicts the label at ``t + 1``, as in causal
            language models. ``"labels"``: each label is that of its own position, or of the sample.
        smoothing: Of the labels, over all classes alike.
    """

    kind: str
    smoothing: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.of(logits_of(forward(model, batch)), batch)

    def of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The losses ``[B]``, in single precision at least."""
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        count = sample_count(batch)
        if self.kind in ("squares", "logistic"):
            targets = batch["labels"].to(logits.dtype).reshape(logits.shape)
            each = F.mse_loss if self.kind == "squares" else F.binary_cross_entropy_with_logits
            return each(logits, targets, reduction="none").reshape(count, -1).mean(1)
        labels = targets_of(batch, self.kind)
        if labels.shape != logits.shape[:-1]:
            logits = logits[..., :-1, :]
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        predicted = (labels != IGNORED).reshape(count, -1).sum(1)
        return losses.reshape(count, -1).sum(1) / predicted.clamp(min=1)

    def counts(self, batch: Batch) -> Tensor:
        """How many labels each sample predicts ``[B]``; ones where a label is a number."""
        count = sample_count(batch)
        if self.kind in ("squares", "logistic"):
            return torch.ones(count, dtype=torch.float64)
        return (targets_of(batch, self.kind) != IGNORED).reshape(count, -1).sum(1).double()


def targets_of(batch: Batch, kind: str) -> Tensor:
    """The labels, each to be predicted from the position that it stands at."""
    if "shift_labels" in batch:  # a collator has moved them already
        return batch["shift_labels"]
    labels: Tensor = batch["labels"]
    return labels[..., 1:] if kind == "shifted tokens" else labels


def forward(model: nn.Module, batch: Batch, *, labels: bool = False) -> Any:
    """The model's outputs on a batch, without its own loss unless ``labels``."""
    left_out = () if labels else ("labels", "shift_labels")
    given = {name: value for name, value in batch.items() if name not in left_out}
    if "use_cache" in inspect.signature(type(base_of(model)).forward).parameters:
        given["use_cache"] = False  # keys and values of the past would only take memory
    return model(**given)


def logits_of(outputs: Any, *, after_loss: bool = False) -> Tensor:
    """The logits of a model's outputs, of a named kind or a tuple."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[1 if after_loss else 0]
    if not isinstance(logits, Tensor):
        raise LossError(
            "the model gives no tensor of logits; write its loss yourself: Objective.from_loss(model, loss, batches)"
        )
    return logits


def base_of(model: nn.Module) -> nn.Module:
    """The model itself, inside what PEFT wraps around it."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def prepared(model: nn.Module, batch: Any, index: int) -> dict[str, Any]:
    """A batch as the loss wants it: a plain dict with labels, and with decoder inputs where the model needs them."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"batch {index} is a {type(batch).__name__}, not a dict with input_ids, attention_mask and labels as a "
            "collator yields it; for anything else use Objective.from_loss(model, loss, batches)"
        )
    given = {str(name): value for name, value in batch.items() if name != "num_items_in_batch" and value is not None}
    if "labels" not in given:
        given["labels"] = labels_from_inputs(model, given, index)
    if not isinstance(given["labels"], Tensor):
        raise DataError(f"the labels of batch {index} are a {type(given['labels']).__name__}, not a tensor")
    known = inspect.signature(type(base_of(model)).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if unknown := [name for name in given if name not in known and not takes_any]:
        raise DataError(
            f"{type(base_of(model)).__name__} takes no {', '.join(unknown)}, which batch {index} holds; the Trainer "
            "drops such columns: leave them out"
        )
    if is_encoder_decoder(model) and not {"decoder_input_ids", "decoder_inputs_embeds"} & given.keys():
        make = getattr(base_of(model), "prepare_decoder_input_ids_from_labels", None)
        if make is None:
            raise DataError(
                f"batch {index} has no decoder_input_ids, and {type(base_of(model)).__name__} cannot make them of "
                "labels: give DataCollatorForSeq2Seq(tokenizer, model=model)"
            )
        given["decoder_input_ids"] = make(labels=given["labels"])
    return given


def labels_from_inputs(model: nn.Module, batch: Mapping[str, Any], index: int) -> Tensor:
    """The inputs themselves, for a causal language model, with padding ignored."""
    inputs = batch.get("input_ids")
    if not isinstance(inputs, Tensor) or not is_causal(model):
        raise DataError(
            f"batch {index} has no labels. Only for a causal language model are they taken from input_ids, and "
            f"{type(base_of(model)).__name__} is none; a collator such as DataCollatorForLanguageModeling makes them"
        )
    mask, pad = batch.get("attention_mask"), getattr(base_of(model).config, "pad_token_id", None)
    if isinstance(mask, Tensor) and mask.shape == inputs.shape:
        return inputs.masked_fill(mask == 0, IGNORED)
    return inputs if pad is None else inputs.masked_fill(inputs == pad, IGNORED)


def is_causal(model: nn.Module) -> bool:
    """Whether a model is one that predicts each token from those before it, by its name or its kind of loss."""
    base = base_of(model)
    named = type(base).__name__.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel"))
    typed = getattr(base, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    return (named or typed) and not is_encoder_decoder(model)


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(base_of(model), "config", None), "is_encoder_decoder", False))


def own_kinds(model: nn.Module, batches: list[dict[str, Any]], mode: Mode) -> list[str]:
    """The kinds of loss that give the model's own on every batch held here.

    Raises:
        LossError: There is none, or the model gives no loss.
        NonFiniteError: The model's own loss is NaN or infinite.
    """
    device = next(model.parameters()).device

    def look() -> list[str]:
        left = list(KINDS)
        for index, batch in enumerate(batches):
            with torch.no_grad():
                left = _agreeing(model, place(batch, device, None), index, left)
        return left

    shared = Weights.of(model, [], dtype=None, share=True)
    with sandbox(model, mode, device, twice=False), _same_config(base_of(model)):
        kinds: list[str] = with_tensors(model, shared.tensors(), look)
    return kinds


def kind_of_all(model: nn.Module, kinds: list[list[str]]) -> str:
    """The kind that gives the model's own loss on all ranks, from those that do on each.

    Raises:
        LossError: There is none.
    """
    left = [kind for kind in KINDS if all(kind in own for own in kinds)]
    if not left:
        told = "; ".join(f"{', '.join(own)} on rank {i}" for i, own in enumerate(kinds))
        raise LossError(
            f"the loss of {type(base_of(model)).__name__} is of another kind on each rank ({told}): give all of them "
            "batches of the same form"
        )
    # Untrained heads give every class the same chance, and then shifted labels have the loss of labels in place.
    return "labels" if "labels" in left and not is_causal(model) else left[0]


def _agreeing(model: nn.Module, batch: dict[str, Any], index: int, kinds: list[str]) -> list[str]:
    """Those of the kinds whose mean is the model's own loss; all of them where the batch predicts nothing."""
    outputs = forward(model, batch, labels=True)
    own = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(own, Tensor) or own.ndim:
        what = "no loss" if own is None else "a loss that is no single number"
        raise LossError(
            f"{type(base_of(model)).__name__} gives {what} for batch {index} with labels; write it yourself: "
            "Objective.from_loss(model, loss, batches)"
        )
    logits = logits_of(outputs, after_loss=True)
    possible = [kind for kind in kinds if _fits(kind, logits, batch)]
    found: dict[str, float] = {}
    for kind in possible:
        loss = SampleLoss(kind, 0.0)
        counts = loss.counts(batch)
        if counts.sum() == 0:
            return kinds
        found[kind] = float((loss.of(logits, batch).double().cpu() * counts).sum() / counts.sum())
    if not bool(torch.isfinite(own)):
        raise NonFiniteError(f"the model's own loss on batch {index} is {float(own)}; there is no curvature here")
    tolerance = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 2e-5
    agreeing = [kind for kind, value in found.items() if abs(value - float(own)) <= tolerance * max(abs(value), 1e-3)]
    if agreeing:
        return agreeing
    seen = "; ".join(f"{kind}: {value:.6g}" for kind, value in found.items())
    raise LossError(
        f"the loss of {type(base_of(model)).__name__} on batch {index} is {float(own):.6g}, and nothing known "
        f"gives that from logits {tuple(logits.shape)}, labels {tuple(batch['labels'].shape)} ({seen or 'no fit'}). "
        "It may hold further terms (a router's, a head's): switch them off in the model's config, or write the loss "
        "yourself: Objective.from_loss(model, loss, batches)"
    )


def _fits(kind: str, logits: Tensor, batch: dict[str, Any]) -> bool:
    labels: Tensor = batch["labels"]
    if kind in ("squares", "logistic"):
        return labels.numel() == logits.numel() and labels.shape[:1] == logits.shape[:1]
    if labels.dtype.is_floating_point:
        return False
    if kind == "shifted tokens" and labels.ndim < 2:
        return False
    return "shift_labels" in batch or labels.shape == logits.shape[:-1]


@contextmanager
def _same_config(model: nn.Module) -> Iterator[None]:
    """Classifiers note in their config which problem their first labels were of."""
    config = getattr(model, "config", None)
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if getattr(config, "problem_type", None) != before:
            config.problem_type = before  # type: ignore[union-attr]
