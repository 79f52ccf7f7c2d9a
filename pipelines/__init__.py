"""Adapters for diffusers pipelines and models."""
