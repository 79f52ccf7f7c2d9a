"""vLLM-Omni: its adapter against a double of the contract, and the package itself where it is installed."""
