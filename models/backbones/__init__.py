"""Backbones registered with timm, one file a paper, under their official parameter names."""
