"""Budgets in bytes, and the choice of a shape."""

from dataclasses import replace

import pytest
import torch
from compress_models import make_model

import nanohybrid
from nanohybrid.compress.candidate_quality import Judge, Quality
from nanohybrid.compress.report import pareto
from nanohybrid.compress.search import (
    Grid,
    Search,
    choose,
    dominated,
    enumerate_shapes,
    key_of,
    search,
    targets,
    widths,
)
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate.budget import Budget
from nanohybrid.evaluate.perplexity import loss_of
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.depth_importance import rank_layers
from nanohybrid.prune.slicing import prune_model

GRID = Grid(
    drop_layers=(0, 1),
    multiple=4,
    tried=4,
    fractions={
        "hidden_size": (1.0, 0.75),
        "intermediate_size": (1.0, 0.5),
        "mamba_num_heads": (1.0, 0.5),
        "mamba_head_dim": (1.0,),
    },
)


@pytest.fixture
def scores(model, calibration):
    ranking = rank_layers(model, calibration, rounds=1)
    return measure_activations(model, calibration).with_layers(ranking.score_L, ranking.order, 1)


def test_the_papers_budget():
    assert pytest.approx(19.66, abs=0.005) == 22.06 * 0.95 - 1.3
    paper = Budget(int(19.66 * 2**30), 131_072)
    nine, twelve = (nanohybrid.preset(name) for name in ("nano-9b-v2", "nano-12b-v2"))
    memory = paper.memory(nine)
    assert [round(part / 2**30, 2) for part in (memory.weights, memory.kv, memory.state, memory.total)] == [
        16.56,
        2.0,
        0.13,
        18.69,
    ]
    assert paper.fits(nine) and not paper.fits(twelve)


def test_bytes_are_those_of_the_state_that_is_allocated(model):
    from nanohybrid.model import HybridCache

    memory = Budget(1, context=256, batch=3, dtype="fp32").memory(model.config)
    assert memory.kv + memory.state == HybridCache.for_context(model.config, 3, 256, torch.float32).bytes
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())
    assert memory.total == sum(v for k, v in memory.as_dict().items() if k != "total")


def test_every_shape_that_fits_and_only_those(model, scores):
    whole = Budget(10**9, 64).memory(model.config).total
    everything = enumerate_shapes(model.config, scores, GRID, Budget(10**9, 64))
    assert len(everything.candidates) == 16 and everything.rejected == 0
    budget = Budget(int(whole * 0.8), 64)
    some = enumerate_shapes(model.config, scores, GRID, budget)
    assert [c for c in everything.candidates if c.bytes["total"] <= budget.bytes] == list(some.candidates)
    assert some.rejected == 16 - len(some.candidates) > 0
    for candidate in everything.candidates:
        pruned = prune_model(model, candidate.target.select(model.config, scores))
        assert (
            pruned.config == candidate.config
            and sum(p.numel() for p in pruned.parameters()) == candidate.parameters
        )
    with pytest.raises(InputError, match=r"no shape of the grid fits .* the smallest takes"):
        enumerate_shapes(model.config, scores, GRID, Budget(1000))


def test_the_choice_is_the_lowest_loss_of_models_really_pruned(model, scores, calibration):
    budget = Budget(int(Budget(1, 64).memory(model.config).total * 0.85), 64)
    fitting, judge = enumerate_shapes(model.config, scores, GRID, budget), Judge(model, calibration)
    found = search(model, scores, judge, GRID, fitting)
    tried = [c for c in found.candidates if c.loss is not None]
    assert 1 < len(tried) <= GRID.tried and [c.loss for c in tried] == sorted(c.loss for c in tried)
    for candidate in tried:
        pruned = prune_model(model, candidate.target.select(model.config, scores))
        assert loss_of(pruned, calibration.batches()).loss == pytest.approx(candidate.loss)
        assert candidate.agreement == pytest.approx(agreement_of(pruned, model, calibration))
        assert not dominated(candidate, found.candidates)
    known = {key_of(c): Quality(c.loss, c.agreement) for c in tried}
    again = search(model, scores, judge, GRID, fitting, known=known)
    assert again == found and len(known) == len(tried)


def agreement_of(model, parent, calibration):
    """The share of the targets at which both find the same token likeliest, a document at a time."""
    same = []
    for tokens, _ in calibration.samples:
        first, second = (
            m(torch.from_numpy(tokens.astype("int64"))[None])[0].argmax(-1)[:-1] for m in (model, parent)
        )
        same += (first == second).tolist()
    return sum(same) / len(same)


def test_the_fastest_of_those_that_are_as_good_is_chosen(model, scores):
    fitting = enumerate_shapes(
        model.config, scores, GRID, Budget(10**9), speed=lambda config: 1e6 / config.hidden_size
    )
    assert {c.tokens_per_second for c in fitting.candidates} == {1e6 / 32, 1e6 / 24}
    wide = [c for c in fitting.candidates if c.config.hidden_size == 32][:2]
    narrow = [c for c in fitting.candidates if c.config.hidden_size == 24][:2]
    tried = [replace(c, loss=loss) for c, loss in zip((*wide, *narrow), (2.0, 2.1, 2.01, 2.05), strict=True)]
    found = Search((*tried, *fitting.candidates[4:]), 0)
    assert choose(found, near=0.0).chosen == tried[0]
    assert choose(found, near=0.01).chosen == tried[2]
    assert choose(found, near=0.03).chosen == tried[2]  # of two as fast, the better
    assert sorted(map(key_of, choose(found, 0.01).candidates)) == sorted(map(key_of, found.candidates))
    raced = Search((replace(tried[0], healed=0.5), replace(tried[2], healed=0.4), *tried[3:]), 0)
    assert (
        choose(raced, near=0.0).chosen.healed == 0.4
    )  # what was learned since outweighs what was lost at the cut


def test_axes_of_mixers_that_a_model_lacks_are_left_alone(dense):
    assert all("mamba_num_heads" not in target.sizes for target in targets(dense.config, GRID))
    only = make_model("M")
    assert all(
        set(target.sizes) == {"hidden_size", "mamba_num_heads", "mamba_head_dim"}
        for target in targets(only.config, GRID)
    )


def test_widths_are_multiples_the_whole_one_apart():
    assert widths(100, (1.0, 0.9, 0.5, 0.01), 8) == [100, 88, 48, 8]
    assert widths(8, (1.0, 0.9, 0.4), 4) == [8, 4]


@pytest.mark.parametrize(
    "change",
    [
        dict(fractions={"hidden_size": ()}),
        dict(fractions={"intermediate_size": (1.5,)}),
        dict(fractions={"banana": (1.0,)}),
        dict(tried=0),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="grid"):
        Grid(**change)


def test_the_front_holds_what_none_beats():
    assert pareto([(1, 5), (2, 4), (3, 4), (2, 6), (4, 1)]) == [(1, 5), (2, 4), (4, 1)]


def test_dominated_means_no_larger_anywhere(model, scores):
    shapes = enumerate_shapes(model.config, scores, GRID, Budget(10**9)).candidates
    small = next(
        shape
        for shape in shapes
        if shape.target.sizes["hidden_size"] == shape.target.sizes["intermediate_size"] == 24
        and shape.target.layers == 6
    )
    assert dominated(small, shapes)
    assert not dominated(max(shapes, key=lambda shape: shape.parameters), shapes)
