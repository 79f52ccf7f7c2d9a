"""Block-sparse attention in Triton: any tile plan, forward and backward, from Ampere to Blackwell.

`backend` decides whether and how, `launch` is the autograd function. `arguments` are those of the kernels in `lists`,
whose pieces are in `parts`; `boxes` chooses tiles, `routes` builds lists on the device. A kernel starts by `start`,
for `alike` calls `direct`. `config` is the table of launches, `tune` measures others, `estimate` says what a call
takes, `resources` compiles all of it `ahead` of time, with `products` for the kernels without lists.
"""
