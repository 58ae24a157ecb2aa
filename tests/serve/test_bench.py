import json
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
from serving import started

from nanohybrid.bench.serve_load import Lengths, Point, Seen
from nanohybrid.bench.serve_report import percentile, summary
from nanohybrid.cli.main import main
from nanohybrid.errors import InputError
from nanohybrid.serve.service import Settings


def bench(capsys, serve, *flags):
    code = main(["bench", "serve", serve.url, "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_bench_serve_measures_every_level_and_counts_as_the_server_does(serve, capsys, tmp_path):
    before = serve.metric("generated_tokens_total")
    flags = [
        "--rates",
        "200,50",
        "--concurrency",
        "2",
        "--requests",
        "6",
        "--prompt-tokens",
        "5:40",
        "--output-tokens",
        "4:9",
    ]
    code, report = bench(
        capsys, serve, *flags, "--out", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")
    )
    levels = report["levels"]
    assert code == 0 and [(level["rate"], level["clients"]) for level in levels] == [
        (200, None),
        (50, None),
        (None, 2),
    ]
    written = sum(level["output_tokens_per_second"] * level["seconds"] for level in levels)
    # 2 tokens are those of the request that warms up.
    assert written + 2 == pytest.approx(serve.metric("generated_tokens_total") - before)
    for level in levels:
        assert level["completed"] == level["requests"] == 6 and level["errors"] == {}
        assert (
            0 < level["ttft"]["p50"] <= level["ttft"]["p99"] <= level["latency"]["p99"]
            and level["tpot"]["p50"] > 0
        )
    assert json.loads((tmp_path / "b.json").read_text()) == report
    assert "<svg" in (tmp_path / "b.svg").read_text()
    serve.until(serve.idle)


def test_bench_serve_open_loop_does_not_wait_for_answers():
    with started(Settings(model_name="tiny", max_queue=4), max_num_seqs=2, max_model_len=256) as serve:
        serve.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        command = [
            sys.executable,
            "-m",
            "nanohybrid",
            "bench",
            "serve",
            serve.url,
            "--json",
            "--rates",
            "100",
            "--requests",
            "20",
        ]
        loop = serve.service.loop
        step, admit, calls = loop.engine.step, loop.admit, []

        def counted_admit(*arguments):
            calls.append(arguments)
            return admit(*arguments)

        def step_when_all_have_come():
            """The first request is the warm-up. From the second on no token comes until all 20 are there."""
            end = time.monotonic() + 30
            while 1 < len(calls) < 21 and time.monotonic() < end:
                time.sleep(0.01)
            return step()

        loop.admit, loop.engine.step = counted_admit, step_when_all_have_come
        process = subprocess.Popen(
            [*command, "--prompt-tokens", "4", "--output-tokens", "3"], stdout=subprocess.PIPE, text=True
        )
        report = json.loads(process.communicate(timeout=60)[0])
    level = report["levels"][0]
    # Two requests run and four wait; the clients do not wait for their answers.
    assert process.returncode == 0 and level["errors"] == {"429": 14}
    assert level["completed"] + sum(level["errors"].values()) == 20


def test_bench_serve_ctrl_c_reports_what_was_measured(serve, tmp_path):
    command = [
        sys.executable,
        "-m",
        "nanohybrid",
        "bench",
        "serve",
        serve.url,
        "--json",
        "--concurrency",
        "1",
        "--requests",
        "100000",
    ]
    out = tmp_path / "b.json"
    process = subprocess.Popen(
        [*command, "--prompt-tokens", "4", "--output-tokens", "3", "--out", str(out)], stdout=subprocess.PIPE
    )
    before = serve.metric("generated_tokens_total")
    serve.until(
        lambda: serve.metric("generated_tokens_total") > before + 30 or process.poll() is not None, 120
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    report = json.loads(out.read_text())
    assert (
        process.returncode == 130 and report["interrupted"] and 5 < report["levels"][0]["completed"] < 100000
    )
    serve.until(serve.idle)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rates", "1"], "no server with"),
        ([], "--rates R"),
        (["--rates", "0"], "--rates is '0'"),
        (["--concurrency", "1.5"], "whole numbers"),
        (["--rates", "1", "--prompt-tokens", "9:3"], "is not a length"),
        (["--rates", "1", "--plot", "x.bmp"], ".svg or .png"),
    ],
)
def test_bench_serve_refuses_wrong_flags_in_one_line(capsys, flags, words):
    assert main(["bench", "serve", "http://127.0.0.1:9", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_bench_serve_percentiles_equal_those_of_the_statistics_module():
    values = sorted(random.Random(1).expovariate(1) for _ in range(101))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert [percentile(values, p) for p in (50, 90, 99)] == pytest.approx([cuts[49], cuts[89], cuts[98]])


def test_bench_serve_counts_failed_requests_as_errors_only():
    seen = [Seen(0.0, 1.0, 3.0, 10, 5), Seen(0.0, 0.5, 0.6, 10, 2, error="deadline"), Seen(0.0, error="429")]
    level = summary(Point(1.0, None, 0.0, 4.0, seen))
    assert (level["requests"], level["completed"], level["errors"]) == (3, 1, {"deadline": 1, "429": 1})
    assert (
        level["output_tokens_per_second"] == 5 / 4
        and level["ttft"]["p50"] == 1.0
        and level["tpot"]["p99"] == 0.5
    )


def test_bench_serve_lengths_follow_their_distribution():
    rng = random.Random(0)
    drawn = [Lengths.parse("~256").draw(rng) for _ in range(2000)]
    assert 240 < statistics.median(drawn) < 272 and max(drawn) <= 2048 and len(set(drawn)) > 300
    assert {Lengths.parse("3:5").draw(rng) for _ in range(100)} == {3, 4, 5} and Lengths.parse("7").draw(
        rng
    ) == 7
    for bad in ("", "0", "a", "~", "5:2", "-3"):
        with pytest.raises(InputError):
            Lengths.parse(bad)
