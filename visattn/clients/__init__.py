"""Adapters for other programs than diffusers and timm, a folder each."""
