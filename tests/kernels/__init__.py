"""Every engine against masked dense attention."""
