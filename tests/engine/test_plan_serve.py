import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanohybrid
from nanohybrid.cli import plan_serve as command
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.random_weights import random_model
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.serving import plan_serve
from nanohybrid.estimate.units import GIB


@given(
    st.sampled_from(["nano-9b-v2", "qwen3-8b", "nano-291m", "tiny"]),
    st.floats(1, 90),
    st.integers(1, 200_000),
    st.integers(1, 300),
)
def test_plan_serve_fits_and_one_more_sequence_would_not(preset, gib, context, most):
    config = nanohybrid.preset(preset)
    footprint, budget = Footprint.of(config), int(gib * GIB)
    try:
        plan = plan_serve(config, footprint, budget, context, most)
    except InputError:
        assert footprint.total(context) + plan_minimum(config) > budget
        return
    assert (
        plan.total_bytes <= budget
        and 1 <= plan.slots <= most
        and plan.pages == plan.slots * -(-context // 128)
    )
    if plan.slots < most:
        with_one_more = (
            plan.total_bytes + footprint.sequence_bytes(-(-context // 128) * 128) + 16 * config.vocab_size
        )
        assert with_one_more > budget


def plan_minimum(config):
    """What a plan adds to weights and one sequence: a step, a row of logits, and a page that is not full."""
    roomy = plan_serve(config, Footprint.of(config), 2**60, 1, 1)
    return roomy.transient_bytes + roomy.process_bytes + 128 * Footprint.of(config).kv_bytes_per_token


def test_plan_serve_9b_fits_128k_tokens_in_22_gib_and_a_dense_model_does_not():
    config, dense = nanohybrid.preset("nano-9b-v2"), nanohybrid.preset("qwen3-8b")
    plan = plan_serve(config, Footprint.of(config), 22 * GIB, 131_072)
    assert plan.slots == 1
    with pytest.raises(InputError, match="raise --memory-gib or shorten the context"):
        plan_serve(dense, Footprint.of(dense), 22 * GIB, 131_072)


def test_engine_allocates_what_the_plan_says(tokenizer):
    config = nanohybrid.preset("tiny")
    plan = plan_serve(config, Footprint.of(config, torch.float32), GIB * 5 // 8, 1000, 40)
    engine = Engine(
        random_model(config, torch.float32),
        tokenizer,
        max_num_seqs=plan.slots,
        max_model_len=plan.context,
        max_num_batched_tokens=plan.step_tokens,
        num_kv_pages=plan.pages,
    )
    assert engine.runner.state.bytes == plan.state_bytes + plan.kv_bytes
    assert engine.scheduler.slots.size == plan.slots and engine.scheduler.pages.size == plan.pages


def run(*flags):
    parser = command.parser()
    return command.run(parser.instantiate(parser.parse_args(list(flags))))


def test_plan_serve_prints_a_table_and_json(capsys):
    assert run("--preset", "nano-9b-v2", "--memory-gib", "22", "--max-model-len", "24576") == 0
    assert "requests of 24,576 tokens at once in 22.00 GiB" in capsys.readouterr().out
    assert (
        run(
            "--preset",
            "nano-9b-v2",
            "--memory-gib",
            "22",
            "--max-model-len",
            "24576",
            "--json",
            "--max-num-seqs",
            "2",
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["slots"] == 2
        and plan["pages"] == 384
        and plan["total_bytes"] + plan["free_bytes"] == plan["budget_bytes"]
    )


def test_plan_serve_counts_cache_dtypes_and_speculative_tokens(capsys):
    def slots(*flags):
        assert (
            run("--preset", "nano-9b-v2", "--memory-gib", "22", "--max-model-len", "24576", "--json", *flags)
            == 0
        )
        return json.loads(capsys.readouterr().out)

    plain, narrow, drafting = (
        slots(),
        slots("--mamba-ssm-cache-dtype", "fp16", "--kv-cache-dtype", "fp8"),
        slots("--num-speculative-tokens", "15"),
    )
    assert narrow["slots"] >= 1.7 * plain["slots"]
    assert drafting["transient_bytes"] / drafting["slots"] > plain["transient_bytes"] / plain["slots"]
    with pytest.raises(InputError, match="--num-speculative-tokens"):
        run("--preset", "tiny", "--memory-gib", "1", "--num-speculative-tokens", "16")


@pytest.mark.parametrize(
    "flags",
    [
        ["--memory-gib", "1"],
        ["--preset", "tiny", "--memory-gib", "-1"],
        ["--preset", "tiny", "--memory-gib", "1", "--max-model-len", "0"],
    ],
)
def test_plan_serve_refuses_wrong_flags(flags):
    with pytest.raises(InputError):
        run(*flags)
