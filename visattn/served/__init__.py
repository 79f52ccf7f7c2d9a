"""Servers that build models in worker processes: patterns from the environment, at layers that tell their name."""
