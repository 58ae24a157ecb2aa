"""Quantized matrices in the files of checkpoints.

settings.py    what config.json says, and which methods are refused
find.py        tensors -> the layout of each matrix
matrix.py      what every layout has: codes, scales, our format where there is one
integers.py, floats.py, columns.py    the layouts
written.py     what we write
"""
