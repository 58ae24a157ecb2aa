"""The snapshot of a training run: all that it needs to resume exactly, in one safetensors file. No pickle.

Tensors, all fp32: `model.{name}`, and AdamW's `exp_avg.{name}`, `exp_avg_sq.{name}` and `step.{name}`. The
metadata holds `train_state` as JSON. There is no random state: batches are functions of the step, and
training draws no random numbers. The file is written beside its place and renamed, so a killed run leaves the
old snapshot or the new one.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanohybrid.errors import CheckpointError
from nanohybrid.files import flush, scratch

NAME = "snapshot.safetensors"
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")  # torch's names
TRAIN_STATE, OLD_TRAIN_STATE = "train_state", "position"


@dataclass(frozen=True)
class TrainState:
    """The progress of a run: steps, tokens, and the exponential moving average of the loss in nats."""

    step: int = 0
    tokens: int = 0
    loss_ema: float = 0.0


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
    """Write the snapshot of a run, replacing an older one. Returns its path."""
    path = directory / NAME
    beside = scratch(path)
    save_file(tensors(model, optimizer), beside, metadata={TRAIN_STATE: json.dumps(asdict(state))})
    flush(beside)
    os.replace(beside, path)
    return path


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer states by name. A parameter without any step has no optimizer states."""
    result = {}
    for name, parameter in model.named_parameters():
        result[f"model.{name}"] = parameter.detach().contiguous()
        state = optimizer.state.get(parameter)
        if state:
            result |= {f"{key}.{name}": state[key].contiguous() for key in ADAM_STATE}
    return result


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState | None:
    """Restore a snapshot into model and optimizer; None where there is none.

    Raises CheckpointError where the file is damaged, of another model, or of an older version.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if OLD_TRAIN_STATE in metadata and TRAIN_STATE not in metadata:
                raise CheckpointError(
                    f"{path}: was written by an older version, which stored optimizer states under other "
                    "names; "
                    f"remove {directory} to start over"
                )
            state = TrainState(**json.loads(metadata[TRAIN_STATE]))
            names = set(file.keys())
            for name, parameter in model.named_parameters():
                parameter.data.copy_(file.get_tensor(f"model.{name}"))
                if f"exp_avg.{name}" in names:
                    optimizer.state[parameter] = {
                        key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in ADAM_STATE
                    }
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not fit this run ({error}); remove {directory} to start over"
        ) from None
    return state


def remove(directory: Path) -> None:
    """Delete the snapshot of a run that is complete."""
    (directory / NAME).unlink(missing_ok=True)
