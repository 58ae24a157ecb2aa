"""Streamed compression equals compression in memory: the quality of candidates, the whole command, and the
measured cost."""

import json
from dataclasses import replace

import pytest
from compress_models import DENSE, make_calibration, make_model
from test_compress_stage import RECIPE, folders  # noqa: F401  the same parent and documents

from nanohybrid.checkpoint import CheckpointReader, save
from nanohybrid.compress import inference_cost, stage
from nanohybrid.compress.candidate_quality import QualityEvaluator
from nanohybrid.compress.stage import compress
from nanohybrid.estimate.budget import Budget
from nanohybrid.prune import streaming
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.target import Target

SHAPES = [dict(pattern="M-M*-M-"), dict(pattern="*-*-", **DENSE)]


@pytest.mark.parametrize("rows", [7, 60, 1000])
@pytest.mark.parametrize("hidden_bytes", [1, 2**30])
@pytest.mark.parametrize("shape", SHAPES, ids=["hybrid", "dense"])
def test_quality_of_a_streamed_candidate_equals_that_in_memory(
    tmp_path, shape, hidden_bytes, rows, monkeypatch
):
    model, calibration = make_model(**shape).float(), make_calibration()
    save(model, tmp_path)
    monkeypatch.setattr("nanohybrid.prune.layerwise.CHUNK_BYTES", rows * 4 * 32)
    scores = measure_activations(model, calibration)
    target = Target(
        drop_layers=(1,), sizes={"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    )
    selection = target.select(model.config, scores)
    with CheckpointReader(tmp_path) as reader:
        streamed_model = StreamedModel(reader)
        evaluators = (
            QualityEvaluator(model, calibration),
            QualityEvaluator(streamed_model, calibration, hidden_bytes),
        )
        pairs = [
            (evaluator.base, evaluator(candidate))
            for evaluator, candidate in zip(
                evaluators, (prune_model(model, selection), streamed_model.pruned(selection)), strict=True
            )
        ]
    for in_memory, streamed in zip(*pairs, strict=True):
        assert (
            streamed.loss == pytest.approx(in_memory.loss, rel=1e-6)
            and streamed.agreement == in_memory.agreement
        )
    assert pairs[0][1].loss != pairs[0][0].loss


def test_compress_streamed_selects_the_same_shape(folders, tmp_path, monkeypatch):  # noqa: F811
    recipe = replace(
        RECIPE,
        budget_share=0.6,
        grid=replace(RECIPE.grid, drop_layers=(0, 1, 2), max_evaluated=4),
        distill=replace(RECIPE.distill, tokens=100),
    )
    outs = []
    for name, free in (("whole", 2**40), ("streamed", 2**20)):
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "free_bytes", lambda *_, free=free: free)
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


def test_measure_inference_times_models_alone_where_memory_is_short(folders, monkeypatch):  # noqa: F811
    models, budget, seen = {"parent": folders / "parent", "result": folders / "parent"}, Budget(2**30, 64), []
    original = inference_cost.decode_times
    monkeypatch.setattr(
        inference_cost,
        "decode_times",
        lambda loaded, *rest: seen.append(list(loaded)) or original(loaded, *rest),
    )
    whole = inference_cost.measure_inference(models, budget)
    weights = inference_cost.weight_bytes(folders / "parent", budget)
    monkeypatch.setattr(inference_cost, "free_bytes", lambda *_: streaming.WORKSPACE_BYTES + weights)
    alone = inference_cost.measure_inference(models, budget)
    assert seen == [["parent", "result"], ["parent"], ["result"]]
    monkeypatch.setattr(inference_cost, "free_bytes", lambda *_: 1000)
    bytes_alone = inference_cost.measure_inference(models, budget)
    for rows in (alone, bytes_alone):
        assert all(
            rows[name][key] == whole[name][key]
            for name in models
            for key in ("context", "weight_bytes", "state_bytes")
        )
    assert (
        "tokens_per_second" in alone["parent"]
        and "tokens_per_second" not in bytes_alone["parent"]
        and len(seen) == 3
    )
