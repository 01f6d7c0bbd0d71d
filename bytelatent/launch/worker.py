"""One process of a job: `python -m bytelatent.launch.worker SCRIPT ARGUMENT...`, started by torchrun or by srun.

It takes its rank from whichever started it, writes its output to $DUMP_DIR/logs/JOB/RANK.out, turns the cluster's
warning into Ctrl-C, and runs the script.
"""

import os
import runpy
import sys

from bytelatent.errors import guarded
from bytelatent.files import own_file
from bytelatent.signals import interrupt_when_warned

# What torch.distributed reads, and the same in srun's variables.
RANKS = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def main(arguments: list[str]) -> None:
    interrupt_when_warned()
    for name, of_srun in RANKS.items():
        if name not in os.environ:
            os.environ[name] = os.environ[of_srun]
    output = os.path.join(os.environ["DUMP_DIR"], "logs", os.environ["SLURM_JOB_ID"], f"{os.environ['RANK']}.out")
    guarded(lambda: _redirect_output(output))
    script, *sys.argv[1:] = arguments
    guarded(lambda: runpy.run_module(script, run_name="__main__", alter_sys=True))


def _redirect_output(path: str) -> None:
    """Append to a file what this process and its children print; a job that was requeued keeps its id."""
    file = own_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


if __name__ == "__main__":
    main(sys.argv[1:])
