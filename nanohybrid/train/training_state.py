"""What a training run needs to go on after a kill as if nothing had happened, in one safetensors file; no pickle.

Tensors: `model.{name}`; of Adam `first.{name}`, `second.{name}` and `updates.{name}`; all fp32. The header's metadata holds the rest as
JSON: the next step, the tokens seen, and what the caller adds. Batches are a function of the step and nothing here draws random
numbers, so there is no generator to store. One file, written beside and renamed: a kill leaves the old one or the new one.
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
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq", "updates": "step"}  # our names, torch's


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps done, tokens seen, and the average loss of lately."""

    step: int = 0
    tokens: int = 0
    loss: float = 0.0


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> Path:
    """Write the snapshot of a run at `position`, replacing an older one."""
    path = directory / NAME
    beside = scratch(path)
    save_file(tensors(model, optimizer), beside, metadata={"position": json.dumps(asdict(position))})
    flush(beside)
    os.replace(beside, path)
    return path


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name. A parameter that was never stepped has no moments."""
    result = {}
    for name, parameter in model.named_parameters():
        result[f"model.{name}"] = parameter.detach().contiguous()
        state = optimizer.state.get(parameter)
        if state:
            result |= {f"{short}.{name}": state[long].contiguous() for short, long in MOMENTS.items()}
    return result


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position | None:
    """Put a snapshot back into model and optimizer; None where there is none."""
    path = directory / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            names = set(file.keys())
            for name, parameter in model.named_parameters():
                parameter.data.copy_(file.get_tensor(f"model.{name}"))
                if f"first.{name}" in names:
                    optimizer.state[parameter] = {
                        long: file.get_tensor(f"{short}.{name}").to(parameter.device)
                        for short, long in MOMENTS.items()
                    }
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not fit this run ({error}); remove {directory} to begin anew"
        ) from None
    return position


def remove(directory: Path) -> None:
    """Delete the snapshot of a run that is complete."""
    (directory / NAME).unlink(missing_ok=True)
