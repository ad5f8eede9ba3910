"""Write where a script has nothing to write."""

import json
import os
from contextlib import suppress

for folder in json.loads(os.environ["FACTS"])["folders"]:
    with suppress(OSError):
        with open(f"{folder}/written-by-an-attack", "w") as file:
            file.write("x")
        print("got:", folder)
    with suppress(OSError):
        os.chmod(folder, 0o777)
        print("got: chmod", folder)
    with suppress(OSError):
        os.symlink("/", f"{folder}/link-by-an-attack")
        print("got: link", folder)
