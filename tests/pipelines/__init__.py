"""Patched diffusers pipelines, and what they work together with."""
