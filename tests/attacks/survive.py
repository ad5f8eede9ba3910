"""Leave a process behind that ends by no signal but the last, and takes a minute to go."""

import json
import os
import signal
import sys
import time

facts = json.loads(os.environ["FACTS"])
ready, told = os.pipe()
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    for number in (0, 1, 2):
        os.close(number)
    os.write(told, b"x")
    os.close(told)
    code = "import time; time.sleep(60)"
    os.execv(sys.executable, [sys.executable, "-S", "-c", code, facts["marker"]])
os.close(told)
os.read(ready, 1)
time.sleep(facts["stay"])
