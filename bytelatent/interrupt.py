"""Ctrl-C ends the command `blt` with one line from its first moment on, also while modules are imported.

An exception would not: raised inside an import it is passed over here, and comes out as another one there. Nothing but
what Python has loaded anyway is imported here.
"""

import os
import signal

CODE = 130  # errors.STOPPED
_works = False


def listen() -> None:
    """Answer Ctrl-C from now on, unless whoever started the process has it ignored."""
    process = os.getpid()

    def answer(number: int, frame: object) -> None:
        if os.getpid() == process and (not _works or _imports(frame)):
            os.write(2, b"stopped\n")
            os._exit(CODE)
        signal.default_int_handler(number, None)

    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, answer)
    except ValueError:  # not in the main thread, which is then somebody else's
        pass


def begin() -> None:
    """From now on there is work that may have something to put in order: `KeyboardInterrupt` is raised."""
    global _works
    _works = True


def _imports(frame: object) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # pyright: ignore[reportAttributeAccessIssue]
            return True
        frame = frame.f_back  # pyright: ignore[reportAttributeAccessIssue]
    return False
