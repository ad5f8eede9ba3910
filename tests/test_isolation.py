"""records/isolation/: what a hostile script tries from where it runs, and what it finds there.

Each attack in tests/attacks says what it got. Where that is safe it is also made without isolation,
and then gets it.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "records"))

import audit
import isolation
import script
from isolation import box, cgroups, layout

ATTACKS = REPO / "tests" / "attacks"
LIBC = ctypes.CDLL(None, use_errno=True)


def find(tool: str, hidden=()) -> isolation.Isolation:
    """The isolation by a tool; where it does not work here, the test is skipped."""
    try:
        return isolation.find(hidden, [tool])
    except isolation.IsolationError as error:
        pytest.skip(str(error))


@pytest.fixture(params=list(isolation.TOOLS))
def apart(request) -> isolation.Isolation:
    return find(request.param)


def job(attack: str, place: Path | None, facts: dict) -> box.Job:
    """An attack as a job; without isolation, in a place of its own."""
    environment = {"FACTS": json.dumps(facts), "PATH": isolation.PATH}
    items = [box.Item("attack.py", ATTACKS / f"{attack}.py", 0.0)]
    folder = str(place) if place else isolation.WORK
    return box.Job([sys.executable, "attack.py"], folder, environment, items)


def strike(attack: str, apart, place: Path, **facts) -> list[str]:
    """What an attack got, with isolation or, if that is None, without it."""
    ended = box.run(job(attack, None if apart else place, facts), 60, apart)
    lines = ended.console.decode().splitlines()
    print(ended.code, *lines, sep="\n")
    assert not ended.late
    assert "Traceback" not in ended.console.decode()
    return [line.removeprefix("got: ") for line in lines if line.startswith("got: ")]


@contextmanager
def victim(secret: str = ""):
    """A process of the auditor's, with a secret in its environment and its memory."""
    code = (
        "import os, time; kept = [os.environ['SECRET'] * 9 for _ in range(99)]; print(1, flush=1)"
    )
    environment = {**os.environ, "SECRET": secret}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(1, flush=True); time.sleep(60)"],
        env=environment,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def with_marker(marker: str) -> list[int]:
    """The processes of this system that have a marker in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().rstrip(b"\0").endswith(b"\0" + marker.encode()):
                found.append(int(path.parent.name))
    return found


def wait_for(condition) -> bool:
    """Whether something becomes true."""
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.02)
    return False


# ---- secrets


def spy(apart, tmp_path: Path) -> set[str]:
    """Where a secret of the auditor's is found."""
    secret = f"sesame-{os.urandom(8).hex()}"
    kept = tmp_path / "kept"
    kept.write_text(secret)
    with victim(secret) as process, open(kept) as held:
        os.set_inheritable(held.fileno(), True)
        facts = {"files": [str(kept)], "pids": [process.pid]}
        return set(strike("spy", apart, tmp_path / "place", **facts))


def test_no_secret_of_the_auditor_is_found(apart, tmp_path):
    assert not spy(apart, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc here")
def test_without_isolation_secrets_are_found(tmp_path):
    assert {"environ", "root", f"file {tmp_path / 'kept'}"} <= spy(None, tmp_path)


def test_the_process_that_hands_over_the_results_is_out_of_reach(apart, tmp_path):
    assert not strike("first", apart, tmp_path)


def test_it_would_be_in_reach_if_it_did_not_protect_itself(apart, tmp_path, monkeypatch):
    inside = (REPO / "records" / "isolation" / "inside.py").read_text()
    weak = tmp_path / "inside.py"
    weak.write_text(inside.replace("control(PR_SET_DUMPABLE, 0)", "pass"))
    assert weak.read_text() != inside
    monkeypatch.setattr(box, "INSIDE", weak)
    assert {"environ", "root"} <= set(strike("first", apart, tmp_path))


SECRET_PLACES = (
    "/root/.bashrc",
    "/etc/shadow",
    "/etc/hostname",
    "/home",
    "/work",
    str(REPO / "records"),
)


def test_no_file_of_the_reviewer_is_there(apart, tmp_path):
    private = ["/root/.bashrc", "/etc/shadow", "/etc/machine-id", "/var", "/boot", "/run", "/mnt"]
    seen = look(
        apart, tmp_path, [*private, str(REPO / "records"), str(REPO / ".git"), str(tmp_path)]
    )
    assert not seen["seen"]
    assert set(seen["root"]) <= ROOT
    assert set(seen["environment"]) <= {"SEEK", "LC_CTYPE"}


# ---- what is outside


def test_nothing_outside_is_written(apart, tmp_path):
    places = ["/", "/etc", "/usr", "/usr/bin", "/dev", "/proc", "/proc/sys/kernel", "/sys"]
    places += [
        "/home",
        sys.prefix,
        sys.base_prefix,
        os.__file__,
        str(tmp_path),
        "/etc/ld.so.conf.d",
    ]
    assert not strike("outside", apart, tmp_path, folders=places)
    assert not list(tmp_path.iterdir())


def test_without_isolation_it_is(tmp_path):
    (tmp_path / "auditor").mkdir()
    assert strike("outside", None, tmp_path / "place", folders=[str(tmp_path / "auditor")])


def test_what_is_shown_is_read_only_where_all_may_write(apart, tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "open"))
    assert not strike("outside", find_again(apart, []), tmp_path, folders=[str(tmp_path / "open")])


def test_nothing_is_mounted_but_what_is_shown(apart, tmp_path):
    writable = set(apart.writable(0))
    known = {"/", "/dev", "/dev/pts", *writable, *apart.layout.shown}
    seen = [line.split() for line in look(apart, tmp_path)["mounts"].splitlines()]
    points = [fields[4] for fields in seen if not fields[4].startswith(("/proc", "/dev/"))]
    assert set(points) <= known
    assert len(points) == len(set(points))
    for fields in seen:
        if fields[4] in {"/", *apart.layout.shown}:
            assert fields[5].split(",")[0] == "ro"
            assert "nosuid" in fields[5] or fields[4] == "/"


def test_what_is_written_inside_is_gone_after_the_run(apart, tmp_path):
    places = ["/tmp", "/dev/shm", isolation.HOME, isolation.WORK]
    for _ in range(2):  # the second time nothing is in the way
        got = strike("outside", apart, tmp_path, folders=places)
        assert {place for place in got if "/" in place[:1]} == set(places)


def test_nothing_is_mounted_made_or_entered(apart, tmp_path):
    assert not strike("escape", apart, tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="needs root")
def test_much_would_be_if_root_kept_its_rights(tmp_path, monkeypatch):
    apart = find("unshare")
    monkeypatch.setattr(isolation, "drop_root", lambda: ["env"])
    got = " ".join(strike("escape", apart, tmp_path))
    assert "mount" in got
    assert "chroot" in got
    assert "mknod" in got


def test_rights_are_gone_for_good(apart, tmp_path):
    status = look(apart, tmp_path)["status"]
    assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
    assert re.search(r"^CapPrm:\s0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s2$", status, re.MULTILINE)
    assert not re.search(r"^Uid:.*\b0\b", status, re.MULTILINE)
    if os.geteuid() == 0:
        assert re.search(r"^CapBnd:\s0+$", status, re.MULTILINE)
        assert re.search(r"^Groups:\s*(65534)?\s*$", status, re.MULTILINE)


# ---- processes


def test_no_process_outlives_its_run(apart, tmp_path):
    marker = uuid.uuid4().hex
    strike("survive", apart, tmp_path, marker=marker, stay=0)
    assert not with_marker(marker)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc here")
def test_without_isolation_one_does(tmp_path):
    marker = uuid.uuid4().hex
    strike("survive", None, tmp_path, marker=marker, stay=0)
    assert wait_for(lambda: with_marker(marker))
    for pid in with_marker(marker):
        os.kill(pid, signal.SIGKILL)


def test_late_scripts_end_with_all_that_they_started(apart, tmp_path):
    marker = uuid.uuid4().hex
    work = job("survive", None, {"marker": marker, "stay": 60})
    ended = box.run(work, 3, apart)
    assert ended.late
    assert not with_marker(marker)


AUDITOR = """
import json, sys
sys.path[:0] = [{records!r}]
import isolation
from isolation import box
environment = {{"FACTS": json.dumps({{"marker": {marker!r}, "stay": 60}}), "PATH": isolation.PATH}}
items = [box.Item("attack.py", {attack!r}.encode(), 0.0)]
work = box.Job([sys.executable, "attack.py"], isolation.WORK, environment, items)
box.run(work, 60, isolation.find([], [{tool!r}]))
"""


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("killed", ["the auditor", "the launcher"])
def test_all_ends_when_the_auditor_or_the_launcher_is_killed(apart, tmp_path, killed):
    marker = uuid.uuid4().hex
    code = AUDITOR.format(
        records=str(REPO / "records"),
        marker=marker,
        attack=(ATTACKS / "survive.py").read_text(),
        tool=apart.tool,
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    auditor = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        assert wait_for(lambda: with_marker(marker))
        assert auditor.poll() is None
        victims = [auditor.pid] if killed == "the auditor" else children(auditor.pid)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not with_marker(marker))
    finally:
        auditor.kill()
        auditor.wait()
    assert wait_for(lambda: next_run_tidies_up(auditor.pid))


def next_run_tidies_up(pid: int) -> bool:
    """Whether no cgroup of an auditor is left once another one makes its own."""
    with cgroups.make(2**30, 100):
        return not list(Path("/sys/fs/cgroup").glob(f"**/job-{pid}-*"))


def test_no_process_of_the_auditor_is_killed(apart, tmp_path):
    with victim() as process:
        facts = {"pids": [process.pid, os.getpid(), os.getppid()], "all": True}
        assert not strike("kill", apart, tmp_path, **facts)
        assert process.poll() is None


def test_without_isolation_one_is(tmp_path):
    with victim() as process:
        assert strike("kill", None, tmp_path, pids=[process.pid], all=False)
        assert process.wait() == -signal.SIGKILL


# ---- limits


def test_limits_are_set(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "memory_limit", lambda: 123456789)
    limits = re.sub(" +", " ", look(apart, tmp_path)["limits"])
    for line in (
        "Max core file size 0 0",
        "Max data size 123456789 123456789",
        f"Max processes {isolation.PROCESSES} {isolation.PROCESSES}",
    ):
        assert line in limits
    for name in ("file size", "open files"):
        assert re.search(rf"Max {name} \d+ \d+", limits)


def test_written_files_are_bounded(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "SCRATCH", 8 * 2**20)
    places = ["/tmp", "/dev/shm", isolation.HOME, "."]
    got = strike("fill", apart, tmp_path, folders=places)
    assert [int(line.split()[1]) for line in got] == pytest.approx([8] * 4, abs=1)


def test_without_isolation_they_are_not(tmp_path):
    assert strike("fill", None, tmp_path, folders=["."]) == [". 48"]


def test_processes_are_bounded(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "PROCESSES", 40)
    assert 20 < int(strike("bomb", apart, tmp_path)[0]) <= 40


def test_without_isolation_processes_are_not(tmp_path):
    assert strike("bomb", None, tmp_path) == ["150"]


def test_memory_of_a_process_is_bounded(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "memory_limit", lambda: 2**28)
    ended = box.run(job("memory", None, {"processes": 1}), 60, apart)
    assert ended.code != 0
    assert b"MemoryError" in ended.console or ended.code in (-9, None)
    assert ended.console.count(b"got") < 5


def test_without_isolation_memory_is_not(tmp_path):
    assert len(strike("memory", None, tmp_path, processes=1)) == 12


def test_memory_of_all_processes_is_bounded_where_there_are_cgroups(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "memory_limit", lambda: 2**28)
    with apart.launch(0, 0) as launch:
        if "cgroup.procs" not in " ".join(launch.before):
            pytest.skip("no cgroup can be made here")
    ended = box.run(job("memory", None, {"processes": 6}), 60, apart)
    assert ended.console.count(b"got") < 12


def test_the_console_is_bounded_and_its_end_is_kept(tmp_path):
    code = "import os\nfor _ in range(2000): os.write(1, b'x' * 2**15)\nprint(); print('end')"
    work = box.Job([sys.executable, "-c", code], str(tmp_path), {})
    ended = box.run(work, 60, None)
    assert len(ended.console) == box.TAIL
    assert ended.console.endswith(b"\nend\n")


def test_a_console_without_end_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr(box, "TAIL", 2**16)
    read, write = os.pipe()
    with os.fdopen(read, "rb", 0) as console, os.fdopen(write, "wb", 0) as script_end:
        listener = box.Listener(script_end, console, 0)
        for number in range(99):
            script_end.write(bytes([number]) * 2**14)
            assert listener.take(console.fileno())
    assert len(listener.console) <= 3 * 2**16
    assert listener.console[-1] == 98


# ---- what else the kernel keeps


@contextmanager
def ears(tmp_path: Path):
    """What a script could speak with: sockets, shared memory, a key, a terminal's input."""
    name = f"told-{os.urandom(8).hex()}"
    path = tmp_path / "socket"
    with (
        socket.create_server(("127.0.0.1", 0)) as inet,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
    ):
        abstract.bind("\0" + name)
        named.bind(str(path))
        abstract.listen()
        named.listen()
        number = int.from_bytes(os.urandom(3), "big") + 1
        memory = LIBC.shmget(number, 4096, 0o1666)
        shared = Path("/dev/shm") / name
        shared.write_text("x")
        key = LIBC.syscall(KEYS[os.uname().machine], b"user", name.encode(), b"x", 1, -3)
        facts = {"port": inet.getsockname()[1], "abstract": name, "path": str(path), "key": number}
        try:
            yield {**facts, "shared": name, "keyed": name}, memory >= 0, key > 0
        finally:
            LIBC.shmctl(memory, 0, None)
            shared.unlink()
            LIBC.syscall(KEYS[os.uname().machine] + 2, 9, key, -3)  # unlink it


KEYS = {"x86_64": 248, "aarch64": 217}
on_linux = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in KEYS, reason="numbers of Linux's calls"
)


@on_linux
def test_the_script_speaks_with_nobody(apart, tmp_path):
    with ears(tmp_path) as (facts, _, _):
        assert not strike("talk", apart, tmp_path, **facts)


@on_linux
def test_without_isolation_it_speaks_with_all(tmp_path):
    with ears(tmp_path) as (facts, has_memory, has_key):
        got = strike("talk", None, tmp_path / "place", **facts)
    assert len([line for line in got if line.startswith("socket")]) >= 3
    assert "POSIX memory" in got
    assert ("System V memory" in got) == has_memory
    assert ("key" in got) == has_key
    assert "TIOCSTI" in got


def test_the_script_can_speak_with_itself(apart, tmp_path):
    code = "import socket\ns = socket.create_server(('localhost', 0))\n"
    code += "socket.create_connection(s.getsockname(), 5)"
    work = box.Job([sys.executable, "-c", code], isolation.WORK, {})
    assert box.run(work, 30, apart).code == 0


# ---- where it runs

ROOT = {
    "bin",
    "dev",
    "etc",
    "home",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "root",
    "sbin",
    "sys",
}
ROOT |= {"tmp", "usr", "work", "workspace", "opt", "nix", *Path(sys.prefix).parts[1:2]}
ROOT |= set(Path(sys.base_prefix).parts[1:2])


def look(apart, tmp_path: Path, seek=()) -> dict:
    """What a script sees around it."""
    items = [box.Item("attack.py", ATTACKS / "look.py", 0.0)]
    environment = {"SEEK": json.dumps([*seek])}
    folder = isolation.WORK if apart else str(tmp_path / "place")
    work = box.Job([sys.executable, "attack.py"], folder, environment, items)
    ended = box.run(work, 60, apart)
    print(ended.console.decode())
    return json.loads(ended.console)


def test_nothing_around_a_script_is_of_this_run_or_names_an_audit(apart, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    seen = look(apart, tmp_path)
    told = json.dumps({key: value for key, value in seen.items() if key != "environment"})
    python = [str(Path(sys.prefix)), str(Path(sys.base_prefix)), *layout.find_layout([]).shown]
    for path in sorted([*python, *map(os.path.realpath, python)], key=len, reverse=True):
        told = told.replace(path, "")
    assert "audit" not in told
    assert tmp_path.name not in told
    assert str(REPO) not in told
    assert seen["folder"] == isolation.WORK
    assert seen["user"] == "user"
    assert len(seen["processes"]) <= 3


def test_a_python_in_a_place_with_spaces_and_quotes_works(apart, tmp_path, monkeypatch):
    folder = tmp_path / 'it\'s "my" $HOME \\ place'
    shutil.copytree(os.path.dirname(sys.executable), folder / "bin", symlinks=True)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", folder)
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    monkeypatch.setattr(sys, "prefix", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / Path(sys.executable).name))
    here = find_again(apart, [])
    work = box.Job([sys.executable, "-c", "import sys; print(sys.prefix)"], isolation.WORK, {})
    ended = box.run(work, 30, here)
    assert (ended.code, ended.console.decode().strip()) == (0, str(folder))


def find_again(apart, hidden) -> isolation.Isolation:
    """The same isolation, of another layout."""
    return isolation.Isolation(apart.tool, apart.as_root, layout.find_layout(hidden))


def test_hidden_folders_within_what_is_shown_are_covered(apart, tmp_path, monkeypatch):
    (tmp_path / "lib" / "data").mkdir(parents=True)
    (tmp_path / "lib" / "data" / "answers").write_text("x")
    (tmp_path / "lib" / "libx.so").write_text("x")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    seek = [str(tmp_path / "lib" / "data" / "answers"), str(tmp_path / "lib" / "libx.so")]
    assert look(find_again(apart, []), tmp_path, seek)["seen"] == seek
    hidden = find_again(apart, [tmp_path / "lib" / "data"])
    assert look(hidden, tmp_path, seek)["seen"] == seek[1:]


def test_torch_works_there(apart):
    code = "import torch; print((torch.ones(9, 9) @ torch.ones(9, 9)).sum().item())"
    work = box.Job([sys.executable, "-c", code], isolation.WORK, {"OMP_NUM_THREADS": "2"})
    ended = box.run(work, 120, apart)
    assert (ended.code, ended.console.decode().strip()) == (0, "729.0")


def test_nothing_is_left_on_this_system(apart, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    strike("survive", apart, tmp_path, marker=uuid.uuid4().hex, stay=0)
    assert not list(tmp_path.iterdir())
    assert not list(Path("/sys/fs/cgroup").glob(f"**/job-{os.getpid()}-*"))


# ---- where nothing can be done


def test_a_system_without_tools_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(isolation, "PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(isolation.IsolationError) as caught:
        isolation.find([])
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "(bwrap: not installed; unshare: not installed)",
        "install bubblewrap",
        "user namespaces",
        "--no-isolation",
    ):
        assert part in message


def test_another_system_is_told_that_linux_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        isolation.IsolationError, match=r"on Linux only, not on darwin.*--no-isolation"
    ):
        isolation.find([])


@pytest.mark.skipif(not shutil.which("setpriv"), reason="this system has no setpriv")
def test_a_system_that_forbids_namespaces_is_a_refusal_before_anything_is_run(tmp_path):
    """As root without its capabilities, or as a user who may not make namespaces."""
    if os.geteuid():
        pytest.skip("needs root")
    record, data = tmp_path / "record", tmp_path / "data"
    record.mkdir()
    data.mkdir()
    (record / "train_gpt.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (record / "x.artifact").write_text("x")
    less = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"]
    words = [sys.executable, REPO / "records" / "audit.py", record, "--data", data]
    words += ["--tokenizer", record / "x.artifact"]
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*less, *words], **options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("audit.py: error: the script cannot be isolated here (")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    done = subprocess.run([*less, *words, "--no-isolation"], **options)
    assert done.returncode == 1
    assert "cannot be isolated" not in done.stderr


def test_without_isolation_the_verdict_says_so(tmp_path):
    for name in ("train_gpt.py", "artifact", "tokenizer"):
        (tmp_path / name).write_text("")
    places = [tmp_path, tmp_path / "artifact", tmp_path / "tokenizer", tmp_path]
    assert "NOT ISOLATED" in script.Script(*places, isolated=False).apart
    assert audit.parse_arguments([str(tmp_path), "--no-isolation"]).no_isolation
