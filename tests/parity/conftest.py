"""Reference models of transformers, imported once and only by these tests."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the reference of these tests: pip install 'nanohybrid[dev]'"
)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
VOCAB = 96


@torch.no_grad()
def randomize(model):
    """Weights under which every part of a model matters: decays from slow to fast, norms that are not one."""
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.uniform_(-6, 1)
        elif name.endswith("A_log"):
            parameter.uniform_(0, 2.5)
        elif parameter.ndim >= 2:
            parameter.normal_(0, 0.1)
        elif "norm" in name or name.endswith(".D"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 0.3)
    return model.float().eval()


def free_steps(model):
    """transformers 5.23 clamps dt in its prefill, whatever the configuration says, and not in its step; here
    in neither."""
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


@pytest.fixture
def nemotron():
    """Make a random nemotron_h of transformers from a pattern and sizes."""

    def make(pattern, **sizes):
        config = transformers.NemotronHConfig(
            vocab_size=VOCAB,
            layers_block_type=[KINDS[kind] for kind in pattern],
            conv_kernel=4,
            mlp_hidden_act="relu2",
            **sizes,
        )
        return free_steps(randomize(transformers.NemotronHForCausalLM(config)))

    return make


@pytest.fixture
def qwen():
    """Make a random qwen3 of transformers."""

    def make(**sizes):
        return randomize(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=VOCAB, **sizes)))

    return make


@pytest.fixture
def llama():
    """Make a random llama or mistral of transformers."""
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }

    def make(kind="llama", **sizes):
        config, model = kinds[kind]
        return randomize(model(config(vocab_size=VOCAB, **sizes)))

    return make


@pytest.fixture
def reopened():
    """Open a directory with transformers, as someone who does not know us would; nothing may be missing or
    over."""

    def reopen(directory):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        return free_steps(model.eval()) if model.config.model_type == "nemotron_h" else model.eval()

    return reopen


@pytest.fixture
def transformers_config():
    """A Llama configuration of transformers with heads of one width and these rotary positions."""

    def make(head_dim, rope):
        return transformers.LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=131_072,
            rope_parameters=rope,
        )

    return make
