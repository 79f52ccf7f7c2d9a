"""Swapped timm models and the backbones, against golden outputs."""
