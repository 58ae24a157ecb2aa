"""The headline's plan against plain arithmetic, its small twin against the true shapes, and a run of it."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nanohybrid
from nanohybrid.bench import Mix, contenders, machine, measure, mixes, plan, roofline
from nanohybrid.bench import comparison as contest
from nanohybrid.bench.comparison import cap
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
        plan(one, mix, cap(22.0, scale), A10G, scale)
        for mix in mixes(list(names), scale)
        for one in contenders(["bf16", "int8"], scale)
    ]


def test_the_papers_case_is_the_papers_batch_and_more_than_six_times_the_transformer():
    dense, hybrid, quantized = planned()
    assert (dense.sequences, hybrid.sequences) == (1, 8)
    assert hybrid.output / dense.output > 6
    assert quantized.sequences > hybrid.sequences and quantized.output > 2 * hybrid.output


def test_a_hundred_thousand_tokens_fit_the_hybrid_alone():
    dense, hybrid, _ = planned(names=["128k/1k"])
    assert dense.sequences == 0 and dense.output == 0 and hybrid.sequences >= 1


def test_the_rooflines_are_bytes_over_bandwidth():
    """Qwen3-8B: 8,190,735,360 parameters less 151,936 x 4,096 of the table, 147,456 bytes a token. The 9B: 8,888,227,328 less
    131,072 x 4,480, 16,384 a token; 27 states of 128 x 80 x 128 in fp32 and of 3 x 12,288 in bf16, read and written."""
    dense, hybrid, _ = planned()
    length = 8192 + 8192
    seconds = (2 * (8_190_735_360 - 151_936 * 4096) + 147_456 * (length + 1)) / 600e9
    assert dense.decode == pytest.approx(1 / seconds, rel=1e-6)
    state = 27 * (128 * 80 * 128 * 4 + 3 * 12_288 * 2)
    seconds = (2 * (8_888_227_328 - 131_072 * 4480) + 8 * (2 * state + 16_384 * (length + 1))) / 600e9
    assert hybrid.decode == pytest.approx(8 / seconds, rel=1e-6)
    assert hybrid.output < hybrid.decode  # the prompts have to be read


@pytest.mark.parametrize("preset", ["tiny", "tiny-dense"])
def test_flops_of_a_prompt_are_what_torch_counts(preset):
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


def test_the_small_contest_is_decided_as_the_large_one():
    for large, small in zip(planned(names=["1k/1k", "8k/16k"]), planned(8, ["1k/1k", "8k/16k"]), strict=True):
        assert small.mix.context * 8 == large.mix.context
        assert small.sequences == pytest.approx(large.sequences, rel=0.25), large.label


def test_impossible_requests_name_the_possible_ones():
    with pytest.raises(InputError, match="1k/1k, 8k/1k, 8k/16k, 128k/1k"):
        mixes(["2k/2k"])
    with pytest.raises(InputError, match="1, 2, 4, 8"):
        contenders(["bf16"], 3)
    with pytest.raises(InputError, match=r"the process alone takes 0\.5"):
        cap(0.25)


@pytest.fixture
def small(monkeypatch):
    """The contest of two tiny models, three sequences each, in which the Transformer does not fit the second mix."""
    monkeypatch.setattr(contest, "HYBRID", "tiny")
    monkeypatch.setattr(contest, "DENSE", "tiny-dense")
    monkeypatch.setattr(contest, "PAPER", (Mix("1k/1k", 12, 5), Mix("128k/1k", 40, 3)))
    monkeypatch.setattr(
        roofline, "fitting", lambda one, mix, *_: 0 if one.name == "tiny-dense" and mix.inputs == 40 else 3
    )
    monkeypatch.setattr(machine, "STREAM_BYTES", 2**20)
    monkeypatch.setattr(machine, "EDGE", 64)


FLAGS = ["bench", "headline", "--json", "--scale", "1", "--quantized", "none"]


def test_a_run_measures_every_contender_that_fits(small, tmp_path, capsys):
    out = tmp_path / "runs" / "headline"
    assert main([*FLAGS, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "result.json").read_text()) == result
    rows = {(row["mix"], row["model"]): row for row in result["rows"]}
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


def test_what_a_row_says_is_its_timings_arithmetic(small, tmp_path):
    settings = Settings(1, 22.0, ["1k/1k"], ["bf16"], "cpu", 1)
    result = Result(settings)
    for contender, mix in settings.pairs():
        result.keep(
            (mix.name, contender.name, contender.dtype),
            Timed(prompt=0.5, step=0.25, bandwidth=1e9, flops=1e9),
        )
    entry = result.report()["rows"][1]
    assert entry["output_tokens_per_second"] == pytest.approx(3 * 5 / (3 * 0.5 + 5 * 0.25))
    assert entry["fraction"] == pytest.approx(entry["output_tokens_per_second"] / entry["roofline"])
    assert entry["ratio"] == 1


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("kill", [KeyboardInterrupt, Killed])
def test_a_stopped_run_goes_on_with_the_rows_it_has(small, tmp_path, capsys, monkeypatch, kill):
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
    assert main([*flags, "--resume", "--mixes", "1k/1k"]) == 2
    assert "was measured with mixes" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    assert len(calls) == 4
    after = json.loads((tmp_path / "out" / "result.json").read_text())["measured"]
    assert after[:2] == before and len(after) == 3


def test_a_directory_of_something_else_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"settings": 3}')
    assert main([*FLAGS, "--out", str(tmp_path), "--resume"]) == 2
    assert "is no result of bench headline" in capsys.readouterr().err
    assert main([*FLAGS, "--resume"]) == 2 and "--out" in capsys.readouterr().err


def test_the_timed_steps_are_at_the_mixs_mean_length_and_of_all_sequences(small, monkeypatch):
    """In a mix of 12 and 40 tokens with steps enough for 24: the first at 12 + 8, the last at 43, with three rows each."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    row = plan(contenders(["bf16"])[1], Mix("long", 12, 40), cap(22.0), A10G)
    extent = measure.Extent.of(row)
    assert (extent.prompts, extent.steps, extent.start) == (1, 24, 20)
    seen, step = [], Engine.step

    def watched(self):
        ready = step(self)
        seen.append([request.known for request in ready])
        return ready

    monkeypatch.setattr(Engine, "step", watched)
    timed = measure.Runner(row.contender).time(row, 1)
    assert seen[-24:] == [[known] * 3 for known in range(21, 45)]
    assert timed.prompt > 0 and timed.step > 0


def test_the_engine_holds_no_more_than_the_cap(monkeypatch):
    for one in contenders(["bf16", "int8"], 8):
        mix = mixes(["8k/16k"], 8)[0]
        row = plan(one, mix, cap(22.0, 8), A10G, 8)
        state = HybridCache.allocate(
            one.config,
            row.sequences,
            row.sequences * -(-mix.context // 128),
            dtype=torch.bfloat16,
            device="meta",
        )
        assert weight_bytes(one.config, one.dtype) + state.bytes < cap(22.0, 8) - PROCESS


def test_a_format_without_a_form_for_the_widths_is_said():
    with pytest.raises(InputError, match=r"int4 has no form for the .* matrices of nano-9b-v2 at scale 8"):
        contenders(["bf16", "int4"], 8)
    contenders(["bf16", "int4"], 1)


def test_the_table_says_what_does_not_fit(capsys):
    assert main(["bench", "headline", "--roofline", "a10g", "--mixes", "128k/1k", "--quantized", "none"]) == 0
    table = capsys.readouterr().out
    assert "does not fit" in table and "600.0 GB/s" in table


def test_generation_is_measured_as_often_as_asked_and_a_long_prompt_is_warmed_up_for_by_a_short_one(
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
