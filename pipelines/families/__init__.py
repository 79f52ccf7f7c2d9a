"""One data record per diffusers model family."""
