"""The learning rate over a run, and which parameters weight decay may touch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.model import HybridLM
from nanohybrid.train import OptimizerConfig, ScheduleConfig
from nanohybrid.train.optimizer import adamw, decayed
from nanohybrid.train.schedule import factor


@given(steps=st.integers(1, 400), warmup=st.floats(0, 0.5), decay=st.floats(0, 0.5), final=st.floats(0, 1))
def test_the_rate_rises_stays_and_falls_and_never_leaves_its_bounds(
    steps: int, warmup: float, decay: float, final: float
) -> None:
    schedule = ScheduleConfig(warmup, decay, final)
    rates = [factor(schedule, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 or (rate == final == 0) for rate in rates)
    first, last = int(warmup * steps), steps - int(decay * steps) - 1
    assert rates[:first] == sorted(rates[:first]) and rates[last:] == sorted(rates[last:], reverse=True)
    assert all(rate == 1 for rate in rates[first + 1 : last])


def test_the_papers_schedule_ends_at_a_hundredth_of_its_peak() -> None:
    paper = ScheduleConfig(warmup=8e9 / 20e12, decay=3.6 / 20, final=0.01)
    steps = 3_317_000
    assert 4.5e-4 * factor(paper, steps - 1, steps) == pytest.approx(4.5e-6)
    assert factor(paper, int(0.81 * steps), steps) == 1 and factor(
        paper, int(0.91 * steps), steps
    ) == pytest.approx(0.505, abs=1e-3)


def test_parts_that_do_not_fit_a_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="together at most 1"):
        ScheduleConfig(warmup=0.6, decay=0.6)


def test_weight_decay_spares_all_that_is_not_a_matrix(config: HybridConfig) -> None:
    model = HybridLM(config, seed=0)
    spared = {name.rpartition("mixer.")[2] for name, decay in decayed(model).items() if not decay}
    assert {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight", "backbone.norm_f.weight"} <= spared
    assert not any(name.endswith("proj.weight") or name.startswith("lm_head") for name in spared)
    groups = adamw(model, OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
