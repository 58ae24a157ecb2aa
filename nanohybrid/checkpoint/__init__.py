"""Reading and writing checkpoints in the Hugging Face layout: configuration dialects, safetensors, shards."""

from nanohybrid.checkpoint.dialects import load_config
from nanohybrid.checkpoint.hf import cast_as_stored, load, save
from nanohybrid.checkpoint.quantization import refuse_quantized
from nanohybrid.checkpoint.reader import CheckpointReader
from nanohybrid.checkpoint.source import display_name, resolve
from nanohybrid.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "cast_as_stored",
    "display_name",
    "load",
    "load_config",
    "refuse_quantized",
    "resolve",
    "save",
]
