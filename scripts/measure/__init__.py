"""How good: what patterns and students cost in quality."""
