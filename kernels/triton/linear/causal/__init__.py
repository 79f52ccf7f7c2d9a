"""Kernels of linear attention to earlier positions of an axis, with decay.

`attention` is the autograd function of `gather` (what chunks of positions leave, and the decayed sums of that), `read`
(outputs and the gradients of values) and `grad` (gradients of features). Where tokens lie is in `parts`; chunks,
launches and arguments are in `arguments`.
"""
