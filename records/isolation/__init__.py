"""Run a stranger's program without the auditor's rights, by tools that Linux systems have.

bubblewrap is taken where it is installed, else util-linux's unshare, mount and setpriv. Both make
the same place:

    namespaces of its own for processes, mounts, network, IPC, names and cgroups, and where the
    auditor is no administrator for users; with the auditor, or the launcher, all of it ends
    the user nobody, or a namespace's user; no capabilities, no way to new ones, no terminal
    a root that holds the system's libraries and Python, read-only; nothing else of this machine
    memory files of bounded size for the work folder, the home, /tmp and /dev/shm
    a filter of system calls: key rings, the kernel's log, namespaces, typing into terminals
    limits for memory, processes, open files and file sizes, of a cgroup too where one can be made
"""

import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from isolation import box, cgroups
from isolation.layout import DEVICES, Layout, find_layout, python_environment

WORK = "/workspace/parameter-golf"
HOME = "/home/user"
# What each way needs; the first that works is taken.
TOOLS = {
    "bwrap": ("bwrap", "setpriv"),
    "unshare": ("unshare", "setpriv", "sh", "mount", "umount", "pivot_root"),
}
NOBODY, USER = 65534, 1000
SCRATCH = 2**30  # bytes of the home, of /tmp, of /dev/shm, and of the work folder beside its files
INODES = 100_000  # files in each of them, beside those that are given
PROCESSES = 4096  # threads count
OPEN_FILES = 65536
MEMORY_SHARE = 0.8  # of the machine's
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
ADVICE = (
    "install bubblewrap, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, as root, --privileged), "
    "or run the script with your own rights by --no-isolation"
)
# Names the host and starts the loopback device, for what talks to itself.
PREPARE = """
import fcntl, socket, struct, sys
socket.sethostname(sys.argv[1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
    fcntl.ioctl(device, 0x8914, struct.pack("16sh22x", b"lo", 1))
"""


class IsolationError(ValueError):
    """The script cannot run apart here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Isolation:
    """A tool that isolates here, and what a script sees then."""

    tool: str
    as_root: bool
    layout: Layout

    @property
    def words(self) -> str:
        """What is done, in words for the evidence."""
        user = "as nobody" if self.as_root else "as a user of its own"
        return f"apart by {self.tool}, {user}: no network, no files but its own"

    @contextmanager
    def launch(self, size: int, files: int) -> Iterator[box.Launch]:
        """Prepare a place with room for so many bytes in so many files; then it is gone."""
        memory = memory_limit()
        work = size + SCRATCH
        limits = {
            "RLIMIT_CORE": 0,
            "RLIMIT_DATA": memory,
            "RLIMIT_FSIZE": work,
            "RLIMIT_NOFILE": OPEN_FILES,
            "RLIMIT_NPROC": PROCESSES,
        }
        with ExitStack() as stack:
            group = stack.enter_context(cgroups.make(memory, PROCESSES))
            if self.tool == "bwrap":
                command, texts = stack.enter_context(bwrap(self, work))
            else:
                command, texts = stack.enter_context(unshare(self, work, INODES + files)), []
            yield box.Launch([*group, *command], texts, limits, True)

    def writable(self, work: int) -> dict[str, int]:
        """Name the places that a script can write to, and their sizes."""
        return {"/workspace": work, HOME: SCRATCH, "/tmp": SCRATCH, "/dev/shm": SCRATCH}

    def etc(self) -> dict[str, str]:
        """Write the files that name users and hosts."""
        number = NOBODY if self.as_root else USER
        return {
            "/etc/passwd": f"root:x:0:0:root:/root:/bin/bash\n"
            f"user:x:{number}:{number}:user:{HOME}:/bin/bash\n",
            "/etc/group": f"root:x:0:\nuser:x:{number}:\n",
            "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
            "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        }


def find(hidden: Iterable[Path], tools: Iterable[str] | None = None) -> Isolation:
    """Find the first tool that isolates here, by a trial.

    The `hidden` folders are not in sight then. Raises IsolationError if there is none.
    """
    if not sys.platform.startswith("linux"):
        raise IsolationError(
            f"a script can be isolated on Linux only, not on {sys.platform}: audit on Linux, "
            "or run the script with your own rights by --no-isolation"
        )
    try:
        layout = find_layout(hidden)
    except ValueError as error:
        raise IsolationError(f"the script cannot be isolated: {error}") from None
    found: list[str] = []
    for tool in TOOLS if tools is None else tools:
        isolation = Isolation(tool, os.geteuid() == 0, layout)
        problem = isolation_problem(isolation)
        if not problem:
            return isolation
        found.append(f"{tool}: {problem}")
    raise IsolationError(f"the script cannot be isolated here ({'; '.join(found)}): {ADVICE}")


def isolation_problem(isolation: Isolation) -> str:
    """Try a tool with a program that does nothing; why it does not work, or nothing."""
    for program in TOOLS[isolation.tool]:
        if not shutil.which(program, path=PATH):
            return "not installed" if program == isolation.tool else f"{program} is not installed"
    job = box.Job(
        [sys.executable, "-c", "import numpy"], WORK, {"PATH": PATH, **python_environment()}
    )
    try:
        ended = box.run(job, 60, isolation)
    except OSError as error:
        return str(error)
    if ended.code == 0:
        return ""
    said = ended.console.decode("utf-8", "replace").strip().splitlines()
    return "".join(c for c in (said or ["it does not start"])[-1][:200] if c.isprintable())


def memory_limit() -> int:
    """Tell the bytes of memory that a script may take: most of this machine's."""
    return int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def host_name() -> str:
    """Make a name of the kind that containers have."""
    return secrets.token_hex(6)


def drop_root() -> list[str]:
    """Name what makes an administrator's process one of nobody's."""
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return ["setpriv", *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


# ------------------------------------ bubblewrap ------------------------------------


@contextmanager
def bwrap(isolation: Isolation, work: int) -> Iterator[tuple[list[str], list[int]]]:
    """Give the command of bubblewrap, and the open files that it reads.

    Its arguments are in one of them: the script can read its command line.
    """
    words = [*bwrap_rights(isolation.as_root), *bwrap_mounts(isolation, work)]
    with ExitStack() as stack:
        files = []
        for path, text in isolation.etc().items():
            files.append(open_text(stack, text))
            words += ["--perms", "0644", "--file", str(files[-1]), path]
        words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
        files.append(open_text(stack, "\0".join(words)))
        rest = drop_root() if isolation.as_root else []
        yield ["bwrap", "--args", str(files[-1]), "--", *rest], files


def open_text(stack: ExitStack, text: str) -> int:
    """Open a file without a name that holds a text."""
    file = os.memfd_create("text")
    stack.callback(os.close, file)
    os.write(file, os.fsencode(text))
    os.lseek(file, 0, os.SEEK_SET)
    return file


def bwrap_rights(as_root: bool) -> list[str]:
    """Name the namespaces, and the capabilities that are left: those that drop_root needs."""
    words = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--hostname", host_name()]
    words += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if not as_root:
        user = ["--unshare-user", "--uid", str(USER), "--gid", str(USER)]
        return [*words, *user, "--as-pid-1"]
    # The first process is bubblewrap's own here: it may not end one of another user.
    for name in ("SETUID", "SETGID", "SETPCAP"):
        words += ["--cap-add", f"CAP_{name}"]
    return words


def bwrap_mounts(isolation: Isolation, work: int) -> list[str]:
    """Name what is mounted, in order: what is shown may lie below what can be written to."""
    layout = isolation.layout
    words = ["--proc", "/proc", "--ro-bind", "/dev/null", "/proc/keys", "--dev", "/dev"]
    for path, size in isolation.writable(work).items():
        words += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
    words += ["--perms", "1777", "--dir", WORK]
    for path in parent_folders([*layout.shown, *layout.links, *isolation.etc()]):
        words += ["--perms", "0755", "--dir", path]  # bubblewrap's own are for their owner only
    for path in layout.shown:
        words += ["--ro-bind", path, path]
    for path, target in layout.links.items():
        words += ["--symlink", target, path]
    for path in layout.covered:
        words += ["--tmpfs", path, "--remount-ro", path]
    for path in layout.accelerators:
        words += ["--dev-bind", path, path]
    return words


def parent_folders(paths: Iterable[str]) -> list[str]:
    """List all folders above these paths, from the top."""
    return sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"})


# ------------------------------------ util-linux ------------------------------------


@contextmanager
def unshare(isolation: Isolation, work: int, inodes: int) -> Iterator[list[str]]:
    """Give the command of util-linux: a shell mounts the root, goes there, and starts the rest."""
    own = ["mount", "pid", "net", "ipc", "uts", "cgroup"]
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", *(f"--{name}" for name in own)]
    words += ["--fork", "--kill-child=KILL"]
    words += [] if isolation.as_root else ["--user", "--map-root-user"]
    place = tempfile.mkdtemp()
    try:
        recipe = "\n".join(mount_recipe(isolation, work, inodes, place))
        yield [*words, "sh", "-c", recipe, "sh"]
    finally:
        os.rmdir(place)


def mount_recipe(isolation: Isolation, work: int, inodes: int, place: str) -> Iterator[str]:
    """Write the shell's commands that build the root in a folder and go there."""

    def at(path: str) -> str:
        return shlex.quote(place + path)

    def attach(path: str) -> Iterator[str]:
        """Show a folder or file where it lies."""
        if os.path.isdir(path):
            yield f"mkdir -p {at(path)}"
        else:
            yield f"mkdir -p {at(os.path.dirname(path))}"
            yield f": >{at(path)}"
        yield f"mount --rbind {shlex.quote(path)} {at(path)}"

    layout, writable = isolation.layout, isolation.writable(work)
    yield "set -eu"
    yield f"mount -t tmpfs -o mode=755,size=16m tmpfs {at('')}"
    for path, size in writable.items():
        yield f"mkdir -p {at(path)}"
        options = f"mode=1777,nosuid,nodev,size={size},nr_inodes={inodes}"
        yield f"mount -t tmpfs -o {options} tmpfs {at(path)}"
    yield f"mkdir -m 1777 {at(WORK)}"
    for path in layout.shown:
        yield from attach(path)
    yield "read_only() {"
    yield '    mount -o "remount,bind,ro,nosuid,nodev$1" "$2"'
    yield "}"
    yield "while read -r _ _ _ _ point _; do"
    yield '    point=$(printf "%b" "$point")'
    yield "    case $point in"
    yield f"    {' | '.join(at(path) for path in writable)}) ;;"
    yield f"    {at('/')}*)"
    yield '        read_only "" "$point" 2>/dev/null || read_only ,noexec "$point"'
    yield "        ;;"
    yield "    esac"
    yield "done </proc/self/mountinfo"
    for path in layout.covered:
        yield f"mount -t tmpfs -o ro,mode=755 tmpfs {at(path)}"
    for path, target in layout.links.items():
        yield f"mkdir -p {at(os.path.dirname(path))}"
        yield f"ln -s {shlex.quote(target)} {at(path)}"
    for path in (*DEVICES, *layout.accelerators):
        yield from attach(path)
    for name, target in DEVICE_LINKS.items():
        yield f"ln -s {target} {at('/dev/' + name)}"
    yield f"mkdir -p {at('/etc')} {at('/proc')}"
    for path, text in isolation.etc().items():
        yield f"printf %s {shlex.quote(text)} >{at(path)}"
    yield f"mount -t proc -o nosuid,nodev,noexec proc {at('/proc')}"
    yield f"mount --bind /dev/null {at('/proc/keys')}"
    python = shlex.quote(sys.executable)
    yield f"{python} -I -S -c {shlex.quote(PREPARE)} {host_name()} 3<&-"
    yield f"mount -o remount,bind,ro {at('')}"
    yield f"cd {at('')}"
    yield "pivot_root . ."
    yield "umount -l ."
    yield "cd /"
    # A user's namespace within the first one: its user has no rights over the mounts.
    user = ["unshare", "--user", f"--map-user={USER}", f"--map-group={USER}"]
    yield f'exec {shlex.join(drop_root() if isolation.as_root else user)} "$@"'
