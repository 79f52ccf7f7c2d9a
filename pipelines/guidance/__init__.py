"""Guidance by perturbed attention: away from what a model makes with its attention disturbed.

`handle.py` is `visattn.guide`, `guided.py` corrects the predictions of one model, `sums.py` finds out how the running
pipeline adds up its predictions, and `halves.py` takes the half of a batch that has the prompt.
"""
