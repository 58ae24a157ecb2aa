"""Saving and loading: whole or in shards, into new or existing directories, and never incomplete."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nanohybrid
from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter, load, load_config, save
from nanohybrid.checkpoint.hybrid_config import hybrid_object
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.model import HybridLM


def assert_same(first, second):
    assert list(first.state_dict()) == list(second.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("limit", [5 * 10**9, 4000, 1])
def test_checkpoint_survives_saving_and_loading(any_model, tmp_path, limit):
    save(any_model, tmp_path / "saved", max_shard_bytes=limit)
    again = load(tmp_path / "saved")
    assert_same(any_model, again)
    assert all(parameter.requires_grad for parameter in again.parameters())
    tokens = torch.arange(11)[None]
    assert torch.equal(any_model(tokens), again(tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert (limit == 5 * 10**9) == (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_load_casts_once_to_the_requested_dtype(model, tmp_path, stored, wanted):
    model.to(stored)
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == str(
        stored
    ).removeprefix("torch.")
    again = load(tmp_path / "saved", dtype=wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(wanted or stored)), name


def test_load_keeps_the_dtypes_of_parameters(model, tmp_path):
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.float()
    save(model, tmp_path / "saved")
    assert_same(model, load(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (
        load_file(tmp_path / "saved" / "model.safetensors")["backbone.layers.0.mixer.A_log"].dtype
        == torch.float32
    )


def test_safetensors_reads_what_save_writes(sharded, model):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert torch.equal(opened.get_tensor(name), model.state_dict()[name])
    assert all((sharded / file).stat().st_size < 6000 + 4000 for file in index["weight_map"].values())


def test_load_reads_what_safetensors_writes(good, model):
    save_file(model.state_dict(), good / "model.safetensors")
    assert_same(model, load(good))


def test_load_accepts_old_names_and_prefixes(good, model):
    renamed = {name.replace("backbone.", "model."): tensor for name, tensor in model.state_dict().items()}
    save_file(renamed, good / "model.safetensors")
    assert_same(model, load(good))
    old = {name.replace("embeddings.", "embedding."): tensor for name, tensor in model.state_dict().items()}
    save_file(old, good / "model.safetensors")
    assert_same(model, load(good))


def test_load_ignores_multi_token_prediction_heads(good, model):
    save_file(
        {**model.state_dict(), "mtp.layers.0.mixer.q_proj.weight": torch.zeros(2, 2)},
        good / "model.safetensors",
    )
    assert_same(model, load(good))


def test_load_on_the_meta_device_reads_headers_only(good):
    assert {parameter.device.type for parameter in load(good, device="meta").parameters()} == {"meta"}


def test_load_refuses_an_integer_dtype(good):
    with pytest.raises(InputError, match="int8"):
        load(good, dtype=torch.int8)


def test_load_takes_a_dtype_by_name(good):
    assert {p.dtype for p in load(good, dtype="bf16").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(good, dtype="float32").parameters()} == {torch.float32}
    with pytest.raises(InputError, match="dtype is 'int7': known are auto, bf16"):
        load(good, dtype="int7")


def test_load_refuses_a_tied_head_that_differs_from_the_embeddings(tmp_path):
    config = nanohybrid.preset("tiny").replace(tie_word_embeddings=True, vocab_size=40_000, pattern="-")
    tied = HybridLM(config, seed=0)
    save(tied, tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    assert torch.equal(
        tensors["lm_head.weight"], tensors["backbone.embeddings.weight"]
    )  # for readers that know no tie
    assert_same(tied, load(tmp_path / "saved"))
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs"):
        load(tmp_path / "saved")


TIED = dict(rope_theta=1e4, mlp_activation="swiglu", tie_word_embeddings=True)
COPIES = {"nemotron_h": 1, "llama": 0, "qwen3": 0, "nanohybrid": 0}


@pytest.mark.parametrize("kind", COPIES)
def test_a_tied_head_is_stored_once_except_where_other_programs_ignore_the_tie(kind, tmp_path):
    config = {
        "nemotron_h": nanohybrid.preset("tiny").replace(tie_word_embeddings=True),
        "llama": nanohybrid.preset("tiny-dense").replace(qk_norm=False, **TIED),
        "qwen3": nanohybrid.preset("tiny-dense").replace(**TIED),
        "nanohybrid": nanohybrid.preset("tiny").replace(**TIED),
    }[kind]
    model = HybridLM(config, seed=0)
    save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == kind
    assert list(load_file(file)).count("lm_head.weight") == COPIES[kind]
    assert_same(model, load(tmp_path / "saved"))
    embeddings = "model.embed_tokens" if kind in ("llama", "qwen3") else "backbone.embeddings"
    for copied in (True, False):  # files of others have it, or not
        tensors = load_file(file)
        tensors.pop("lm_head.weight", None)
        if copied:
            tensors["lm_head.weight"] = tensors[f"{embeddings}.weight"].clone()
        save_file(tensors, file)
        assert_same(model, load(tmp_path / "saved"))


def test_a_llama_that_was_saved_under_our_own_type_leaves_as_llama(tmp_path):
    config = nanohybrid.preset("tiny-dense").replace(qk_norm=False, rope_theta=1e5)
    model = HybridLM(config, seed=0)
    (tmp_path / "ours").mkdir()
    save_file(model.state_dict(), tmp_path / "ours" / "model.safetensors")
    own = hybrid_object(config, "float32", "nanohybrid")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(own))
    save(load(tmp_path / "ours"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert "model.layers.2.mlp.gate_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert_same(model, load(tmp_path / "out"))


# ---- over and beside other files


def test_save_keeps_other_files_of_the_directory(sharded, tmp_path):
    (sharded / "recipe.toml").write_text("kept")
    other = HybridLM(nanohybrid.preset("tiny"), seed=3)
    save(other, sharded)
    assert_same(other, load(sharded))
    assert sorted(path.name for path in sharded.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.toml",
    ]
    save(other, sharded, max_shard_bytes=10**5)
    assert_same(other, load(sharded))
    assert not (sharded / "model.safetensors").exists() and (sharded / "recipe.toml").read_text() == "kept"


@pytest.mark.parametrize("existing", [True, False])
def test_save_that_fails_leaves_the_directory_unchanged(good, model, tmp_path, existing):
    target = good if existing else tmp_path / "new"
    before = load(good)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(target, model.config, torch.float32) as writer:
        writer.write("lm_head.weight", torch.zeros(48, 16))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    assert_same(before, load(good))


def test_save_removes_the_files_of_a_killed_writer(good, model, tmp_path):
    for scratch in (good / ".checkpoint.writing", tmp_path / ".new.writing"):
        scratch.mkdir()
        (scratch / "model.safetensors").write_bytes(b"half")
    save(model, good)
    save(model, tmp_path / "new")
    assert not (good / ".checkpoint.writing").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "good",
        "new",
    ]


def test_save_leaves_nothing_that_loads_between_its_renames(good, model, monkeypatch):
    moved = []

    def killed(source, target):
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(os.rename(source, target))

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(model, good)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load(good)


def test_save_refuses_to_replace_a_file(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(model, tmp_path / "file" / "below")


def test_save_copies_tokenizer_and_template(good, model, tmp_path):
    (good / "tokenizer.json").write_text("{}")
    (good / "chat_template.jinja").write_text("hello")
    (good / "secret.txt").write_text("not this")
    save(model, tmp_path / "next", assets=good)
    assert {path.name for path in (tmp_path / "next").iterdir()} == {
        "tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    save(model, good, assets=good)  # over itself
    assert (good / "chat_template.jinja").read_text() == "hello"


def test_save_writes_the_stop_ids_of_the_model_family(good):
    assert json.loads((good / "generation_config.json").read_text())["eos_token_id"] == [2, 11, 12]


# ---- tensor by tensor


def test_reader_to_writer_copies_one_tensor_at_a_time(sharded, model, tmp_path):
    with CheckpointReader(sharded) as reader:
        assert set(reader.names()) == set(model.state_dict())
        narrow = reader.config.replace(intermediate_size=10)
        with CheckpointWriter(tmp_path / "narrow", narrow, torch.bfloat16, assets=sharded) as writer:
            for name in reader.names():
                tensor = reader.tensor(name, torch.float32)
                if "up_proj" in name:
                    tensor = tensor[:10]
                if "down_proj" in name:
                    tensor = tensor[:, :10]
                writer.write(name, tensor)
    assert load_config(tmp_path / "narrow") == narrow
    up = "backbone.layers.1.mixer.up_proj.weight"
    assert torch.equal(load(tmp_path / "narrow").state_dict()[up], model.state_dict()[up][:10].bfloat16())


def test_writer_requires_each_tensor_exactly_once(model, tmp_path):
    tensors = model.state_dict()
    with pytest.raises(CheckpointError, match=r"norm_f\.weight: was not written"):
        with CheckpointWriter(tmp_path / "new", model.config, torch.float32) as writer:
            writer.write("lm_head.weight", tensors["lm_head.weight"])
            for name, tensor, says in [
                ("lm_head.weight", tensors["lm_head.weight"], "already"),
                ("lm_foot.weight", tensors["lm_head.weight"], "not a tensor"),
                ("backbone.norm_f.weight", torch.zeros(3), r"\[3\]"),
            ]:
                with pytest.raises(CheckpointError, match=says):
                    writer.write(name, tensor)
            for name in set(tensors) - {"lm_head.weight", "backbone.norm_f.weight"}:
                writer.write(name, tensors[name])
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_dtype_that_cannot_be_stored(model, tmp_path):
    with pytest.raises(InputError, match="float8"):
        CheckpointWriter(tmp_path / "new", model.config, torch.float8_e4m3fn)
