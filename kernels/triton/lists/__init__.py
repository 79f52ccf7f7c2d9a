"""Kernels that walk tile lists on any GPU that Triton supports.

`program` states a plan as lists on a device, `positions` where tokens are for the position bias. `forward`, `key_grad`
and `query_grad` walk them; `delta` runs before the gradients, `bias_grad` after.
"""
