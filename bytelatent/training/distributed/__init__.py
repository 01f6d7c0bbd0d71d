"""Training on several processes: ranks, the plan that divides the work, FSDP, tensor parallelism, sharded tables, whole
matrices.
"""
