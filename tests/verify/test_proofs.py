"""The proofs pass on a sound model, and each fails on the defect that it is there to find."""

import dataclasses
import json

import pytest
import torch

import nanohybrid
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.engine import scheduler
from nanohybrid.engine.runner import Runner
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.mixers import mamba2
from nanohybrid.ops.attention import pages
from nanohybrid.ops.causal_conv import torch as torch_form
from nanohybrid.presets import PRESETS
from nanohybrid.train import training_state
from nanohybrid.verify import saving, verify
from nanohybrid.verify.line import TOLERANCE, Line
from nanohybrid.verify.small import small_config

CONFIG = small_config(nanohybrid.preset("nano-9b-v2")).replace(initializer_range=0.2)
ENGINE = {
    f"engine: {name}"
    for name in (
        "chunked == whole",
        "batched == alone",
        "cached == computed",
        "preempted == not",
        "drafted == plain",
    )
}
ALL = {
    "packed == unpacked",
    "chunked == whole",
    "step == whole",
    "batch == alone",
    *ENGINE,
    "save -> load -> equal",
    "resume == uninterrupted",
}


def failures(config: HybridConfig = CONFIG, dtype: torch.dtype = torch.float32) -> set[str]:
    lines = list(verify(HybridLM(config, seed=0).to(dtype)))
    assert {line.what for line in lines} == ALL
    return {line.what for line in lines if not line.passed}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_sound_model_passes_in_every_number_format(dtype):
    assert failures(dtype=dtype) == set()


@pytest.mark.parametrize("preset", ["qwen3-8b", "tiny", "tiny-dense"])
def test_other_architectures_pass(preset):
    assert failures(small_config(nanohybrid.preset(preset))) == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_small_copy_has_every_kind_of_layer(preset):
    config = nanohybrid.preset(preset)
    small = small_config(config)
    assert set(small.pattern) == set(config.pattern) and len(small.pattern) <= 8
    assert small.mlp_activation == config.mlp_activation and small.rope_theta == config.rope_theta


def test_states_that_are_not_carried_are_found(monkeypatch):
    monkeypatch.setattr(mamba2._Carried, "read", lambda self, name: None)
    assert failures() == {"chunked == whole", "step == whole", "batch == alone", "engine: drafted == plain"}


def test_drafts_that_are_not_taken_back_are_found(monkeypatch):
    settle = HybridCache.settle
    monkeypatch.setattr(
        HybridCache,
        "settle",
        lambda self, rows, counts: settle(self, rows, [min(count + 1, 2) for count in counts]),
    )
    assert failures() == {"engine: drafted == plain"}


def test_a_state_that_comes_back_without_its_conv_is_found(monkeypatch):
    load = HybridCache.load

    def forgetful(self, saved, slot, pages):
        load(self, saved, slot, pages)
        self.slot_pools[0][slot].zero_()

    monkeypatch.setattr(HybridCache, "load", forgetful)
    assert failures() == {"engine: cached == computed", "engine: preempted == not"}


def test_requests_that_share_a_slot_are_found(monkeypatch):
    layout = Runner._layout

    def shared(self, work):
        made = layout(self, work)
        return dataclasses.replace(made, slots=(0,) * made.sequences)

    monkeypatch.setattr(Runner, "_layout", shared)
    assert {"engine: batched == alone", "engine: preempted == not"} <= failures()


def test_a_prompt_cut_where_no_chunk_ends_is_found(monkeypatch):
    monkeypatch.setattr(scheduler, "CHUNK", 50)
    assert failures() == {"engine: chunked == whole"}


def test_a_conv_that_reaches_into_the_document_before_is_found(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")  # whose conv is broken here
    monkeypatch.setattr(torch_form, "_rows_within", lambda layout, k, device: torch.arange(k))
    assert "packed == unpacked" in failures()


def test_keys_written_one_row_too_far_are_found(monkeypatch):
    write = pages.write

    def shifted_write(pool, rows, layout):
        write(pool, rows.roll(1, 0), layout)

    monkeypatch.setattr(pages, "write", shifted_write)
    assert {"chunked == whole", "batch == alone"} <= failures()


def test_sequences_that_share_a_slot_are_found(monkeypatch):
    monkeypatch.setattr(
        Layout,
        "slot_index",
        lambda self, device: torch.zeros(self.sequences, dtype=torch.int64, device=device),
    )
    assert failures() == {"batch == alone"}


def test_a_checkpoint_that_comes_back_changed_is_found(monkeypatch):
    load = saving.load

    def damaged(*arguments, **options):
        model = load(*arguments, **options)
        model.backbone.layers[0].mixer.A_log.data[0] += 1e-6
        return model

    monkeypatch.setattr(saving, "load", damaged)
    assert failures() == {"save -> load -> equal"}


def test_a_snapshot_that_loses_the_optimizers_moments_is_found(monkeypatch):
    tensors = training_state.tensors

    def only_weights(*arguments):
        return {name: t for name, t in tensors(*arguments).items() if name.startswith("model.")}

    monkeypatch.setattr(training_state, "tensors", only_weights)
    assert failures() == {"resume == uninterrupted"}


def test_nan_never_passes():
    model = HybridLM(CONFIG, seed=0)
    model.backbone.norm_f.weight.data[0] = float("nan")
    lines = {line.what: line for line in verify(model)}
    assert not lines["packed == unpacked"].passed and not lines["chunked == whole"].passed


def test_a_line_says_when_it_could_not_have_failed():
    assert (
        Line("", "", 0.0, 1e-4, forgetful=1.0).telling and not Line("", "", 0.0, 1e-4, forgetful=1e-5).telling
    )


def test_the_command_exits_0_1_or_2(monkeypatch, capsys):
    command = ["verify", "--preset", "tiny", "--random-weights", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and {proof["what"] for proof in result["proofs"]} == ALL
    assert main(command[:-1]) == 0
    assert "chunked == whole" in capsys.readouterr().out
    monkeypatch.setattr(mamba2._Carried, "read", lambda self, name: None)
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
def test_bad_input_is_one_line(arguments, complaint, capsys):
    assert main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
