"""Attention through a few agents (agent), and among merged tokens (agentsd).

`attention` computes both halves in torch, `agent_sd` what Stable Diffusion's merged tokens take; the kernels are in
`triton/agent`.
"""
