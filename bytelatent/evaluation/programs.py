"""Programs that a model wrote, run in a limited process.

Each program gets an interpreter of its own that sees Python's standard library alone, with an empty environment, an
empty folder, and limits of time, memory and file sizes. Where the system allows it, it has no network, cannot write
outside its folder, and cannot signal other processes. All that it begins ends with it. This protects from the mistakes
of a model, not from an attacker.
"""

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from bytelatent.errors import UserError, in_one_line

LOGGER = logging.getLogger(__name__)

TIMED_OUT, TOO_MANY = 124, 125  # how the interpreter ends if it had to end the program
MAX_PROCESSES = 64
WHY = {TIMED_OUT: "timed out", TOO_MANY: f"it began more than {MAX_PROCESSES} processes"}
GRACE = 10.0  # seconds to end what a program has begun

# What the interpreter does before and after a program. It runs the program in a fork, of which it ends everything that
# descends: on Linux, orphans become its own children. The fork reports to the pipe `fd`; a program that ends the
# process before its last line reports nothing, and so has not passed.
RUNNER = r"""
import ctypes, json, os, resource, signal, sys, time
fd, limits, password = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
folder = os.getcwd()
USER, MOUNTS, NETWORK, PROCESSES, IPC = 0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000

def isolate():
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(USER | MOUNTS | NETWORK | PROCESSES | IPC):
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    text = ctypes.c_char_p
    libc.mount.argtypes = [text, text, text, ctypes.c_ulong, text]
    PRIVATE, RECURSIVE = 1 << 18, 1 << 14
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    SETATTR, HERE, ALL = 442, -100, 0x8000
    sizes = f"size={limits['files']},mode=700".encode()
    return not (
        libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None)
        or libc.syscall(SETATTR, HERE, b"/", ALL, ctypes.byref(read_only), ctypes.sizeof(read_only))
        or libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 2 | 4, sizes)  # no set-user-id, no devices
    )

def descendants():
    parents, found, new = {}, set(), {os.getpid()}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        try:
            with open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it has ended, or is no process
            pass
    while new:
        new = {one for one, parent in parents.items() if parent in new} - found
        found |= new
    return found

def end_all():
    for number in (signal.SIGSTOP, signal.SIGKILL):  # what is stopped begins no others
        seen = set()
        while more := (descendants() | {child}) - seen:
            for one in more:
                try:
                    os.kill(one, number)
                except OSError:
                    pass
            seen |= more
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass

def watch():
    parent, begun, counted = os.getppid(), time.monotonic(), 0.0
    while True:
        ended = os.waitpid(-1, os.WNOHANG)[0]
        passed = time.monotonic() - begun
        if ended == child:
            return 0
        if passed > limits["clock"] or os.getppid() != parent:
            return limits["timed_out"]
        if passed - counted > 0.1:
            counted = passed
            if len(descendants()) > limits["processes"]:
                return limits["too_many"]
        if not ended:
            time.sleep(min(0.02, 0.001 + passed / 20))

def stopped(*_):
    raise SystemExit

source = sys.stdin.read()
isolated = False
try:
    control = ctypes.CDLL(None).prctl
    control(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
except AttributeError:  # not Linux
    control = lambda *_: None
try:
    isolated = limits["isolate"] and isolate()
except (OSError, AttributeError, ValueError):
    pass
os.chdir(folder)
signal.signal(signal.SIGTERM, stopped)
child = os.fork()  # in a new namespace its first process: all others end with it
if child:
    os.close(fd)
    code = limits["timed_out"]
    try:
        code = watch()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()
        os._exit(code)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
control(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with the process above
for name, limit in (("AS", "memory"), ("CPU", "seconds"), ("FSIZE", "files"), ("NOFILE", "open"), ("CORE", "core")):
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[limit], limits[limit]))
    except (ValueError, OSError):  # macOS has no limit of addresses
        pass
sys.argv, report = ["program.py"], os.fdopen(fd, "w")

def end(why):
    report.write(json.dumps({"why": why, "isolated": isolated, "password": password}))
    report.flush()
    os._exit(0)

try:
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
except BaseException as error:
    end(f"{type(error).__name__}: {error}"[:200])
end("")
"""


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may use.

    Attributes:
        seconds: by the clock and of the processor.
        memory, files: bytes of addresses, and of a file or all files in its folder.
        isolate: try namespaces: no network, no files but its own, no other processes.
    """

    seconds: float = 3.0
    memory: int = 2**30
    files: int = 2**24
    isolate: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        why: why it has not passed, in a line; empty if it has run to its end without an error.
        isolated: whether it had namespaces of its own.
    """

    why: str
    isolated: bool

    @property
    def passed(self) -> bool:
        return not self.why


def run_program(source: str, limits: ProgramLimits = ProgramLimits()) -> Outcome:
    """Run a Python program, and end all processes that it has begun.

    Raises:
        UserError: this system has no limits for processes.
    """
    if os.name == "nt":
        raise UserError("run_programs: Windows has no limits for processes; run it on Linux, macOS, or in a container")
    given = {"memory": limits.memory, "files": limits.files, "clock": limits.seconds, "processes": MAX_PROCESSES}
    given |= {"isolate": limits.isolate, "open": 64, "core": 0, "seconds": int(limits.seconds) + 1}
    given |= {"timed_out": TIMED_OUT, "too_many": TOO_MANY}
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        begin, end = os.pipe()
        command = [sys.executable, "-I", "-S", "-c", RUNNER, str(end), json.dumps(given), password]
        with subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[end],
            start_new_session=True,
        ) as process:
            os.close(end)
            try:
                process.communicate(source.encode("utf-8", "surrogatepass"), timeout=limits.seconds + GRACE)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _end(process)
        os.set_blocking(begin, False)  # a process that escaped may hold the other end open
        try:
            report = os.read(begin, 2**16)
        except BlockingIOError:
            report = b""
        finally:
            os.close(begin)
    return _outcome(report, password, process.returncode)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End an interpreter, which first ends what it has begun; if it does not, end its process group."""
    with suppress(subprocess.TimeoutExpired):
        process.terminate()
        process.wait(GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(report: bytes, password: str, code: int) -> Outcome:
    try:
        found = json.loads(report)
        if found["password"] == password:
            return Outcome(in_one_line(found["why"]), bool(found["isolated"]))
    except (ValueError, TypeError, KeyError):
        pass
    return Outcome(WHY.get(code, "the process ended before the program"), False)


def run_programs(sources: Sequence[str], limits: ProgramLimits = ProgramLimits()) -> list[Outcome]:
    """Run programs, as many at once as there are processors."""
    if len(sources) < 2:
        return [run_program(source, limits) for source in sources]
    with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda source: run_program(source, limits), sources))


@cache
def check_isolation() -> bool:
    """Whether programs have namespaces of their own here; logs a warning where they have not."""
    isolated = run_program("pass", ProgramLimits(seconds=30)).isolated
    if not isolated:
        LOGGER.warning(
            "this system gives programs no namespaces: they reach the network and your files; run this in a container"
        )
    return isolated


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The probability that one of k samples passes: an estimate without bias, from more samples.

    Source: Chen et al. 2021, section 2.1.
    """
    missing = 1.0
    for number in range(num_samples - num_passed + 1, num_samples + 1):
        missing *= max(1 - k / number, 0)
    return 1 - missing
