"""The kernels of the CPU executor, compiled by numba at first use. What runs them in threads is `ops/numba`."""
