"""Outputs of the published implementations."""
