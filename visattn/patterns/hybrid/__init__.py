"""Patterns with two branches: softmax over chosen key blocks, and something cheap and trained for the others."""
