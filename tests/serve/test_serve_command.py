"""Flags of `nanohybrid serve` that set up the engine, and the metrics."""

import concurrent.futures

import pytest
from serving import started

import nanohybrid
from nanohybrid.cli import serve as command
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.serving import plan_overcommitted, plan_slots

TINY = ["--preset", "tiny", "--random-weights"]


def planned(*flags):
    parser = command.parser()
    return command._plan(parser.instantiate(parser.parse_args([*TINY, *flags])))


def test_serve_memory_gib_becomes_slots_and_pages_and_is_printed():
    plan, lines = planned("--memory-gib", "2", "--max-model-len", "1000")
    assert plan.total_bytes <= 2 * 2**30 and plan.pages == 8 * plan.slots and plan.slots == command.MAX_SLOTS
    assert f"{plan.slots} requests of 1,000 tokens" in lines[0] and any("slots of" in line for line in lines)
    small, _ = planned("--memory-gib", "1.72", "--max-model-len", "32768")
    assert small.slots < command.MAX_SLOTS and small.total_bytes <= 1.72 * 2**30
    assert planned()[0].slots == command.DEFAULT_SLOTS and planned("--max-num-seqs", "3")[0].slots == 3


def test_serve_memory_gib_too_small_is_one_line(capsys):
    from nanohybrid.cli.main import main

    for flags in (
        ["--memory-gib", "1"],
        ["--memory-gib", "1", "--overcommit"],
        ["--overcommit"],
        ["--memory-gib", "-1"],
    ):
        assert main(["serve", *TINY, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--memory-gib" in error


def test_plan_overcommitted_pages_are_what_the_memory_has_left():
    config = nanohybrid.preset("nano-291m")
    footprint = Footprint.of(config)
    full = plan_slots(config, footprint, 16, 4096)
    plan = plan_overcommitted(config, footprint, full.total_bytes - full.kv_bytes // 2, 4096, 16)
    assert (plan.slots, plan.pages) == (16, full.pages // 2) and plan.free_bytes >= 0
    assert plan_overcommitted(config, footprint, full.total_bytes * 2, 4096, 16).pages == full.pages


def test_serve_overcommit_preempts_and_changes_no_text():
    ask = {
        "max_tokens": 600,
        "temperature": 0,
        "ignore_eos": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with started(num_kv_pages=9, overcommit=True, deterministic=True) as serve:
        alone = serve.chat("two", **ask).json()["choices"][0]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda text: serve.chat(text, **ask).json(), ["one", "two", "three"]))
        assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["length"] * 3
        assert answers[1]["choices"][0] == alone
        assert serve.metric("preemptions_total") > 0
        serve.until(serve.idle)


@pytest.mark.parametrize(
    "name", ["preemptions_total", "slots_free", "pages_free", "requests_waiting", "queue_seconds_count"]
)
def test_metrics_exist_before_the_first_request(serve, name):
    assert f"nanohybrid_{name}" in serve.http.get("/metrics").text
