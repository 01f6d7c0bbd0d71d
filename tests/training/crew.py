"""Processes that wait for jobs of several ranks, so that torch is imported once for many tests."""

import os
import socket
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.processes import forkserver


class Crew:
    """So many processes. Each job takes as many of them as it has ranks; they talk through gloo."""

    def __init__(self, size: int):
        context = forkserver()
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_wait_for_jobs, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)

    def run(self, *jobs: tuple[Any, ...]) -> list[list[Any]]:
        """Run jobs at the same time, each (ranks, function, arguments...); what every rank returned, job by job."""
        free = iter(self.pipes)
        running = []
        for world, call, *arguments in jobs:
            port = _free_port()
            pipes = [next(free) for _ in range(world)]
            for rank, pipe in enumerate(pipes):
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
                where = {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                pipe.send(({key: str(value) for key, value in where.items()}, call, arguments))
            running.append(pipes)
        answers = [[_answer(pipe) for pipe in pipes] for pipes in running]
        for error, _ in (answer for job in answers for answer in job):
            assert error is None, error
        return [[value for _, value in job] for job in answers]


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(120), "a rank did not answer"
    return pipe.recv()


def _wait_for_jobs(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            where, call, arguments = pipe.recv()
        except EOFError:
            return
        os.environ.update(where)
        try:
            pipe.send((None, call(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        for name in where:
            os.environ.pop(name)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
