"""Three ways to rank layers, streamed in one pass where that is enough."""

import numpy as np
import pytest
import torch
from compress_models import make_model

from nanohybrid.checkpoint import CheckpointReader, save
from nanohybrid.model import Layout
from nanohybrid.prune import measure
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.depth_importance import rank_layers_streamed
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.measure import importance_of


def test_cosine_score_is_the_change_of_direction_of_the_hidden_state(model, calibration):
    found, turns = measure_activations(model, calibration).cosine, []
    for tokens, _ in calibration.samples:
        h_TE, layout, row = (
            model.backbone.embeddings(torch.from_numpy(tokens.astype("int64"))),
            Layout.packed([len(tokens)]),
            [],
        )
        for block in model.backbone.layers:
            after_TE = block(h_TE, layout, None)
            cosine_T = (h_TE * after_TE).sum(1) / (h_TE.norm(dim=1) * after_TE.norm(dim=1))
            row.append(float((1 - cosine_T.detach()).mean()))
            h_TE = after_TE
        turns.append(row)
    torch.testing.assert_close(
        found.double(), torch.tensor(np.square(turns).mean(0) ** 0.5), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("how", ["iterative", "one-shot", "cosine"])
def test_importance_of_reads_a_stored_ranking_of_the_same_kind(
    model, calibration, tmp_path, how, monkeypatch
):
    first = importance_of(model, calibration, tmp_path, True, 3, how)
    assert sorted(first.order) == list(range(7)) and first.facts["depth_importance"] == how
    if how != "iterative":
        assert list(first.order) == sorted(range(7), key=lambda layer: float(first.layers[layer]))
    monkeypatch.setattr(measure, "rank_layers", lambda *_, **__: pytest.fail("it ranks again"))
    again = importance_of(model, calibration, tmp_path, True, 2, how)
    assert again.order == first.order and torch.equal(again.cosine, Importance.load(tmp_path).cosine)


@pytest.mark.parametrize("how", ["one-shot", "cosine"])
def test_importance_of_loads_the_whole_model_only_to_rank_iteratively(
    calibration, tmp_path, monkeypatch, how
):
    save(make_model().float(), tmp_path / "model")
    whole = importance_of(make_model().float(), calibration, tmp_path / "whole", True, 2, how)
    monkeypatch.setattr(measure, "load", lambda *_, **__: pytest.fail("it reads the whole model"))
    found = importance_of(tmp_path / "model", calibration, tmp_path, True, 2, how)
    assert found.facts["depth_importance"] == how and found.order == whole.order
    torch.testing.assert_close(found.layers, whole.layers)


@pytest.mark.parametrize(
    "hidden_bytes", [1, 12_000, 2**30], ids=["a document at a time", "two groups", "all at once"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_rank_layers_streamed_gives_the_change_of_whole_logits(calibration, tmp_path, hidden_bytes, tied):
    model = make_model("M-*-M", tie_word_embeddings=tied).float()
    save(model, tmp_path)
    with CheckpointReader(tmp_path) as reader:
        found = rank_layers_streamed(StreamedModel(reader), calibration, hidden_bytes)
    wanted = torch.zeros(5)
    for tokens, _ in calibration.samples:
        ids_T, layout = torch.from_numpy(tokens.astype("int64")), Layout.packed([len(tokens)])
        whole_TV = model(ids_T, layout=layout).detach()
        for gone in range(5):
            h_TE = model.backbone.embeddings(ids_T)
            for layer, block in enumerate(model.backbone.layers):
                h_TE = h_TE if layer == gone else block(h_TE, layout, None)
            logits_TV = model.backbone.norm_f(h_TE).detach() @ model.head_weight.detach().T
            wanted[gone] += (logits_TV - whole_TV).square().mean(1).sum() / calibration.tokens
    torch.testing.assert_close(found.score_L, wanted, rtol=1e-4, atol=0)
    assert list(found.order) == wanted.argsort().tolist()


def test_importance_load_reads_files_without_a_cosine(model, calibration, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = measure_activations(model, calibration).save(tmp_path)
    with safe_open(file, "pt") as stored:
        facts = stored.metadata()
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "cosine"}, file, facts)
    assert len(Importance.load(file).cosine) == 0
