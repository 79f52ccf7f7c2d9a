"""ComfyUI: nodes that make the attention of its native models sparse."""
