"""Executors: how a model's forward is computed.

Each gives the plain model's numbers (model/lm.py) and is tested against it.

torch         any model, any device
cpu           packed bf16, int8 or int4 weights, and one numba kernel for the whole forward
cuda_graphs   decode steps of the torch executor, recorded and replayed
"""

from nanohybrid.executors.choose import executor_for
from nanohybrid.executors.executor import Executor
from nanohybrid.executors.torch import TorchExecutor

__all__ = ["Executor", "TorchExecutor", "executor_for"]
