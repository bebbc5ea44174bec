"""What is said of a decoder of Llama's shape is what Transformers' own takes, where that is small enough to count."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from curvdiag import Objective
from curvdiag.operators.live_bytes import LiveBytes
from curvdiag.operators.trial import try_out
from curvdiag.spectrum.decoder import LLAMA_7B, LLAMA_70B, WALKING, Decoder

pytest.importorskip("transformers", reason="the models that are counted are those of Transformers")

SMALL = Decoder(layers=5, width=40, inner=104, heads=4, kv_heads=2, vocabulary=60)
LARGER = Decoder(layers=7, width=64, inner=160, heads=8, kv_heads=8, vocabulary=150)
SEQUENCES = 32


def llama(shape: Decoder, attention: str = "sdpa"):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        attn_implementation=attention,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tokens(shape: Decoder, length: int, count: int = SEQUENCES) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(shape.vocabulary, (count, length))}


@pytest.mark.parametrize(("shape", "published"), [(LLAMA_7B, 6_738_415_616), (LLAMA_70B, 68_976_648_192)])
def test_the_weights_of_the_published_models_are_counted(shape: Decoder, published: int) -> None:
    assert shape.units().size == published
    few = replace(shape, layers=1)
    with torch.device("meta"):
        real = llama(few)
    names = sorted(tuple(parameter.shape) for parameter in real.parameters())
    units = few.units()
    assert sorted([*units.root, *units.others[0]]) == names


@pytest.mark.parametrize(("shape", "length"), [(SMALL, 24), (LARGER, 12)])
def test_the_operations_of_a_gradient_are_those_that_torch_counts(shape: Decoder, length: int) -> None:
    model, batch = llama(shape, "eager"), tokens(shape, length, 2)
    with FlopCounterMode(display=False) as counter:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert 2 * shape.gradient_flops(length) == counter.get_total_flops()


@pytest.mark.parametrize(("shape", "length"), [(SMALL, 24), (LARGER, 40)])
def test_the_numbers_that_a_graph_keeps_are_those_that_are_alive(shape: Decoder, length: int) -> None:
    model = llama(shape)
    objective = Objective.from_huggingface(model, [tokens(shape, length)])
    tried = try_out(objective, objective.batches[0], "hessian", None, time.perf_counter)
    assert 4 * shape.graph(length) == pytest.approx(tried.graph.per_sample, rel=0.01)
    walking = tried.passing(2 * SEQUENCES) - tried.passing(SEQUENCES)
    assert WALKING * 4 * shape.graph(length) == pytest.approx(walking / SEQUENCES, rel=0.1)
    whole = shape.work(SEQUENCES, length).walking
    assert whole(SEQUENCES) == pytest.approx(tried.passing(SEQUENCES), rel=0.1)
    assert tried.passing(1) <= whole(1) <= 2 * tried.passing(1)  # parts of it are there at different times


@pytest.mark.parametrize(("shape", "length"), [(SMALL, 24), (LARGER, 40)])
def test_the_numbers_that_a_gradient_keeps_are_those_that_are_alive(shape: Decoder, length: int) -> None:
    model, held = llama(shape), {}
    for count in (8, 16):
        batch = tokens(shape, length, count)
        with LiveBytes() as counter:
            loss = model(**batch, labels=batch["input_ids"]).loss
            held[count] = counter.now()
            del loss
    assert 4 * shape.activations(length) == pytest.approx((held[16] - held[8]) / 8, rel=0.01)


def test_checkpointing_keeps_inputs_of_blocks_and_one_block() -> None:
    less = SMALL.checkpointed(24)
    assert less == 24 * 5 * 40 + replace(SMALL, layers=1).activations(24)
    plain, again = (LLAMA_7B.work(8, 2048, checkpointing=kind) for kind in (False, True))
    assert again.recomputed
    assert again.activations(1) < plain.activations(1) / 4
    assert (again.flops, again.graph) == (plain.flops, plain.graph)
