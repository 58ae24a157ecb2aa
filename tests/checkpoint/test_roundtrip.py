"""What is saved is what is loaded, whole or in shards, new or over an old one, and never half."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nanohybrid
from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter, load, load_config, save
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.model import HybridLM


def assert_same(first, second):
    assert list(first.state_dict()) == list(second.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("limit", [5 * 10**9, 4000, 1])
def test_any_model_comes_back(any_model, tmp_path, limit):
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
def test_loading_casts_once_to_the_type_asked_for(model, tmp_path, stored, wanted):
    model.to(stored)
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == str(
        stored
    ).removeprefix("torch.")
    again = load(tmp_path / "saved", dtype=wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(wanted or stored)), name


def test_parameters_of_several_types_keep_theirs(model, tmp_path):
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


def test_the_safetensors_library_reads_what_is_written(sharded, model):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert torch.equal(opened.get_tensor(name), model.state_dict()[name])
    assert all((sharded / file).stat().st_size < 6000 + 4000 for file in index["weight_map"].values())


def test_what_the_safetensors_library_writes_is_read(good, model):
    save_file(model.state_dict(), good / "model.safetensors")
    assert_same(model, load(good))


def test_old_names_and_prefixes_are_read(good, model):
    renamed = {name.replace("backbone.", "model."): tensor for name, tensor in model.state_dict().items()}
    save_file(renamed, good / "model.safetensors")
    assert_same(model, load(good))
    old = {name.replace("embeddings.", "embedding."): tensor for name, tensor in model.state_dict().items()}
    save_file(old, good / "model.safetensors")
    assert_same(model, load(good))


def test_heads_for_several_tokens_are_left_aside(good, model):
    save_file(
        {**model.state_dict(), "mtp.layers.0.mixer.q_proj.weight": torch.zeros(2, 2)},
        good / "model.safetensors",
    )
    assert_same(model, load(good))


def test_on_the_meta_device_only_the_heads_are_read(good):
    assert {parameter.device.type for parameter in load(good, device="meta").parameters()} == {"meta"}


def test_a_type_of_whole_numbers_is_refused(good):
    with pytest.raises(InputError, match="int8"):
        load(good, dtype=torch.int8)


def test_a_head_said_to_be_tied_must_be_the_embeddings(tmp_path):
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


# ---- over and beside other files


def test_saving_into_a_directory_leaves_other_files_alone(sharded, tmp_path):
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
def test_a_write_that_fails_leaves_what_was_there(good, model, tmp_path, existing):
    target = good if existing else tmp_path / "new"
    before = load(good)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(target, model.config, torch.float32) as writer:
        writer.write("lm_head.weight", torch.zeros(48, 16))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    assert_same(before, load(good))


def test_what_a_killed_writer_left_is_cleared_by_the_next(good, model, tmp_path):
    for scratch in (good / ".checkpoint.writing", tmp_path / ".new.writing"):
        scratch.mkdir()
        (scratch / "model.safetensors").write_bytes(b"half")
    save(model, good)
    save(model, tmp_path / "new")
    assert not (good / ".checkpoint.writing").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "good",
        "new",
    ]


def test_between_the_renames_nothing_loads(good, model, monkeypatch):
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


def test_a_file_is_not_overwritten_by_a_directory(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(model, tmp_path / "file" / "below")


def test_tokenizer_and_template_come_along(good, model, tmp_path):
    (good / "tokenizer.json").write_text("{}")
    (good / "chat_template.jinja").write_text("hello")
    (good / "secret.txt").write_text("not this")
    save(model, tmp_path / "next", assets=good)
    assert {path.name for path in (tmp_path / "next").iterdir()} == {
        "tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    save(model, good, assets=good)  # over itself
    assert (good / "chat_template.jinja").read_text() == "hello"


def test_generation_stops_where_the_family_does(good):
    assert json.loads((good / "generation_config.json").read_text())["eos_token_id"] == [2, 11, 12]


# ---- tensor by tensor


def test_disk_to_disk_one_tensor_at_a_time(sharded, model, tmp_path):
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


def test_a_writer_takes_each_tensor_once_and_all_of_them(model, tmp_path):
    tensors = model.state_dict()
    with pytest.raises(CheckpointError, match=r"norm_f\.weight: was not written"):
        with CheckpointWriter(tmp_path / "new", model.config, torch.float32) as writer:
            writer.write("lm_head.weight", tensors["lm_head.weight"])
            for name, tensor, says in [
                ("lm_head.weight", tensors["lm_head.weight"], "already"),
                ("lm_foot.weight", tensors["lm_head.weight"], "no tensor"),
                ("backbone.norm_f.weight", torch.zeros(3), r"\[3\]"),
            ]:
                with pytest.raises(CheckpointError, match=says):
                    writer.write(name, tensor)
            for name in set(tensors) - {"lm_head.weight", "backbone.norm_f.weight"}:
                writer.write(name, tensors[name])
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_type_that_cannot_be_stored_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="float8"):
        CheckpointWriter(tmp_path / "new", model.config, torch.float8_e4m3fn)
