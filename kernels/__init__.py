"""The engines: one room or file a backend, whose `backend` object runs any tile plan or composition it supports."""
