"""How patterns choose key tiles from q and k: blocks, their scores, what is always listed, which ones are picked."""
