"""Bi-level routing on the device: what every region sees, as the lists that the attention kernels walk.

`means` averages regions and multiplies them, `choose` takes the best and writes the lists of query tiles, `turn` those
of key tiles for their gradients. `tables` is what does not depend on q and k, `router` starts the kernels.
"""
