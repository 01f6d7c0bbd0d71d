"""What a process has imported leaves the garbage collector's sight: neither it nor its forks look through it again."""

import gc

gc.collect()
gc.freeze()
gc.enable()
