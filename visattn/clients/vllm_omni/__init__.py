"""vLLM-Omni: a backend "VISATTN" of its diffusion attention, which runs a pattern."""
