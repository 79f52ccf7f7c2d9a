"""Training, measuring and rendering, on tiny models."""
