"""What is no loss over samples of a Transformers model is refused, in words that help."""

import pytest
import tiny_transformers as tiny
import torch

from curvdiag import Hessian, Objective
from curvdiag.errors import ArgumentError, DataError, LossError, NonFiniteError

pytest.importorskip("transformers")


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_only_a_causal_model_makes_labels_of_its_inputs():
    with pytest.raises(DataError, match=r"batch 0 has no labels.*BertForMaskedLM is none"):
        Objective.from_huggingface(tiny.bert(), without_labels(tiny.tokens()))


def test_a_batch_is_a_mapping():
    batch = tiny.tokens()
    with pytest.raises(DataError, match="batch 0 is a tuple, not a dict with input_ids"):
        Objective.from_huggingface(tiny.gpt2(), [(batch["input_ids"], batch["labels"])])


def test_labels_are_a_tensor():
    with pytest.raises(DataError, match="labels of batch 0 are a list"):
        Objective.from_huggingface(tiny.gpt2(), {**tiny.tokens(), "labels": [[1, 2]]})


def test_a_column_that_forward_does_not_take_is_named():
    class Strict(torch.nn.Module):
        def forward(self, input_ids, labels=None):
            raise AssertionError

    Strict.config = None
    with pytest.raises(DataError, match="Strict takes no length, attention_mask, which batch 0 holds"):
        Objective.from_huggingface(Strict(), {"length": torch.ones(6), **tiny.tokens()})


def test_a_loss_with_further_terms_is_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**tiny.SIZES, **tiny.HEADS, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5))
    with pytest.raises(LossError, match=r"the loss of MixtralForCausalLM on batch 0 is .*a router's"):
        Objective.from_huggingface(model, tiny.tokens())


def test_a_model_without_a_loss_is_refused():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=tiny.VOCABULARY, n_positions=24, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises((LossError, DataError), match=r"GPT2Model (takes no labels|gives no loss)"):
        Objective.from_huggingface(model, tiny.tokens())


def test_there_is_nothing_to_smooth_in_a_regression():
    batch = {**tiny.tokens(), "labels": torch.randn(6)}
    model = tiny.bert("SequenceClassification", num_labels=1)
    with pytest.raises(ArgumentError, match=r"label_smoothing=0.1 smooths over classes"):
        Objective.from_huggingface(model, batch, label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_label_smoothing_is_a_share(smoothing):
    with pytest.raises(ArgumentError, match="a share between 0 and 1"):
        Objective.from_huggingface(tiny.gpt2(), tiny.tokens(), label_smoothing=smoothing)


def test_dropout_in_train_mode_is_named():
    with pytest.raises(Exception, match="dropout is active"):
        Objective.from_huggingface(tiny.gpt2(resid_pdrop=0.5), tiny.tokens(), mode="train")


def test_weights_that_are_not_finite_are_named():
    model = tiny.gpt2()
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="the model's own loss on batch 0 is nan"):
        Objective.from_huggingface(model, tiny.tokens())


def test_the_autocast_that_accelerate_puts_around_a_model_is_left_out():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    batch = tiny.tokens()
    plain = Objective.from_huggingface(tiny.gpt2(), batch)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the whole process
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny.gpt2())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    wrapped = model.forward
    objective = Objective.from_huggingface(model, batch)
    assert wrapped(**batch).logits.sub(tiny.gpt2()(**batch).logits).abs().max() > 1e-3  # there is autocast
    assert objective.value() == plain.value()
    v = torch.ones(objective.parameters.size, dtype=torch.float64)
    found, expected = Hessian(objective, dtype=torch.float64) @ v, Hessian(plain, dtype=torch.float64) @ v
    assert (found - expected).norm() < 1e-9 * expected.norm()
    assert model.forward is wrapped
