"""`nanohybrid init`: a checkpoint directory of random weights, with a tokenizer and a chat template."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import DTYPES, command_parser, print_json, spelled
from nanohybrid.cli.model_flags import check_seed, random_dtype
from nanohybrid.errors import InputError

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "a checkpoint of random weights, for tests and measurements"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("init", SUMMARY)
    result.add_argument("--preset", required=True, metavar="NAME", help="the configuration")
    result.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the directory to write, which must not exist"
    )
    result.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="precision (default: fp32, or bf16 from a billion parameters on)",
    )
    result.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the weights")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Write weights, config.json, tokenizer and chat template. Raises InputError where --out exists."""
    import torch

    from nanohybrid.checkpoint import CheckpointWriter
    from nanohybrid.engine.random_weights import random_weights, stand_in_tokenizer, whole
    from nanohybrid.model import HybridLM
    from nanohybrid.presets import preset
    from nanohybrid.text import ChatTemplate

    check_seed(arguments.seed)
    config = preset(arguments.preset)
    if arguments.out.exists():
        raise InputError(f"--out {arguments.out} exists; give another directory, or remove it")
    dtype = random_dtype(config) if arguments.dtype == "auto" else getattr(torch, DTYPES[arguments.dtype])
    with tempfile.TemporaryDirectory() as assets:
        stand_in_tokenizer(config).save(assets)
        ChatTemplate.default().save(assets)
        with torch.device("meta"):
            model = HybridLM(config)
        with CheckpointWriter(
            arguments.out, config, dtype, assets=assets
        ) as writer:  # one at a time: a 12B needs no 25 GB
            for name, weight in random_weights(model, dtype, arguments.seed):
                writer.write(name, whole(weight))
    if arguments.json:
        print_json({"out": arguments.out, "preset": arguments.preset, "dtype": spelled(dtype)})
    else:
        print(f"{arguments.out}: {arguments.preset}, random weights in {spelled(dtype)}")
    return 0
