"""Patterns with two branches: whoever runs lists runs one, the other is added.

`rows` has the weights of tokens in the mix of both.
"""
