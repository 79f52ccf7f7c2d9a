"""Second branches of hybrid patterns on a GPU, without gradients: states of groups of tokens, joined in place.

`states` sums features times values, `join` reads them for every query, `gated` adds the attention of means, `router`
lists by learned maps of means; `run` puts them together for each pattern.
"""
