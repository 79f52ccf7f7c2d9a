"""The specification: the rooms again, each with its oracles."""
