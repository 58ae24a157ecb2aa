"""All dialects of config.json load to the same configuration; unsupported ones are refused by name."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanohybrid
from nanohybrid.checkpoint import load_config
from nanohybrid.checkpoint.config_fields import DENSE_TYPES
from nanohybrid.checkpoint.dialects import config_object, model_type, parse
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, ConfigError, NanohybridError
from nanohybrid.presets import PRESETS

OFFICIAL = {
    "model_type": "nemotron_h", "auto_map": {"AutoConfig": "x"}, "hybrid_override_pattern": "M-*",
    "num_hidden_layers": 3, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 6,
    "mamba_head_dim": 8, "n_groups": 3, "ssm_state_size": 16, "time_step_limit": [0.0, math.inf],
    "torch_dtype": "bfloat16", "eos_token_id": 12, "tie_word_embeddings": True, "attention_bias": True,
    "residual_in_fp32": True,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3", "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 5e5, "tie_word_embeddings": True, "bos_token_id": None,
    "eos_token_id": [3, 4], "attention_bias": False, "hidden_act": "silu", "sliding_window": None,
}  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "rope_scaling": LLAMA3, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": True,
    "max_position_embeddings": 131_072, "rope_interleaved": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def without(source, *keys, **changes):
    return {**{key: value for key, value in source.items() if key not in keys}, **changes}


SAME = {
    "official": OFFICIAL,
    "no number of layers": without(OFFICIAL, "num_hidden_layers"),
    "attention_head_dim": without(OFFICIAL, "head_dim", attention_head_dim=8),
    "as transformers 5 saves": without(
        OFFICIAL, "hybrid_override_pattern", "num_hidden_layers", "torch_dtype", dtype="bfloat16",
        n_routed_experts=8, layers_block_type=["linear_attention", "mlp", "full_attention"],
        time_step_limit=[0.0, {"__float__": "Infinity"}],
    ),
    "older block "
    "names": without(OFFICIAL, "hybrid_override_pattern", layers_block_type=["mamba", "mlp", "attention"]),
    "both, agreeing": {**OFFICIAL, "layers_block_type": ["mamba", "mlp", "attention"]},
    "whole numbers with a point": {**OFFICIAL, "hidden_size": 32.0, "num_hidden_layers": 3.0},
    "no upper limit, as JSON.stringify writes it": {**OFFICIAL, "time_step_limit": [0.0, None]},
    "no upper limit in words": {**OFFICIAL, "time_step_limit": [0.0, "Infinity"]},
    "no padding token": {**OFFICIAL, "pad_token_id": -1},
    "nulls": {**OFFICIAL, "time_step_limit": None, "use_conv_bias": None, "layers_block_type": None},
}  # fmt: skip


@pytest.mark.parametrize("dialect", SAME)
def test_config_dialects_load_to_the_same_configuration(dialect, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SAME[dialect]))
    config = load_config(tmp_path)
    assert config == HybridConfig(
        pattern="M-*", vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_num_heads=6, mamba_head_dim=8, n_groups=3, ssm_state_size=16,
        eos_token_id=12,
    )  # fmt: skip
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_qwen3_config_is_pairs_of_attention_and_mlp(rope):
    config = parse({**QWEN, **rope})
    assert (config.pattern, config.rope_theta, config.qk_norm, config.mlp_activation) == (
        "*-*-",
        5e5,
        True,
        "swiglu",
    )
    assert config.tie_word_embeddings and config.eos_token_id == 3 and config.layer_norm_epsilon == 1e-6


SAME_LLAMA = {
    "before transformers 5": LLAMA,
    "as transformers 5 saves": without(
        LLAMA, "rope_theta", "rope_scaling", "torch_dtype", dtype="bfloat16",
        rope_parameters={"rope_theta": 5e5, **LLAMA3},
    ),
    "of 2023": {**LLAMA, "rope_scaling": {**without(LLAMA3, "rope_type"), "type": "llama3"}},
    "both, agreeing": {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    "context before scaling outside": {
        **LLAMA, "rope_scaling": without(LLAMA3, "original_max_position_embeddings"),
        "original_max_position_embeddings": 8192,
    },
    "head_dim said": {**LLAMA, "head_dim": 8},
    "Mistral without a window": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "Mistral, window as long as the context": {**LLAMA, "model_type": "mistral", "sliding_window": 131_072},
    "layers of full attention": {**LLAMA, "layer_types": ["full_attention"] * 2},
}  # fmt: skip


@pytest.mark.parametrize("dialect", SAME_LLAMA)
def test_llama_dialects_load_to_the_same_configuration(dialect):
    config = parse(json.loads(json.dumps(SAME_LLAMA[dialect])))
    assert config == HybridConfig(
        pattern="*-*-", vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_norm_epsilon=1e-5, rope_theta=5e5, rope_scaling=LLAMA3,
        mlp_activation="swiglu", tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    assert not config.qk_norm and model_type(config) == "llama"


def test_llama_fields_that_are_left_out_are_transformers_defaults():
    left_out = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "bos_token_id",
                "eos_token_id", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    config = parse(without(LLAMA, *left_out))
    assert (config.num_key_value_heads, config.layer_norm_epsilon, config.rope_theta) == (4, 1e-6, 1e4)
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (1, 2, 2048)
    assert config.rope_scaling is None and not config.tie_word_embeddings


def test_a_dense_configuration_is_written_under_the_type_that_others_read():
    llama = parse(LLAMA)
    types = {
        "llama": llama,
        "qwen3": llama.replace(qk_norm=True),
        "mistral": llama.replace(hidden_size=24, num_attention_heads=5, num_key_value_heads=1),
        "nanohybrid": llama.replace(pattern="*--"),
    }
    for kind, config in types.items():
        written = json.loads(json.dumps(config_object(config, "bfloat16")))
        assert written["model_type"] == kind and parse(written).rope_scaling == config.rope_scaling
        assert written["rope_scaling"] == LLAMA3 and written["rope_theta"] == 5e5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_saving_and_loading(name):
    config = nanohybrid.preset(name)
    again = parse(json.loads(json.dumps(config_object(config, "bfloat16"))))
    unused = {
        "rescale_prenorm_residual",
        *(field.name for field in dataclasses.fields(config) if "mamba" in field.name or "ssm" in field.name),
    }
    unused |= {
        "n_groups",
        "conv_kernel",
        "chunk_size",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "time_step_limit",
    }
    keep = {} if model_type(config) not in DENSE_TYPES else {name: getattr(config, name) for name in unused}
    assert again.replace(**keep) == config


def test_config_outside_the_official_dialect_has_its_own_model_type():
    plain = nanohybrid.preset("tiny")
    assert model_type(plain) == "nemotron_h"
    for change in ({"rope_theta": 1e4}, {"qk_norm": True}, {"mlp_activation": "swiglu"}):
        assert model_type(plain.replace(**change)) == "nanohybrid"
        assert parse(config_object(plain.replace(**change), "float32")) == plain.replace(**change)


REFUSED = {
    "another model": ({"model_type": "mamba9"}, "model_type"),
    "no model type": ({"model_type": None}, "model_type"),
    "a list as model type": ({"model_type": ["nemotron_h"]}, "model_type"),
    "experts": ({"hybrid_override_pattern": "MEM"}, "mixture of experts"),
    "experts by "
    "name": ({"hybrid_override_pattern": None, "layers_block_type": ["mamba", "moe", "mlp"]}, "mixture of experts"),  # noqa: E501
    "unknown character": ({"hybrid_override_pattern": "M?*"}, '"?"'),
    "unknown block": ({"layers_block_type": ["mamba", "rwkv", "mlp"]}, "rwkv"),
    "blocks not a list": ({"layers_block_type": "M-*"}, "layers_block_type"),
    "two patterns": ({"layers_block_type": ["mamba", "mlp", "mlp"]}, "hybrid_override_pattern"),
    "pattern against number": ({"num_hidden_layers": 4}, "num_hidden_layers"),
    "no pattern": ({"hybrid_override_pattern": None}, "hybrid_override_pattern"),
    "empty pattern": ({"hybrid_override_pattern": ""}, "hybrid_override_pattern"),
    "width missing": ({"hidden_size": None}, "hidden_size"),
    "heads missing": ({"mamba_num_heads": None}, "mamba_num_heads"),
    "negative width": ({"hidden_size": -64}, "hidden_size"),
    "width a word": ({"hidden_size": "wide"}, "hidden_size"),
    "width a fraction": ({"hidden_size": 32.5}, "hidden_size"),
    "width true": ({"hidden_size": True}, "hidden_size"),
    "groups": ({"n_groups": 4}, "n_groups"),
    "key heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "projection biases": ({"use_bias": True}, "use_bias"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias"),
    "no conv bias": ({"use_conv_bias": False}, "use_conv_bias"),
    "activation": ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act"),
    "Mamba activation": ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act"),
    "time step limit a number": ({"time_step_limit": 5}, "time_step_limit"),
    "time step limit a word": ({"time_step_limit": ["a", "b"]}, "time_step_limit"),
    "time step limit without a lower bound": ({"time_step_limit": [None, None]}, "time_step_limit"),
    "a negative token": ({"eos_token_id": -2}, "eos_token_id"),
    "epsilon not a number": ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon"),
    "epsilon zero in float32": ({"layer_norm_epsilon": 1e-300}, "layer_norm_epsilon"),
    "time step limit beyond "
    "float32": ({"time_step_limit": [0.0, 1e308]}, "the upper bound of time_step_limit is 1e+308"),
    "a width beyond int32": ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
}  # fmt: skip
REFUSED_QWEN = {
    "scaling without context": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max"),
    "no theta": ({"rope_theta": -1}, "rope_theta"),
    "theta beyond float32": ({"rope_theta": 1e300}, "rope_theta is 1e+300"),
    "theta beyond float64": ({"rope_theta": 10**400}, "rope_theta is 1000"),
    "rope a word": ({"rope_parameters": "default"}, "rope_parameters"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "window": ({"use_sliding_window": True}, "use_sliding_window"),
    "window by layer": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "layers missing": ({"num_hidden_layers": None}, "num_hidden_layers"),
    "layers beyond memory": ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    "tie a word": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
}


def scaled(**changes):
    return {"rope_scaling": {**LLAMA3, **changes}}


MISTRAL = {"model_type": "mistral", "num_key_value_heads": 2}
REFUSED_LLAMA = {
    "biases": ({"attention_bias": True}, "attention_bias"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "frequencies by length": (scaled(rope_type="dynamic"), "rope_type is dynamic"),
    "two sets of frequencies": ({"rope_scaling": {"type": "longrope", "short_factor": []}}, "longrope"),
    "unknown scaling": (scaled(rope_type="cubic"), "known are default, linear, llama3, yarn"),
    "scaling a number": (scaled(rope_type=3), "rope_type is 3"),
    "no factor": (scaled(factor=None), "factor of rope_scaling is missing"),
    "factor below one": (scaled(factor=0.5), "factor of rope_scaling is 0.5"),
    "factor a word": (scaled(factor="8"), "factor of rope_scaling is 8"),
    "no low factor": (scaled(low_freq_factor=None), "low_freq_factor"),
    "factors in reverse": (scaled(low_freq_factor=5.0), "low_freq_factor of rope_scaling is 5.0"),
    "context a fraction": (
        scaled(original_max_position_embeddings=8192.5),
        "original_max_position_embeddings",
    ),
    "two scalings": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "differ"),
    "rotation of a part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "rotation of a part, inside": (scaled(partial_rotary_factor=0.25), "partial_rotary_factor"),
    "positions of images": (scaled(mrope_section=[2, 1, 1]), "mrope_section"),
    "positions by layer": ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention"),
    "truncate a word": (scaled(rope_type="yarn", truncate="no"), "truncate"),
    "yarn's bounds in reverse": (scaled(rope_type="yarn", beta_fast=1, beta_slow=2), "beta_slow"),
    "yarn with theta one": ({"rope_theta": 1.0, **scaled(rope_type="yarn")}, "rope_theta is 1.0"),
    "heads beside the width": ({"num_attention_heads": 6}, "head_dim is missing"),
    "layers of windows": ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention"),
    "chunks": ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
    "Mistral's window": ({**MISTRAL, "sliding_window": 4096}, "sliding_window is 4096: only full"),
    "Mistral's window by default": (MISTRAL, "sliding_window is 4096 (the default)"),
    "layers none": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "tie a word": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
}
REFUSALS = [
    (source, *case)
    for source, cases in ((OFFICIAL, REFUSED), (QWEN, REFUSED_QWEN), (LLAMA, REFUSED_LLAMA))
    for case in cases.values()
]


@pytest.mark.parametrize("source, change, named", REFUSALS, ids=[*REFUSED, *REFUSED_QWEN, *REFUSED_LLAMA])
def test_load_config_names_unsupported_settings(source, change, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**source, **change}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert (
        named in str(caught.value)
        and str(tmp_path / "config.json") in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000, b"null", b"1" * 6000]
)
def test_load_config_refuses_a_file_that_is_not_a_json_object(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_load_config_refuses_a_missing_directory(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, says in [
        ("nowhere", "no such directory"),
        ("file", "not a directory"),
        ("empty", "no such file"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            load_config(tmp_path / path)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 200), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.just(10**400), st.just("\ud800"),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(
    st.sampled_from([OFFICIAL, QWEN, LLAMA]).flatmap(
        lambda raw: st.tuples(st.just(raw), st.dictionaries(st.sampled_from(sorted(raw)), VALUES))
    )
)
def test_load_config_of_fuzzed_values_raises_no_other_error(case):
    source, changes = case
    try:
        config = parse({**source, **changes})
    except NanohybridError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, HybridConfig)
