"""Second branches of hybrid patterns on a GPU, without gradients: states of groups of tokens, joined in place.

Kernels: `states` sums features times values, `join` reads them for every query, `gated` adds the attention of means.
`router` lists, by learned maps of means too; `linear` and `coarse` run the branches, with what `given` takes of a call
and programs of `sizes`. `run` puts them together for each pattern.
"""
