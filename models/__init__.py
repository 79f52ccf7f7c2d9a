"""timm: swapped attention, and the backbones of the papers."""
