"""FlashAttention-4 as a backend: tile plans as its lists of full and partial blocks, forward and backward.

`words` and `blocks` say a plan in its terms, `chosen` the lists that q and k choose; `mods` are mask functions that it
compiles, `package` finds and imports it, `trial` compares each kernel with the reference before its results are used,
and `backend` runs calls.
"""
