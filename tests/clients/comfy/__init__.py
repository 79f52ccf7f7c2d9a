"""ComfyUI: nodes and override against a double of its contract."""
