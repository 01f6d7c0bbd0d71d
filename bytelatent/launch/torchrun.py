"""torchrun inside a job: `python -m bytelatent.launch.torchrun ARGUMENT...`, with the arguments of torchrun.

It differs in two ways. It ends with the exit code of the process that ended first, where torchrun ends with 1 whatever
happened: a job has to know whether it was stopped on request. And it leaves signals to the processes: SLURM sends them
to all of a job, and one that is told to stop a second time does not save.
"""

import os
import signal
import sys

from bytelatent.launch.worker import WARNINGS


def main(arguments: list[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)  # before torch begins threads of its own
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not ignored, which the processes would inherit
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    own = ["--signals-to-handle=SIGHUP", f"--node-rank={os.environ['SLURM_NODEID']}"]
    try:
        run(parse_args([*own, *arguments]))
    except ChildFailedError as error:
        # A process that torchrun ended, because another one had, may have met its error earlier: it is not the reason.
        others = {rank: failure for rank, failure in error.failures.items() if failure.exitcode != -signal.SIGTERM}
        rank, failure = min((others or error.failures).items(), key=lambda item: item[1].timestamp)
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"rank {rank} was the first to end, with {code}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
