"""Models for other programs: GGUF files, which llama.cpp and what is built on it load."""

from nanohybrid.export.gguf_file import TYPES, GgufExport

__all__ = ["TYPES", "GgufExport"]
