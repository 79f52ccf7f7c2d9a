"""Block-sparse attention in Triton: any tile plan, forward and backward, from Ampere to Blackwell."""

from visattn.kernels.triton.engine import backend

__all__ = ["backend"]
