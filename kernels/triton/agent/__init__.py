"""Kernels of agent attention."""
