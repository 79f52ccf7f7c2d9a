"""Training, measuring, checking and benchmarking; run from the checkout as `python -m scripts.ROOM.NAME`."""
