"""Trains the embedded models and the digits classifiers."""
