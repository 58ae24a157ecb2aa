import fcntl
import json
import os
import shutil

import pytest

from nanohybrid.cli.main import main

TINY = ["--preset", "tiny", "--random-weights"]


@pytest.fixture
def run(capsys):
    """Run the command in this process; returns exit code, stdout and stderr."""

    def inner(*arguments):
        code = main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return inner


def test_generate_json_has_its_fields_and_depends_on_the_seed(run):
    ask = ["generate", *TINY, "--prompt", "hi", "--max-new-tokens", 6, "--temperature", 1, "--json", "--seed"]
    one, two, other = (json.loads(run(*ask, seed)[1]) for seed in (3, 3, 4))
    assert {"text", "tokens", "tokens_per_second", "peak_memory_bytes"} <= one.keys()
    assert one["tokens"] == 6 and one["peak_memory_bytes"] > 1e7
    assert one["token_ids"] == two["token_ids"] != other["token_ids"]


def test_generate_speculation_and_cache_dtype_flags(run):
    ask = ["generate", *TINY, "--prompt", "abcabcabcabc", "--max-new-tokens", 20, "--json", "--seed", 1]
    plain, drafted, narrow = (
        json.loads(run(*ask, *more)[1])
        for more in (
            (),
            ("--num-speculative-tokens", 5),
            ("--mamba-ssm-cache-dtype", "fp16", "--kv-cache-dtype", "fp8"),
        )
    )
    assert plain["token_ids"] == drafted["token_ids"] and plain["token_ids"][:2] == narrow["token_ids"][:2]
    assert (
        run(*ask, "--num-speculative-tokens", 99)[0] == run(*ask, "--mamba-ssm-cache-dtype", "bf16")[0] == 2
    )


def test_generate_structured_output_flags_constrain_prompts_and_files(run, tmp_path):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    file, prompts, answers = tmp_path / "schema.json", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps(schema))
    prompts.write_text('{"prompt": "hi"}\n{"prompt": "ho"}\n')
    flags = ["generate", *TINY, "--temperature", 1, "--seed", 1]
    for flag in (("--json-schema", json.dumps(schema)), ("--json-schema-file", file)):
        code, out, _ = run(*flags, "--prompt", "hi", *flag)
        assert code == 0 and json.loads(out)["a"] in (1, 2)
    assert run(*flags, "--prompt", "hi", "--choice", "ja", "--choice", "nein")[1] in ("ja\n", "nein\n")
    assert run(*flags, "--input", prompts, "--output", answers, "--json-schema-file", file)[0] == 0
    texts = [json.loads(json.loads(line)["text"]) for line in answers.read_text().splitlines()]
    assert len(texts) == 2 and all(text["a"] in (1, 2) for text in texts)


def test_generate_prints_only_the_text_on_stdout(run):
    code, out, err = run("generate", *TINY, "--prompt", "hi", "--max-new-tokens", 5, "--seed", 1)
    described = json.loads(
        run("generate", *TINY, "--prompt", "hi", "--max-new-tokens", 5, "--seed", 1, "--json")[1]
    )
    assert code == 0 and out == described["text"] + "\n" and "tokens/s" in err


def test_generate_thinking_budget_implies_a_chat_that_thinks(run):
    flags = ["--max-new-tokens", 40, "--thinking-budget", 4, "--thinking-grace", 2, "--ignore-eos", "--json"]
    chat = json.loads(run("generate", *TINY, "--prompt", "hi", *flags)[1])
    assert (
        chat["thinking_end"] in ("newline", "forced")
        and chat["thinking_tokens"] <= 6
        and "</think>" not in chat["content"]
    )
    raw = json.loads(run("generate", *TINY, "--prompt", "<think>", "--raw", *flags)[1])
    assert raw["prompt_tokens"] < chat["prompt_tokens"] and raw["thinking_end"] != "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "hi"], "name a checkpoint directory"),
        (["--preset", "tiny", "--prompt", "hi"], "add --random-weights"),
        ([*TINY], "--prompt TEXT"),
        ([*TINY, "--prompt", ""  , "--chat", "--raw", "--think"], "contradicts"),
        ([*TINY, "--prompt", "hi", "--temperature", "-1"], "temperature is -1.0"),
        ([*TINY, "--prompt", "hi", "--top-p", "2"], "top_p is 2.0"),
        ([*TINY, "--prompt", "hi", "--max-new-tokens", "0"], "max_tokens is 0"),
        ([*TINY, "--prompt", "hi", "--max-new-tokens", "1000000000000"], "more than the context"),
        ([*TINY, "--prompt", "hi", "--device", "abacus"], "--device abacus"),
        ([*TINY, "--prompt", "hi", "--device", "meta"], "--device meta cannot be used"),
        ([*TINY, "--prompt", "hi", "--seed", "99999999999999999999999"], "--seed is"),
        (["--preset", "tinny", "--random-weights", "--prompt", "hi"], "nearest tiny"),
        ([*TINY, "--input", "x.jsonl"], "go together"),
        ([*TINY, "--prompt", "hi", "--regex", "a", "--json-object"], "--json-object contradicts --regex"),
        ([*TINY, "--prompt", "hi", "--json-schema", "[1]"], "the JSON schema is not a JSON object"),
        ([*TINY, "--prompt", "hi", "--json-schema-file", "nowhere.json"], "nowhere.json: No such file"),
        ([*TINY, "--prompt", "hi", "--regex", "a", "--ignore-eos"], "ignore_eos contradicts"),
        ([*TINY, "--input", "nowhere.jsonl", "--output", "y.jsonl"], "nowhere.jsonl: No such file"),
    ],
)  # fmt: skip
def test_generate_refuses_wrong_flags_in_one_line(run, arguments, message):
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a", "id": 7},
        {"messages": [{"role": "user", "content": "hi"}], "seed": 4},
        {"prompt": "b" * 40},
        {"prompt": "é"},
    ]
    path.write_text("\n".join(map(json.dumps, lines[:2])) + "\n\n" + "\n".join(map(json.dumps, lines[2:])))
    return path


def test_generate_answers_a_file_of_prompts_in_order(run, prompts, tmp_path):
    output = tmp_path / "new" / "out.jsonl"
    code, out, _ = run(
        "generate",
        *TINY,
        "--input",
        prompts,
        "--output",
        output,
        "--max-new-tokens",
        7,
        "--temperature",
        1,
        "--seed",
        2,
        "--json",
    )
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert code == 0 and json.loads(out)["prompts"] == 4
    assert [a.get("prompt", "chat") for a in answers] == ["a", "chat", "b" * 40, "é"] and answers[0][
        "id"
    ] == 7
    alone = json.loads(
        run(
            "generate",
            *TINY,
            "--prompt",
            "b" * 40,
            "--max-new-tokens",
            7,
            "--temperature",
            1,
            "--seed",
            2,
            "--json",
        )[1]
    )
    assert answers[2]["token_ids"] == alone["token_ids"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_generate_resumes_an_interrupted_file(run, prompts, tmp_path, share):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ask = ["generate", *TINY, "--input", prompts, "--max-new-tokens", 5, "--output"]
    run(*ask, whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    shutil.copy(f"{whole}.settings.json", f"{cut}.settings.json")
    assert run(*ask, cut)[0] == 0 and cut.read_bytes() == content


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--temperature", 1], "another temperature (0.0, now 1.0)"),
        (["--max-new-tokens", 6], "another max_tokens (5, now 6)"),
        (["--seed", 9], "another seed (null, now 9)"),
        (["--chat"], "another chat (false, now true)"),
        (["--dtype", "bf16"], 'another dtype ("checkpoint", now "bf16")'),
    ],
)
def test_generate_refuses_to_continue_answers_of_other_settings(run, prompts, tmp_path, flags, names):
    """Else one file would hold answers of two models or temperatures, and nothing would say so."""
    output = tmp_path / "out.jsonl"
    ask = ["generate", *TINY, "--input", prompts, "--output", output, "--max-new-tokens", 5]
    assert run(*ask)[0] == 0
    content = output.read_bytes()
    code, _, err = run(*ask, *flags)
    assert code == 2 and names in err and output.read_bytes() == content
    assert run(*ask)[0] == 0
    (tmp_path / "out.jsonl.settings.json").unlink()
    code, _, err = run(*ask)
    assert code == 2 and "out.jsonl.settings.json, which says how its answers were made, is missing" in err


def test_generate_refuses_to_continue_answers_of_another_model(run, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    for seed in (0, 1):
        run("init", "--preset", "tiny", "--seed", seed, "--out", tmp_path / f"model-{seed}")
    ask = ["--input", prompts, "--output", output, "--max-new-tokens", 2]
    assert run("generate", tmp_path / "model-0", *ask)[0] == 0
    code, _, err = run("generate", tmp_path / "model-1", *ask)
    assert code == 2 and "made with another model; give another --output" in err


def test_generate_refuses_an_output_with_answers_to_other_prompts(run, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text('{"prompt": "another", "text": "kept"}\n')
    code, _, err = run("generate", *TINY, "--input", prompts, "--output", output)
    assert code == 2 and "out.jsonl:1: does not answer" in err and "kept" in output.read_text()


@pytest.mark.parametrize("content", ["my notes, without a line end", '{"text": "an object of mine"}'])
def test_generate_does_not_truncate_a_file_that_is_not_its_own(run, prompts, tmp_path, content):
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    code, _, err = run("generate", *TINY, "--input", prompts, "--output", output)
    assert (
        code == 2
        and "out.jsonl:1: is not the beginning of an answer" in err
        and output.read_text() == content
    )


def test_generate_writes_to_a_pipe(run, prompts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    code, _, err = run(
        "generate", *TINY, "--input", prompts, "--output", tmp_path / "pipe", "--max-new-tokens", 2
    )
    assert code == 0, err
    assert len(os.read(reader, 100_000).splitlines()) == 4
    os.close(reader)


def test_generate_refuses_the_input_file_as_output(run, prompts):
    content = prompts.read_bytes()
    code, _, err = run("generate", *TINY, "--input", prompts, "--output", prompts)
    assert code == 2 and "is the input file" in err and prompts.read_bytes() == content


def test_generate_refuses_an_output_that_another_process_writes(run, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    with open(output, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run("generate", *TINY, "--input", prompts, "--output", output, "--max-new-tokens", 2)
    assert code == 2 and "another process writes it" in err and output.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "must be an object"),
        (b'{"text": "x"}', "must be an object"),
        (b'{"prompt": 5}', "must be a string"),
        (b'{"prompt": "x", "messages": []}', "either"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', "unknown role"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b'{"prompt": "x", "seed": "y"}', "whole number"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "id": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "id": NaN}', "is not JSON"),
        (b'{"prompt": "%s"}' % (b"x" * 40_000), "more than the context"),
    ],
)
def test_generate_names_file_and_number_of_a_bad_line(run, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    code, _, err = run("generate", *TINY, "--input", path, "--output", tmp_path / "out.jsonl")
    assert code == 2 and "bad.jsonl:3: " in err and message in err and len(err.strip().splitlines()) == 1
