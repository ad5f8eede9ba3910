"""Take memory, 768 MiB at most, by one process or by six."""

import json
import os
import time
from contextlib import suppress

PART = 2**20 * 64


def take(parts):
    """Take so many parts, and touch each page of them."""
    held = []
    for _ in range(parts):
        held.append(bytearray(b"x") * PART)
        print("got: 64", flush=True)
    return held


if json.loads(os.environ["FACTS"])["processes"] == 1:
    take(12)
else:
    ready, told = os.pipe()
    go, start = os.pipe()
    children = set()
    for _ in range(6):
        child = os.fork()
        children.add(child)
        if not child:
            os.close(start)
            held = take(2)
            os.write(told, b"x")
            os.read(go, 1)
            os._exit(0)
    os.set_blocking(ready, False)
    done = 0
    while done < len(children):  # until each has what it wants, or was ended
        time.sleep(0.05)
        ended = os.waitpid(-1, os.WNOHANG)[0] if children else 0
        children.discard(ended)
        with suppress(BlockingIOError):
            done += len(os.read(ready, 6))
