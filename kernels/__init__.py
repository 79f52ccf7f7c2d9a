"""The engines: one room or file a backend, whose `backend` object runs any tile plan or composition it supports.

Rooms have a `backend.py` (what it supports, at which cost, how a call is run) and their engine beside it. Backends of
one file: `sdpa` and `reference` (dense attention under a mask), `natten` and `xformers` (other people's kernels),
`sigmoid`, `clipped`, `wrapped` (gates and temperatures around another pattern), `sharing` (attention that denoising
steps share), `heads` (patterns that differ from head to head), `gate` (lists by trained weights), `ordered` (tokens in
the order of their content), `centroids` (clusters around trained centroids). What several share: `fused` (torch's own
attention, for any number of samples), `masks` (dense masks and position biases), `triangular` (lines that are causal as
a whole), `scores` (log-sum-exps a block of scores at a time), `choosing` (what it costs a CPU
to choose lists), `plan_chunks` (a plan as chunks for plain operators),
`heard` (what parts of a call list), `weights` (other functions of a row's logits than the softmax), `second_order`
(derivatives of gradients), `unchanged` (what a backward reads again). For callers beside `attention`: `caught` (the
share of attention that a pattern lists), `rows` (weights of chosen queries), `halo_padded` (HaloNet's attention as it
was trained).
"""
