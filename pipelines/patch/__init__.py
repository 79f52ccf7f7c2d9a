"""Patches the attention of diffusers models: installation, per-forward state, steps, undo."""
