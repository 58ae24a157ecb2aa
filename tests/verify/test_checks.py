"""The checks pass on a sound model, and each fails on the defect that it is there to find."""

import dataclasses
import json

import pytest
import torch

import nanohybrid
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.engine import scheduler
from nanohybrid.engine.runner import Runner
from nanohybrid.executors.cpu.drafts import CpuDrafts
from nanohybrid.executors.cpu.forward import CpuExecutor
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.mixers.recurrent_state import RecurrentStates
from nanohybrid.ops.attention import pages
from nanohybrid.ops.causal_conv import torch as torch_form
from nanohybrid.ops.numba import available
from nanohybrid.presets import PRESETS
from nanohybrid.train import training_state
from nanohybrid.verify import checkpoint_check, verify
from nanohybrid.verify.result import TOLERANCE, CheckResult
from nanohybrid.verify.small import small_config

CONFIG = small_config(nanohybrid.preset("nano-9b-v2")).replace(initializer_range=0.2)
EXECUTOR = {
    f"{name}" for name in ("whole == plain forward", "chunked == whole", "step == whole", "batch == alone")
}
ENGINE = {
    "chunked == whole",
    "batched == alone",
    "cached == computed",
    "preempted == not",
    "drafted == plain",
}
PLAIN = {"model: packed == unpacked", "save -> load -> equal", "resume == uninterrupted"}


def of(executor: str) -> set[str]:
    """The names of one executor's checks."""
    return {f"{executor}: {what}" for what in EXECUTOR} | {f"{executor} engine: {what}" for what in ENGINE}


def failures(config: HybridConfig = CONFIG, dtype: torch.dtype = torch.float32) -> set[str]:
    """The checks that fail, without the name of the torch executor; those of the CPU kernels begin with
    "cpu".
    """
    lines = list(verify(HybridLM(config, seed=0).to(dtype)))
    packed = of("cpu") if dtype == torch.bfloat16 and available() else set()
    assert [line.what for line in lines if line.what not in PLAIN | of("torch") | packed] == []
    assert len(lines) == len(PLAIN | of("torch") | packed)
    return {line.what.removeprefix("torch").lstrip(": ") for line in lines if not line.passed}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_verify_passes_a_sound_model_in_every_number_format(dtype):
    assert failures(dtype=dtype) == set()


@pytest.mark.parametrize("preset", ["qwen3-8b", "tiny", "tiny-dense"])
def test_verify_passes_dense_and_tiny_architectures(preset):
    assert failures(small_config(nanohybrid.preset(preset))) == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_small_copy_has_every_kind_of_layer(preset):
    config = nanohybrid.preset(preset)
    small = small_config(config)
    assert set(small.pattern) == set(config.pattern) and len(small.pattern) <= 8
    assert small.mlp_activation == config.mlp_activation and small.rope_theta == config.rope_theta


def test_verify_finds_states_that_are_not_carried(monkeypatch):
    monkeypatch.setattr(RecurrentStates, "initial", lambda self, name: None)
    assert failures() == {"chunked == whole", "step == whole", "batch == alone", "engine: drafted == plain"}


def test_verify_finds_draft_tokens_that_are_not_rolled_back(monkeypatch):
    commit = HybridCache.commit
    monkeypatch.setattr(
        HybridCache,
        "commit",
        lambda self, rows, counts: commit(self, rows, [min(count + 1, 2) for count in counts]),
    )
    assert failures() == {"engine: drafted == plain"}


def test_verify_finds_a_state_restored_without_its_conv(monkeypatch):
    load = HybridCache.load

    def forgetful(self, saved, slot, pages):
        load(self, saved, slot, pages)
        self.slot_pools[0][slot].zero_()

    monkeypatch.setattr(HybridCache, "load", forgetful)
    assert failures() == {"engine: cached == computed", "engine: preempted == not"}


def test_verify_finds_requests_that_share_a_slot(monkeypatch):
    layout = Runner._layout

    def shared(self, work):
        made = layout(self, work)
        return dataclasses.replace(made, slots=(0,) * made.sequences)

    monkeypatch.setattr(Runner, "_layout", shared)
    assert {"engine: batched == alone", "engine: preempted == not"} <= failures()


def test_verify_finds_a_prompt_cut_inside_a_chunk(monkeypatch):
    monkeypatch.setattr(scheduler, "CHUNK", 50)
    assert failures() == {"engine: chunked == whole"}


def test_verify_finds_a_conv_that_crosses_documents(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")  # whose conv is broken here
    monkeypatch.setattr(torch_form, "_rows_within", lambda layout, k, device: torch.arange(k))
    assert "model: packed == unpacked" in failures()


def test_verify_finds_keys_written_one_row_too_far(monkeypatch):
    write = pages.write

    def shifted_write(pool, rows, layout):
        write(pool, rows.roll(1, 0), layout)

    monkeypatch.setattr(pages, "write", shifted_write)
    assert {"chunked == whole", "batch == alone"} <= failures()


def test_verify_finds_sequences_that_share_a_slot(monkeypatch):
    monkeypatch.setattr(
        Layout,
        "slot_index",
        lambda self, device: torch.zeros(self.sequences, dtype=torch.int64, device=device),
    )
    assert failures() == {"batch == alone"}


def test_verify_finds_a_checkpoint_that_is_loaded_changed(monkeypatch):
    load = checkpoint_check.load

    def damaged(*arguments, **options):
        model = load(*arguments, **options)
        model.backbone.layers[0].mixer.A_log.data[0] += 1e-6
        return model

    monkeypatch.setattr(checkpoint_check, "load", damaged)
    assert failures() == {"save -> load -> equal"}


def test_verify_finds_training_state_without_moments(monkeypatch):
    tensors = training_state.tensors

    def only_weights(*arguments):
        return {name: t for name, t in tensors(*arguments).items() if name.startswith("model.")}

    monkeypatch.setattr(training_state, "tensors", only_weights)
    assert failures() == {"resume == uninterrupted"}


@pytest.mark.skipif(not available(), reason="numba is not installed")
def test_verify_runs_the_cpu_kernels_that_serve_the_model(monkeypatch):
    """On a bf16 model each check of the CPU executor calls the kernel, as `generate` does."""
    calls = []
    run = CpuExecutor.run
    monkeypatch.setattr(CpuExecutor, "run", lambda self, *a: (calls.append(1), run(self, *a))[1])
    assert failures(dtype=torch.bfloat16) == set()
    assert len(calls) > 40


@pytest.mark.skipif(not available(), reason="numba is not installed")
def test_verify_finds_cpu_kernels_that_lose_positions(monkeypatch):
    """A kernel that takes every call for the beginning of its sequences."""
    run = CpuExecutor.run

    def beginning(self, tokens_T, layout, wanted):
        return run(self, tokens_T, dataclasses.replace(layout, positions=(0,) * layout.sequences), wanted)

    monkeypatch.setattr(CpuExecutor, "run", beginning)
    found = failures(dtype=torch.bfloat16)
    assert {"cpu: chunked == whole", "cpu: step == whole", "cpu: batch == alone"} <= found
    assert all(what.startswith("cpu") for what in found)


@pytest.mark.skipif(not available(), reason="numba is not installed")
def test_verify_finds_cpu_draft_tokens_that_are_not_rolled_back(monkeypatch):
    monkeypatch.setattr(CpuDrafts, "roll_back", lambda self, cache: None)
    assert failures(dtype=torch.bfloat16) == {"cpu engine: drafted == plain"}


def test_verify_fails_on_nan():
    model = HybridLM(CONFIG, seed=0)
    model.backbone.norm_f.weight.data[0] = float("nan")
    lines = {line.what: line for line in verify(model)}
    assert not lines["model: packed == unpacked"].passed and not lines["torch: chunked == whole"].passed


def test_check_result_says_when_it_could_hardly_fail():
    assert (
        CheckResult("", "", 0.0, 1e-4, memoryless=1.0).telling
        and not CheckResult("", "", 0.0, 1e-4, memoryless=1e-5).telling
    )


def test_verify_command_exits_0_or_1(monkeypatch, capsys):
    command = ["verify", "--preset", "tiny", "--random-weights", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and {check["what"] for check in result["checks"]} == PLAIN | of("torch")
    assert main(command[:-1]) == 0
    assert "chunked == whole" in capsys.readouterr().out
    monkeypatch.setattr(RecurrentStates, "initial", lambda self, name: None)
    assert main(command) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "one of the two"),
        (["--preset", "tiny"], "add --random-weights"),
        (["--preset", "huge", "--random-weights"], "huge"),
        (["/nowhere"], "/nowhere"),
        (["/nowhere", "--random-weights"], "has its own weights"),
        (["--preset", "tiny", "--random-weights", "--device", "abacus"], "abacus"),
    ],
    ids=str,
)
def test_verify_command_refuses_bad_input_in_one_line(arguments, complaint, capsys):
    assert main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
