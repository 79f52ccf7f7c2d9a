"""Dynamic patterns on the device: which key blocks each query block lists, and the lists that the kernels walk.

`means`, `scores` and `select` are the kernels of the choice, `choose` starts them; `lists` is the kernel that writes
the lists of query tiles, `tables` what does not depend on q and k, `listed` what one call has of both. `rest` and
`rest_grad` are the kernels of `rest=mean`, `moment` the one of `rest=slope`, `pooled` what one call has of them;
`skipped` runs `skip`. `cost` says what choosing takes.
"""
