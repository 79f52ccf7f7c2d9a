"""Kernels that walk tile lists on Hopper, in Gluon: bulk copies and specialised warps.

`launch` says which calls they take. `forward`, `key_grad` and `query_grad` are the kernels, `one_pass` both gradients
at once in the order of `turns`; their warps deal (`jobs`), `copy` tiles and `fill` rings with what is too small to
copy; `parts` has what they share. `eightbit` is the forward in 8 bits.
"""
