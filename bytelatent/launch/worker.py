"""One process of a job: `python -m bytelatent.launch.worker SCRIPT ARGUMENT...`, started by torchrun or by srun.

It takes its place among the processes from whichever started it, writes to $DUMP_DIR/logs/JOB/RANK.out, turns the
cluster's warning into Ctrl-C, and is then the script.
"""

import os
import runpy
import signal
import sys
import threading

from bytelatent.errors import guarded
from bytelatent.files import own_file

# What torch.distributed reads, and where srun says the same.
PLACES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: list[str]) -> None:
    _stop_when_warned()
    for name, of_slurm in PLACES.items():
        if name not in os.environ:
            os.environ[name] = os.environ[of_slurm]
    # Appended to: a job that was requeued keeps its id.
    log = os.path.join(os.environ["DUMP_DIR"], "logs", os.environ["SLURM_JOB_ID"], f"{os.environ['RANK']}.out")
    guarded(lambda: _write_to(log))
    script, *sys.argv[1:] = arguments
    guarded(lambda: runpy.run_module(script, run_name="__main__", alter_sys=True))


def _write_to(log: str) -> None:
    """Send what this process and those it starts print into a file."""
    file = own_file(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _stop_when_warned() -> None:
    """Have one warning come to the script as Ctrl-C, and none to the processes that it starts.

    That torchrun is killed is a warning, too: not every cluster finds the processes that it leaves behind, and they
    would train on without a job.

    SLURM sends a signal to every process of a job, and one that knows nothing of it would die: those that read ahead or
    compile. They inherit that it is blocked.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background processes ignore it
    parent = os.getppid()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def wait() -> None:
        while signal.sigtimedwait(WARNINGS, 1.0) is None and os.getppid() == parent:
            pass
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
