"""Streamed models: rankings from disk equal those in memory, with one layer in memory at a time."""

import pytest
import torch
from compress_models import DENSE, make_calibration, make_model

from nanohybrid.checkpoint import CheckpointReader, save
from nanohybrid.prune import measure, streaming
from nanohybrid.prune.depth_importance import rank_layers, rank_layers_streamed
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.measure import importance_of

SHAPES = [dict(pattern="M-M*-M-"), dict(pattern="*-*-", **DENSE)]


@pytest.mark.parametrize("hidden_bytes", [1, 2**30], ids=["a document at a time", "all at once"])
@pytest.mark.parametrize("shape", SHAPES, ids=["hybrid", "dense"])
def test_rank_layers_streamed_equals_rank_layers(tmp_path, shape, hidden_bytes):
    model, calibration = make_model(**shape).float(), make_calibration()
    save(model, tmp_path)
    rounds = model.config.num_hidden_layers - 1
    wanted, steps = rank_layers(model, calibration, rounds), []
    with CheckpointReader(tmp_path) as reader:
        found = rank_layers_streamed(StreamedModel(reader), calibration, rounds, hidden_bytes, steps.append)
    assert (
        found.order == wanted.order
        and sum(steps) == rounds * calibration.tokens * model.config.num_hidden_layers
    )
    torch.testing.assert_close(found.score_L, wanted.score_L, rtol=1e-4, atol=0)


def test_importance_of_streams_an_iterative_ranking_where_memory_is_short(tmp_path, monkeypatch):
    save(make_model().float(), tmp_path / "model")
    wanted = importance_of(make_model().float(), make_calibration(), tmp_path / "whole", True, 3)
    monkeypatch.setattr(streaming, "free_bytes", lambda *_: 1000)
    monkeypatch.setattr(measure, "load", lambda *_, **__: pytest.fail("it reads the whole model"))
    found = importance_of(tmp_path / "model", make_calibration(), tmp_path, True, 3)
    assert found.order == wanted.order and found.facts == wanted.facts


def test_streamed_model_frees_a_layer_before_it_reads_the_next(tmp_path, monkeypatch):
    save(make_model().float(), tmp_path)
    given, original = [], StreamedModel.read

    def reading(model, name):
        assert not any(parameter.numel() for block in given for parameter in block.parameters())
        return original(model, name)

    monkeypatch.setattr(StreamedModel, "read", reading)
    with CheckpointReader(tmp_path) as reader:
        for block in StreamedModel(reader).blocks():
            assert all(parameter.numel() for parameter in block.parameters())
            given.append(block)
    assert len(given) == 7
