"""The CPU engine: tile lists in plain torch, batched by shape."""
