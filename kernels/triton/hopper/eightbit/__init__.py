"""The forward in 8 bits on Hopper.

`forward` is the kernel; its other warps `copy` column tiles and row tiles; `softmax` makes weights of bytes.
"""
