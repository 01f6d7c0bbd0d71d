"""Saving and resuming a run: `manager.py` decides when and what, `storage.py` reads and writes tensors."""
