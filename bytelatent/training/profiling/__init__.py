"""Where time goes: traces of a run, statistics of its layers, and the speed of training on this machine."""
