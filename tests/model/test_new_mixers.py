"""A kind of layer that is one file: everything follows from what it declares, and what does not know it refuses it."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import nanohybrid
from nanohybrid.checkpoint import load, load_config, save
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.engine import LLM, Engine, SamplingParams
from nanohybrid.engine.random_weights import stand_in_tokenizer
from nanohybrid.errors import CheckpointError, ConfigError, InputError
from nanohybrid.estimate import Footprint
from nanohybrid.executors import TorchExecutor
from nanohybrid.executors.cpu.weights import packable, prepare
from nanohybrid.model import HybridLM, Layout
from nanohybrid.model.mixers import (
    MIXERS,
    Attention,
    CacheSpec,
    InnerActivation,
    LayerFields,
    Mixer,
    MixerSpec,
    PrunableAxis,
    register,
)
from nanohybrid.model.mixers.recurrent_state import RecurrentStates
from nanohybrid.model.quantized import QuantizedLinear, quantizable
from nanohybrid.model.spec import DRAFT_ROWS
from nanohybrid.verify import verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "add_a_mixer.py"
WINDOW = 16


@pytest.fixture(autouse=True)
def registry():
    """Kinds that a test registers are gone after it."""
    before = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(before)


@pytest.fixture
def window() -> type[Mixer]:
    """The sliding-window attention of the example."""
    spec = importlib.util.spec_from_file_location("add_a_mixer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WindowAttention


def config_with(pattern: str, **fields) -> HybridConfig:
    return HybridConfig(
        pattern, vocab_size=269, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=16, initializer_range=0.3,
        max_position_embeddings=512, extra=fields,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AverageFields(LayerFields):
    """Configuration of the recurrent kind below."""

    average_heads: int = 4
    average_width: int = 8
    average_decay: float = 0.9


class Average(Mixer[AverageFields]):
    """h_t = a h_{t-1} + (1 - a) in(x_t), out(h_t): a moving average, with a recurrent state of its own."""

    symbol, label, color, fields = "a", "moving average", "#2a9d6f", AverageFields
    prunable = (PrunableAxis("average_heads", "--average-heads", "averages"),)
    activation = InnerActivation("in_proj", "output", ("average_heads", "average_width"), writer="out_proj")
    in_proj: nn.Linear
    out_proj: nn.Linear

    @classmethod
    def declare(cls, config):
        inner = ("average_heads", "average_width")
        from nanohybrid.model.mixers.axes import Outer

        return MixerSpec(
            {
                "in_proj.weight": (Outer(*inner), "hidden_size"),
                "out_proj.weight": ("hidden_size", Outer(*inner)),
            },
            cache={"mean": CacheSpec(inner, "recurrent", torch.float32)},
        )

    def forward(self, x_TE, layout, cache):
        states, x_TD, decay = RecurrentStates(cache, layout), self.in_proj(x_TE), self.config.average_decay
        initial = states.initial("mean")
        outputs, finals = [], []
        for i, part_TD in enumerate(x_TD.split(list(layout.lengths))):
            h = x_TD.new_zeros(x_TD.shape[1]).float() if initial is None else initial[i].flatten()
            for row in part_TD:
                h = decay * h + (1 - decay) * row.float()
                outputs.append(h)
            finals.append(h.unflatten(0, (self.config.average_heads, self.config.average_width)))
        states.store("mean", torch.stack(finals) if cache is not None else None)
        return self.out_proj(torch.stack(outputs).to(x_TE.dtype))


def test_window_attention_equals_full_attention_with_a_band_mask(window):
    """Against torch's softmax over an explicit mask, packed documents and all."""
    config = config_with("W", sliding_window=5)
    model = HybridLM(config, seed=0).double()
    tokens, mixer = torch.randint(269, (40,)), model.backbone.layers[0].mixer
    layout = Layout.packed([23, 17])
    x_TE = model.backbone.layers[0].norm(model.backbone.embeddings(tokens))
    q_THP, k_TKP, v_TKP = mixer.project(x_TE, layout)
    k_THP, v_THP = (rows.repeat_interleave(2, dim=1) for rows in (k_TKP, v_TKP))
    t = torch.arange(40)
    document = (t >= 23).long()
    mask = (t[None] <= t[:, None]) & (t[None] > t[:, None] - 5) & (document[None] == document[:, None])
    scores = torch.einsum("THP,CHP->HTC", q_THP, k_THP) / 4
    expected = torch.einsum("HTC,CHP->THP", scores.masked_fill(~mask, float("-inf")).softmax(-1), v_THP)
    torch.testing.assert_close(
        mixer(x_TE, layout, None), mixer.o_proj(expected.flatten(1)), rtol=1e-9, atol=1e-9
    )


def test_a_new_kind_is_saved_and_loaded_with_its_field(window, tmp_path):
    model = HybridLM(config_with("M-W-*-", sliding_window=WINDOW), seed=0)
    save(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "nanohybrid" and raw["sliding_window"] == WINDOW
    again = load(tmp_path)
    tokens = torch.randint(269, (2, 60))
    assert again.config == model.config and again.config.sliding_window == WINDOW
    assert torch.equal(again(tokens), model(tokens))


def test_a_checkpoint_of_an_unregistered_kind_is_refused(window, tmp_path):
    save(HybridLM(config_with("W", sliding_window=WINDOW), seed=0), tmp_path)
    MIXERS.pop("W")
    with pytest.raises(ConfigError, match="known are"):
        load_config(tmp_path)


def test_saving_refuses_a_field_that_it_cannot_write(tmp_path):
    @dataclass(frozen=True)
    class Wider(HybridConfig):
        secret: int = 3

    config = Wider(**config_with("M-").as_dict())
    with pytest.raises(CheckpointError, match="secret"):
        save(HybridLM(config, seed=0), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_the_memory_of_a_window_does_not_grow_with_the_context(window):
    footprint = Footprint.of(config_with("W-", sliding_window=WINDOW), torch.bfloat16)
    assert footprint.kv_bytes_per_token == 0
    assert footprint.state_bytes_per_sequence == 2 * (WINDOW + DRAFT_ROWS) * 2 * 16 * 2
    assert footprint.max_context(2**30) is None


def test_a_bf16_model_with_a_subclass_of_attention_generates_what_its_plain_forward_says(window):
    """The fault that began this: the packed kernels took the subclass for full attention, token for token."""
    model = HybridLM(config_with("M-W-W-", sliding_window=WINDOW), seed=0).bfloat16().eval()
    assert not packable(model) and not prepare(model)
    prompt = torch.randint(13, 269, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = Engine(model, stand_in_tokenizer(model.config), max_num_seqs=1, max_model_len=128)
    assert isinstance(engine.runner.executor, TorchExecutor)
    said = engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + said.token_ids]))[0, len(prompt) - 1 : -1]
    gap = logits.max(-1).values - logits.gather(1, torch.tensor(said.token_ids)[:, None])[:, 0]
    assert (gap <= 0.05 * logits.abs().max()).all(), "within bf16's rounding of the best token"


def test_a_subclass_does_not_inherit_what_others_can_do(window):
    """Kernels, programs and graphs know the class, not what was derived from it."""
    assert Attention.official(config_with("*")) and not window.official(config_with("W"))
    assert window.block_types == () and window.gguf_names == {} and not window.cuda_graphs
    model = HybridLM(config_with("*W"), seed=0)
    assert model.backbone.layers[0].mixer.cpu_kernel() is not None
    assert model.backbone.layers[1].mixer.cpu_kernel() is None


def test_verify_finds_a_kernel_that_computes_another_kind(window):
    """A subclass that claims attention's kernel for its window."""
    pytest.importorskip("numba")
    window.cpu_kernel = Attention.cpu_kernel
    window.declare = Attention.declare  # pages, which the kernel can read
    window.forward = banded
    model = HybridLM(config_with("M-W-", sliding_window=4), seed=0).bfloat16()
    failed = {check.what for check in verify(model) if not check.passed}
    assert "cpu: whole == plain forward" in failed


def banded(self, x_TE, layout, cache):
    from nanohybrid.ops.attention import window_attention

    if cache is not None and any(layout.positions):
        return self.o_proj(self.project(x_TE, layout)[0].flatten(-2))  # continuing is not what is tested
    rows = window_attention(*self.project(x_TE, layout), Layout.packed(layout.lengths), 4)
    return self.o_proj(rows.flatten(-2))


def test_inspect_plan_and_export_know_a_new_kind_or_refuse_it(window, tmp_path, capsys):
    save(HybridLM(config_with("M-W-*-", sliding_window=WINDOW), seed=0).bfloat16(), tmp_path / "model")
    stand_in_tokenizer(config_with("M")).save(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "window attention" in capsys.readouterr().out
    assert main(["plan", "serve", str(tmp_path / "model"), "--memory-gib", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["export", "gguf", str(tmp_path / "model"), str(tmp_path / "model.gguf")]) == 2
    error = capsys.readouterr().err
    assert "window attention" in error and error.count("\n") == 1


def test_a_recurrent_kind_of_its_own_is_verified_on_every_executor(tmp_path):
    """Whole, chunked, batched, cached, preempted, saved and resumed; its draft tokens are refused, since it buffers none."""
    register(Average)
    config = config_with("a-*a", average_heads=3, average_decay=0.8)
    model = HybridLM(config, seed=0)
    checks = {check.what: check for check in verify(model)}
    assert [what for what, check in checks.items() if not check.passed] == []
    assert "refused" in checks["torch engine: drafted == plain"].on
    save(model, tmp_path)
    stand_in_tokenizer(config).save(tmp_path)
    assert load(tmp_path).config == config
    assert (
        len(LLM(tmp_path).generate(["hello"], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids)
        == 4
    )
    with pytest.raises(InputError, match="moving average"):
        Engine(model, stand_in_tokenizer(config), max_num_seqs=1, max_model_len=64, num_speculative_tokens=2)


def test_a_field_of_a_kind_that_the_pattern_lacks_is_refused(window):
    with pytest.raises(ConfigError, match="sliding_window"):
        config_with("M-", sliding_window=8)
    assert config_with("W", sliding_window=8).replace(pattern="M-").extra == ()
    assert config_with("W").replace(sliding_window=9).sliding_window == 9
    with pytest.raises(ConfigError, match="sliding_window"):
        config_with("W", sliding_window=0)


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"symbol": "*"}, "Attention"),
        ({"symbol": "xy"}, "one printable character"),
        ({"label": None}, "label"),
        ({"activation": None}, "activation"),
        ({"block_types": ("mlp",)}, "MLP"),
    ],
    ids=str,
)
def test_register_refuses_incomplete_or_conflicting_facts(facts, complaint):
    kind = type("Broken", (Average,), {"symbol": "b", "label": "broken", "color": "#000000"} | facts)
    with pytest.raises(ConfigError, match=complaint):
        register(kind)


class Taps(Average):
    """A kind with a matrix that is no linear."""

    symbol, label, color = "t", "taps", "#8a7a1f"
    prunable, activation = (), None

    @classmethod
    def declare(cls, config):
        spec = super().declare(config)
        return MixerSpec({**spec.parameters, "taps": ("hidden_size", 32)}, spec.cache)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_a_matrix_that_is_no_linear_is_not_quantized(format, tmp_path):
    register(Taps)
    model = HybridLM(config_with("t*"), seed=0)
    assert "backbone.layers.0.mixer.taps" not in quantizable(model.config)
    save(model, tmp_path)
    again = load(tmp_path, quantize=format)
    assert torch.equal(again.backbone.layers[0].mixer.taps, model.backbone.layers[0].mixer.taps)
    assert isinstance(again.backbone.layers[0].mixer.in_proj, QuantizedLinear)


def named(symbol: str, **facts) -> type[Mixer]:
    return type("Named", (Average,), {"symbol": symbol, "label": "named", "color": "#000000"} | facts)


def test_a_shared_field_with_another_default_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class OtherDefault(AverageFields):
        conv_kernel: int = 3

    register(named("s", fields=OtherDefault))
    with pytest.raises(ConfigError, match="conv_kernel"):
        config_with("s")


def test_an_axis_without_a_field_is_refused_in_one_line():
    spec = MixerSpec({"in_proj.weight": ("hiden_size", "hidden_size")})
    register(named("y", declare=classmethod(lambda cls, config: spec)))
    with pytest.raises(ConfigError, match="hiden_size"):
        config_with("y")


def test_a_property_of_a_kinds_fields_is_an_axis():
    @dataclass(frozen=True, kw_only=True)
    class Derived(AverageFields):
        @property
        def average_inner(self) -> int:
            return self.average_heads * self.average_width

    register(named("w", fields=Derived))
    assert config_with("w", average_heads=3).average_inner == 24


def test_a_class_that_is_defined_again_replaces_the_one_before():
    kinds = [named("r"), named("r")]
    assert [register(kind) for kind in kinds] == kinds and MIXERS["r"] is kinds[1]


def test_commands_know_a_kind_that_the_environment_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOHYBRID_MIXERS", str(EXAMPLE))
    assert main(["plan", "train", "--preset", "tiny", "--json"]) == 0
    assert MIXERS["W"].label == "window attention"
    monkeypatch.setenv("NANOHYBRID_MIXERS", str(tmp_path / "missing.py"))
    assert main(["inspect", "--preset", "tiny"]) == 2
    assert "missing.py" in capsys.readouterr().err


def test_presets_are_public():
    assert nanohybrid.preset("tiny").mixers[0] is MIXERS["M"]
