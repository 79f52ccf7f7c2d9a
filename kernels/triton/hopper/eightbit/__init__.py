"""The forward in 8 bits on Hopper: `forward` is the kernel, its other warps `copy` tiles, `softmax` makes weights of bytes."""
