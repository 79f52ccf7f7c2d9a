"""Kernels of linear attention: gather sums over the keys, read them for each query.

`attention` is the autograd function of `gather`, `read` and `grad`, whose feature maps are in `parts`. In `causal` the
sums are over the keys of earlier positions.
"""
