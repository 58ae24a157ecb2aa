"""GGUF files: their header, the values of their blocks, and their metadata as the files of a checkpoint."""

from nanohybrid.gguf.header import GgufFile, GgufTensor, is_gguf, open_gguf

__all__ = ["GgufFile", "GgufTensor", "is_gguf", "open_gguf"]
