"""Block-sparse attention in Triton: any tile plan, forward and backward, from Ampere to Blackwell."""
