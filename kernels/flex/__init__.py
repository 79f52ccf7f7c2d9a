"""PyTorch's FlexAttention as a backend.

`blocks` states a tile plan in its terms: block mask, mask and score functions over the slots of tiles. `visible` says
which slots see each other.
"""
