"""transformers: every tower of the table, names, and what `apply` promises."""
