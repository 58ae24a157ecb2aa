"""Teachers in memory, quantized, offloaded and cached: the same result, or nearly the same where weights are
rounded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compress_models import DENSE, make_model

from nanohybrid.checkpoint import load, save
from nanohybrid.data import Batch, TokenStore
from nanohybrid.distill import teacher as teachers
from nanohybrid.distill.loader import DistillLoader
from nanohybrid.distill.recipe import DistillRecipe, SequenceLengthStep
from nanohybrid.distill.stage import distill
from nanohybrid.distill.teacher import TeacherCache, open_teacher
from nanohybrid.errors import ConfigError
from nanohybrid.text import train_bpe
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

RECIPE = DistillRecipe(
    tokens=300,
    batch_tokens=100,
    sequence_length=40,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    precision=PrecisionConfig("fp32"),
    loop=LoopConfig(snapshot_steps=2, log_steps=1),
    measured_tokens=100,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("teacher"), np.random.default_rng(0)
    for name, seed in (("parent", "M-M*-M-"), ("student", "M-*-")):
        train_bpe(["some words"], 269).save(root / name)
        save(make_model(seed, vocab_size=269).float(), root / name)
    documents = [
        (rng.integers(13, 60, n), np.r_[np.zeros(2), np.ones(n - 2)]) for n in rng.integers(5, 30, 30)
    ]
    (root / "data").mkdir()
    TokenStore.from_documents(documents).write(root / "data" / "chats.safetensors")
    return root


@pytest.fixture(scope="module")
def beside(root):
    return distilled(root, root / "beside", RECIPE)


def distilled(root, out, recipe):
    return load(distill(recipe, root / "student", root / "parent", root / "data", out)).state_dict()


@pytest.mark.parametrize("changes", [dict(pattern="M-M*-M-"), dict(pattern="*-*-", **DENSE)])
def test_offloaded_teacher_equals_the_model_in_memory(tmp_path, changes):
    model = make_model(**changes).float()
    save(model, tmp_path)
    batch = Batch.of([(np.arange(20, 33), np.ones(13)), (np.arange(40, 47), np.ones(7))])
    with open_teacher(tmp_path, "offloaded") as teacher:
        assert torch.equal(
            teacher.hidden(batch.tokens_T, batch.layout), model.hidden(batch.tokens_T, batch.layout)
        )
        assert torch.equal(teacher.head_weight, model.head_weight)


def test_offloaded_teacher_has_one_layer_in_memory(root, monkeypatch):
    alive, most = [], []
    original = teachers.StreamedModel.blocks

    def counting(parts):
        import weakref

        for block in original(parts):
            alive.append(weakref.ref(block))
            most.append(sum(reference() is not None for reference in alive))
            yield block
            del block

    monkeypatch.setattr(teachers.StreamedModel, "blocks", counting)
    with open_teacher(root / "parent", "offloaded") as teacher:
        batch = Batch.of([(np.arange(20, 33), np.ones(13))])
        teacher.hidden(batch.tokens_T, batch.layout)
    assert len(most) == 7 and max(most) <= 2  # the current layer, and the one that is about to be freed


def test_distill_from_an_offloaded_teacher_gives_the_same_weights(root, beside, tmp_path):
    found = distilled(root, tmp_path / "out", replace(RECIPE, teacher="offloaded"))
    assert all(torch.equal(found[name], beside[name]) for name in beside)


def test_distill_from_an_int8_teacher_gives_nearly_the_same_weights(root, beside, tmp_path):
    found = distilled(root, tmp_path / "out", replace(RECIPE, teacher="int8"))
    change = torch.cat([(found[name] - beside[name]).float().flatten() for name in beside])
    start = load(root / "student").state_dict()
    learned = torch.cat([(start[name] - beside[name]).float().flatten() for name in beside])
    assert 0 < change.norm() < 0.3 * learned.norm()


def test_distill_from_stored_distributions_of_all_tokens_equals_the_teacher(root, beside, tmp_path):
    found = distilled(root, tmp_path / "out", replace(RECIPE, top_k=269))
    for name in beside:
        torch.testing.assert_close(found[name], beside[name], atol=2e-4, rtol=1e-3)
    assert not (tmp_path / "out" / "teacher").exists()


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_teacher_cache_is_filled_only_for_missing_steps_after_a_kill(
    root, tmp_path, train_on_prompt, monkeypatch
):
    recipe = replace(RECIPE, top_k=8, train_on_prompt=train_on_prompt)
    whole = distilled(root, tmp_path / "whole", recipe)
    calls, original = [], teachers.top_k_of

    def dying(*arguments):
        if len(calls) == 2:
            raise InterruptedError
        calls.append(1)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(teachers, "top_k_of", dying)
        distilled(root, tmp_path / "out", recipe)
    assert len(list((tmp_path / "out.partial" / "teacher").glob("step-*"))) == 2
    found = distilled(root, tmp_path / "out", recipe)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_teacher_cache_names_a_broken_file(root, tmp_path):
    cache = TeacherCache(tmp_path, 4, 1.0)
    cache.file(0).write_bytes(b"no")
    with pytest.raises(Exception, match="step-000000"):
        cache.batch(Batch.of([(np.arange(20, 33), np.ones(13))]), torch.arange(3), 0)


def test_distill_loader_follows_the_sequence_length_schedule(root):
    store = TokenStore.from_documents([(np.arange(13, 60), np.ones(47))] * 40)
    recipe = replace(
        RECIPE,
        tokens=1000,
        sequence_length_schedule=(
            SequenceLengthStep(0.5, 10),
            SequenceLengthStep(0.8, 20),
            SequenceLengthStep(1.0, 40),
        ),
    )
    loader = DistillLoader(recipe, {"chats": store}, {"chats": 1.0})
    longest = [max(loader.batch(step).layout.lengths) for step in range(recipe.steps + 2)]
    assert longest == [10] * 5 + [20] * 3 + [40] * 4


@pytest.mark.parametrize(
    "change",
    [
        dict(teacher="elsewhere"),
        dict(top_k=-1),
        dict(sequence_length_schedule=(SequenceLengthStep(0.5, 8),)),
        dict(sequence_length_schedule=(SequenceLengthStep(1.0, 8), SequenceLengthStep(0.5, 8))),
    ],
)
def test_distill_recipe_refuses_values_out_of_range(change):
    with pytest.raises(ConfigError):
        replace(RECIPE, **change)
