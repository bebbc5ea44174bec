"""Several ranks and one process agree for language models, other types, BatchNorm in train mode and odd losses."""

import pytest
from data_parallel_more import coarse, compiled, in_train_mode, language, odd_losses, types
from ranks import launch

SCRIPT = """
from data_parallel_more import *

for name, measure in {"language": language, "types": types, "coarse": coarse, "train": in_train_mode}.items():
    saved[name] = measure(rank, world, "world")
saved["odd"] = odd_losses(rank, world, "world")
labels = {"input_ids": tokens(3, 5)["input_ids"], "labels": torch.zeros(3, 5).long() + (3 if rank else -100)}
saved["no labels here"] = Objective.from_huggingface(gpt2(layers=1), labels, group="world").total_weight
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("ranks"), limit=300)


def assert_near(runs, truth, key, kinds=None, accepted=1e-12):
    for saved in runs:
        assert saved[key].keys() == truth.keys()
        for kind in kinds or truth:
            found, one = saved[key][kind], truth[kind]
            assert found.shape == one.shape, kind
            assert float((found - one).norm()) <= accepted * float(one.norm()), kind


def test_language_models_count_the_tokens_of_all_ranks(runs):
    assert_near(runs, language(0, 1, None), "language")


def test_a_rank_without_labels_counts_for_nothing(runs):
    assert [saved["no labels here"] for saved in runs] == [12, 12]


def test_other_types_and_shared_weights(runs):
    truth = types(0, 1, None)
    assert_near(runs, truth, "types", ["double", "double noise", "double moments"])
    assert_near(runs, truth, "types", ["shared"], accepted=1e-5)


def test_coarse_products_carry_the_error_that_is_noted(runs):
    full, _, error = coarse(0, 1, None)
    for saved in runs:
        own_full, own_rough, own_error = saved["coarse"]
        assert own_error == runs[0]["coarse"][2]
        assert error / 3 < own_error < 3 * error
        assert float((own_rough - own_full).norm()) < 3 * error * float(full.norm())
        assert float((own_rough - own_full).norm()) > 0


def test_batchnorm_in_train_mode_couples_the_samples_of_a_batch_and_no_others(runs):
    assert_near(runs, in_train_mode(0, 1, None), "train")


def test_losses_that_say_too_little_are_refused_as_in_one_process(runs):
    truth = odd_losses(0, 1, None)
    for saved in runs:
        found = saved["odd"]
        for name in ("alike", "lengths"):
            assert truth[name][0] == "LossError"
            assert found[name][0] in ("LossError", "RankFailedError"), found[name]
            assert "nothing says how much each batch counts" in found[name][1]
        apart, (kind, _) = found["refused"]
        assert not apart
        assert kind == "LossError"
    assert_near(runs, truth, "odd", ["weighted", "mixed"])


@pytest.mark.long
def test_compiled_products_are_those_of_one_process(tmp_path):
    script = "from data_parallel_more import compiled\nsaved['compiled'] = compiled(rank, world, 'world')"
    assert_near(launch(script, 2, tmp_path, limit=300), compiled(0, 1, None), "compiled")
