"""Whether the built package is whole, and the GPU engines are right on a GPU."""
