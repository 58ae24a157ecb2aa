"""Checkpoints as other programs write them, each with the right value: what contradicts nothing is read."""

import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanohybrid.checkpoint import CheckpointReader, load, load_config, save
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, Tokenizer

LLAMA = HybridConfig(
    pattern="*-*-", vocab_size=300, hidden_size=16, intermediate_size=24, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, rope_theta=1e4, mlp_activation="swiglu", bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def tied(tmp_path):
    """A tied Llama in shards, with an index."""
    save(HybridLM(LLAMA.replace(tie_word_embeddings=True), seed=2), tmp_path / "tied", max_shard_bytes=12_000)
    return tmp_path / "tied"


def shard_of(directory, name="model.embed_tokens.weight"):
    """The file of a tensor."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def rewrite(shard, change):
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def test_a_tied_head_in_a_shard_that_the_index_does_not_list_is_its_copy(tied):
    first = shard_of(tied)
    want = load(tied).state_dict()

    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(first, copy_head)
    loaded = load(tied)
    assert all(torch.equal(want[name], tensor) for name, tensor in loaded.state_dict().items())
    rewrite(first, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        load(tied)
    edit(tied / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: the index does not list it"):
        load(tied)


def test_heads_for_several_tokens_that_only_the_index_lists_are_ignored(sharded, tied):
    for directory, name in ((sharded, "mtp.layers.0.eh_proj.weight"), (tied, "model.mtp.norm.weight")):
        index = directory / "model.safetensors.index.json"
        map_of = json.loads(index.read_text())["weight_map"]
        shard = next(iter(map_of.values()))
        for file in (shard, "model-mtp.safetensors"):  # in no file, and in a file that was not copied
            edit(index, weight_map={**map_of, name: file})
            assert load(directory).config.vocab_size


def test_rotary_frequencies_that_old_files_store_are_ignored(tied):
    names = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
    index = json.loads((tied / "model.safetensors.index.json").read_text())["weight_map"]
    rewrite(shard_of(tied), lambda tensors: tensors.update(names))
    listed = dict.fromkeys(names, shard_of(tied).name)
    edit(tied / "model.safetensors.index.json", weight_map={**index, **listed})
    assert load(tied).config.vocab_size == 300


def test_rows_beyond_the_vocabulary_are_refused_and_a_padded_vocabulary_is_read(tmp_path):
    save(HybridLM(LLAMA.replace(vocab_size=320), seed=0), tmp_path)
    assert load(tmp_path).config.vocab_size == 320
    edit(tmp_path / "config.json", vocab_size=300)
    with pytest.raises(CheckpointError, match=r"is \[320, 16\], but config\.json says \[300, 16\]"):
        CheckpointReader(tmp_path)


def test_an_empty_quantization_is_none(good):
    edit(good / "config.json", quantization_config={})
    assert CheckpointReader(good).format is None


def test_a_byte_order_mark_and_windows_lines_change_nothing(good):
    want = load_config(good)
    path = good / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(good) == want


@pytest.fixture
def with_tokenizer(tmp_path, small_tokenizer):
    config = LLAMA.replace(vocab_size=small_tokenizer.vocab_size)
    save(HybridLM(config, seed=0), tmp_path / "model")
    small_tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small_tokenizer():
    from nanohybrid.text import train_bpe

    return train_bpe(["a few words, a few more words"] * 3, 280)


def test_stops_of_the_generation_config_count_and_a_damaged_one_is_an_error(with_tokenizer):
    generation = with_tokenizer / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [12, 40, -1], "bos_token_id": None}))
    assert {12, 40} <= Tokenizer.from_directory(with_tokenizer).stop_ids
    generation.write_bytes(b"\xef\xbb\xbf" + generation.read_bytes())
    assert 40 in Tokenizer.from_directory(with_tokenizer).stop_ids
    for damaged in (b'{"eos_token_id": [12, 4', b"[]", b"\xff\xfe"):
        generation.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            Tokenizer.from_directory(with_tokenizer)
    generation.unlink()
    assert Tokenizer.from_directory(with_tokenizer).stop_ids


NAMES = ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip


def read(directory):
    load(directory)
    Tokenizer.from_directory(directory)
    ChatTemplate.from_directory(directory)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_or_device_in_the_place_of_a_file_is_one_line(name, with_tokenizer):
    ChatTemplate.default().save(with_tokenizer)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        path = with_tokenizer / name
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
        make(path)
        caught: list[BaseException | None] = []

        def attempt(caught=caught):
            try:
                read(with_tokenizer)
                caught.append(None)
            except CheckpointError as error:
                caught.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive(), f"{name} is read for ever"
        assert caught and "is not a regular file" in str(caught[0]) and name in str(caught[0])


@pytest.mark.parametrize("name, most", [("tokenizer.json", 256_000_000), ("chat_template.jinja", 1_000_000)])
def test_files_of_absurd_sizes_are_refused_before_they_are_read(name, most, with_tokenizer):
    with open(with_tokenizer / name, "wb") as file:
        file.truncate(most + 1)
    with pytest.raises(CheckpointError, match=rf"{name}: .*at most {most:,} are read"):
        read(with_tokenizer)
