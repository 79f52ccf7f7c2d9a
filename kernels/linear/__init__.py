"""Attention through sums over all keys (linear, flow, mala, wersa), alone or beside sparse softmax.

`features` maps queries and keys, `plain` sums, `causal` sums over earlier positions of an axis, `slabs` over ranks;
`flow` and `mala` are forms of their own, `wersa` features of its own. `sparse_linear` is the backend of mixes with
sparse softmax, whose other half `hidden` computes. The kernels are in `triton/linear`.
"""
