"""EngineConfig: names and ranges of its fields, names of the previous release, and where it is used."""

import warnings
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.engine import LLM, Engine, EngineConfig
from nanohybrid.engine.config import RENAMED
from nanohybrid.errors import InputError
from nanohybrid.presets import preset


def test_fields_are_frozen():
    with pytest.raises(FrozenInstanceError):
        EngineConfig().max_num_seqs = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"max_model_len": -1}, "max_model_len is -1"),
        ({"num_kv_pages": 0}, "num_kv_pages is 0"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes is -1"),
        ({"prefix_cache_interval": 100}, "prefix_cache_interval is 100; it must be a multiple of 128"),
        ({"num_speculative_tokens": 16}, "num_speculative_tokens is 16; it must be from 0 to 15"),
        ({"num_speculative_tokens": 2, "deterministic": True}, "contradicts deterministic"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_name_of_its_field(options, message):
    with pytest.raises(InputError, match=message):
        EngineConfig(**options)


def test_an_unknown_option_is_refused_with_the_nearest_name(model, tokenizer):
    with pytest.raises(InputError, match=r"no option 'max_num_seq'; did you mean max_num_seqs\?"):
        Engine(model, tokenizer, max_num_seq=2)
    with pytest.raises(InputError, match="no option 'speed'; known are"):
        LLM.random(preset("tiny"), torch.float32, speed=9)
    with pytest.raises(InputError, match="no EngineConfig; options are given by name"):
        Engine(model, tokenizer, 8)


def test_options_replace_fields_of_a_configuration(model, tokenizer):
    config = EngineConfig(max_num_seqs=3, max_model_len=200)
    engine = Engine(model, tokenizer, config, max_num_seqs=2)
    assert engine.scheduler.slots.size == 2 and engine.scheduler.max_model_len == 200
    assert engine.config == EngineConfig(max_num_seqs=2, max_model_len=200)


@pytest.mark.parametrize("old", RENAMED)
def test_a_name_of_the_previous_release_works_with_a_deprecation_warning(old):
    value = {"prefix_cache_interval": 256, "mamba_ssm_cache_dtype": "fp16", "kv_cache_dtype": "fp8"}.get(
        RENAMED[old], 5
    )
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated; use {RENAMED[old]}") as caught:
        config = EngineConfig.of(None, {old: value}, stacklevel=2)
    assert getattr(config, RENAMED[old]) == value and len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(InputError, match=f"{RENAMED[old]} is given twice"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        EngineConfig.of(None, {RENAMED[old]: value, old: value})


def test_the_warning_names_the_caller_of_llm_and_engine(model, tokenizer):
    with pytest.warns(DeprecationWarning) as caught:
        Engine(model, tokenizer, max_running=2, max_context=100)
        LLM.random(preset("tiny"), torch.float32, speculate=2)
    assert len(caught) == 3 and {one.filename for one in caught} == {__file__}


def test_every_renamed_option_is_a_field():
    names = {field.name for field in fields(EngineConfig)}
    assert set(RENAMED.values()) <= names and not set(RENAMED) & names


@pytest.mark.parametrize(
    ("given", "longest", "expected"), [(None, 131072, 4096), (None, 512, 512), (9000, 512, 9000)]
)
def test_the_longest_sequence_is_the_models_or_4096_tokens(given, longest, expected):
    assert EngineConfig(max_model_len=given).longest(longest) == expected


def test_an_llm_takes_the_length_of_its_job_within_the_configured_one():
    config: HybridConfig = preset("tiny")
    prompts = [[5] * 40, [5] * 90]
    assert LLM.random(config, torch.float32).engine(prompts, 30).scheduler.max_model_len == 120
    bounded = LLM.random(config, torch.float32, max_model_len=100, max_num_seqs=1).engine(prompts, 30)
    assert bounded.scheduler.max_model_len == 100 and bounded.scheduler.slots.size == 1
