"""Finds the fastest schedule of patterns that holds a quality, or the best one at a speed; knows no model library."""
