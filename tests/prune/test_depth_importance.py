"""Three ways to rank layers, streamed in one pass where that is enough."""

import numpy as np
import pytest
import torch
from compress_models import make_model

from nanohybrid.checkpoint import CheckpointReader, load_config, save
from nanohybrid.checkpoint.dialects import model_type
from nanohybrid.compress import CompressRecipe, Grid
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate import Footprint
from nanohybrid.model import Layout
from nanohybrid.prune import measure
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_importance import rank_layers, rank_layers_streamed
from nanohybrid.prune.depth_units import depth_units
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.measure import DepthRanking, importance_of
from nanohybrid.prune.stage import PruneRecipe, prune
from nanohybrid.prune.target import Target


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
    first = importance_of(model, calibration, tmp_path, True, 3, DepthRanking(how))
    assert sorted(first.order) == list(range(7)) and first.facts["depth_importance"] == how
    if how != "iterative":
        assert list(first.order) == sorted(range(7), key=lambda layer: float(first.layers[layer]))
    monkeypatch.setattr(measure, "rank_layers", lambda *_, **__: pytest.fail("it ranks again"))
    again = importance_of(model, calibration, tmp_path, True, 2, DepthRanking(how))
    assert again.order == first.order and torch.equal(again.cosine, Importance.load(tmp_path).cosine)


@pytest.mark.parametrize("how", ["one-shot", "cosine"])
def test_importance_of_loads_the_whole_model_only_to_rank_iteratively(
    calibration, tmp_path, monkeypatch, how
):
    save(make_model().float(), tmp_path / "model")
    whole = importance_of(make_model().float(), calibration, tmp_path / "whole", True, 2, DepthRanking(how))
    monkeypatch.setattr(measure, "load", lambda *_, **__: pytest.fail("it reads the whole model"))
    found = importance_of(tmp_path / "model", calibration, tmp_path, True, 2, DepthRanking(how))
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


# Blocks, parameters, tokens

BLOCKS = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4, "qk_norm": False}


def dense(layers=4, **fields):
    """A model of the type llama."""
    return make_model("*-" * layers, mlp_activation="swiglu", **BLOCKS, **fields).float()


def test_depth_units_are_blocks_where_the_type_of_the_model_knows_only_blocks():
    config = dense().config
    assert model_type(config) == "llama"
    units = depth_units(config)
    assert units.layers == ((0, 1), (2, 3), (4, 5), (6, 7)) and units.size == 2
    smaller = config.replace(pattern="*-*-*-")
    assert units.parameters[0] == Footprint.of(config).parameters - Footprint.of(smaller).parameters
    assert depth_units(config, "layer").size == 1
    hybrid = make_model().config
    assert depth_units(hybrid).layers == tuple((i,) for i in range(hybrid.num_hidden_layers))
    with pytest.raises(ConfigError, match="depth_unit is block: only llama"):
        depth_units(hybrid, "block")
    with pytest.raises(ConfigError, match="depth_unit is 'pair': known are auto, block, layer"):
        depth_units(hybrid, "pair")


@pytest.mark.parametrize("rounds", [0, 2])
def test_rank_layers_of_blocks_gives_the_change_of_the_logits_without_the_block(
    calibration, tmp_path, rounds
):
    model = dense()
    units = depth_units(model.config)
    found = rank_layers(model, calibration, rounds, units=units)
    save(model, tmp_path)
    with CheckpointReader(tmp_path) as reader:
        streamed = rank_layers_streamed(StreamedModel(reader), calibration, rounds, units=units)
    assert streamed.order == found.order
    torch.testing.assert_close(streamed.score_L, found.score_L, rtol=1e-4, atol=0)

    def change(gone):
        """The mean squared change of the logits without these layers, from the equation."""
        total = 0.0
        for tokens, _ in calibration.samples:
            ids_T, layout = torch.from_numpy(tokens.astype("int64")), Layout.packed([len(tokens)])
            h_TE = model.backbone.embeddings(ids_T)
            for layer, block in enumerate(model.backbone.layers):
                h_TE = h_TE if layer in gone else block(h_TE, layout, None)
            logits_TV = model.backbone.norm_f(h_TE) @ model.head_weight.T
            total += float((logits_TV - model(ids_T, layout=layout)).detach().square().mean(1).sum())
        return total / calibration.tokens

    wanted = [change(unit) for unit in units.layers]
    torch.testing.assert_close(found.score_L[::2], torch.tensor(wanted), rtol=1e-4, atol=0)
    assert torch.equal(found.score_L[::2], found.score_L[1::2])
    first = min(range(4), key=wanted.__getitem__)
    assert found.order[:2] == units.layers[first]
    if rounds == 2:  # the second is the best one beside the first
        left = [unit for unit in range(4) if unit != first]
        second = min(left, key=lambda unit: change(units.layers[first] + units.layers[unit]))
        assert found.order[2:4] == units.layers[second]


def test_rank_layers_per_parameter_divides_by_what_goes(model, calibration):
    units = depth_units(model.config, "layer")
    raw = rank_layers(model, calibration)
    found = rank_layers(model, calibration, per_parameter=True)
    assert torch.equal(found.score_L, raw.score_L)
    cost = dict(enumerate(units.parameters))
    assert list(found.order) == sorted(cost, key=lambda layer: float(raw.score_L[layer]) / cost[layer])
    assert found.order != raw.order


def test_importance_of_ranks_on_as_many_tokens_as_are_given(calibration, tmp_path, capsys):
    model = dense()
    found = importance_of(model, calibration, tmp_path, True, 2, DepthRanking(tokens=20))
    assert found.facts["depth_calibration_tokens"] < calibration.tokens
    line = capsys.readouterr().err
    assert f"ranked on {found.facts['depth_calibration_tokens']} of {calibration.tokens} calibration" in line
    whole = importance_of(model, calibration, tmp_path, True, 2, DepthRanking())
    assert whole.facts["depth_calibration_tokens"] == calibration.tokens, "other tokens: measured again"
    huge = make_model().config.replace(hidden_size=4096, intermediate_size=65536, vocab_size=131072)
    assert DepthRanking().calibration(huge, calibration, "cpu").tokens <= calibration.tokens


def test_calibration_spread_takes_samples_from_all_over():
    samples = [(np.full(10 + n, n, dtype=np.int32), np.ones(10 + n, dtype=np.uint8)) for n in range(9)]
    some = Calibration(tuple(samples)).spread(60)
    assert [int(tokens[0]) for tokens, _ in some.samples] == [0, 3, 5, 8]
    assert Calibration(tuple(samples)).spread(10**9).tokens == sum(10 + n for n in range(9))


def test_a_pruned_llama_stays_one_and_says_so_where_it_does_not(calibration, tmp_path, capsys):
    save(dense(), tmp_path / "parent")
    importance_of(dense(), calibration, tmp_path / "scores", True, 4)
    scores = tmp_path / "scores"
    prune(PruneRecipe(Target(layers=4)), tmp_path / "parent", tmp_path / "blocks", importance=scores)
    assert model_type(load_config(tmp_path / "blocks")) == "llama" and capsys.readouterr().err == ""
    with pytest.raises(InputError, match="--layers 5: this model loses whole blocks of 2 layers"):
        prune(PruneRecipe(Target(layers=5)), tmp_path / "parent", tmp_path / "odd", importance=scores)
    assert not (tmp_path / "odd").exists()
    prune(PruneRecipe(Target(drop_layers=(2,))), tmp_path / "parent", tmp_path / "single")
    assert "the type nanohybrid, which no other program reads; a llama model" in capsys.readouterr().err


def test_compress_refuses_a_grid_that_drops_half_a_block():
    recipe = CompressRecipe(grid=Grid(drop_layers=(0, 1)))
    with pytest.raises(InputError, match=r"grid.drop_layers names 1: this model loses whole blocks of 2"):
        recipe.grid_for(dense().config)
    assert CompressRecipe(grid=recipe.grid, depth_unit="layer").grid_for(dense().config) == recipe.grid
    assert recipe.grid_for(make_model().config) == recipe.grid
