"""Attention through a few agents (agent), and among merged tokens (agentsd)."""
