"""How the tools of this folder end: whatever they print, and whatever they print to."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a tool's main with the command line, and end the program with what it returns.

    What a console cannot show is printed as an escape. A console that is closed ends the tool
    without a word; what else the system refuses is one line.
    """
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    code: int | str | None
    try:
        code = main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
    except OSError as problem:
        code = f"{Path(sys.argv[0]).name}: error: {problem}"
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
