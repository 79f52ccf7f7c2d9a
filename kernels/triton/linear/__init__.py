"""Kernels of linear attention: gather sums over the keys, read them for each query."""
