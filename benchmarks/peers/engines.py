"""How each engine is run, as a process that prints one JSON object, and the check of its logits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]  # the checkout that is measured, whether it is installed or not
TYPES = {
    "bf16": "bf16",
    "int8": "q8_0",
    "int4": "q4_0",
}  # our format, and the GGUF type with as many bits
# Of a bf16 engine's logits from ours in fp32: rms of the difference over their standard deviation.
MAX_DISTANCE = 0.1


class Failed(Exception):
    """An engine is not installed, or does not compute the same logits."""


@dataclass(frozen=True)
class Workload:
    """A prompt of prompt_tokens for each of `batch` sequences, then new_tokens decode steps."""

    prompt_tokens: int
    new_tokens: int
    batch: int

    def scaled(self, by: float) -> "Workload":
        return Workload(
            max(8, round(self.prompt_tokens * by)), max(4, round(self.new_tokens * by)), self.batch
        )

    def flags(self, threads: int) -> list[str]:
        values = {
            "prompt-tokens": self.prompt_tokens,
            "new-tokens": self.new_tokens,
            "batch": self.batch,
            "threads": threads,
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Setting:
    """What is the same for all engines. ours: the command of the nanohybrid that is measured."""

    model: Path
    files: dict[str, Path]  # GGUF by type
    threads: int
    out: Path
    llama_python: str
    ours: list[str]


@dataclass(frozen=True)
class Measured:
    """One measurement: what a child process printed."""

    engine: str
    kind: str
    workload: str
    values: dict[str, object]

    def short(self) -> str:
        speeds = [f"{key.split('_')[0]} {self.values[key]['median']:.1f} tok/s" for key in SPEEDS]  # type: ignore[index]
        return ", ".join(speeds)


SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")


@dataclass(frozen=True)
class Engine:
    """The formats that an engine has, the command that measures it, and the one that writes its logits."""

    types: tuple[str, ...]
    command: Callable[[Setting, str], list[str]]
    logits: Callable[[Setting], list[str]] | None = None

    def check(self, setting: Setting) -> object:
        """The engine's versions. Raises Failed where it is not installed or its logits differ from ours."""
        if self.logits is None:
            return run([*setting.ours, "--version"], setting.threads, as_json=False)
        file = setting.out / "logits.npy"
        printed = run(
            [*self.logits(setting), "--threads", str(setting.threads), "--logits", str(file)], setting.threads
        )
        theirs, ours = np.load(file), _our_logits(setting)
        distance = float(np.sqrt(np.mean((theirs - ours) ** 2)) / ours.std())
        if not distance < MAX_DISTANCE:
            raise Failed(
                f"its logits differ from ours by {distance:.3f} of their spread: are these the same weights?"
            )
        return {**printed["versions"], "logits_differ_by": round(distance, 4)}


def _llama(setting: Setting, kind: str) -> list[str]:
    return [setting.llama_python, str(HERE / "llama_cpp_child.py"), str(setting.files[kind])]


def _transformers(setting: Setting, _: str = "bf16") -> list[str]:
    return [sys.executable, str(HERE / "transformers_child.py"), str(setting.model)]


ENGINES = {
    "nanohybrid": Engine(
        tuple(TYPES),
        lambda setting, kind: [
            *setting.ours,
            "bench",
            "generate",
            str(setting.model),
            "--dtype",
            kind,
            "--json",
        ],
    ),
    "llama.cpp": Engine(tuple(TYPES), _llama, lambda setting: _llama(setting, next(iter(setting.files)))),
    "transformers": Engine(("bf16",), _transformers, _transformers),
}


def measure(setting: Setting, engine: str, kind: str, name: str, workload: Workload) -> Measured:
    """One measurement, in its own process."""
    values = run([*ENGINES[engine].command(setting, kind), *workload.flags(setting.threads)], setting.threads)
    return Measured(engine, kind, name, values)


def run(command: list[str], threads: int, as_json: bool = True) -> dict[str, object] | str:  # type: ignore[return]
    """The JSON object (or text) that a child prints last. Raises Failed with the last line of its error."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads))
    if done.returncode:
        raise Failed(
            (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        )
    last = done.stdout.strip().splitlines()[-1]
    return json.loads(last) if as_json else last


def environment(threads: int) -> dict[str, str]:
    """The environment of children: this checkout, the number of threads, and no network."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _our_logits(setting: Setting) -> np.ndarray:
    file = setting.out / "ours.npy"
    if not file.exists():
        run(
            [sys.executable, str(HERE / "our_logits.py"), str(setting.model), str(file)],
            setting.threads,
            as_json=False,
        )
    return np.load(file)


def remove_stale_files(model: Path, out: Path) -> None:
    """Remove files in `out` that were made from another model, or from an older version of this one."""
    stamp = f"{model.resolve()} {max(file.stat().st_mtime_ns for file in model.iterdir())}"
    stamp_file = out / "made_of.txt"
    if not stamp_file.exists() or stamp_file.read_text() != stamp:
        for file in (*out.glob("*.gguf"), *out.glob("*.npy")):
            file.unlink()
        stamp_file.write_text(stamp)


def export_gguf(model: Path, out: Path, kind: str) -> Path:
    """The model as a GGUF file in that format, made once."""
    if not out.exists():
        run(
            [
                sys.executable,
                "-m",
                "nanohybrid",
                "export",
                "gguf",
                str(model),
                str(out),
                "--type",
                TYPES[kind],
                "--json",
            ],
            1,
        )
    return out


def make_model(name: str, directory: Path) -> Path:
    """A checkpoint of random bf16 weights, made once."""
    if not (directory / "config.json").exists():
        import torch

        from nanohybrid.checkpoint import save
        from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
        from nanohybrid.presets import preset

        config = preset(name)
        save(random_model(config, torch.bfloat16, seed=0), directory)
        stand_in_tokenizer(config).save(directory)
    return directory
