"""Fill every place that can be written to, at most to 48 MiB each."""

import json
import os
from contextlib import suppress

PART = b"x" * 2**20
for place in json.loads(os.environ["FACTS"])["folders"]:
    written = 0
    for number in range(3):
        with suppress(OSError), open(f"{place}/fill{number}", "wb", 0) as file:
            for _ in range(16):
                written += file.write(PART)
    print("got:", place, written >> 20)
