"""torchrun inside a job: `python -m bytelatent.launch.torchrun ARGUMENT...`, with the arguments of torchrun.

It differs in two ways. It ends with the exit code of the process that ended first, where torchrun always ends with 1:
a job has to know whether it stopped on request. And it leaves signals to the processes: SLURM sends them to all
processes of a job, and one that is asked to stop a second time does not save.
"""

import os
import sys

from bytelatent.signals import TERMINATED, block_warnings, leave_to_children


def main(arguments: list[str]) -> None:
    block_warnings()  # before torch starts threads
    leave_to_children()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    own = ["--signals-to-handle=SIGHUP", f"--node-rank={os.environ['SLURM_NODEID']}"]
    try:
        run(parse_args([*own, *arguments]))
    except ChildFailedError as error:
        # A process that torchrun ended after another one had failed may have an earlier error, which is no reason.
        others = {rank: failure for rank, failure in error.failures.items() if failure.exitcode != TERMINATED}
        rank, failure = min((others or error.failures).items(), key=lambda item: item[1].timestamp)
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"rank {rank} was the first to end, with {code}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
