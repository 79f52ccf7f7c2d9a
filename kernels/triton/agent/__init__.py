"""Kernels of agent attention.

`attention` is the autograd function: `attend` in splits of the keys, `combine` them, then attend to the agents.
"""
