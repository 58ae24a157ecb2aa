"""Commands take a GGUF file in the place of a directory; those of the real model hold a conversation."""

import io
import json
import random

import pytest
import torch
from gguf_models import checkpoint_of, export
from real_model import smollm2

from nanohybrid import LLM
from nanohybrid.cli.main import main
from nanohybrid.engine import EngineConfig
from nanohybrid.serve.limits import Limits
from nanohybrid.serve.service import Service, Settings, model_name
from nanohybrid.text import ChatTemplate

QUESTION = "What is the capital of France? Answer with one sentence."


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return export(checkpoint_of("hybrid", tmp_path_factory.mktemp("hybrid") / "model"), "q8_0")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return export(checkpoint_of("llama, tied", tmp_path_factory.mktemp("llama") / "model"), "q4_0")


@pytest.fixture(scope="module")
def corpus(hybrid, tmp_path_factory):
    """Documents in the ids of both files, whose tokenizers are the same."""
    words = {"MODEL": str(hybrid), "OUT": str(tmp_path_factory.mktemp("data") / "out")}
    assert main([words.get(word, word) for word in COMMANDS["data"]]) == 0
    return words["OUT"]


def test_a_file_is_exported_again(hybrid, tmp_path, capsys):
    """With its tokenizer, its template, and the numbers of its blocks."""
    assert main(["export", "gguf", str(hybrid), str(tmp_path / "again.gguf"), "--type", "f32"]) == 0
    before, after = LLM(hybrid, torch.float32), LLM(tmp_path / "again.gguf")
    assert before.encode("The quick 東京") == after.encode("The quick 東京")
    assert before.template.source == after.template.source
    for name, parameter in before.model.named_parameters():
        assert torch.equal(parameter, after.model.get_parameter(name)), name


def test_a_stage_says_once_what_it_reads(hybrid, tmp_path, capsys):
    assert main(["prune", str(hybrid), "--drop-layers", "1", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "dequantized" in line]
    assert len(lines) == 1 and lines[0].startswith(f"nanohybrid: {hybrid.name}: ") and "Q8_0" in lines[0]
    assert "to bfloat16" in lines[0]


PHASES = '[{"until": 1.0, "weights": {"prose": 1.0}}]'
COMMANDS = {
    "inspect": ["inspect", "MODEL"],
    "plan serve": ["plan", "serve", "MODEL", "--memory-gib", "4"],
    "plan train": ["plan", "train", "MODEL"],
    "tokenizer encode": ["tokenizer", "encode", "MODEL", "--text", "quick fox"],
    "generate": ["generate", "MODEL", "--prompt", "The quick", "--max-new-tokens", "2"],
    "generate int8": ["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "2", "--quantize", "int8"],
    "bench generate": ["bench", "generate", "MODEL", "--prompt-tokens", "8", "--new-tokens", "2",
                       "--repeats", "1"],
    "verify": ["verify", "MODEL"],
    "quantize": ["quantize", "MODEL", "--to", "int4", "--out", "OUT"],
    "prune": ["prune", "MODEL", "--intermediate-size", "64", "--calibration", "TEXTS", "--out", "OUT"],
    "distill": ["distill", "MODEL", "MODEL", "--data", "DATA", "--tokens", "1024", "--sequence-length", "64",
                "--measured-tokens", "128", "--batch-tokens", "512", "--out", "OUT"],
    "evaluate": ["evaluate", "MODEL", "--contexts", "[16]", "--decode-rounds", "1", "--tasks", '["sums"]',
                 "--problems", "1", "--thinking-budgets", "[]", "--out", "OUT"],
    "align merge": ["align", "merge", "--first", "MODEL", "--second", "MODEL", "--out", "OUT"],
    "data": ["data", "--tokenizer", "MODEL", "--code_megabytes", "0", "--prose_megabytes", "0.02", "--tasks",
             '[{"name": "sums", "count": 20}]', "--phases", PHASES, "--out", "OUT"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["hybrid", "llama"])
def test_a_command_takes_a_file(name, kind, hybrid, llama, corpus, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The quick brown fox counts 1, 2, 3 and 12 + 30 = 42."}\n' * 4)
    path = {"hybrid": hybrid, "llama": llama}[kind]
    words = {"MODEL": str(path), "OUT": str(tmp_path / "out"), "TEXTS": str(texts), "DATA": str(corpus)}
    assert main([*(words.get(word, word) for word in COMMANDS[name]), "--json"]) == 0, capsys.readouterr().err
    json.loads(capsys.readouterr().out)
    if "OUT" in COMMANDS[name] and name not in ("data", "evaluate"):
        out = LLM(tmp_path / "out")
        assert out.encode("The quick 東京") == LLM(path).encode("The quick 東京")
        assert out.template.source == ChatTemplate.from_directory(path).source
        recorded = json.loads((tmp_path / "out" / "lineage.json").read_text())["inputs"]
        assert all("sha256:" in json.dumps(one) for one in recorded.values())


def test_a_damaged_file_is_one_line_and_exit_code_2(llama, tmp_path, capsys):
    """Bits of the header are flipped: it is read all the same, or refused, by each command that opens it."""
    generator, whole = random.Random(1), llama.read_bytes()
    refused = 0
    for turn in range(120):
        content = bytearray(whole)
        for _ in range(3):
            content[generator.randrange(len(whole) // 3)] ^= 1 << generator.randrange(8)
        path = tmp_path / f"{turn}.gguf"
        path.write_bytes(content)
        for command in (["inspect", str(path)], ["tokenizer", "encode", str(path), "--text", "x"]):
            code = main(command)
            error = capsys.readouterr().err
            assert code == 0 or (code == 2 and error.count("\n") == 1 and f"{turn}.gguf" in error), error
            refused += code
        path.unlink()
    assert refused > 50


def test_a_missing_file_and_a_directory_of_files_are_named(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "no.gguf")]) == 2
    assert "no.gguf: no such file" in capsys.readouterr().err


def test_inspect_shows_what_the_file_is(llama, capsys):
    assert main(["inspect", str(llama)]) == 0
    assert "weights, int4 (from " in (out := " ".join(capsys.readouterr().out.split())) and "Q4_0" in out


def test_chat_holds_a_conversation_with_the_real_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nAnd of Italy?\n"))
    assert main(["chat", str(smollm2()), "--max-new-tokens", "40", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    assert "Paris" in said and "Rome" in said


def test_the_server_answers_with_the_real_model():
    from fastapi.testclient import TestClient

    from nanohybrid.serve.app import application

    llm = LLM(smollm2(), engine_config=EngineConfig(max_num_seqs=2, max_model_len=256))
    service = Service(llm, Settings(model_name=model_name(smollm2(), None)), Limits())
    with TestClient(application(service)) as client:
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 30, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["finish_reason"] == "stop" and "SmolLM2" in answer["model"]
