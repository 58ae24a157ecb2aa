"""Importance against the paper's formulas written out, sample by sample."""

import json

import numpy as np
import pytest
import torch
from compress_models import make_model
from safetensors.torch import save_file

from nanohybrid.checkpoint import CheckpointReader, save
from nanohybrid.data import TokenStore
from nanohybrid.errors import InputError
from nanohybrid.model import Layout
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_importance import rank_layers
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.rank_stability import spearman
from nanohybrid.prune.target import Target


def by_hand(model, calibration):
    """For each layer: norm output and what the formulas call a, one sample at a time, aggregated in numpy."""
    seen = {}

    def keep(name, tensor):
        seen.setdefault(name, []).append(tensor.abs().mean(0).numpy())

    for tokens, _ in calibration.samples:
        layout, h = Layout.packed([len(tokens)]), model.backbone.embeddings(torch.from_numpy(tokens).long())
        for i, block in enumerate(model.backbone.layers):
            x, mixer = block.norm(h), block.mixer
            keep(f"norm{i}", x)
            if model.config.pattern[i] == "-":
                keep(f"mixer{i}", torch.relu(mixer.up_proj(x)) ** 2)
            if model.config.pattern[i] == "M":
                inner = model.config.mamba_inner_size
                keep(f"mixer{i}", mixer.in_proj(x)[:, inner : 2 * inner])
            h = block(h, layout, None)
        keep("norm7", model.backbone.norm_f(h))
    return {name: np.sqrt((np.stack(rows) ** 2).sum(0)) for name, rows in seen.items()}


@torch.no_grad()
def test_activation_scores_equal_the_formulas_of_the_paper(model, calibration):
    got, want = (
        measure_activations(model, calibration, scale_by_outgoing_norm=False, batch_tokens=24),
        by_hand(model, calibration),
    )
    np.testing.assert_allclose(got.hidden_size, sum(want[f"norm{i}"] for i in range(8)), rtol=1e-5)
    np.testing.assert_allclose(got.scores[4], want["mixer4"], rtol=1e-5)
    s_HP = {i: want[f"mixer{i}"].reshape(8, 8) for i in (0, 2, 5)}
    np.testing.assert_allclose(
        got.of_shared("mamba_head_dim"), sum(np.sqrt((s**2).sum(0)) for s in s_HP.values()), rtol=1e-5
    )
    np.testing.assert_allclose(
        got.of_layer(2, "mamba_num_heads", {"mamba_head_dim": [1, 4]}),
        np.sqrt((s_HP[2][:, [1, 4]] ** 2).sum(1)),
        rtol=1e-5,
    )


def test_activation_scores_do_not_depend_on_batch_size(model, calibration):
    one, four = (measure_activations(model, calibration, batch_tokens=size) for size in (1000, 1))
    for layer, scores in one.scores.items():
        torch.testing.assert_close(four.scores[layer], scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(four.hidden_size, one.hidden_size, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_activation_scores_of_a_streamed_model_equal_those_in_memory(calibration, tmp_path, tied, outgoing):
    model = make_model(tie_word_embeddings=tied).float()
    save(model, tmp_path)
    want = measure_activations(model, calibration, outgoing, batch_tokens=24)
    with CheckpointReader(tmp_path) as reader:
        got = measure_activations(StreamedModel(reader), calibration, outgoing, batch_tokens=24)
    torch.testing.assert_close(got.hidden_size, want.hidden_size)
    assert got.facts == want.facts and got.axes == want.axes
    assert all(torch.equal(got.scores[layer], scores) for layer, scores in want.scores.items())


def test_rank_stability_is_1_where_both_halves_are_the_same_documents(model, calibration):
    twice = Calibration(tuple(sample for sample in calibration.samples for _ in range(2)))
    assert set(measure_activations(model, twice).facts["stability"].values()) == {1.0}
    stability = measure_activations(model, calibration).facts["stability"]
    assert set(stability) == {
        "layers_by_cosine",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "mamba_num_heads",
        "mamba_head_dim",
    }
    assert all(
        -1 <= value < 1
        for name, value in stability.items()
        if name not in ("num_attention_heads", "layers_by_cosine")
    )
    assert measure_activations(model, calibration.first(1)).facts["stability"] == {}


def test_spearman_correlates_ranks():
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([0.1, 5, 90])) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0]), torch.tensor([3.0])) == 1


@pytest.mark.parametrize("outgoing", [True, False])
def test_activation_scores_rank_dead_entries_last(model, calibration, outgoing):
    with torch.no_grad():
        model.backbone.layers[1].mixer.up_proj.weight[11] = 0
        model.backbone.layers[3].mixer.v_proj.weight[8:] = 0  # the second key/value head: query heads 2 and 3
        if outgoing:
            model.backbone.layers[0].mixer.out_proj.weight[:, 24:32] = 0  # Mamba head 3 writes nothing
    scores = measure_activations(model, calibration, outgoing)
    assert scores.scores[1].argmin() == 11
    assert set(scores.scores[3].argsort()[:2].tolist()) == {2, 3}
    assert not outgoing or scores.of_layer(0, "mamba_num_heads", {}).argmin() == 3


@torch.no_grad()
def without(model, calibration, gone):
    """Mean squared change of the logits without some layers, from whole logits."""
    total, count = 0.0, 0
    for tokens, _ in calibration.samples:
        ids, layout = torch.from_numpy(tokens).long(), Layout.packed([len(tokens)])
        h = model.backbone.embeddings(ids)
        for i, block in enumerate(model.backbone.layers):
            h = h if i in gone else block(h, layout, None)
        change = model.head(model.backbone.norm_f(h)) - model(ids, layout=layout)
        total, count = total + change.square().sum().item(), count + change.numel()
    return total / count


def test_rank_layers_scores_the_change_of_the_logits_and_orders_iteratively(model, calibration):
    ranking = rank_layers(model, calibration, rounds=3, batch_tokens=40)
    for layer in range(7):
        assert float(ranking.score_L[layer]) == pytest.approx(without(model, calibration, {layer}), rel=1e-4)
    gone = []
    for place in range(3):
        left = [i for i in range(7) if i not in gone]
        gone.append(min(left, key=lambda i: without(model, calibration, {*gone, i})))
        assert ranking.order[place] == gone[-1]
    assert sorted(ranking.order) == list(range(7))


def test_rank_layers_puts_a_layer_without_effect_first(model, calibration):
    with torch.no_grad():
        model.backbone.layers[4].mixer.down_proj.weight.zero_()
    assert rank_layers(model, calibration).order[0] == 4


def test_importance_survives_its_file(model, calibration, tmp_path):
    ranking = rank_layers(model, calibration, rounds=1)
    scores = measure_activations(model, calibration).with_layers(ranking.score_L, ranking.order)
    scores.save(tmp_path)
    back = Importance.load(tmp_path)
    target = Target(
        layers=5,
        sizes={
            "hidden_size": 20,
            "mamba_num_heads": 4,
            "mamba_head_dim": 5,
            "intermediate_size": 30,
            "num_attention_heads": 2,
        },
    )
    assert back.order == scores.order and back.facts == scores.facts
    assert target.select(model.config, back) == target.select(model.config, scores)
    assert json.loads((tmp_path / "importance.json").read_text())["calibration"] == calibration.hash
    (tmp_path / "importance.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a file of importance"):
        Importance.load(tmp_path)
    with pytest.raises(InputError, match="another shape"):
        back.check(make_model("M-M-").config)


def test_importance_load_reads_the_layout_of_the_last_release(model, calibration, tmp_path):
    scores = measure_activations(model, calibration).with_layers(torch.arange(7.0), range(7), 2)
    prefixes = {"-": "ffn", "M": "mamba", "*": "attention"}
    tensors = {"embedding": scores.hidden_size, "layers": scores.layers, "cosine": scores.cosine}
    for layer, of in scores.scores.items():
        tensors[f"{prefixes[model.config.pattern[layer]]}.{layer}"] = of
    facts = {"outgoing": True, "layers_by": "cosine", "rounds": 2, "order": list(range(7))}
    save_file(tensors, tmp_path / "importance.safetensors", {"facts": json.dumps(facts)})
    back = Importance.load(tmp_path)
    back.check(model.config)
    assert torch.equal(back.hidden_size, scores.hidden_size) and back.axes == scores.axes
    assert list(back.scores) == list(scores.scores)
    assert all(torch.equal(back.scores[layer], of) for layer, of in scores.scores.items())
    assert back.facts == {"scale_by_outgoing_norm": True, "depth_importance": "cosine", "rounds": 2}


def test_target_selects_the_highest_scores_and_drops_named_layers(model, calibration):
    scores = measure_activations(model, calibration)
    target = Target(drop_layers=(2, 4), sizes={"intermediate_size": 5, "mamba_num_heads": 2})
    selection = target.select(model.config, scores)
    neurons, heads = selection.axes["intermediate_size"], selection.axes["mamba_num_heads"]
    assert selection.layers == (0, 1, 3, 5, 6) and list(neurons) == [1, 6]
    assert selection.hidden == tuple(range(32))
    assert set(neurons[1]) == set(scores.scores[1].topk(5).indices.tolist())
    scores_H = scores.of_layer(5, "mamba_num_heads", {})
    assert heads[5] == (int(scores_H[:4].argmax()), 4 + int(scores_H[4:].argmax()))
    assert Target(drop_layers=(2, 4)).select(model.config, None).layers == selection.layers


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(sizes={"mamba_num_heads": 5}), r"--mamba-heads 5: .* multiple of 2; nearest 4 or 6"),
        (Target(sizes={"mamba_num_heads": 1}), r"nearest 2"),
        (Target(sizes={"num_attention_heads": 3}), r"nearest 2 or 4"),
        (Target(layers=99), r"the model has 7, .*nearest 7"),
        (Target(layers=0), r"nearest 1"),
        (Target(sizes={"hidden_size": 512}), r"nearest 32"),
        (Target(sizes={"mamba_head_dim": 9}), r"nearest 8"),
        (Target(drop_layers=(77,)), r"no such layer, they are 0 to 6"),
        (Target(drop_layers=tuple(range(7))), r"at least one must remain"),
        (Target(layers=5, drop_layers=(1,)), r"contradict"),
        (Target(sizes={"hidden_size": 20}), r"--calibration"),
    ],
)
def test_target_refuses_impossible_sizes_and_names_the_nearest(model, target, message):
    with pytest.raises(InputError, match=message):
        target.select(model.config, None)


def test_target_refuses_an_axis_of_layers_that_the_model_lacks(dense):
    with pytest.raises(InputError, match="no such layers"):
        Target(sizes={"mamba_num_heads": 2}).check(dense.config)


def test_calibration_reads_token_stores_and_text(tmp_path):
    from nanohybrid.text import train_bpe

    train_bpe(["some words"], 269).save(tmp_path)
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 50, n), rng.integers(0, 2, n)) for n in range(1, 40)]
    (tmp_path / "stores").mkdir()
    TokenStore.from_documents(documents).write(tmp_path / "stores" / "chats.safetensors")
    TokenStore.from_documents(documents).write(tmp_path / "stores" / "validation.safetensors")
    found = Calibration.read(tmp_path, tmp_path, 10, 8)
    assert len(found.samples) == 10 and max(len(tokens) for tokens, _ in found.samples) == 8
    assert found.hash == Calibration.read(tmp_path / "stores" / "chats.safetensors", tmp_path, 10, 8).hash
    assert sum(batch.layout.tokens for batch in found.batches(20)) == found.tokens
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n\n{"text": "defg"}\n')
    assert [len(tokens) for tokens, _ in Calibration.read(tmp_path / "text.jsonl", tmp_path).samples] == [
        3,
        4,
    ]
    (tmp_path / "text.jsonl").write_text('{"txt": "abc"}\n')
    with pytest.raises(InputError, match=r"text\.jsonl:1"):
        Calibration.read(tmp_path / "text.jsonl", tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weights are no documents")
    with pytest.raises(InputError, match="no token stores"):
        Calibration.read(tmp_path / "checkpoint", tmp_path)
    with pytest.raises(InputError, match="no token stores"):
        Calibration.read(tmp_path / "nothing", tmp_path)
