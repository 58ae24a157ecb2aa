"""A whole compression in a process of its own that may kill itself, as `kill -9` does, at any write to the
disk."""

import multiprocessing
import os
import signal
from pathlib import Path

EVENTS = ("fsync", "replace", "rename", "link")  # what every write that is to last ends with


def compress_in_a_process(root: Path, out: Path, kill_at: int | None) -> int:
    """Run the stage; dies at the event number `kill_at`. Returns the exit code: 0, or minus the signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nanohybrid.compress.stage", "nanohybrid.stages.plots", "matplotlib.figure"]
    )
    process = context.Process(target=work, args=(root, out, kill_at))
    process.start()
    process.join(300)
    if (
        process.exitcode is None
    ):  # it was stopped from outside, or waits for something: it is not to be left behind
        process.kill()
        raise TimeoutError(
            "a compression that takes some seconds was not done after 300, in "
            f"{out.with_name(out.name + '.partial')}"
        )
    return process.exitcode


def work(root: Path, out: Path, kill_at: int | None) -> None:
    """In the child: count the events, and die at one of them, half of the times just before it and half just
    after."""
    import torch

    torch.set_num_threads(1)
    count = 0

    def counting(function):
        def call(*arguments, **named):
            nonlocal count
            if function.__name__ != "fsync" and not os.fspath(arguments[0]).startswith(str(out.parent)):
                return function(
                    *arguments, **named
                )  # numba caches a kernel that it compiled for the first time: no event of the stage
            count += 1
            if count == kill_at and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in EVENTS:
        setattr(os, name, counting(getattr(os, name)))
    from nanohybrid.align import GrpoRecipe, MergeRecipe, SftRecipe
    from nanohybrid.align.chats import ChatShares
    from nanohybrid.align.rollouts import SamplingConfig
    from nanohybrid.compress.post_training import PostTrainingRecipe
    from nanohybrid.compress.recipe import CompressRecipe
    from nanohybrid.compress.search import Grid
    from nanohybrid.compress.stage import compress
    from nanohybrid.compress.successive_halving import SuccessiveHalvingRecipe
    from nanohybrid.distill.recipe import DistillRecipe
    from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

    learning = {
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "precision": PrecisionConfig("fp32"),
        "loop": LoopConfig(snapshot_steps=1, log_steps=1),
    }
    sampling = {
        "prompts": 2,
        "num_generations": 2,
        "sampling": SamplingConfig(max_tokens=4),
        "eval_problems": 2,
        "warmup_steps": 0,
    }
    after = (
        PostTrainingRecipe(sft=SftRecipe(("parity",), ChatShares(text=0.0), 200, 100, 60, **learning)),
        PostTrainingRecipe(
            grpo=GrpoRecipe(("parity",), (4,), rollout_steps=2, beta=0.1, **sampling, **learning)
        ),
        PostTrainingRecipe(merge=MergeRecipe(0.5)),
    )
    recipe = CompressRecipe(
        budget_share=0.6,
        quantize="int8",
        gguf="q8_0",
        context=64,
        num_calibration_samples=8,
        max_calibration_length=30,
        successive_halving=SuccessiveHalvingRecipe(2, 200),
        grid=Grid(
            multiple=4,
            max_evaluated=2,
            fractions={
                "hidden_size": (1.0, 0.75),
                "intermediate_size": (1.0, 0.75, 0.5),
                "mamba_head_dim": (1.0, 0.5),
            },
        ),
        distill=DistillRecipe(
            tokens=400, batch_tokens=100, sequence_length=40, measured_tokens=100, **learning
        ),
        post_training=after,
    )
    compress(recipe, root / "parent", root / "sft", out)
    (out.parent / f"{out.name}.events").write_text(str(count))
