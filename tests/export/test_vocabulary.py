"""The tokenizer of a GGUF file: every id has a token, and the splitting rule is one of llama.cpp's."""

import json
import shutil

import gguf
import pytest

from nanohybrid.errors import CheckpointError
from nanohybrid.export.gguf_file import GgufExport
from nanohybrid.export.vocabulary import read_vocabulary
from nanohybrid.gguf.splitting import rule_names
from nanohybrid.text import ChatTemplate

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def directory(small, tmp_path):
    """A tokenizer of 350 ids and nothing else."""
    small.save(tmp_path)
    return tmp_path


@pytest.fixture
def edit(directory):
    """Change tokenizer.json by a function of its object."""

    def change(function):
        path = directory / "tokenizer.json"
        raw = json.loads(path.read_text())
        function(raw)
        path.write_text(json.dumps(raw))

    return change


def split(pattern):
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]


def test_vocabulary_has_tokens_at_their_ids_and_padding_elsewhere(directory, small):
    found = read_vocabulary(directory, 384)
    assert len(found.tokens) == len(found.types) == 384 == len(set(found.tokens))
    for number in range(350):
        assert small.id_of(found.tokens[number]) == number
    assert {found.types[number] for number in small.special_tokens} == {gguf.TokenType.CONTROL}
    assert set(found.types[13:350]) == {gguf.TokenType.NORMAL} and set(found.types[350:]) == {
        gguf.TokenType.UNUSED
    }
    assert (found.bos, found.eos, found.pad, found.more_stops) == (1, 12, 0, [2, 11])


def test_vocabulary_has_merges_in_order(directory, small):
    found = read_vocabulary(directory, 350)
    joined = [merge.replace(" ", "") for merge in found.merges]
    assert joined == found.tokens[13 + 256 :]


def test_vocabulary_types_of_added_words_are_user_defined(directory, edit):
    edit(
        lambda raw: raw["added_tokens"].append(
            dict(raw["added_tokens"][0], id=350, content="<tool_call>", special=False)
        )
    )
    found = read_vocabulary(directory, 384)
    assert (found.tokens[350], found.types[350]) == ("<tool_call>", gguf.TokenType.USER_DEFINED)


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [(QWEN, False, "qwen2"), (QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"), True, "llama-bpe")],
)
def test_vocabulary_knows_splitting_rules_of_other_families(directory, edit, pattern, whole, name):
    def change(raw):
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split(pattern)}
        raw["model"]["ignore_merges"] = whole

    edit(change)
    assert read_vocabulary(directory, 350).rule == name


def test_vocabulary_rule_of_gpt2_is_that_of_byte_level(directory, edit):
    def change(raw):
        raw["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        raw["model"]["ignore_merges"] = False

    edit(change)
    assert read_vocabulary(directory, 350).rule == "gpt-2"


def change_pattern(raw):
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"


def change_merging(raw):
    raw["model"]["ignore_merges"] = False


def add_step(raw):
    raw["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})


def add_space(raw):
    raw["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def invert(raw):
    raw["pre_tokenizer"]["pretokenizers"][0]["invert"] = True


@pytest.mark.parametrize("change", [change_pattern, change_merging, add_step, add_space, invert])
def test_vocabulary_refuses_a_similar_splitting_rule(directory, edit, change):
    edit(change)
    with pytest.raises(
        CheckpointError,
        match=rf"tokenizer.json: its splitting rule is not one of llama.cpp's \({', '.join(rule_names())}\)",
    ):
        read_vocabulary(directory, 350)


def test_vocabulary_of_bytes_has_one_unused_merge(directory, edit):
    edit(lambda raw: raw["model"].update(merges=[]))
    assert read_vocabulary(directory, 350).merges == ["ÿ ÿ"]  # 255 twice, which is no UTF-8


def test_vocabulary_adds_bos_as_the_files_say(directory, edit):
    assert not read_vocabulary(directory, 350).add_bos  # our own tokenizer_config.json says so
    (directory / "tokenizer_config.json").unlink()
    assert not read_vocabulary(directory, 350).add_bos
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, begin, text]}
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    edit(lambda raw: raw.update(post_processor=template))
    assert read_vocabulary(directory, 350).add_bos
    (directory / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not read_vocabulary(directory, 350).add_bos


def test_vocabulary_template_is_that_of_the_checkpoint_or_the_built_in_one(directory, edit):
    assert read_vocabulary(directory, 350).template == ChatTemplate.default().source
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert read_vocabulary(directory, 350).template == "{{ messages[0].content }}"
    (directory / "chat_template.jinja").unlink()

    def change(raw):
        raw["added_tokens"][12]["content"] = "<|im_end|>"
        raw["model"]["vocab"]["<|im_end|>"] = raw["model"]["vocab"].pop("<SPECIAL_12>")

    edit(change)
    assert read_vocabulary(directory, 350).template is None


def test_export_without_a_tokenizer_has_no_tokens(checkpoint, tmp_path):
    shutil.copytree(checkpoint("hybrid"), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with GgufExport(tmp_path / "model") as export:
        export.write(tmp_path / "model.gguf")
    said = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert said["tokenizer.ggml.model"].contents() == "none" and "tokenizer.ggml.tokens" not in said
    assert said["nemotron_h.vocab_size"].contents() == 384


def test_export_writes_all_tokenizer_keys(checkpoint, tmp_path, small):
    with GgufExport(checkpoint("dense")) as export:
        export.write(tmp_path / "model.gguf")
        wanted = export.vocabulary
    found = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {
        key.removeprefix("tokenizer."): field.contents()
        for key, field in found.items()
        if key.startswith("tokenizer.")
    }
    assert said == {
        "ggml.model": "gpt2", "ggml.pre": "tekken", "ggml.tokens": wanted.tokens,
        "ggml.token_type": wanted.types, "ggml.merges": wanted.merges,
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 12, "ggml.padding_token_id": 0, "ggml.eot_token_id": 2,
        "ggml.eom_token_id": 11, "ggml.add_bos_token": False, "chat_template": ChatTemplate.default().source,
    }  # fmt: skip
