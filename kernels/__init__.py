"""One backend a file; each runs any tile plan it supports."""
