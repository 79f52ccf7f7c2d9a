"""PyTorch's FlexAttention as a backend."""
