"""Speak with what the auditor's side listens to, or keeps in the kernel."""

import ctypes
import fcntl
import json
import os
import platform
import socket
from contextlib import suppress

FACTS = json.loads(os.environ["FACTS"])
LIBC = ctypes.CDLL(None, use_errno=True)
KEYCTL = {"x86_64": 250, "aarch64": 219}[platform.machine()]
SEARCH, READ, SESSION = 10, 11, -3
TIOCSTI, READ_ALL = 0x5412, 3

for family, address in (
    (socket.AF_INET, ("127.0.0.1", FACTS["port"])),
    (socket.AF_UNIX, "\0" + FACTS["abstract"]),
    (socket.AF_UNIX, FACTS["path"]),
    (socket.AF_INET, ("192.0.2.1", 80)),
):
    with suppress(OSError), socket.socket(family) as line:
        line.settimeout(1)
        line.connect(address)
        print("got: socket", str(address).lstrip("\0"))
if LIBC.shmget(FACTS["key"], 0, 0) >= 0:
    print("got: System V memory")
if os.path.exists(f"/dev/shm/{FACTS['shared']}"):
    print("got: POSIX memory")
key = LIBC.syscall(KEYCTL, SEARCH, SESSION, b"user", FACTS["keyed"].encode(), 0)
if key > 0:
    print("got: key")
with suppress(OSError), open("/proc/keys") as keys:
    if FACTS["keyed"] in keys.read():
        print("got: name of key")
if LIBC.klogctl(READ_ALL, ctypes.create_string_buffer(4096), 4096) > 0:
    print("got: kernel log")
with suppress(OSError):
    os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK)
    print("got: kmsg")
with suppress(OSError):
    os.open("/dev/tty", os.O_RDWR)
    print("got: terminal")
try:
    fcntl.ioctl(0, TIOCSTI, b"x")
except PermissionError:
    pass
except OSError:
    print("got: TIOCSTI")  # that this is no terminal is not said by the filter
