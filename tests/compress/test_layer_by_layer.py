"""What is measured layer by layer is what is measured in memory: the iterative ranking, the losses of shapes, the whole command."""

import json
from dataclasses import replace

import pytest
import torch
from compress_models import DENSE, make_calibration, make_model
from test_compress_stage import RECIPE, folders  # noqa: F401  the same parent and documents

from nanohybrid.checkpoint import CheckpointReader, save
from nanohybrid.compress import inference_cost as before_after
from nanohybrid.compress import stage
from nanohybrid.compress.candidate_quality import Judge
from nanohybrid.compress.stage import compress
from nanohybrid.estimate.budget import Budget
from nanohybrid.prune import measure
from nanohybrid.prune import streaming as room
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.depth_importance import rank_layers, rank_layers_streamed
from nanohybrid.prune.layerwise import Stored
from nanohybrid.prune.measure import importance_of
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.target import Target

SHAPES = [dict(pattern="M-M*-M-"), dict(pattern="*-*-", **DENSE)]


@pytest.mark.parametrize("held_bytes", [1, 2**30], ids=["a document at a time", "all at once"])
@pytest.mark.parametrize("shape", SHAPES, ids=["hybrid", "dense"])
def test_layers_are_ranked_iteratively_from_the_disk_as_in_memory(tmp_path, shape, held_bytes):
    model, calibration = make_model(**shape).float(), make_calibration()
    save(model, tmp_path)
    rounds = model.config.num_hidden_layers - 1
    wanted, steps = rank_layers(model, calibration, rounds), []
    with CheckpointReader(tmp_path) as reader:
        found = rank_layers_streamed(Stored(reader), calibration, rounds, held_bytes, steps.append)
    assert (
        found.order == wanted.order
        and sum(steps) == rounds * calibration.tokens * model.config.num_hidden_layers
    )
    torch.testing.assert_close(found.score_L, wanted.score_L, rtol=1e-4, atol=0)


def test_an_iterative_ranking_holds_one_layer_and_the_hidden_states(tmp_path, monkeypatch):
    save(make_model().float(), tmp_path / "model")
    wanted = importance_of(make_model().float(), make_calibration(), tmp_path / "whole", True, 3)
    monkeypatch.setattr(room, "free_bytes", lambda *_: 1000)  # so the whole has no room
    monkeypatch.setattr(measure, "load", lambda *_, **__: pytest.fail("it reads the whole model"))
    found = importance_of(tmp_path / "model", make_calibration(), tmp_path, True, 3)
    assert found.order == wanted.order and found.facts == wanted.facts


def test_while_a_layer_is_read_the_one_before_it_is_gone(tmp_path, monkeypatch):
    save(make_model().float(), tmp_path)
    given, original = [], Stored.read

    def reading(parts, name):
        assert not any(parameter.numel() for block in given for parameter in block.parameters())
        return original(parts, name)

    monkeypatch.setattr(Stored, "read", reading)
    with CheckpointReader(tmp_path) as reader:
        for block in Stored(reader).blocks():
            assert all(parameter.numel() for parameter in block.parameters())
            given.append(block)
    assert len(given) == 7


@pytest.mark.parametrize("piece", [7, 60, 1000])
@pytest.mark.parametrize("held_bytes", [1, 2**30])
@pytest.mark.parametrize("shape", SHAPES, ids=["hybrid", "dense"])
def test_a_shape_is_tried_from_the_disk_as_in_memory(tmp_path, shape, held_bytes, piece, monkeypatch):
    model, calibration = make_model(**shape).float(), make_calibration()
    save(model, tmp_path)
    monkeypatch.setattr("nanohybrid.prune.layerwise.PIECE", piece * 4 * 32)
    scores = measure_activations(model, calibration)
    target = Target(
        drop_layers=(1,), sizes={"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    )
    selection = target.select(model.config, scores)
    with CheckpointReader(tmp_path) as reader:
        parts = Stored(reader)
        judges = Judge(model, calibration), Judge(parts, calibration, held_bytes)
        pairs = [
            (judge.parent, judge(cut))
            for judge, cut in zip(judges, (prune_model(model, selection), parts.cut(selection)), strict=True)
        ]
    for in_memory, streamed in zip(*pairs, strict=True):
        assert (
            streamed.loss == pytest.approx(in_memory.loss, rel=1e-6)
            and streamed.agreement == in_memory.agreement
        )
    assert pairs[0][1].loss != pairs[0][0].loss


def test_the_whole_command_chooses_the_same_layer_by_layer(folders, tmp_path, monkeypatch):  # noqa: F811
    recipe = replace(
        RECIPE,
        budget_share=0.6,
        grid=replace(RECIPE.grid, drop_layers=(0, 1, 2), tried=4),
        distill=replace(RECIPE.distill, tokens=100),
    )
    outs = []
    for name, free in (("whole", 2**40), ("streamed", 2**20)):
        with monkeypatch.context() as patch:
            patch.setattr(room, "free_bytes", lambda *_, free=free: free)
            if name == "streamed":
                patch.setattr(stage, "load", lambda *_, **__: pytest.fail("it reads a whole model"))
            outs.append(compress(recipe, folders / "parent", folders / "sft", tmp_path / name))
    rows = [json.loads((out / "search" / "search.json").read_text())["candidates"] for out in outs]
    measures = [json.loads((out / "lineage.json").read_text())["measures"] for out in outs]
    assert [m["streamed"] for m in measures] == [False, True]
    assert [row["config"] for row in rows[0]] == [row["config"] for row in rows[1]]
    tried = [[row["loss"] for row in table if row["loss"] is not None] for table in rows]
    assert len(tried[0]) == 4 and tried[1] == pytest.approx(tried[0], rel=1e-6)
    for name in ("pruning_mask.json", "kept.json", "model.safetensors"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert measures[1]["losses"] == pytest.approx(measures[0]["losses"], rel=1e-6)


def test_models_without_room_beside_each_other_are_timed_alone_or_not_at_all(folders, monkeypatch):  # noqa: F811
    models, budget, seen = {"parent": folders / "parent", "result": folders / "parent"}, Budget(2**30, 64), []
    original = before_after.decode_times
    monkeypatch.setattr(
        before_after,
        "decode_times",
        lambda loaded, *rest: seen.append(list(loaded)) or original(loaded, *rest),
    )
    whole = before_after.at_work(models, budget)
    weights = before_after.held_bytes(folders / "parent", budget)
    monkeypatch.setattr(before_after, "free_bytes", lambda *_: room.BESIDE + weights)
    alone = before_after.at_work(models, budget)
    assert seen == [["parent", "result"], ["parent"], ["result"]]
    monkeypatch.setattr(before_after, "free_bytes", lambda *_: 1000)
    untimed = before_after.at_work(models, budget)
    for rows in (alone, untimed):
        assert all(
            rows[name][key] == whole[name][key]
            for name in models
            for key in ("context", "weight_bytes", "state_bytes")
        )
    assert (
        "tokens_per_second" in alone["parent"]
        and "tokens_per_second" not in untimed["parent"]
        and len(seen) == 3
    )
