"""SFT, GRPO and merging as stages: checkpoint in, checkpoint out; GRPO goes on bit for bit."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanohybrid.align import GrpoRecipe, MergeRecipe, SftRecipe, grpo, merge, sft
from nanohybrid.align.chats import ChatMaker, Shares
from nanohybrid.align.grpo import Objective, Rollouts
from nanohybrid.align.rollouts import Rollout, Sampling, draw, pack, reward, sample
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
    rollouts=3,
    prompts=2,
    group=2,
    sampling=Sampling(max_tokens=6),
    held_out=2,
    loop=LoopConfig(log_steps=1, snapshot_steps=1),
)


def measures(out: Path) -> dict[str, float]:
    result: dict[str, float] = json.loads((out / "lineage.json").read_text())["measures"]
    return result


def test_sft_learns_the_chats_and_keeps_the_tokenizer(
    base: Path, data: Path, maker: ChatMaker, tmp_path: Path
) -> None:
    out = sft(SFT, base, tmp_path / "sft", data)
    chat = maker.chat(Problem("running", 1, "run 1+1", "1+1=2", "2"), "thinking", random.Random(0))
    batch = Batch.of([(chat.tokens, chat.loss)])
    losses = [mean_loss(load(path, dtype=torch.float32), [batch]) for path in (base, out)]
    assert losses[1] < losses[0] - 0.5 and measures(out)["final_loss"] > 0
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_sft_without_text_must_be_asked_for(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --data DIR, or set"):
        sft(SFT, base, tmp_path / "sft")
    sft(replace(SFT, tokens=300, shares=Shares(text=0.0)), base, tmp_path / "sft")


def test_a_rollout_is_packed_so_that_only_what_was_sampled_is_learned() -> None:
    problem = Problem("running", 1, "run 1+1", "1+1=2", "2")
    completion = Completion("x", [7, 8, 9], "stop", 0, "none", [-1.0, -2.0, -3.0], 2, forced=range(1, 2))
    batch = pack([Rollout(problem, [5, 6], completion, 1.0)] * 2, [0.5, -0.5])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8] * 2 and batch.layout.lengths == (4, 4)
    assert batch.targets_T.tolist() == [IGNORED, 7, IGNORED, 9] * 2 and batch.target_count == 4
    assert batch.old_T.tolist() == [0, -1, -2, -3] * 2
    assert batch.advantages_T.tolist() == [0, 0.5, 0.5, 0.5, 0, -0.5, -0.5, -0.5]


def test_what_did_not_end_earns_nothing() -> None:
    problem = Problem("running", 1, "run 1+1", "1+1=2", "2")
    ended = Completion("1+1=2\n</think>\n\n2", [1], "stop", 0, "natural", None, 1)
    assert reward(problem, ended) == 1.0
    assert (
        reward(problem, replace(ended, finish_reason="length"))
        == 0.0
        == reward(problem, replace(ended, text="3"))
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainers_log_probabilities_are_the_engines(
    base: Path, maker: ChatMaker, temperature: float
) -> None:
    policy = load(base, dtype=torch.float32)
    sampling = Sampling(max_tokens=6, temperature=temperature)
    problems = draw(("running", "sums"), (3,), 2, random.Random(0))
    batch = pack(sample(policy, maker, problems, 2, sampling, random.Random(1)), [1.0] * 4)
    objective = Objective(replace(GRPO, sampling=sampling), None)
    sampled = batch.targets_T != IGNORED
    with torch.no_grad():
        torch.testing.assert_close(
            objective.log_probs(policy, batch)[sampled], batch.old_T[sampled], rtol=1e-4, atol=1e-4
        )
        assert objective(policy, batch)[0].item() == pytest.approx(-batch.target_count, rel=1e-4)


@pytest.mark.parametrize("updates", [1, 2])
def test_grpo_goes_on_bit_for_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    recipe = replace(GRPO, updates=updates, beta=0.1)
    monkeypatch.setattr(
        "nanohybrid.align.rollouts.reward", lambda problem, completion: float(completion.token_ids[0] % 2)
    )
    expected = load(grpo(recipe, base, tmp_path / "whole")).state_dict()
    before = load(base).state_dict()
    assert any(not torch.equal(expected[name], tensor) for name, tensor in before.items())
    draw_and_sample = Rollouts.sample

    def failing(self: Rollouts, number: int) -> object:
        if number == 2:
            raise OSError("the disk is gone")
        return draw_and_sample(self, number)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(Rollouts, "sample", failing)
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


def test_grpo_recipes_that_cannot_be_are_refused() -> None:
    for changes, message in ({"group": 1}, "group at least 2"), ({"updates": 3}, "take a multiple"):
        with pytest.raises(ConfigError, match=message):
            replace(GRPO, **changes)  # type: ignore[arg-type]


def test_a_merge_lies_between_its_parents_and_refuses_strangers(base: Path, tmp_path: Path) -> None:
    first = load(base, dtype=torch.float32)
    second = load(base, dtype=torch.float32)
    second.reset_parameters(1)
    save(second, tmp_path / "second", assets=base)
    out = merge(MergeRecipe(0.25), base, tmp_path / "second", tmp_path / "merged")
    got = load(out, dtype=torch.float32).state_dict()
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(got[name], 0.75 * tensor + 0.25 * second.state_dict()[name])
    second.backbone.norm_f.weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="only twins can be merged"):
        from nanohybrid.align.merge import interpolate

        interpolate(first.state_dict(), second.state_dict(), 0.5)


def test_the_command_line_runs_each_of_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "sft"
    flags = [
        "--tokens",
        "300",
        "--batch_tokens",
        "300",
        "--sequence_length",
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
    assert main(["align", "grpo", "--model", str(base), "--out", str(tmp_path / "g"), "--group", "1"]) == 2
    assert "group at least 2" in capsys.readouterr().err


def test_text_of_another_tokenizer_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "foreign")
    TokenStore.from_documents([([5000] * 20, [1] * 20)] * 9).write(tmp_path / "foreign" / "text.safetensors")
    with pytest.raises(InputError, match="text: holds ids up to 5000"):
        sft(SFT, base, tmp_path / "sft", tmp_path / "foreign")
    assert not (tmp_path / "sft.partial").exists()  # nothing that the right --data would trip over
