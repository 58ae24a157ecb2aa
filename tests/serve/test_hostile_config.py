"""Any content of config.json gives one line before the server is ready, or a server that works."""

import json
import re
import shutil

import pytest
import torch
from serving import CONFIG, started

from nanohybrid.checkpoint import save
from nanohybrid.engine import LLM
from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
from nanohybrid.errors import NanohybridError
from nanohybrid.serve.service import Service, Settings

SETTINGS = Settings(model_name="tiny", max_queue=8)
REFUSED = {
    "time_step_limit": [
        "[0.0, 1e308]",
        "[0, 1e400, 1]",
        "[NaN, 1.0]",
        "[1e39, 1e400]",
        "[false, true]",
        "[0.0, %s]" % ("9" * 400),
    ],
    "layer_norm_epsilon": ["1e-300", "1e39", "1e400", "0", "-1e-5", "NaN", "true", '"\\ud800"', "9" * 400],
    "initializer_range": ["-1.0", "1e39", "1e400", "true"],
    "time_step_min": ["1e-300", "0", "1e400"],
    "time_step_floor": ["1e308", "0"],
    "max_position_embeddings": ["0", "1", "1e400", "true", "9" * 30],
    "chunk_size": ["0", "1099511627776", "128.5"],
    "conv_kernel": ["2147483647", "1099511627776", "5"],
    "head_dim": ["2147483647", "24"],
    "vocab_size": ["1099511627776", "2147483647", "1", "270"],
    "num_attention_heads": ["2147483646", "true"],
    "n_groups": ["3", "1"],
    "eos_token_id": ["-2", "9" * 30, "true", '"</s>"'],
    "hybrid_override_pattern": ['"M"', '"\\ud800"', "7", "true", '"M-*M-M"'],
}
SERVED = {
    "time_step_limit": ["[0.0, Infinity]", "[0.0, 1e400]", "[0, 1e38]", "[0.001, 0.1]"],
    "layer_norm_epsilon": ["1e-37", "1e38", "1"],
    "initializer_range": ["0", "1e38"],
    "time_step_max": ["1e38"],
    "max_position_embeddings": ["2147483647", "2"],
    "chunk_size": ["1", "2147483647", "128.0"],
    "eos_token_id": ["2147483647", "[2147483647, 5]", "0", "-1"],
    "bos_token_id": ["2147483647"],
    "pad_token_id": ["2147483647"],
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of the tests' configuration; in bf16 with heads that the CPU kernels take."""
    config = CONFIG if request.param == torch.float32 else CONFIG.replace(head_dim=16)
    folder = tmp_path_factory.mktemp("hostile") / "good"
    save(random_model(config, request.param, seed=5), folder)
    stand_in_tokenizer(config).save(folder)
    return folder


def changed(checkpoint, folder, field, text):
    """A copy of the checkpoint, with this text as the value of a field of config.json."""
    shutil.copytree(checkpoint, folder, copy_function=shutil.copy)
    raw = json.loads((folder / "config.json").read_text()) | {field: "@"}
    (folder / "config.json").write_text(json.dumps(raw).replace('"@"', text))
    return folder


def cases(table):
    return [
        pytest.param(field, text, id=f"{field}={text[:20]}")
        for field, texts in table.items()
        for text in texts
    ]


@pytest.mark.parametrize("field, text", cases(REFUSED))
def test_unusable_config_is_refused_before_the_server_is_ready(checkpoint, tmp_path, field, text):
    with pytest.raises(NanohybridError) as caught:
        Service(LLM(changed(checkpoint, tmp_path / "model", field, text)), SETTINGS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("field, text", cases(SERVED))
def test_unusual_config_is_served(checkpoint, tmp_path, field, text):
    llm = LLM(changed(checkpoint, tmp_path / "model", field, text), max_num_seqs=2, max_model_len=256)
    with started(SETTINGS, llm=llm) as serve:
        asked = [
            ("/v1/completions", {"prompt": "", "max_tokens": 1}),
            ("/v1/completions", {"prompt": "a", "max_tokens": 3, "logprobs": 2, "stream": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "guided_regex": "a"},
            ),
        ]
        for path, body in asked:
            answer = serve.http.post(path, json=body)
            assert answer.status_code < 500 and "server_error" not in answer.text, answer.text
        assert serve.http.get("/health").status_code == 200
        serve.until(serve.idle)


def test_model_with_non_finite_logits_is_refused_before_the_server_is_ready(checkpoint):
    llm = LLM(checkpoint)
    with torch.no_grad():
        next(iter(llm.model.state_dict().values())).fill_(float("nan"))
    with pytest.raises(NanohybridError, match="logits are not numbers"):
        Service(llm, SETTINGS)


def test_error_in_the_first_step_is_one_line_before_the_server_is_ready(checkpoint, monkeypatch):
    """For a configuration that no check covers: the engine runs a step before the server is ready."""

    def broken(*_):
        raise RuntimeError("value cannot be converted to type float\nwithout overflow")

    monkeypatch.setattr("nanohybrid.engine.runner.Runner.run", broken)
    with pytest.raises(NanohybridError) as caught:
        Service(LLM(checkpoint), SETTINGS)
    assert re.fullmatch(
        r"this model cannot generate \(RuntimeError: value .* without overflow\)", str(caught.value)
    )
