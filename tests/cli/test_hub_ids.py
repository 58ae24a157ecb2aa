"""Commands take an id of the Hub and a folder of its cache in the place of a directory. Here the cache is
full and there is no connection.
"""

import json

import pytest

from nanohybrid.checkpoint import save
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, train_bpe

ID, COMMIT = "org/tiny-llama", "c" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with a small Llama of four layers, with tokenizer and template."""
    folder = tmp_path_factory.mktemp("hub") / "models--org--tiny-llama"
    tokenizer = train_bpe(["a few words and a few more words"] * 3, 280)
    config = HybridConfig(
        pattern="*-*-", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, rope_theta=1e4, mlp_activation="swiglu",
        max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    save(HybridLM(config, seed=0), snapshot)
    tokenizer.save(snapshot)
    ChatTemplate.default().save(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


PHASES = '[{"until": 1.0, "weights": {"prose": 1.0}}]'
COMMANDS = {
    "inspect": ["inspect", "MODEL"],
    "plan serve": ["plan", "serve", "MODEL", "--memory-gib", "4"],
    "plan train": ["plan", "train", "MODEL"],
    "tokenizer encode": ["tokenizer", "encode", "MODEL", "--text", "few words"],
    "generate": ["generate", "MODEL", "--prompt", "a few", "--max-new-tokens", "2"],
    "bench generate": ["bench", "generate", "MODEL", "--prompt-tokens", "8", "--new-tokens", "2",
                       "--repeats", "1"],
    "verify": ["verify", "MODEL"],
    "quantize": ["quantize", "MODEL", "--to", "int8", "--out", "OUT"],
    "prune": ["prune", "MODEL", "--drop-layers", "2,3", "--out", "OUT"],
    "align merge": ["align", "merge", "--first", "MODEL", "--second", "MODEL", "--out", "OUT"],
    "data": ["data", "--tokenizer", "MODEL", "--code_megabytes", "0", "--prose_megabytes", "0.02", "--tasks",
             '[{"name": "sums", "count": 20}]', "--phases", PHASES, "--out", "OUT"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_an_id_of_the_hub(name, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    words = {"MODEL": ID, "OUT": str(tmp_path / "out")}
    assert main([*(words.get(word, word) for word in COMMANDS[name]), "--json"]) == 0, capsys.readouterr().err
    json.loads(capsys.readouterr().out)


def test_a_command_takes_a_folder_of_the_cache_and_writes_no_links(cache, tmp_path):
    assert main(["quantize", str(cache), "--to", "int8", "--out", str(tmp_path / "out"), "--json"]) == 0
    snapshot = cache / "snapshots" / COMMIT
    assert main(["quantize", str(snapshot), "--to", "int8", "--out", str(tmp_path / "again"), "--json"]) == 0
    records = [json.loads((tmp_path / name / "lineage.json").read_text()) for name in ("out", "again")]
    assert records[0]["inputs"] == records[1]["inputs"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_server_calls_the_model_by_its_id(cache, monkeypatch):
    from nanohybrid.checkpoint import resolve
    from nanohybrid.serve.service import model_name

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    assert model_name(resolve(ID), None) == ID
