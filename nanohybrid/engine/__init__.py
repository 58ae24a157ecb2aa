"""The inference engine: scheduler, block manager, prefix cache, sampler, thinking budget, grammars."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanohybrid.engine.config import EngineConfig
    from nanohybrid.engine.engine import Engine
    from nanohybrid.engine.llm import LLM
    from nanohybrid.engine.params import Completion, SamplingParams, StructuredOutputs

_HOME = {
    "LLM": "llm",
    "Engine": "engine",
    "EngineConfig": "config",
    "Completion": "params",
    "SamplingParams": "params",
    "StructuredOutputs": "params",
}
__all__ = ["LLM", "Completion", "Engine", "EngineConfig", "SamplingParams", "StructuredOutputs"]


def __getattr__(name: str) -> Any:  # lazily: the policy files and the command line's --help need no torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
