"""Quantized matrices in the files of checkpoints, and how each public layout is read and written."""
