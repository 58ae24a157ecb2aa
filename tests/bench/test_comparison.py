"""`bench compare`: plans against arithmetic, scaled plans against full size, runs of tiny models."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nanohybrid
from nanohybrid.bench import Workload, candidates, comparison, machine, measure, plan, roofline, workloads
from nanohybrid.bench.comparison import memory_limit
from nanohybrid.bench.measure import Timed
from nanohybrid.bench.result import Result, Settings
from nanohybrid.bench.roofline import prefill_flops
from nanohybrid.cli.main import main
from nanohybrid.engine import Engine
from nanohybrid.errors import InputError
from nanohybrid.estimate.budget import weight_bytes
from nanohybrid.estimate.devices import device
from nanohybrid.estimate.serving import PROCESS
from nanohybrid.model import HybridCache, HybridLM

A10G = device("a10g")


def planned(scale=1, names=("8k/16k",)):
    return [
        plan(one, workload, memory_limit(22.0, scale), A10G, scale)
        for workload in workloads(list(names), scale)
        for one in candidates(["bf16", "int8"], scale)
    ]


def test_plan_of_8k_16k_gives_the_papers_batch_of_8_and_more_than_6x_the_transformer():
    dense, hybrid, quantized = planned()
    assert (dense.sequences, hybrid.sequences) == (1, 8)
    assert hybrid.output / dense.output > 6
    assert quantized.sequences > hybrid.sequences and quantized.output > 2 * hybrid.output


def test_plan_of_128k_fits_only_the_hybrid():
    dense, hybrid, _ = planned(names=["128k/1k"])
    assert dense.sequences == 0 and dense.output == 0 and hybrid.sequences >= 1


def test_decode_roofline_is_step_bytes_over_bandwidth():
    """Qwen3-8B: 8,190,735,360 parameters less 151,936 x 4,096 of the table, 147,456 bytes a token.

    The 9B: 8,888,227,328 less 131,072 x 4,480, 16,384 a token; 27 states of 128 x 80 x 128 in fp32 and of 3 x
    12,288 in bf16, read and written.
    """
    dense, hybrid, _ = planned()
    length = 8192 + 8192
    seconds = (2 * (8_190_735_360 - 151_936 * 4096) + 147_456 * (length + 1)) / 600e9
    assert dense.decode == pytest.approx(1 / seconds, rel=1e-6)
    state = 27 * (128 * 80 * 128 * 4 + 3 * 12_288 * 2)
    seconds = (2 * (8_888_227_328 - 131_072 * 4480) + 8 * (2 * state + 16_384 * (length + 1))) / 600e9
    assert hybrid.decode == pytest.approx(8 / seconds, rel=1e-6)
    assert hybrid.output < hybrid.decode  # the prompts have to be read


@pytest.mark.parametrize("preset", ["tiny", "tiny-dense"])
def test_prefill_flops_equals_torch_flop_counter(preset):
    config = nanohybrid.preset(preset)
    with torch.device("meta"):
        model = HybridLM(config)
    linears = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not getattr(model, "lm_head", None)
    ]
    with FlopCounterMode(display=False) as counter:
        for linear in linears:
            linear(torch.empty(300, linear.in_features, device="meta"))
    causal = 2 * config.pattern.count("*") * config.num_attention_heads * config.head_dim * 300**2
    states = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    recurrence = 5 * config.pattern.count("M") * states * 300
    expected = counter.get_total_flops() + causal + recurrence
    assert prefill_flops(config, 300) == pytest.approx(expected, rel=0.01)  # norms and convs are not counted


def test_scaled_plan_fits_as_many_sequences_as_full_size():
    for large, small in zip(planned(names=["1k/1k", "8k/16k"]), planned(8, ["1k/1k", "8k/16k"]), strict=True):
        assert small.workload.context * 8 == large.workload.context
        assert small.sequences == pytest.approx(large.sequences, rel=0.25), large.label


def test_unknown_workload_scale_or_memory_limit_error_names_valid_values():
    with pytest.raises(InputError, match="1k/1k, 8k/1k, 8k/16k, 128k/1k"):
        workloads(["2k/2k"])
    with pytest.raises(InputError, match="1, 2, 4, 8"):
        candidates(["bf16"], 3)
    with pytest.raises(InputError, match=r"the process alone takes 0\.5"):
        memory_limit(0.25)


@pytest.fixture
def small(monkeypatch):
    """A comparison of two tiny models, three sequences each.

    The Transformer does not fit the second workload.
    """
    monkeypatch.setattr(comparison, "HYBRID", "tiny")
    monkeypatch.setattr(comparison, "DENSE", "tiny-dense")
    monkeypatch.setattr(comparison, "PAPER", (Workload("1k/1k", 12, 5), Workload("128k/1k", 40, 3)))
    monkeypatch.setattr(
        roofline,
        "fitting",
        lambda one, workload, *_: 0 if one.name == "tiny-dense" and workload.input_tokens == 40 else 3,
    )
    monkeypatch.setattr(machine, "STREAM_BYTES", 2**20)
    monkeypatch.setattr(machine, "EDGE", 64)


FLAGS = ["bench", "compare", "--json", "--scale", "1", "--quantized", "none"]


def test_bench_compare_measures_every_row_that_fits(small, tmp_path, capsys):
    out = tmp_path / "runs" / "compare"
    assert main([*FLAGS, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "result.json").read_text()) == result
    rows = {(row["workload"], row["model"]): row for row in result["rows"]}
    assert len(rows) == 4 and rows["128k/1k", "tiny-dense"]["output_tokens_per_second"] is None
    for key in rows.keys() - {("128k/1k", "tiny-dense")}:
        assert rows[key]["output_tokens_per_second"] > 0 and rows[key]["fraction"] > 0
    first, second = rows["1k/1k", "tiny-dense"], rows["1k/1k", "tiny"]
    assert second["ratio"] == pytest.approx(
        second["output_tokens_per_second"] / first["output_tokens_per_second"]
    )
    assert rows["128k/1k", "tiny"]["ratio"] is None
    assert (out / "result.svg").stat().st_size > 1000
    table = (out / "result.md").read_text().splitlines()
    assert table[4].startswith("| 128k/1k | tiny-dense bf16 | does not fit |") and len(table) == 8


def test_report_derives_throughput_fraction_and_ratio_from_timings(small, tmp_path):
    settings = Settings(1, 22.0, ["1k/1k"], ["bf16"], "cpu", 1)
    result = Result(settings)
    for candidate, workload in settings.pairs():
        result.add(
            (workload.name, candidate.name, candidate.dtype),
            Timed(prompt=0.5, step=0.25, bandwidth=1e9, flops=1e9),
        )
    entry = result.report()["rows"][1]
    assert entry["output_tokens_per_second"] == pytest.approx(3 * 5 / (3 * 0.5 + 5 * 0.25))
    assert entry["fraction"] == pytest.approx(entry["output_tokens_per_second"] / entry["roofline"])
    assert entry["ratio"] == 1


class Killed(BaseException):
    """An exception that no handler catches, as after SIGKILL."""


@pytest.mark.parametrize("kill", [KeyboardInterrupt, Killed])
def test_stopped_bench_compare_resumes_with_saved_rows(small, tmp_path, capsys, monkeypatch, kill):
    time, calls = measure.Runner.time, []

    def some(self, planned, *rest):
        calls.append(planned.label)
        if len(calls) == 3:
            raise kill
        return time(self, planned, *rest)

    monkeypatch.setattr(measure.Runner, "time", some)
    flags = [*FLAGS, "--out", str(tmp_path / "out")]
    if kill is KeyboardInterrupt:
        assert main(flags) == 130
        assert (
            "stopped after 2 rows" in (told := capsys.readouterr()).err
            and json.loads(told.out)["rows"][1]["ratio"] > 0
        )
    else:
        with pytest.raises(Killed):
            main(flags)
    before = json.loads((tmp_path / "out" / "result.json").read_text())["measured"]
    assert len(before) == 2
    assert main(flags) == 2 and "--resume" in capsys.readouterr().err
    assert main([*flags, "--resume", "--workloads", "1k/1k"]) == 2
    assert "was measured with workloads" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    assert len(calls) == 4
    after = json.loads((tmp_path / "out" / "result.json").read_text())["measured"]
    assert after[:2] == before and len(after) == 3


def test_resume_refuses_a_directory_without_a_comparison(small, tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"settings": 3}')
    assert main([*FLAGS, "--out", str(tmp_path), "--resume"]) == 2
    assert "is not a result of bench compare" in capsys.readouterr().err
    assert main([*FLAGS, "--resume"]) == 2 and "--out" in capsys.readouterr().err


def test_timed_decode_steps_run_all_sequences_around_the_mean_context(small, monkeypatch):
    """Of 12 input and 40 output tokens, 24 steps: from context 12 + 8 to 43, three rows each."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    row = plan(candidates(["bf16"])[1], Workload("long", 12, 40), memory_limit(22.0), A10G)
    part = measure.TimedPart.of(row)
    assert (part.prompts, part.steps, part.start) == (1, 24, 20)
    seen, step = [], Engine.step

    def watched(self):
        ready = step(self)
        seen.append([request.num_tokens for request in ready])
        return ready

    monkeypatch.setattr(Engine, "step", watched)
    timed = measure.Runner(row.candidate).time(row, 1)
    assert seen[-24:] == [[known] * 3 for known in range(21, 45)]
    assert timed.prompt > 0 and timed.step > 0


def test_weights_and_cache_stay_below_the_memory_limit(monkeypatch):
    for one in candidates(["bf16", "int8"], 8):
        workload = workloads(["8k/16k"], 8)[0]
        row = plan(one, workload, memory_limit(22.0, 8), A10G, 8)
        state = HybridCache.allocate(
            one.config,
            row.sequences,
            row.sequences * -(-workload.context // 128),
            dtype=torch.bfloat16,
            device="meta",
        )
        assert weight_bytes(one.config, one.dtype) + state.bytes < memory_limit(22.0, 8) - PROCESS


def test_candidates_refuses_a_format_that_does_not_support_a_width():
    with pytest.raises(InputError, match=r"int4 does not support the .* matrices of nano-9b-v2 at scale 8"):
        candidates(["bf16", "int4"], 8)
    candidates(["bf16", "int4"], 1)


def test_table_shows_rows_that_do_not_fit_and_device_rates(capsys):
    assert (
        main(["bench", "compare", "--roofline", "a10g", "--workloads", "128k/1k", "--quantized", "none"]) == 0
    )
    table = capsys.readouterr().out
    assert "does not fit" in table and "600.0 GB/s" in table


def test_bench_generate_repeats_as_often_as_asked_and_warms_up_long_prompts_with_a_short_one(
    small, capsys, monkeypatch
):
    from nanohybrid.bench import generate

    monkeypatch.setattr(generate, "WARM_TOKENS", 150)
    read, once = [], generate._once
    monkeypatch.setattr(
        generate,
        "_once",
        lambda engine, prompts, count: read.append(len(prompts[0])) or once(engine, prompts, count),
    )
    flags = ["--preset", "tiny", "--random-weights", "--new-tokens", "2", "--json"]
    for prompt, repeats, lengths in ((151, 1, [128, 151]), (150, 2, [150] * 3)):
        read.clear()
        assert (
            main(["bench", "generate", *flags, "--prompt-tokens", str(prompt), "--repeats", str(repeats)])
            == 0
        )
        assert read == lengths and json.loads(capsys.readouterr().out)["repeats"] == repeats
    assert main(["bench", "generate", *flags, "--repeats", "0"]) == 2
    assert "--repeats is 0; it must be at least 1" in capsys.readouterr().err
