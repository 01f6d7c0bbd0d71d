"""What each verb does, one file per verb."""

import gc
from importlib import import_module
from typing import Any


def import_uncollected(module: str) -> Any:
    """Import a module that takes seconds. It is no garbage: not to look for any saves up to a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        if collects:
            gc.enable()
