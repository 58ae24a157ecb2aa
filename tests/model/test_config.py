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
]


@pytest.mark.parametrize(
    "changes, complaint", REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_configuration_that_no_model_can_have_is_refused_in_one_line(changes, complaint):
    with pytest.raises(ConfigError) as caught:
        HybridConfig(**(dict(pattern="M*-", vocab_size=50, hidden_size=8, intermediate_size=8) | changes))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_the_pattern_uses_is_judged():
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


def test_replace_checks_anew():
    config = nanohybrid.preset("tiny")
    assert config.replace(pattern="M").num_hidden_layers == 1
    with pytest.raises(ConfigError):
        config.replace(n_groups=3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name):
    assert nanohybrid.preset(name).num_hidden_layers == len(PRESETS[name]["pattern"])


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest nano-9b-v2"):
        nanohybrid.preset("nano-9b")


@pytest.mark.parametrize("name, share", [("tiny", 0.14), ("mini", 0.01)])
def test_a_dense_twin_is_about_as_large_as_its_hybrid(name, share):
    hybrid, dense = (Footprint.of(nanohybrid.preset(preset)).parameters for preset in (name, f"{name}-dense"))
    assert abs(dense / hybrid - 1) < share
