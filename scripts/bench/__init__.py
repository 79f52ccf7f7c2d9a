"""How fast: CPU and GPU engines, backends, whole models."""
