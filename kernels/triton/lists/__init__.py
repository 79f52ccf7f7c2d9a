"""Kernels that walk tile lists on any GPU that Triton supports."""
