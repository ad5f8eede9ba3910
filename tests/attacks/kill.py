"""Kill or stop the auditor, and everything else that can be reached."""

import json
import os
import signal
from contextlib import suppress

facts = json.loads(os.environ["FACTS"])
for pid in facts["pids"]:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        print("got:", pid, flush=True)
if facts["all"]:  # never without isolation
    for pid in (-1, os.getppid(), 1):
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):
                os.kill(pid, number)
print("still here")
