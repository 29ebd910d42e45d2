"""Triton kernels, one file a kernel. Imported only where one runs: Triton is an optional dependency."""
