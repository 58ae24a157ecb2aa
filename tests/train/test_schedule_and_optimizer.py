"""The learning-rate schedule, and which parameters have weight decay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.model import HybridLM
from nanohybrid.train import OptimizerConfig, ScheduleConfig
from nanohybrid.train.optimizer import adamw, has_weight_decay
from nanohybrid.train.schedule import lr_multiplier


@given(
    steps=st.integers(1, 400), warmup=st.floats(0, 0.5), decay=st.floats(0, 0.5), min_lr_ratio=st.floats(0, 1)
)
def test_lr_multiplier_rises_stays_falls_and_stays_in_bounds(
    steps: int, warmup: float, decay: float, min_lr_ratio: float
) -> None:
    schedule = ScheduleConfig(warmup, decay, min_lr_ratio)
    rates = [lr_multiplier(schedule, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 or (rate == min_lr_ratio == 0) for rate in rates)
    first, last = int(warmup * steps), steps - int(decay * steps) - 1
    assert rates[:first] == sorted(rates[:first]) and rates[last:] == sorted(rates[last:], reverse=True)
    assert all(rate == 1 for rate in rates[first + 1 : last])


def test_lr_multiplier_of_the_papers_schedule_ends_at_a_hundredth() -> None:
    paper = ScheduleConfig(warmup=8e9 / 20e12, decay=3.6 / 20, min_lr_ratio=0.01)
    steps = 3_317_000
    assert 4.5e-4 * lr_multiplier(paper, steps - 1, steps) == pytest.approx(4.5e-6)
    assert lr_multiplier(paper, int(0.81 * steps), steps) == 1 and lr_multiplier(
        paper, int(0.91 * steps), steps
    ) == pytest.approx(0.505, abs=1e-3)


def test_schedule_refuses_warmup_and_decay_beyond_the_run() -> None:
    with pytest.raises(ConfigError, match="together at most 1"):
        ScheduleConfig(warmup=0.6, decay=0.6)


def test_adamw_applies_weight_decay_to_matrices_only(config: HybridConfig) -> None:
    model = HybridLM(config, seed=0)
    without_decay = {
        name.rpartition("mixer.")[2] for name, decay in has_weight_decay(model).items() if not decay
    }
    assert {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight", "backbone.norm_f.weight"} <= without_decay
    assert not any(name.endswith("proj.weight") or name.startswith("lm_head") for name in without_decay)
    groups = adamw(model, OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
