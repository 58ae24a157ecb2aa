"""The CPU executor: weights packed into GEMM panels, and one numba kernel for the whole forward."""
