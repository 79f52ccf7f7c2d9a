"""Guidance by perturbed attention: away from what a model makes with its attention disturbed.

`handle.py` is `visattn.guide`, `guided.py` corrects the predictions of one model, `sums.py` finds out how the running
pipeline adds up its predictions, `halves.py` takes the half of a batch that has the prompt, `perturbing.py` is what
both `guide` and `guider.py`, the guider of modular pipelines, do to a model.
"""
