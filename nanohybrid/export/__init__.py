"""Export to other programs: GGUF files for llama.cpp."""

from nanohybrid.export.gguf_file import TYPES, GgufExport

__all__ = ["TYPES", "GgufExport"]
