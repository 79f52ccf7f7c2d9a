"""transformers: patterns in the vision towers of its models, by name of an attention implementation."""
