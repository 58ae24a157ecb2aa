"""The stages sft, grpo and merge: checkpoint in, checkpoint out; a killed GRPO resumes exactly."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanohybrid.align import GrpoRecipe, MergeRecipe, SftRecipe, grpo, merge, sft
from nanohybrid.align.chats import ChatMaker, ChatShares
from nanohybrid.align.grpo import GrpoLoss, RolloutLoader
from nanohybrid.align.rollouts import (
    Rollout,
    SamplingConfig,
    draw_problems,
    pack_rollouts,
    reward,
    sample_completions,
)
from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.data import Batch, TokenStore
from nanohybrid.engine import Completion
from nanohybrid.errors import CheckpointError, ConfigError, InputError
from nanohybrid.ops.losses import IGNORED
from nanohybrid.tasks import Problem
from nanohybrid.text import ChatTemplate, Tokenizer
from nanohybrid.train import LoopConfig, PrecisionConfig, mean_loss

SFT = SftRecipe(
    tasks=("running",), tokens=1500, batch_tokens=300, sequence_length=100, precision=PrecisionConfig("fp32")
)
GRPO = GrpoRecipe(
    tasks=("running", "sums"),
    difficulties=(3,),
    rollout_steps=3,
    prompts=2,
    num_generations=2,
    sampling=SamplingConfig(max_tokens=6),
    eval_problems=2,
    loop=LoopConfig(log_steps=1, snapshot_steps=1),
)


def measures(out: Path) -> dict[str, float]:
    result: dict[str, float] = json.loads((out / "lineage.json").read_text())["measures"]
    return result


def test_sft_lowers_the_loss_on_chats_and_copies_the_tokenizer(
    base: Path, data: Path, maker: ChatMaker, tmp_path: Path
) -> None:
    out = sft(SFT, base, tmp_path / "sft", data)
    chat = maker.chat(Problem("running", 1, "run 1+1", "1+1=2", "2"), "thinking", random.Random(0))
    batch = Batch.of([(chat.tokens, chat.loss_mask)])
    losses = [mean_loss(load(path, dtype=torch.float32), [batch]) for path in (base, out)]
    assert losses[1] < losses[0] - 0.5 and measures(out)["final_loss"] > 0
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_sft_and_grpo_write_the_dtypes_of_their_input(base: Path, data: Path, tmp_path: Path) -> None:
    save(load(base).bfloat16(), tmp_path / "bf16", assets=base)
    outs = [
        sft(SFT, tmp_path / "bf16", tmp_path / "sft", data),
        grpo(GRPO, tmp_path / "bf16", tmp_path / "grpo"),
    ]
    for out in outs:
        assert {tensor.dtype for tensor in load(out).state_dict().values()} == {torch.bfloat16}


def test_sft_without_data_requires_a_text_share_of_0(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --data DIR, or set"):
        sft(SFT, base, tmp_path / "sft")
    sft(replace(SFT, tokens=300, shares=ChatShares(text=0.0)), base, tmp_path / "sft")


def test_pack_rollouts_has_targets_at_sampled_tokens_only() -> None:
    problem = Problem("running", 1, "run 1+1", "1+1=2", "2")
    completion = Completion("x", [7, 8, 9], "stop", 0, "none", [-1.0, -2.0, -3.0], 2, forced=range(1, 2))
    batch = pack_rollouts([Rollout(problem, [5, 6], completion, 1.0)] * 2, [0.5, -0.5])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8] * 2 and batch.layout.lengths == (4, 4)
    assert batch.targets_T.tolist() == [IGNORED, 7, IGNORED, 9] * 2 and batch.target_count == 4
    assert batch.old_log_probs_T.tolist() == [0, -1, -2, -3] * 2
    assert batch.advantages_T.tolist() == [0, 0.5, 0.5, 0.5, 0, -0.5, -0.5, -0.5]


def test_reward_of_a_cut_off_completion_is_0() -> None:
    problem = Problem("running", 1, "run 1+1", "1+1=2", "2")
    ended = Completion("1+1=2\n</think>\n\n2", [1], "stop", 0, "natural", None, 1)
    assert reward(problem, ended) == 1.0
    assert (
        reward(problem, replace(ended, finish_reason="length"))
        == 0.0
        == reward(problem, replace(ended, text="3"))
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_grpo_loss_has_the_log_probabilities_of_the_engine(
    base: Path, maker: ChatMaker, temperature: float
) -> None:
    policy = load(base, dtype=torch.float32)
    sampling = SamplingConfig(max_tokens=6, temperature=temperature)
    problems = draw_problems(("running", "sums"), (3,), 2, random.Random(0))
    batch = pack_rollouts(
        sample_completions(policy, maker, problems, 2, sampling, random.Random(1)), [1.0] * 4
    )
    objective = GrpoLoss(replace(GRPO, sampling=sampling), None)
    sampled = batch.targets_T != IGNORED
    with torch.no_grad():
        torch.testing.assert_close(
            objective.log_probs(policy, batch)[sampled], batch.old_log_probs_T[sampled], rtol=1e-4, atol=1e-4
        )
        assert objective(policy, batch)[0].item() == pytest.approx(-batch.target_count, rel=1e-4)


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_grpo_resumes_bit_for_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_per_generation: int
) -> None:
    recipe = replace(GRPO, steps_per_generation=steps_per_generation, beta=0.1)
    monkeypatch.setattr(
        "nanohybrid.align.rollouts.reward", lambda problem, completion: float(completion.token_ids[0] % 2)
    )
    expected = load(grpo(recipe, base, tmp_path / "whole")).state_dict()
    before = load(base).state_dict()
    assert any(not torch.equal(expected[name], tensor) for name, tensor in before.items())
    draw_and_sample = RolloutLoader.sample

    def failing(self: RolloutLoader, number: int) -> object:
        if number == 2:
            raise OSError("the disk is gone")
        return draw_and_sample(self, number)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(RolloutLoader, "sample", failing)
        grpo(recipe, base, tmp_path / "out")
    again = load(grpo(recipe, base, tmp_path / "out")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "metrics" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3] and {"accuracy_before", "accuracy_after"} <= measures(
        tmp_path / "out"
    ).keys()


def test_grpo_recipe_refuses_settings_out_of_range() -> None:
    for changes, message in (
        ({"num_generations": 1}, "num_generations at least 2"),
        ({"steps_per_generation": 3}, "must be a multiple"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(GRPO, **changes)  # type: ignore[arg-type]


def test_merge_interpolates_and_refuses_other_architectures(base: Path, tmp_path: Path) -> None:
    first = load(base, dtype=torch.float32)
    second = load(base, dtype=torch.float32)
    second.reset_parameters(1)
    save(second, tmp_path / "second", assets=base)
    out = merge(MergeRecipe(0.25), base, tmp_path / "second", tmp_path / "merged")
    got = load(out, dtype=torch.float32).state_dict()
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(got[name], 0.75 * tensor + 0.25 * second.state_dict()[name])
    second.backbone.norm_f.weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="only checkpoints of the same architecture can be merged"):
        from nanohybrid.align.merge import interpolate

        interpolate(first.state_dict(), second.state_dict(), 0.5)


def test_align_command_runs_sft_and_merge_and_refuses_a_bad_grpo_recipe(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "sft"
    flags = [
        "--tokens",
        "300",
        "--batch-tokens",
        "300",
        "--sequence-length",
        "100",
        "--shares.text",
        "0",
        "--json",
    ]
    assert main(["align", "sft", "--model", str(base), "--out", str(directory), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(directory)
    assert (
        main(
            [
                "align",
                "merge",
                "--first",
                str(base),
                "--second",
                str(directory),
                "--out",
                str(tmp_path / "m"),
                "--weight",
                "0.5",
            ]
        )
        == 0
    )
    assert "out" in capsys.readouterr().out and Tokenizer.from_directory(tmp_path / "m").vocab_size > 256
    assert ChatTemplate.from_directory(tmp_path / "m").source
    assert (
        main(["align", "grpo", "--model", str(base), "--out", str(tmp_path / "g"), "--num-generations", "1"])
        == 2
    )
    assert "num_generations at least 2" in capsys.readouterr().err


def test_sft_refuses_text_of_another_tokenizer(base: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "foreign")
    TokenStore.from_documents([([5000] * 20, [1] * 20)] * 9).write(tmp_path / "foreign" / "text.safetensors")
    with pytest.raises(InputError, match="text: has ids up to 5000"):
        sft(SFT, base, tmp_path / "sft", tmp_path / "foreign")
    assert not (
        tmp_path / "sft.partial"
    ).exists()  # so that the same command with the right --data starts afresh
