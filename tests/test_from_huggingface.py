"""An objective from a Transformers model has the model's own value, gradient, curvature and noise."""

import pytest
import tiny_transformers as tiny
import torch
from torch.nn.functional import log_softmax

from curvdiag import Hessian, NoiseCovariance, Objective
from curvdiag.data import tensors_of

pytest.importorskip("transformers")

MODELS = {
    "gpt2": (tiny.gpt2, tiny.tokens()),
    "llama": (tiny.llama, tiny.tokens()),
    "bert, masked": (tiny.bert, tiny.masked(tiny.tokens())),
    "bart": (tiny.bart, tiny.tokens()),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, batch = MODELS[request.param]
    return make().eval(), batch


def own_loss(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def own_gradient(model, batch):
    gradients = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    return torch.cat([one.reshape(-1) for one in gradients])


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def test_the_value_is_the_models_own_loss(case):
    model, batch = case
    assert Objective.from_huggingface(model, batch).value() == pytest.approx(own_loss(model, batch), rel=1e-6)


def test_batches_of_other_lengths_count_by_their_tokens(case):
    model, batch = case
    objective = Objective.from_huggingface(model, [part(batch, slice(0, 4)), part(batch, slice(4, 6))])
    assert objective.size == 6
    assert objective.value() == pytest.approx(own_loss(model, batch), rel=1e-6)


def test_the_gradient_is_that_of_the_models_own_loss_with_tied_embeddings_too(case):
    model, batch = case
    found, expected = Objective.from_huggingface(model, batch).gradient(), own_gradient(model, batch)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_that_of_the_trainer(case, smoothing):
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = case
    shift = type(model).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    with torch.no_grad():
        expected = LabelSmoother(epsilon=smoothing)(model(**batch), batch["labels"], shift_labels=shift).item()
    objective = Objective.from_huggingface(model, batch, label_smoothing=smoothing)
    assert objective.value() == pytest.approx(expected, rel=1e-6)
    assert abs(expected - own_loss(model, batch)) > 1e-4 * expected  # it makes a difference


def loss_by_hand(model, batch):
    """Mean over all predicted tokens, in double precision, one token after the other."""
    chances = log_softmax(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, -1)
    labels, terms = batch["labels"], []
    for i in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[i, t] != -100:
                terms.append(-chances[i, t - 1, labels[i, t]])
    return torch.stack(terms).mean()


def flat_gradient(model, batch, at):
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(at, model.parameters())
    found = torch.autograd.grad(loss_by_hand(model, batch), list(model.parameters()))
    return torch.cat([one.reshape(-1) for one in found])


def test_hessian_products_are_the_differences_of_gradients():
    model, batch = tiny.gpt2().eval(), tiny.tokens()
    assert model.config._attn_implementation == "sdpa"  # whose fused kernels have no second derivative
    double = tiny.gpt2().double().eval()
    at = torch.nn.utils.parameters_to_vector(double.parameters()).detach()
    v = torch.randn(len(at), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    v /= v.norm()
    h = 1e-4
    expected = (flat_gradient(double, batch, at + h * v) - flat_gradient(double, batch, at - h * v)) / (2 * h)
    found = Hessian(Objective.from_huggingface(model, batch), dtype=torch.float64) @ v
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_hessian_products_are_those_of_the_models_own_loss(name):
    make, batch = MODELS[name]
    model = make(attn_implementation="eager").eval()
    at = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in at), generator=torch.Generator().manual_seed(7))
    gradient = torch.autograd.grad(model(**batch).loss, at, create_graph=True)
    parts = zip(v.split([p.numel() for p in at]), at, strict=True)
    products = torch.autograd.grad(gradient, at, [part.view_as(p) for part, p in parts])
    expected = torch.cat([one.reshape(-1) for one in products])
    found = Hessian(Objective.from_huggingface(make().eval(), batch)) @ v
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_noise_is_that_of_sequences_weighted_by_their_tokens(case):
    model, batch = case
    objective = Objective.from_huggingface(model, batch)
    shifted = type(model).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    counts = (labels != -100).sum(1).double()
    rows = [own_gradient(model, part(batch, slice(i, i + 1))).double() for i in range(6)]
    gradients = torch.stack(rows) * (counts / counts.mean())[:, None]
    centred = gradients - gradients.mean(0)
    v = torch.randn(objective.parameters.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = centred.T @ (centred @ v) / 6
    found = (NoiseCovariance(objective) @ v.float()).double()
    assert counts.unique().numel() > 1
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_labels_that_are_missing_are_those_of_the_collator():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, **{f"w{i}": i for i in range(1, tiny.VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "w1")), pad_token="[PAD]")
    samples = [{"input_ids": [3, 4, 5, 6, 7]}, {"input_ids": [8, 9, 10]}, {"input_ids": [11, 12]}]
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)([dict(one) for one in samples])
    model = tiny.llama().eval()
    without = {name: value for name, value in collated.items() if name != "labels"}
    assert (collated["labels"] == -100).sum() == 5
    for batch in (collated, without, {"input_ids": without["input_ids"]}):
        objective = Objective.from_huggingface(model, batch)
        if "attention_mask" in batch:
            assert objective.value() == pytest.approx(own_loss(model, collated), rel=1e-6)
        assert torch.equal(objective.batches[0]["labels"], collated["labels"])


def test_collators_dictionaries_and_loaders_are_batches():
    from transformers import BatchEncoding

    model, batch = tiny.gpt2().eval(), tiny.tokens()
    samples = [part(batch, i) for i in range(6)]
    for batches in (BatchEncoding(batch), [BatchEncoding(batch)], torch.utils.data.DataLoader(samples, batch_size=4)):
        assert Objective.from_huggingface(model, batches).value() == pytest.approx(own_loss(model, batch), rel=1e-6)


@pytest.mark.parametrize("shape", ["classes", "number", "numbers", "several labels", "of tokens"])
def test_classifiers_and_regressions_have_their_own_loss(shape):
    batch, generator = tiny.tokens(), torch.Generator().manual_seed(1)
    labels = {
        "classes": torch.arange(6) % 3,
        "number": torch.randn(6, generator=generator),
        "numbers": torch.randn(6, 3, generator=generator),
        "several labels": (torch.rand(6, 3, generator=generator) > 0.5).float(),
        "of tokens": batch["labels"].where(batch["labels"] < 0, batch["labels"] % 3),
    }[shape]
    head = "TokenClassification" if shape == "of tokens" else "SequenceClassification"
    problem = {"problem_type": "regression"} if shape == "numbers" else {}
    model = tiny.bert(head, num_labels=1 if shape == "number" else 3, **problem).eval()
    batch = {**batch, "labels": labels}
    before = dict(vars(model.config))
    objective = Objective.from_huggingface(model, batch)
    assert dict(vars(model.config)) == before
    assert objective.value() == pytest.approx(own_loss(model, batch), rel=1e-6)
    found, expected = objective.gradient(), own_gradient(model, batch)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert objective.per_sample


def test_a_sequence_that_predicts_nothing_counts_nothing():
    model, batch = tiny.gpt2().eval(), tiny.tokens()
    empty = {**batch, "labels": batch["labels"].clone()}
    empty["labels"][2] = -100
    objective = Objective.from_huggingface(model, [empty, {**batch, "labels": torch.full_like(batch["labels"], -100)}])
    assert objective.value() == pytest.approx(own_loss(model, empty), rel=1e-6)
    assert objective.total_weight == int((empty["labels"][:, 1:] != -100).sum())
    assert torch.isfinite(Hessian(objective) @ torch.ones(objective.parameters.size)).all()


def test_labels_that_a_collator_has_shifted_already_are_taken_as_they_are():
    model, batch = tiny.llama().eval(), tiny.tokens()
    moved = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    objective = Objective.from_huggingface(model, {**batch, "shift_labels": moved})
    assert objective.value() == pytest.approx(own_loss(model, batch), rel=1e-6)


def test_an_untrained_head_does_not_hide_how_labels_are_shifted():
    model, batch = tiny.llama().eval(), tiny.tokens()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token has the same chance, wherever it stands
    objective = Objective.from_huggingface(model, batch)
    found, expected = objective.gradient(), own_gradient(model, batch)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_it_leaves_no_trace_and_keeps_no_past():
    model, batch = tiny.gpt2(resid_pdrop=0.5), tiny.tokens()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = [one.clone() for one in tensors_of(batch)]
    config, random = model.config.to_dict(), torch.get_rng_state()
    pasts = []
    hook = model.register_forward_hook(lambda module, inputs, outputs: pasts.append(outputs.get("past_key_values")))
    objective = Objective.from_huggingface(model, batch)
    first = objective.value()
    assert objective.value() == first  # dropout is off
    hook.remove()
    assert pasts
    assert not any(pasts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(tensors_of(batch), kept, strict=True))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_inside_that_of_peft_is_seen():
    class Wrapped(torch.nn.Module):  # as PEFT's: any arguments, and the model one level down
        def __init__(self, model):
            super().__init__()
            self.base_model = model
            self.config = model.config

        def get_base_model(self):
            return self.base_model

        def forward(self, *arguments, **options):
            return self.base_model(*arguments, **options)

    model, batch = Wrapped(tiny.gpt2()).eval(), tiny.tokens()
    without = {name: value for name, value in batch.items() if name != "labels"}
    objective = Objective.from_huggingface(model, without, params="base_model.*.mlp.*")
    assert objective.value() == pytest.approx(own_loss(model, batch), rel=1e-6)
    assert all(name.startswith("base_model.") for name in objective.parameters.names)


def test_params_choose_layers():
    model, batch = tiny.gpt2().eval(), tiny.tokens()
    objective = Objective.from_huggingface(model, batch, params="*.mlp.*")
    assert set(objective.parameters.names) == {n for n, _ in model.named_parameters() if ".mlp." in n}


def test_half_precision_weights_have_their_own_loss():
    model, batch = tiny.llama().bfloat16().eval(), tiny.tokens()
    assert Objective.from_huggingface(model, batch).value() == pytest.approx(own_loss(model, batch), rel=1e-5)
