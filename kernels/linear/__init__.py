"""Attention through sums over all keys (linear, flow, mala), alone or beside sparse softmax."""
