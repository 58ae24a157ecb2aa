"""Damaged checkpoint files are refused in one line that names the file and the tensor."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanohybrid.checkpoint import CheckpointReader, load
from nanohybrid.checkpoint.header import encode_header, read_header
from nanohybrid.errors import CheckpointError, NanohybridError

UP, A_LOG = "backbone.layers.1.mixer.up_proj.weight", "backbone.layers.0.mixer.A_log"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(directory, *says):
    """Check the error of one line for a directory, on opening it and on loading it."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (str(directory), *says)), message
    with pytest.raises(CheckpointError):
        load(directory)


def rename(header):
    header[A_LOG + "_lost"] = header.pop(A_LOG)


def reshape(header):
    header[UP]["shape"] = header[UP]["shape"][::-1]


HEADERS = {
    "tensor missing and another extra": (rename, (A_LOG, "missing", A_LOG + "_lost")),
    "misshaped": (reshape, (UP, "[16, 24]", "[24, 16]")),
    "whole numbers": (lambda header: header[A_LOG].update(dtype="I32"), (A_LOG, "I32")),
    "unknown type": (lambda header: header[A_LOG].update(dtype="F31"), (A_LOG, "F31")),
    "type not a word": (lambda header: header[A_LOG].update(dtype=["F32"]), (A_LOG, "type")),
    "a name of several lines": (
        lambda header: header.update({"a\nb": header.pop(A_LOG)}),
        ("'a\\nb'", "valid name"),
    ),
    "entry not an object": (lambda header: header.update({A_LOG: 5}), (A_LOG,)),
    "shape negative": (lambda header: header[A_LOG].update(shape=[-4]), (A_LOG, "shape")),
    "shape true": (lambda header: header[A_LOG].update(shape=[True, 4]), (A_LOG, "shape")),
    "shape beyond measure": (lambda header: header[A_LOG].update(shape=[2**62] * 16), (A_LOG, "bytes")),
    "offsets missing": (lambda header: header[A_LOG].pop("data_offsets"), (A_LOG, "data_offsets")),
    "offsets turned": (lambda header: header[A_LOG].update(data_offsets=[16, 0]), (A_LOG, "data_offsets")),
    "offsets beyond the file": (
        lambda header: header[A_LOG].update(data_offsets=[10**9, 10**9 + 16]),
        (A_LOG, "truncated"),
    ),
    "two at one place": (
        lambda header: header[A_LOG].update(data_offsets=header["backbone.layers.0.mixer.D"]["data_offsets"]),
        ("starts",),
    ),
    "a hole": (lambda header: header.pop(A_LOG), ("starts",)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_reader_names_file_and_tensor_of_a_damaged_header(good, edit_header, name):
    change, says = HEADERS[name]
    edit_header(good / WEIGHTS, change)
    refused(good, WEIGHTS, *says)


FILES = {
    "truncated": (lambda raw: raw[:-1000], "truncated"),
    "one byte short": (lambda raw: raw[:-1], "truncated"),
    "one byte over": (lambda raw: raw + b"x", "end at"),
    "empty": (lambda raw: b"", "truncated"),
    "seven bytes": (lambda raw: raw[:7], "truncated"),
    "not JSON": (lambda raw: struct.pack("<Q", 40) + b"x" * 60, "JSON"),
    "a list": (lambda raw: struct.pack("<Q", 2) + b"[]", "object"),
    "deep": (lambda raw: struct.pack("<Q", 200_000) + b"[" * 200_000, "JSON"),
    "2^60 bytes of header": (lambda raw: struct.pack("<Q", 2**60) + b"{}", "header"),
    "a name twice": (lambda raw: struct.pack("<Q", 16) + b'{"a": 1, "a": 2}', "duplicate key"),
    "no tensors": (lambda raw: struct.pack("<Q", 2) + b"{}", "missing"),
}


@pytest.mark.parametrize("name", FILES)
def test_reader_refuses_a_file_that_is_not_safetensors(good, name):
    change, says = FILES[name]
    (good / WEIGHTS).write_bytes(change((good / WEIGHTS).read_bytes()))
    refused(good, WEIGHTS if name != "no tensors" else "embeddings", says)


def test_reader_names_missing_weight_files(good, sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    (good / WEIGHTS).unlink()
    refused(good, WEIGHTS, "are the weights missing")
    shards[1].unlink()
    refused(sharded, shards[1].name, "download")
    (sharded / INDEX).unlink()
    refused(sharded, INDEX)


def test_reader_names_a_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(sharded, shard.name)


def other_shard(where):
    return next(file for file in where.values() if file != where[UP])


INDEXES = {
    "outside the directory": (
        lambda where: where.update({UP: "../../etc/x.safetensors"}),
        (UP, "beside the index"),
    ),
    "absolute": (lambda where: where.update({UP: "/etc/x.safetensors"}), (UP, "beside the index")),
    "another kind of file": (lambda where: where.update({UP: "config.json"}), (UP,)),
    "a name without end": (lambda where: where.update({UP: "x" * 5000 + ".safetensors"}), (UP,)),
    "a tensor of several lines": (
        lambda where: where.update({"a\nb": where[UP]}),
        ("'a\\nb'", "not in the file"),
    ),
    "not a name": (lambda where: where.update({UP: 7}), (UP,)),
    "a file that is not there": (
        lambda where: where.update({UP: "model-9.safetensors"}),
        ("model-9.safetensors", "no such file"),
    ),
    "the wrong shard": (lambda where: where.update({UP: other_shard(where)}), (UP,)),
    "a tensor in no file": (lambda where: where.update(ghost=where[UP]), ("ghost", "not in the file")),
    "a tensor unlisted": (lambda where: where.pop(A_LOG), (A_LOG, "does not list")),
}


@pytest.mark.parametrize("name", INDEXES)
def test_reader_refuses_an_index_that_contradicts_its_files(sharded, name):
    change, says = INDEXES[name]
    index = json.loads((sharded / INDEX).read_text())
    change(index["weight_map"])
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, *says)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_reader_refuses_an_index_without_weight_map(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_reader_names_an_additional_tensor(good, model):
    extra = {
        **{n: (t.dtype, tuple(t.shape)) for n, t in model.state_dict().items()},
        "backbone.layers.9.norm.weight": (torch.float32, (4,)),
    }
    head, begins = encode_header(extra)
    (good / WEIGHTS).write_bytes(head + bytes(begins["backbone.layers.9.norm.weight"] + 16 - len(head)))
    refused(good, "backbone.layers.9.norm.weight", "is not a tensor of the model")


def test_reader_refuses_one_tensor_under_two_names(good, edit_header):
    def twice(header):
        header["model.norm_f.weight"] = {
            **header["backbone.norm_f.weight"],
            "shape": [0],
            "data_offsets": [0, 0],
        }

    edit_header(good / WEIGHTS, twice)
    refused(good, "norm_f.weight", "remove one of them")


def test_reader_notices_a_file_truncated_after_opening(good):
    with CheckpointReader(good) as reader:
        (good / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:3000])
        with pytest.raises(CheckpointError, match="ends within"):
            reader.tensor("lm_head.weight")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_reader_of_a_fuzzed_header_loads_or_raises_checkpoint_error(good, data):
    path = good / WEIGHTS
    sound = good / "sound"
    if not sound.exists():
        sound.write_bytes(path.read_bytes())
    raw = bytearray(sound.read_bytes())
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.one_of(st.integers(0, 7), st.integers(8, head - 1)))] = data.draw(
            st.integers(0, 255)
        )
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw)), st.integers(0, head)))
    path.write_bytes(raw[:cut])
    try:
        model = load(good)
    except NanohybridError as error:
        assert "\n" not in str(error)
        return
    assert all(tuple(p.shape) == read_header(path)[name].shape for name, p in model.named_parameters())
