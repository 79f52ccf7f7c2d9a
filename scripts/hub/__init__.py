"""Lays the tile-list kernels out as a kernel of the hub, and states plans for it."""
