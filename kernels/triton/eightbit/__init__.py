"""Attention in 8 bits along tile lists.

`run` takes calls and refuses what is not built; `launch` lays tiles out, quantises by the kernels of `quantise` and
starts the walk: `forward`, or on Hopper `visattn.kernels.triton.hopper.eightbit`. `cost` says what quantising takes.
"""
