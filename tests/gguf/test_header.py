"""Headers of GGUF files: what is read, and that a damaged one is refused in one line that names the file."""

import random
import struct

import gguf
import numpy as np
import pytest

from nanohybrid.errors import CheckpointError
from nanohybrid.gguf import is_gguf, open_gguf

from . import build

PAIRS = [
    build.pair("general.architecture", "str", "llama"), build.pair("a.number", "u32", 7),
    build.pair("a.real", "f32", 0.5), build.pair("a.flag", "bool", True),
    build.pair("a.words", "strings", ["x", "größer", ""]), build.pair("a.list", "i32s", [1, -2]),
]  # fmt: skip
INFOS = [build.info("first.weight", (32, 2), kind=8), build.info("second", (3,), offset=96)]
DATA = bytes(range(68)) + b"\0" * 28 + struct.pack("<3f", 1, 2, 3)
GOOD = build.whole(PAIRS, INFOS, DATA)


@pytest.fixture
def put(tmp_path):
    def write(content, name="x.gguf"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and len(message) < 400


def test_keys_and_tensors_are_read(put):
    path = put(GOOD)
    file = open_gguf(path)
    assert file.architecture == "llama"
    assert file.whole("a.number") == 7 and file.number("a.real") == 0.5 and file.flag("a.flag") is True
    assert list(file.strings("a.words")) == ["x", "größer", ""] and len(file.strings("a.words")) == 3
    assert file.wholes("a.list").tolist() == [1, -2]
    first, second = file.tensors["first.weight"], file.tensors["second"]
    assert (first.kind, first.shape, second.kind, second.shape) == ("Q8_0", (2, 32), "F32", (3,))
    assert GOOD[first.begin : first.end] == DATA[:68] and GOOD[second.begin : second.end] == DATA[96:]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(put, version):
    assert open_gguf(put(build.whole(PAIRS, INFOS, DATA, version=version))).whole("a.number") == 7


def test_an_alignment_of_its_own_is_followed(put):
    pairs = [*PAIRS, build.pair("general.alignment", "u32", 128)]
    infos = [INFOS[0], build.info("second", (3,), offset=128)]
    path = put(build.whole(pairs, infos, DATA[:68] + b"\0" * 60 + DATA[96:], alignment=128))
    assert open_gguf(path).tensors["second"].begin % 128 == 0


def test_what_the_gguf_package_writes_is_read_alike(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint64("big", 2**40)
    writer.add_array("numbers", [0.25, 0.5])
    writer.add_array("none", ["a"] * 1000)
    for name, shape in {"a": (3, 64), "b": (5,)}.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = open_gguf(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    assert file.whole("big") == 2**40 and len(file.strings("none")) == 1000
    for tensor in reader.tensors:
        found = file.tensors[tensor.name]
        assert (found.begin, found.end - found.begin) == (tensor.data_offset, tensor.n_bytes)
        assert found.shape == tuple(int(size) for size in tensor.shape)[::-1]


BAD = {
    "nothing": (b"", "does not begin with GGUF"),
    "another file": (b"PK\3\4" + b"\0" * 60, "does not begin with GGUF"),
    "version 1": (build.whole(PAIRS, INFOS, DATA, version=1), "has version 1; supported is GGUF 2 and 3"),
    "big-endian": (build.whole(PAIRS, INFOS, DATA, version=3 << 24), "is big-endian; supported"),
    "many keys": (build.whole(PAIRS, INFOS, DATA, counts=(2, 2**60)), "keys, more than the file can hold"),
    "many tensors": (build.whole(PAIRS, INFOS, DATA, counts=(2**60, 6)), "tensors, more than the file can"),
    "more keys than there are": (build.whole(PAIRS, [], b"", counts=(0, 7)), "a key is empty"),
    "a long string": (
        build.whole([build.text("k") + struct.pack("<IQ", 8, 2**62)], [], b""),
        "k has .* bytes",
    ),
    "a long key": (build.whole([struct.pack("<Q", 2**40) + b"k"], [], b""), "a key has .* bytes"),
    "a long array": (
        build.whole([build.text("k") + struct.pack("<IIQ", 9, 4, 2**40)], [], b""),
        "k has .* entries, more than",
    ),
    "an array of arrays": (
        build.whole([build.text("k") + struct.pack("<IIQ", 9, 9, 1)], [], b""), "k is an array of type 9",
    ),
    "an unknown type": (
        build.whole([build.text("k") + struct.pack("<I", 99)], [], b""),
        "k has the unknown type 99",
    ),
    "a key twice": (build.whole([*PAIRS, PAIRS[1]], INFOS, DATA), "the key a.number is there twice"),
    "a key that is no text": (build.whole([build.pair(b"\xff", "u32", 1)], [], b""), "a key is not UTF-8"),
    "an odd alignment": (
        build.whole([build.pair("general.alignment", "u32", 48)], [], b""),
        "general.alignment is 48, and must be",
    ),
    "an alignment of 0": (
        build.whole([build.pair("general.alignment", "u32", 0)], [], b""),
        "general.alignment is 0, and must be",
    ),
    "a tensor twice": (build.whole(PAIRS, [INFOS[0], INFOS[0]], DATA), "first.weight is there twice"),
    "five dimensions": (build.whole(PAIRS, [build.info("t", (1,) * 5)], DATA), "t has 5 dimensions"),
    "no dimensions": (build.whole(PAIRS, [build.info("t", ())], DATA), "t has 0 dimensions"),
    "a type that is not supported": (
        build.whole(PAIRS, [build.info("t", (256,), 23)], DATA),
        "t: is IQ4_XS, which",
    ),
    "an unknown type of a tensor": (
        build.whole(PAIRS, [build.info("t", (256,), 200)], DATA),
        "t: is of type 200, which",
    ),
    "half a block": (
        build.whole(PAIRS, [build.info("t", (33,), 8)], DATA),
        "rows of 33 are no whole blocks of Q8_0",
    ),
    "no elements": (build.whole(PAIRS, [build.info("t", (0, 4))], DATA), r"t has the shape \[4, 0\]"),
    "too many elements": (build.whole(PAIRS, [build.info("t", (2**62, 2**62))], DATA), "t has the shape"),
    "an overlap": (
        build.whole(PAIRS, [INFOS[0], build.info("t", (3,), offset=32)], DATA),
        "t starts at byte 32",
    ),
    "a gap": (
        build.whole(PAIRS, [INFOS[0], build.info("t", (3,), offset=128)], DATA),
        "t starts at byte 128",
    ),
    "a tensor beyond the end": (GOOD[:-1], "second: ends at byte .* is the download complete"),
    "no tensors": (build.whole(PAIRS, [], b""), "has no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_header_is_refused(put, what):
    content, match = BAD[what]
    refused(put(content), match)


def test_every_truncation_is_refused(put):
    for length in range(len(GOOD)):
        refused(put(GOOD[:length], f"{length}.gguf"), "GGUF|ends|keys|tensors|the file")


def test_flipped_bits_are_read_or_refused_in_one_line(put):
    """No other exception, whatever the bits say."""
    generator, refusals = random.Random(0), 0
    for turn in range(1500):
        content = bytearray(GOOD)
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(len(GOOD) - len(DATA))] ^= 1 << generator.randrange(8)
        try:
            file = open_gguf(put(bytes(content), f"{turn}.gguf"))
            assert all(tensor.end <= len(content) for tensor in file.tensors.values())
        except CheckpointError as error:
            refusals += "\n" not in str(error)
    assert refusals > 1000


def test_values_of_another_type_are_refused_by_their_key(put):
    file = open_gguf(put(GOOD))
    for read, key in (
        (file.text, "a.number"), (file.whole, "a.real"), (file.number, "a.words"), (file.flag, "a.number"),
        (file.strings, "a.list"), (file.wholes, "a.words"), (file.text, "missing"), (file.whole, "a.flag"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=key):
            read(key)


def test_a_path_is_a_gguf_file_by_its_name_or_its_first_bytes(put, tmp_path):
    assert is_gguf(put(GOOD)) and is_gguf(put(GOOD, "blob")) and is_gguf(tmp_path / "missing.gguf")
    (tmp_path / "directory.gguf").mkdir()
    assert not is_gguf(tmp_path / "directory.gguf") and not is_gguf(tmp_path) and not is_gguf(put(b"x", "y"))
    refused(tmp_path / "missing.gguf", "no such file")


def parts(count, put, total=2, numbers=None):
    """The files of a model in two parts, the first with all keys."""
    split = [
        [build.pair("split.no", "u32", number), build.pair("split.count", "u32", count),
         build.pair("split.tensors.count", "i32", total)]
        for number in (numbers or range(2))
    ]  # fmt: skip
    second = build.info("second", (3,))
    put(build.whole([*PAIRS, *split[0]], [INFOS[0]], DATA[:68]), f"m-00001-of-{count:05d}.gguf")
    return put(build.whole(split[1], [second], DATA[96:]), f"m-00002-of-{count:05d}.gguf")


def test_a_file_in_parts_is_read_from_the_first(put):
    second = parts(2, put)
    file = open_gguf(second.with_name("m-00001-of-00002.gguf"))
    assert {name: tensor.path.name for name, tensor in file.tensors.items()} == {
        "first.weight": "m-00001-of-00002.gguf", "second": "m-00002-of-00002.gguf",
    }  # fmt: skip
    refused(second, "name the first of them, m-00001-of-00002.gguf")


def test_parts_that_are_missing_or_of_another_file_are_refused(put):
    first = parts(3, put).with_name("m-00001-of-00003.gguf")
    with pytest.raises(
        CheckpointError, match=r"m-00003-of-00003.gguf: no such file; is the download of the 3"
    ):
        open_gguf(first)
    first = parts(2, put, total=3).with_name("m-00001-of-00002.gguf")
    refused(first, "its parts have 2 tensors, and it says 3")
    first = parts(2, put, numbers=(0, 4)).with_name("m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match="is not part 2 of 2; do the files belong together"):
        open_gguf(first)
    first.rename(first.with_name("renamed.gguf"))
    refused(first.with_name("renamed.gguf"), "is not named as in model-00001-of-00003.gguf")
