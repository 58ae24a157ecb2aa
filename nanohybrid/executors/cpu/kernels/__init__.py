"""The kernels of the CPU executor, compiled by numba at first use.

They run on the thread pool of `ops/numba`.
"""
