"""Which executor runs a model on this machine."""

from __future__ import annotations

from nanohybrid.executors.executor import Executor
from nanohybrid.executors.torch import TorchExecutor
from nanohybrid.model.cache import HybridCache
from nanohybrid.model.lm import HybridLM


def executor_for(model: HybridLM, cache: HybridCache) -> Executor:
    """The CPU kernels where the model is packed for them and they hold this cache, else torch.

    CUDA graphs record a torch executor's decode steps, and are asked for beside it
    (executors/cuda_graphs.py).
    """
    from nanohybrid.executors.cpu.weights import is_packed

    if is_packed(model):
        from nanohybrid.executors.cpu.forward import CpuExecutor  # imports numba

        if CpuExecutor.holds(model, cache):
            return CpuExecutor(model, cache)
    return TorchExecutor(model, cache)
