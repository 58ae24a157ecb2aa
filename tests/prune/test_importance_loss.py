"""The importance-loss proxy: what a shape loses equals the share of the squared scores that its selection
leaves out."""

import pytest

from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.depth_importance import rank_layers
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.target import Target


@pytest.fixture
def scores(model, calibration):
    ranking = rank_layers(model, calibration, rounds=1)
    return measure_activations(model, calibration).with_layers(ranking.score_L, ranking.order, 1)


def test_importance_loss_is_the_share_of_the_scores_that_a_selection_leaves_out(model, scores):
    proxy = ImportanceLoss(model.config, scores)
    assert proxy.of(Target()) == pytest.approx(0.0, abs=1e-9)
    target = Target(
        layers=6,
        sizes={
            "hidden_size": 20,
            "intermediate_size": 10,
            "mamba_num_heads": 4,
            "mamba_head_dim": 5,
            "num_attention_heads": 2,
        },
    )
    axes = Target(sizes=target.sizes).select(model.config, scores).axes
    own = scores.scores

    def share(values, indices):
        return float(values[list(indices)].square().sum() / values.square().sum())

    lost = 1 - share(scores.hidden_size, axes["hidden_size"][None])
    lost += 1 - sum(share(own[i], of) for i, of in axes["intermediate_size"].items()) / 3
    lost += 1 - share(own[3], axes["num_attention_heads"][3])
    channels = axes["mamba_head_dim"][None]
    inner = {i: [h * 8 + c for h in heads for c in channels] for i, heads in axes["mamba_num_heads"].items()}
    lost += 1 - sum(share(own[i].flatten(), inner[i]) for i in inner) / 3
    lost += float(scores.layers[scores.order[0]] / scores.layers.sum())
    assert proxy.of(target) == pytest.approx(lost, rel=1e-5)
