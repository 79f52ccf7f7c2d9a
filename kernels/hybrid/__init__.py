"""Patterns with two branches: whoever runs lists runs one, the other is added."""
