"""Leave the root, change what is mounted, make namespaces and devices, gain rights."""

import ctypes
import os
import shutil
import subprocess
from contextlib import suppress

LIBC = ctypes.CDLL(None, use_errno=True)
MS_REMOUNT, MS_BIND, MNT_DETACH = 32, 4096, 2
NAMESPACES = {"user": 0x10000000, "mnt": 0x20000, "pid": 0x20000000, "net": 0x40000000}


def call(name, *arguments):
    """Say so if a system call is granted."""
    if getattr(LIBC, name)(*arguments) == 0:
        print("got:", name, *arguments)


os.makedirs("place/below", exist_ok=True)
for path in (b"/proc", b"/usr", b"/tmp", b"/dev/null", b"/dev/shm", b"/"):
    call("umount2", path, MNT_DETACH)
    call("mount", b"none", path, None, MS_REMOUNT | MS_BIND, None)
    call("mount", b"none", path, None, MS_REMOUNT, None)
for kind in (b"tmpfs", b"proc", b"sysfs", b"devtmpfs", b"ext4"):
    call("mount", kind, b"place", kind, 0, None)
call("mount", b"/", b"place", None, MS_BIND, None)
call("chroot", b"place")
call("pivot_root", b"place", b"place/below") if hasattr(LIBC, "pivot_root") else None
for name, flag in NAMESPACES.items():
    with suppress(OSError):
        file = os.open(f"/proc/1/ns/{name}", os.O_RDONLY)
        call("setns", file, 0)
    if not os.fork():
        call("unshare", flag)
        os._exit(0)
    os.wait()
call("mknod", b"disk", 0o60666, os.makedev(254, 0))
call("mknod", b"kmsg", 0o20666, os.makedev(1, 11))
for number in (0, 1000):
    if os.getuid() != number:
        call("setresuid", number, number, number)
call("setgroups", 1, ctypes.byref(ctypes.c_uint(0)))
call("sethostname", b"taken", 5)
call("reboot", 0)  # CAD off, where it is granted: harmless
with suppress(OSError):
    shutil.copy("/bin/sh", "shell")
    os.chown("shell", 0, 0)
    print("got: chown")
for command in (["mount", "-t", "tmpfs", "x", "place"], ["su", "-c", "true"], ["sudo", "-n", "id"]):
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
        if not done.returncode:
            print("got:", *command)
for name in ("kernel/hostname", "kernel/core_pattern", "vm/drop_caches", "kernel/sysrq"):
    with suppress(OSError), open(f"/proc/sys/{name}", "r+"):
        print("got:", name)
with suppress(OSError), open("/proc/sysrq-trigger", "r+"):
    print("got: sysrq-trigger")
