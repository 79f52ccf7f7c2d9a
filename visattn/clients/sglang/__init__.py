"""SGLang: the self-attention of its diffusion models runs a pattern, where it would run torch's own attention."""
