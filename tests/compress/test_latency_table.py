"""Times of layers, measured once on a device and interpolated."""

import json

import pytest
import torch

import nanohybrid
from nanohybrid.compress import latency_table
from nanohybrid.compress.latency_table import LatencyTable, decode_timer, interpolate, layer_bytes, spread
from nanohybrid.compress.search import Grid, targets
from nanohybrid.errors import InputError
from nanohybrid.estimate.budget import Budget
from nanohybrid.ops.numba import available
from nanohybrid.version import VERSION

BUDGET = Budget(10**9, context=64, dtype="fp32")
CPU = torch.device("cpu")


def shapes_of(config):
    return [
        target.config(config, None)
        for target in targets(
            config,
            Grid(
                multiple=4, fractions={"hidden_size": (1.0, 0.75, 0.5), "intermediate_size": (1.0, 0.75, 0.5)}
            ),
        )
    ]


def by_formula(config):
    """A step's time as a device with a constant bandwidth would take it, and a constant beside it that no
    layer causes."""
    layers = sum(config.pattern.count(kind) * layer_bytes(config, kind) for kind in set(config.pattern))
    return 7.0 + layers * 1e-6 + config.vocab_size * config.hidden_size * 1e-5


def timer(log):
    def time(shapes):
        log.append(shapes)
        return {name: by_formula(config) for name, config in shapes.items()}

    return time


MODEL = nanohybrid.preset("tiny")


def test_latency_table_step_is_the_sum_of_its_layers(model, tmp_path):
    table, log = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path), []
    table.measure(shapes_of(model.config), timer(log))
    assert len(log) < len(shapes_of(model.config)) * 4  # not every shape was timed
    for config in shapes_of(model.config):
        head = (config.vocab_size - latency_table.SMALL_VOCABULARY) * config.hidden_size * 1e-5
        layers = (
            sum(config.pattern.count(kind) * layer_bytes(config, kind) for kind in set(config.pattern)) * 1e-6
        )
        assert table.seconds(config) == pytest.approx(max(head, 0) + layers, rel=1e-6)
        assert table.tokens_per_second(config) == pytest.approx(1 / table.seconds(config))


def test_latency_table_is_measured_once_and_resumes_after_a_kill(model, tmp_path):
    whole, log = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path / "whole"), []
    whole.measure(shapes_of(model.config), timer(log))

    def dying(shapes):
        if len(seen) == 3:
            raise InterruptedError
        return timer(seen)(shapes)

    seen = []
    with pytest.raises(InterruptedError):
        LatencyTable.open(BUDGET, CPU, MODEL, tmp_path / "parts").measure(shapes_of(model.config), dying)
    rest = []
    parts = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path / "parts")
    parts.measure(shapes_of(model.config), timer(rest))
    assert len(rest) == len(log) - 3 and json.loads(parts.file.read_text()) == json.loads(
        whole.file.read_text()
    )
    again = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path / "whole")
    again.measure(shapes_of(model.config), lambda _: pytest.fail("it measures again"))
    assert again.times == whole.times


def test_latency_table_is_separate_for_each_context_batch_and_dtype(tmp_path):
    budgets = [
        BUDGET,
        Budget(1, 128, dtype="fp32"),
        Budget(1, 64, dtype="bf16"),
        Budget(1, 64, 2, dtype="fp32"),
    ]
    assert len({LatencyTable.open(budget, CPU, MODEL, tmp_path).file for budget in budgets}) == 4


@pytest.mark.parametrize("what", ["kernels", "numba", "version", "code", "threads", "device", "model"])
def test_latency_table_is_measured_again_under_other_conditions(model, tmp_path, monkeypatch, what):
    first, log, config = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path), [], MODEL
    first.measure([model.config], timer([]))
    if what == "kernels":
        monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    elif what == "model":
        config = MODEL.replace(ssm_state_size=2 * MODEL.ssm_state_size)
    elif what == "numba":
        monkeypatch.setattr(latency_table, "available", lambda: not available())
    elif what == "version":
        monkeypatch.setattr(latency_table, "VERSION", "9.9")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    else:
        monkeypatch.setattr(
            latency_table, {"code": "code_hash", "device": "device_name"}[what], lambda *_: "another"
        )
    second = LatencyTable.open(BUDGET, CPU, config, tmp_path)
    second.measure([model.config], timer(log))
    assert second.file != first.file and len(log) == 4
    monkeypatch.undo()
    assert LatencyTable.open(BUDGET, CPU, MODEL, tmp_path).times == first.times
    told = json.loads(first.file.read_text())["conditions"]
    assert told["version"] == VERSION and told["work"] == "fp32, context 64, batch 1"


def test_latency_table_is_shared_by_pruned_shapes_and_names_a_broken_file(tmp_path):
    table = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path)
    assert (
        LatencyTable.open(BUDGET, CPU, MODEL.replace(hidden_size=64, pattern="M-"), tmp_path).file
        == table.file
    )
    table.file.write_text("[1]")
    with pytest.raises(InputError, match="remove it"):
        LatencyTable.open(BUDGET, CPU, MODEL, tmp_path)


def test_interpolate_is_linear_between_times_and_proportional_beyond():
    times = {10: 1.0, 20: 3.0}
    assert [interpolate(times, size) for size in (5, 10, 15, 20, 40)] == [0.5, 1.0, 2.0, 3.0, 6.0]
    assert spread([1, 2, 3, 4, 5, 6, 7], 4) == [1, 3, 5, 7] and spread([9], 4) == [9]


def test_decode_timer_measures_layers_on_this_machine(tmp_path):
    config = nanohybrid.preset("tiny")
    table = LatencyTable.open(BUDGET, CPU, MODEL, tmp_path)
    table.measure([config], decode_timer(BUDGET, CPU, rounds=2))
    assert set(table.times) == {"head", "M", "*", "-"}
    assert 0 < table.seconds(config) < 1
