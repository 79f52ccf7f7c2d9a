"""Block-sparse attention in Triton: any tile plan, forward and backward, from Ampere to Blackwell.

`backend` decides whether and how; the first of calls that are alike starts its kernels by `launch`, from then on they
are `prepared`, and `ready` runs them with and without gradients; of calls of several kernels `again` keeps all
launches. `arguments` are those of the kernels in `lists`, whose pieces are in `parts`; `boxes` chooses tiles, `routes`
builds lists on the device, `splits` cuts sums over all tokens. A kernel starts by `start`, a prepared one `direct`ly.
`config` is the table of launches, `tune` measures others, `estimate` says what a call takes and `scaling` what a layer
on several GPUs, `resources` compiles all of it `ahead` of time, with `products` for the kernels without lists.
"""
