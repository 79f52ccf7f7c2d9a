"""Adapters of other programs, against the programs themselves or doubles of their contracts."""
