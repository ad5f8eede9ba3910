"""Unpack a job, run its program, and hand back what it saved: the part that runs beside a script.

box.py starts this, in namespaces of its own or without them, as `python - SOURCE RESULTS`:
the text is standard input, the arguments are open files. SOURCE holds a line of JSON and then the
bytes of the files. RESULTS is a pipe of the auditor's; what goes there is

    int64 exit status, negative for a signal
    for each wanted file an int64, its size and then its bytes, or one of the PROBLEMS

Nothing here is trusted: the script has the same rights. The auditor bounds and checks every byte.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
from contextlib import suppress
from typing import Any, BinaryIO

MISSING, NO_FILE, TOO_LARGE, UNREADABLE = -1, -2, -3, -4  # PROBLEMS
CHUNK = 2**20

# Of linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

# System calls that no namespace holds back, or that make namespaces: x86_64, aarch64.
REFUSED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "syslog": (103, 116),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
CLONE, IOCTL, CLONE3 = (56, 220), (16, 29), 435
NAMESPACES = 0x7E020080  # all CLONE_NEW... flags
TERMINAL = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type into a terminal

# Of linux/bpf_common.h and linux/seccomp.h.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
AT_NUMBER, AT_ARCH, AT_FIRST, AT_SECOND = 0, 4, 16, 24


def build_filter(machine: int) -> bytes:
    """Write the program that the kernel runs for every system call."""
    refuse = [(RETURN, 0, 0, REFUSE | errno.EPERM)]
    unknown = [(RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    number = [(LOAD, 0, 0, AT_NUMBER)]
    lines = [(LOAD, 0, 0, AT_ARCH), (EQUAL, 1, 0, AUDIT_ARCH[machine]), *unknown, *number]
    lines += [(AT_LEAST, 0, 1, 0x40000000), *unknown]  # the x32 calls of x86_64
    lines += [
        (EQUAL, 0, 1, CLONE3),
        *unknown,
    ]  # its flags are out of sight: the C library asks clone
    for numbers in REFUSED.values():
        lines += [(EQUAL, 0, 1, numbers[machine]), *refuse]
    lines += [(EQUAL, 0, 3, CLONE[machine]), (LOAD, 0, 0, AT_FIRST)]
    lines += [(ANY_BIT, 0, 1, NAMESPACES), *refuse, *number]
    lines += [(EQUAL, 0, 5, IOCTL[machine]), (LOAD, 0, 0, AT_SECOND)]
    lines += [(EQUAL, 1, 0, TERMINAL[0]), (EQUAL, 0, 1, TERMINAL[1]), *refuse, *number]
    lines += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def control(*arguments: Any) -> None:
    """Call prctl; OSError if the kernel refuses."""
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    values += [ctypes.c_ulong(0)] * (5 - len(values))
    if ctypes.CDLL(None, use_errno=True).prctl(*values):
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


def protect(results: int) -> None:
    """Give up what could be given back, and end with who started this.

    Not dumpable: the script, which has the same user, can neither trace this process nor read its
    memory, environment or open files.
    """
    control(PR_SET_DUMPABLE, 0)
    control(PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(results, 0)
    if poll.poll(0):
        raise SystemExit("nobody reads the results")
    if platform.machine() not in MACHINES:
        raise SystemExit(f"no filter of system calls for {platform.machine()}")
    control(PR_SET_NO_NEW_PRIVS, 1)
    program = build_filter(MACHINES.index(platform.machine()))
    held = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(held))
    control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header, len(header)))


def unpack(source: BinaryIO, job: dict[str, Any]) -> None:
    """Write the files of the job into its folder, and stay there."""
    os.makedirs(job["folder"], exist_ok=True)
    os.chdir(job["folder"])
    for folder in job["folders"]:
        os.makedirs(folder, exist_ok=True)
    for name, size, when in job["files"]:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            while size:
                part = source.read(min(size, CHUNK))
                if not part:
                    raise SystemExit(f"{name}: cut off")
                file.write(part)
                size -= len(part)
        os.utime(name, (when, when))


def start(job: dict[str, Any]) -> int:
    """Start the program, with the job's limits and environment and without open files."""
    child = os.fork()
    if child:
        return child
    try:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, this goes first
        for name, value in job["limits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execve(job["command"][0], job["command"], job["environment"])
    except BaseException as error:
        print(f"{job['command'][0]}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def finish(child: int, apart: bool) -> int:
    """Wait for the program, end what it left behind where that is known, and tell its status."""
    if not apart:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended, status = 0, 0
    while ended != child:
        ended, status = os.wait()
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all of its namespace, but the first and this one
    with suppress(ChildProcessError):
        while True:
            os.wait()
    return os.waitstatus_to_exitcode(status)


def open_result(name: str, most: int) -> tuple[int, int]:
    """Open a wanted file if it is a plain one of at most this size; its size, or a problem."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return -1, MISSING
        strange = (errno.ELOOP, errno.ENXIO, errno.EOPNOTSUPP)  # a link, a socket
        return -1, NO_FILE if error.errno in strange else UNREADABLE
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode):
        return file, NO_FILE
    return file, about.st_size if about.st_size <= most else TOO_LARGE


def hand_back(name: str, most: int, results: BinaryIO) -> None:
    """Send one wanted file, or why not."""
    file, size = open_result(name, most)
    results.write(struct.pack("<q", size))
    while size > 0:
        part = os.read(file, min(size, CHUNK))
        if not part:
            raise SystemExit(f"{name}: it became shorter while it was read")
        results.write(part)
        size -= len(part)
    if file >= 0:
        os.close(file)


def main() -> None:
    """Do a job."""
    source, out = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(source, False)
    os.set_inheritable(out, False)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.umask(0o022)
    with open(out, "wb") as results:
        with open(source, "rb") as packed:
            job = json.loads(packed.readline())
            if job["apart"]:
                protect(out)
            unpack(packed, job)
        code = finish(start(job), job["apart"])
        results.write(struct.pack("<q", code))
        for name, most in job["wanted"]:
            hand_back(name, most, results)


main()
