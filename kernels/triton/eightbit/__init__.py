"""Attention in 8 bits: what quantises q, k and v, and the kernels that multiply them.

`visattn.kernels.triton.hopper.eightbit` is the same walk along the lists for Hopper.
"""
