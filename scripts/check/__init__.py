"""Whether the GPU engines are right, on a GPU."""
