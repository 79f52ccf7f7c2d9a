"""Runs a pattern inside somebody's model: given where the tokens sit, the step and the module, or says why not.

Adapters stand on this room. It knows neither diffusers nor timm: an adapter tells it where the tokens of a forward
sit, which module calls, and what to run instead of a pattern.
"""
