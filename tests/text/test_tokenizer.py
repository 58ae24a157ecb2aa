"""Small BPEs, special tokens, decoding by bytes, streaming, and unreadable files."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.text import TextStream, Tokenizer, train_bpe

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_trained_ids_are_special_tokens_then_bytes_then_merges(small):
    assert [small.id_of(name) for name in ("<unk>", "<s>", "</s>", "<SPECIAL_3>", "<SPECIAL_12>")] == [
        0,
        1,
        2,
        3,
        12,
    ]
    assert [small.token_bytes(13 + value) for value in range(256)] == [bytes([value]) for value in range(256)]
    assert small.vocab_size == 350
    assert len(small.token_bytes(349)) > 1


def test_train_bpe_keeps_digits_single(small):
    assert [small.token_bytes(number) for number in small.encode("2024")] == [b"2", b"0", b"2", b"4"]


def test_train_bpe_is_deterministic():
    texts = ["a rose is a rose is a rose", "rosa rosae rosam"] * 3
    first, second = train_bpe(texts, 290), train_bpe(iter(texts), 290)
    assert [first.token_bytes(number) for number in range(290)] == [
        second.token_bytes(number) for number in range(290)
    ]


def test_train_bpe_refuses_a_vocabulary_below_269_ids():
    with pytest.raises(InputError, match="269"):
        train_bpe(["x"], 268)
    assert train_bpe(["x"], 269).encode("x") == [13 + ord("x")]


def test_train_bpe_of_few_texts_has_a_smaller_vocabulary():
    assert train_bpe(["ab ab"], 1000).vocab_size < 280


@given(TEXTS)
def test_decode_inverts_encode(small, text):
    assert small.decode(small.encode(text, parse_special=False)) == text


def test_encode_adds_bos_only_where_asked_for(small):
    assert small.encode("a", bos=True) == [1, *small.encode("a")]
    assert small.encode_batch(["a", "b"], bos=True) == [
        small.encode("a", bos=True),
        small.encode("b", bos=True),
    ]


def test_encode_parses_special_tokens_only_where_asked_for(small):
    assert small.encode("a<SPECIAL_12>") == [*small.encode("a"), 12]
    plain = small.encode("a<SPECIAL_12>", parse_special=False)
    assert min(plain) > 12
    assert small.decode(plain) == "a<SPECIAL_12>"
    assert small.decode([12, *plain[:1], 1]) == "a"
    assert small.decode([12, *plain[:1], 1], skip_special_tokens=False) == "<SPECIAL_12>a<s>"


def test_threads_with_and_without_parse_special_do_not_disturb_each_other(small):
    seen: set[tuple[bool, bool]] = set()

    def work(parse_special: bool) -> None:
        seen.update(
            (parse_special, 12 in small.encode("x<SPECIAL_12>y", parse_special=parse_special))
            for _ in range(300)
        )

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {(True, True), (False, False)}


def test_encode_names_the_position_of_half_a_surrogate_pair(small):
    with pytest.raises(InputError, match="character 2"):
        small.encode("ab\ud83d")


@given(st.lists(st.integers(-2, 370), max_size=40), st.booleans())
def test_stream_of_tokens_decodes_to_the_text_of_the_whole(small, ids, skip):
    stream = TextStream(small, skip_special_tokens=skip)
    pieces = [stream.push(number) for number in ids]
    assert "".join(pieces) + stream.flush() == small.decode(ids, skip_special_tokens=skip)


@settings(max_examples=50)
@given(TEXTS)
def test_stream_never_returns_half_a_character(small, text):
    stream = TextStream(small)
    pieces = [stream.push(number) for number in small.encode(text, parse_special=False)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_decode_equals_that_of_the_tokenizers_library(small, tmp_path):
    from tokenizers import Tokenizer as Raw

    small.save(tmp_path)
    raw = Raw.from_file(str(tmp_path / "tokenizer.json"))
    for ids in (
        [13 + 0xE6, 13 + 0x9D],
        [13 + 0xF0, 13 + 0x9F, 65],
        [13 + 0xC3, 12, 13 + 0xA9],
        [13 + 0xED, 13 + 0xA0, 13 + 0x80],
    ):
        assert small.decode(ids) == raw.decode(ids, skip_special_tokens=True)


def test_stream_flush_turns_an_incomplete_character_into_one_replacement(small):
    stream = TextStream(small)
    assert stream.push(13 + 0xF0) + stream.push(13 + 0x9F) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(13 + ord("a")) == "a"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"{", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"\xff\xfe", "cannot be read as text"),
        (b"{}", "not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "byte-level"),
    ],
)
def test_from_file_names_a_bad_tokenizer_file(tmp_path, content, says):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_from_directory_refuses_a_tokenizer_larger_than_the_model(small, tmp_path):
    small.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"ids up to 349.*ends at 299"):
        Tokenizer.from_directory(tmp_path, vocab_size=300)
    (tmp_path / "config.json").write_text('{"vocab_size": 349, "time_step_limit": [0.0, Infinity]}')
    with pytest.raises(CheckpointError, match="ends at 348"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    assert Tokenizer.from_directory(tmp_path).vocab_size == 350


def test_added_tokens_that_the_model_has_no_row_for_are_refused_in_a_text_only(tmp_path):
    from tokenizers import AddedToken

    from nanohybrid.text.bytelevel import BYTE_TO_CHARACTER, assemble

    raw = assemble(["<|end|>"], BYTE_TO_CHARACTER, [])
    raw.add_special_tokens([AddedToken("[PAD]", special=True)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path, vocab_size=257)
    assert tokenizer.vocab_size == 257 and tokenizer.id_of("[PAD]") is None
    assert tokenizer.decode(tokenizer.encode("padded<|end|>")) == "padded"
    assert tokenizer.decode(tokenizer.encode("[PAD]", parse_special=False)) == "[PAD]"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(InputError, match=r"has \[PAD\], the token 257, but .* ends at 256"):
            encode("a [PAD]")
    with pytest.raises(CheckpointError, match=r"ids up to 257.*ends at 255"):
        Tokenizer.from_directory(tmp_path, vocab_size=256)


def test_stop_ids_of_other_special_tokens_come_from_the_checkpoint(tmp_path):
    from tokenizers import AddedToken

    from nanohybrid.text.bytelevel import BYTE_TO_CHARACTER, assemble

    raw = assemble(["<|end|>", "<|start|>"], BYTE_TO_CHARACTER, [])
    raw.add_tokens([AddedToken("<tool>", special=False)])
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "pad_token_id": 1}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (0, 1, {0, 1})
    assert tokenizer.decode(tokenizer.encode("a<tool><|end|>")) == "a<tool>"


@pytest.mark.parametrize(
    "settings, processor, begins",
    [({}, False, False), ({}, True, True), ({"add_bos_token": False}, True, False),
     ({"add_bos_token": True}, False, True), ({"add_bos_token": None}, True, True)],
)  # fmt: skip
def test_plain_text_begins_with_bos_where_the_files_say_so(settings, processor, begins, tmp_path):
    from tokenizers.processors import TemplateProcessing

    from nanohybrid.text.bytelevel import BYTE_TO_CHARACTER, assemble

    raw = assemble(["<|begin|>", "<|end|>"], BYTE_TO_CHARACTER, [])
    if processor:
        raw.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_directory(tmp_path).begins_with_bos == begins


def test_plain_text_of_nemotrons_vocabulary_begins_with_bos(small, tmp_path):
    small.save(tmp_path)  # says add_bos_token false, which is about conversations
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.begins_with_bos and not tokenizer.adds_bos
