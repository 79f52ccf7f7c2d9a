"""Kernels that walk tile lists on Hopper, in Gluon: bulk copies and specialised warps.

`launch` says which calls they take. `forward`, `key_grad` and `query_grad` are the kernels, `one_pass` is both
gradients at once, which adds those of queries in `turns`, and `eightbit` the forward in 8 bits; their warps deal
(`jobs`), `copy` tiles and `fill` rings with what is too small to copy; `masks` are laid out for threads, `parts` has
what they share.
"""
