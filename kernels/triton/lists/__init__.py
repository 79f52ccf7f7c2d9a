"""Kernels that walk tile lists on any GPU that Triton supports.

`program` states a plan as lists on a device, `halves` what each half of a row tile has to do with them, `positions`
where tokens are for the position bias. `forward`, `key_grad` and `query_grad` walk them, `skipping` is a forward that
passes over what weighs nothing; `delta` runs before the gradients, `bias_grad` after.
"""
