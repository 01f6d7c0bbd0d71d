"""Until `tests.frozen` nobody looks for garbage among what is imported: there is none, and it takes time."""

import gc

gc.disable()
