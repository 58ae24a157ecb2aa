"""Budgets in bytes, and the choice of a shape."""

from dataclasses import replace

import pytest
import torch
from compress_models import make_model

import nanohybrid
from nanohybrid.compress.candidate_quality import CandidateQuality, QualityEvaluator
from nanohybrid.compress.report import pareto
from nanohybrid.compress.search import (
    Grid,
    Search,
    dominated,
    enumerate_shapes,
    key_of,
    search,
    select,
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
    max_evaluated=4,
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


def test_budget_of_the_paper_holds_the_9b_and_not_the_12b():
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


def test_budget_memory_equals_the_allocated_cache_and_weights(model):
    from nanohybrid.model import HybridCache

    memory = Budget(1, context=256, batch=3, dtype="fp32").memory(model.config)
    assert memory.kv + memory.state == HybridCache.for_context(model.config, 3, 256, torch.float32).bytes
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())
    assert memory.total == sum(v for k, v in memory.as_dict().items() if k != "total")


def test_enumerate_shapes_gives_all_shapes_that_fit_and_no_others(model, scores):
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


def test_search_ranks_candidates_by_the_loss_of_the_pruned_models(model, scores, calibration):
    budget = Budget(int(Budget(1, 64).memory(model.config).total * 0.85), 64)
    fitting, judge = (
        enumerate_shapes(model.config, scores, GRID, budget),
        QualityEvaluator(model, calibration),
    )
    found = search(model, scores, judge, GRID, fitting)
    tried = [c for c in found.candidates if c.loss is not None]
    assert 1 < len(tried) <= GRID.max_evaluated and [c.loss for c in tried] == sorted(c.loss for c in tried)
    for candidate in tried:
        pruned = prune_model(model, candidate.target.select(model.config, scores))
        assert loss_of(pruned, calibration.batches()).loss == pytest.approx(candidate.loss)
        assert candidate.agreement == pytest.approx(agreement_of(pruned, model, calibration))
        assert not dominated(candidate, found.candidates)
    known = {key_of(c): CandidateQuality(c.loss, c.agreement) for c in tried}
    again = search(model, scores, judge, GRID, fitting, known=known)
    assert again == found and len(known) == len(tried)


def agreement_of(model, parent, calibration):
    """The share of the targets at which both have the same most probable token, one document at a time."""
    same = []
    for tokens, _ in calibration.samples:
        first, second = (
            m(torch.from_numpy(tokens.astype("int64"))[None])[0].argmax(-1)[:-1] for m in (model, parent)
        )
        same += (first == second).tolist()
    return sum(same) / len(same)


def test_select_takes_the_fastest_candidate_within_the_tolerance(model, scores):
    fitting = enumerate_shapes(
        model.config, scores, GRID, Budget(10**9), speed=lambda config: 1e6 / config.hidden_size
    )
    assert {c.tokens_per_second for c in fitting.candidates} == {1e6 / 32, 1e6 / 24}
    wide = [c for c in fitting.candidates if c.config.hidden_size == 32][:2]
    narrow = [c for c in fitting.candidates if c.config.hidden_size == 24][:2]
    tried = [replace(c, loss=loss) for c, loss in zip((*wide, *narrow), (2.0, 2.1, 2.01, 2.05), strict=True)]
    found = Search((*tried, *fitting.candidates[4:]), 0)
    assert select(found, tolerance=0.0).selected == tried[0]
    assert select(found, tolerance=0.01).selected == tried[2]
    assert select(found, tolerance=0.03).selected == tried[2]  # of two as fast, the better
    assert sorted(map(key_of, select(found, 0.01).candidates)) == sorted(map(key_of, found.candidates))
    raced = Search((replace(tried[0], distilled_kl=0.5), replace(tried[2], distilled_kl=0.4), *tried[3:]), 0)
    assert (
        select(raced, tolerance=0.0).selected.distilled_kl == 0.4
    )  # what was learned since outweighs what was lost at the cut


def test_targets_leave_out_axes_that_a_model_lacks(dense):
    assert all("mamba_num_heads" not in target.sizes for target in targets(dense.config, GRID))
    only = make_model("M")
    assert all(
        set(target.sizes) == {"hidden_size", "mamba_num_heads", "mamba_head_dim"}
        for target in targets(only.config, GRID)
    )


def test_widths_are_multiples_except_the_whole_size():
    assert widths(100, (1.0, 0.9, 0.5, 0.01), 8) == [100, 88, 48, 8]
    assert widths(8, (1.0, 0.9, 0.4), 4) == [8, 4]


@pytest.mark.parametrize(
    "change",
    [
        dict(fractions={"hidden_size": ()}),
        dict(fractions={"intermediate_size": (1.5,)}),
        dict(fractions={"banana": (1.0,)}),
        dict(max_evaluated=0),
    ],
)
def test_grid_refuses_values_out_of_range(change):
    with pytest.raises(ConfigError, match="grid"):
        Grid(**change)


def test_pareto_is_the_front_of_unbeaten_points():
    assert pareto([(1, 5), (2, 4), (3, 4), (2, 6), (4, 1)]) == [(1, 5), (2, 4), (4, 1)]


def test_dominated_means_another_shape_is_as_large_on_every_axis(model, scores):
    shapes = enumerate_shapes(model.config, scores, GRID, Budget(10**9)).candidates
    small = next(
        shape
        for shape in shapes
        if shape.target.sizes["hidden_size"] == shape.target.sizes["intermediate_size"] == 24
        and shape.target.layers == 6
    )
    assert dominated(small, shapes)
    assert not dominated(max(shapes, key=lambda shape: shape.parameters), shapes)
