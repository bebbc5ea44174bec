"""Transformers models of a few thousand parameters, made from configurations, and generated tokens."""

import random

import numpy as np
import torch

VOCABULARY = 23
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 24}


def gpt2(layers=2, **options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "n_positions": 24, "n_embd": 16, "n_layer": layers, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**settings, **{**special, **options}))


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, **HEADS, num_key_value_heads=1, initializer_range=0.2, pad_token_id=0, **options)
    )


def bert(head="MaskedLM", **options):
    import transformers

    torch.manual_seed(2)
    config = transformers.BertConfig(**SIZES, **HEADS, initializer_range=0.2, **options)
    return getattr(transformers, f"BertFor{head}")(config)


def bart(**options):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(3)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 24}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    settings = {"vocab_size": VOCABULARY, "d_model": 16, "init_std": 0.2, "forced_eos_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**settings, **layers, **heads, **special, **options))


def tokens(count=6, length=9, seed=0, shortest=3):
    """A padded batch as a collator yields it: ragged sequences, 0 and -100 where they have ended."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    ends = torch.randint(shortest, length + 1, (count, 1), generator=generator)
    ends[0] = length
    mask = (torch.arange(length) < ends).long()
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def masked(batch, seed=0):
    """The batch with a few labels left, as for a masked language model."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.4) & (batch["attention_mask"] == 1)
    chosen[:, 1] = True
    return {
        **batch,
        "input_ids": batch["input_ids"].masked_fill(chosen, 3),
        "labels": batch["labels"].masked_fill(~chosen, -100),
    }


class Sequences(torch.utils.data.Dataset):
    """Sequences of a language that can be learnt: each token is the one before plus a small step."""

    def __init__(self, count=24, length=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, 20, (count, 1), generator=generator)
        steps = torch.randint(1, 3, (count, length - 1), generator=generator)
        self.ids = 3 + torch.cat([first, first + steps.cumsum(1)], 1) % 20

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer(folder, callbacks=(), model=None, optimizer=None, data=None, evaluate=None, **options):
    """A Trainer on the CPU, without progress bars or reports; six steps of two micro-batches by default."""
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    torch.manual_seed(11)
    model = gpt2(layers=1, resid_pdrop=0.1) if model is None else model
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **options}),
        train_dataset=Sequences() if data is None else data,
        eval_dataset=evaluate,
        callbacks=list(callbacks),
        optimizers=(None, None) if optimizer is None else (optimizer(model.parameters()), None),
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def random_states():
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMES += ("eval_samples_per_second", "eval_steps_per_second")


def own_history(trainer):
    """The log history of the Trainer itself, without times."""
    kept = [one for one in trainer.state.log_history if not any(key.startswith("curv/") for key in one)]
    return [{key: value for key, value in one.items() if key not in TIMES} for one in kept]


def added(trainer):
    """What the callback added to the log history, without times."""
    kept = [one for one in trainer.state.log_history if any(key.startswith("curv/") for key in one)]
    slow = ("curv/cost/", "curv/overhead")
    return [{key: value for key, value in one.items() if not key.startswith(slow)} for one in kept]
