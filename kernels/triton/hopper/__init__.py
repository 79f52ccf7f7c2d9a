"""Kernels that walk tile lists on Hopper, in Gluon: bulk copies and specialised warps."""
