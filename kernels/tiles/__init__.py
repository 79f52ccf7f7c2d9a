"""The CPU engine: tile lists in plain torch, batched by shape.

A pattern becomes `groups` of query tiles with equally many keys, exact `boxes` where it is one interval per axis
(`rule` chooses their size); `batches` cuts them to what stays in the cache; `engine` runs them forward and backward,
by `moves` between rows and problems and the `fused` kernel. Lists that q and k choose are `routed`: whole key tiles
move, for each group of `heads` that shares lists. `plain` and `sides` are gradients that can be differentiated again.
`eightbit` rounds as the kernels of 8 bits do.
"""
