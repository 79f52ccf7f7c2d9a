"""Fewer query heads, and shared key heads, in a pretrained model: weights are merged or chosen, and all is undone."""
