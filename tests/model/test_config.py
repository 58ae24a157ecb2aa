"""What no model can be is refused in one line that names the field."""

import math

import pytest

import nanohybrid
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint
from nanohybrid.presets import PRESETS

REFUSED = [
    (dict(pattern=""), "layer pattern"),
    (dict(pattern=7), "layer pattern"),
    (dict(pattern="M-x"), '"x" at position 2'),
    (dict(vocab_size=0), "vocab_size is 0"),
    (dict(hidden_size=-4), "hidden_size is -4"),
    (dict(hidden_size=8.5), "hidden_size is 8.5: it must be a whole number"),
    (dict(hidden_size=True), "hidden_size is True"),
    (dict(intermediate_size=0), "intermediate_size is 0"),
    (dict(num_key_value_heads=0), "num_key_value_heads is 0"),
    (
        dict(num_key_value_heads=3),
        "num_attention_heads is 40: it must be a multiple of num_key_value_heads = 3",
    ),
    (dict(n_groups=3), "mamba_num_heads is 128: it must be a multiple of n_groups = 3"),
    (dict(head_dim=5, rope_theta=1e4), "head_dim is 5: rotary"),
    (dict(rope_theta=-1.0), "rope_theta"),
    (dict(rope_theta=math.nan), "rope_theta"),
    (dict(mlp_activation="gelu"), "mlp_activation"),
    (dict(layer_norm_epsilon=math.nan), "layer_norm_epsilon"),
    (dict(layer_norm_epsilon="small"), "layer_norm_epsilon"),
    (dict(time_step_limit=(1.0, 0.5)), "time_step_limit"),
    (dict(time_step_limit=(1.0,)), "time_step_limit"),
    (dict(time_step_limit=5.0), "time_step_limit"),
    (dict(time_step_limit=("a", "b")), "time_step_limit"),
    (dict(time_step_min=0.0), "time_step_min"),
    (dict(time_step_min=0.5, time_step_max=0.1), "time_step_m"),
    (dict(eos_token_id=-1), "eos_token_id is -1"),
    (dict(conv_kernel=0), "conv_kernel is 0"),
    (dict(qk_norm="yes"), "qk_norm is yes: it must be true or false"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings is 1"),
    # executors hold these in float32, where they would be infinite, zero or no number
    (dict(time_step_limit=(0.0, 1e308)), "the upper bound of time_step_limit is 1e+308: float32 holds"),
    (dict(time_step_limit=(0.0, 10**400)), "the upper bound of time_step_limit is 1000"),
    (dict(time_step_limit=(math.inf, math.inf)), "the lower bound of time_step_limit is inf"),
    (dict(time_step_limit=(-1.0, math.inf)), "the lower bound of time_step_limit is -1.0"),
    (dict(time_step_limit=(0.0, math.nan)), "the upper bound of time_step_limit is nan"),
    (dict(time_step_limit=(False, True)), "time_step_limit is (False, True): it must be two numbers"),
    (dict(layer_norm_epsilon=1e-300), "layer_norm_epsilon is 1e-300: float32 holds"),
    (dict(layer_norm_epsilon=1e39), "layer_norm_epsilon is 1e+39: float32 holds"),
    (dict(layer_norm_epsilon=0), "layer_norm_epsilon is 0: it must be positive"),
    (dict(layer_norm_epsilon=-1e-5), "layer_norm_epsilon is -1e-05: it must be positive"),
    (dict(layer_norm_epsilon=True), "layer_norm_epsilon is True"),
    (dict(layer_norm_epsilon=10**400), "layer_norm_epsilon is 1000"),
    (dict(rope_theta=1e300, head_dim=4), "rope_theta is 1e+300: float32 holds"),
    (dict(rope_theta=1e-300, head_dim=4), "rope_theta is 1e-300: float32 holds"),
    (dict(rope_theta=True, head_dim=4), "rope_theta is True"),
    (dict(rope_theta=10**400, head_dim=4), "rope_theta is 1000"),
    (dict(initializer_range=-0.1), "initializer_range is -0.1"),
    (dict(initializer_range=1e39), "initializer_range is 1e+39"),
    (dict(initializer_range=math.inf), "initializer_range is inf"),
    (dict(time_step_floor=1e308), "time_step_floor is 1e+308"),
    (dict(time_step_min=1e-300), "time_step_min is 1e-300"),
    # sizes at which torch's own arithmetic overflows
    (dict(vocab_size=2**40), "vocab_size is 1099511627776: it must be at most 2,147,483,647"),
    (dict(eos_token_id=2**31), "eos_token_id is 2147483648"),
    (dict(max_position_embeddings=10**30), "max_position_embeddings is 1000"),
    (dict(chunk_size=2**31), "chunk_size is 2147483648"),
    (
        dict(head_dim=2**31 - 1, hidden_size=2**20),
        "head_dim 2,147,483,647, hidden_size 1,048,576 make a tensor of",
    ),
    (dict(intermediate_size=2**30, hidden_size=2**20), "intermediate_size 1,073,741,824, hidden_size"),
    (dict(mamba_head_dim=2**31 - 1, hidden_size=2**10), "mamba_head_dim 2,147,483,647"),
    (dict(conv_kernel=2**31 - 1), "conv_kernel 2,147,483,647"),
    (dict(ssm_state_size=2**30), "ssm_state_size 1,073,741,824"),
    (dict(pattern="M" * 20_001), "the layer pattern has 20,001 layers"),
    (dict(pattern=["M"] * 100), "the layer pattern is ['M', 'M'"),
]


@pytest.mark.parametrize(
    "changes, complaint", REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_configuration_that_no_model_can_have_is_refused_in_one_line(changes, complaint):
    with pytest.raises(ConfigError) as caught:
        HybridConfig(**(dict(pattern="M*-", vocab_size=50, hidden_size=8, intermediate_size=8) | changes))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_config_checks_only_fields_that_the_pattern_uses():
    HybridConfig(
        pattern="M",
        vocab_size=50,
        hidden_size=8,
        intermediate_size=0,
        num_attention_heads=5,
        num_key_value_heads=3,
    )
    HybridConfig(
        pattern="*-", vocab_size=50, hidden_size=8, intermediate_size=8, mamba_num_heads=5, n_groups=3
    )


def test_config_replace_checks_the_result():
    config = nanohybrid.preset("tiny")
    assert config.replace(pattern="M").num_hidden_layers == 1
    with pytest.raises(ConfigError):
        config.replace(n_groups=3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name):
    assert nanohybrid.preset(name).num_hidden_layers == len(PRESETS[name]["pattern"])


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest nano-9b-v2"):
        nanohybrid.preset("nano-9b")


@pytest.mark.parametrize("name, share", [("tiny", 0.14), ("mini", 0.01)])
def test_dense_preset_is_about_as_large_as_its_hybrid(name, share):
    hybrid, dense = (Footprint.of(nanohybrid.preset(preset)).parameters for preset in (name, f"{name}-dense"))
    assert abs(dense / hybrid - 1) < share


def test_a_number_of_more_digits_than_python_writes_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="layer_norm_epsilon is a int of too many digits"):
        HybridConfig(
            pattern="M", vocab_size=50, hidden_size=8, intermediate_size=8, layer_norm_epsilon=10**5000
        )
