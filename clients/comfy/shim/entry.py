"""visattn in ComfyUI: this folder belongs into custom_nodes, `visattn comfy PATH` writes it."""

from visattn.clients.comfy.nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
