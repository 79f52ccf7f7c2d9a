"""Swaps the attention of timm models: one file a kind of attention; the adapter of `visattn.apply`."""
