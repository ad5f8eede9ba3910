"""Check a record folder: a table of rules, each PASS, WARN, FAIL or NOT CHECKED.

    python records/audit.py FOLDER [--artifact F] [--best FOLDER] [--rules practice] [--json]
    python records/audit.py FOLDER --data DIR --tokenizer M [--artifact F] [--unseen DIR] [--json]

The static rules read the folder's files, of this repository or of a public one of any age, and run
nothing. With --data and --tokenizer the script is also run, as a black box that speaks the protocol
of README.md (EVAL_ONLY, ARTIFACT, SAVE_NLL, SCORE_STREAMS): the dynamic rules. It runs without your
rights, and where the system does not allow that it is not run, but for --no-isolation.
Exits with 0 if no rule says FAIL, with 1 if one does, with 2 if the arguments are wrong or the
script cannot be isolated.
"""

import argparse
import contextlib
import json
import sys
import textwrap
from pathlib import Path

import program
import static_rules
from reading import FAIL, NOT_CHECKED, PASS, WARN, Verdict

WIDTH = 100


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; exit with 2 if it is wrong."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("audit.py", None, summary, details, formatter_class=form)
    parser.add_argument("folder", type=Path, help="the record folder")
    parser.add_argument("--artifact", type=Path, help="the model; default: the one in the folder")
    parser.add_argument("--data", type=Path, help="a folder with fineweb_val_*.bin shards")
    parser.add_argument("--tokenizer", type=Path, help="their SentencePiece model")
    help_of_best = "the record to beat; default: the best one beside FOLDER that is not younger"
    parser.add_argument("--best", type=Path, help=help_of_best, metavar="FOLDER")
    help_of_rules = "the challenge's rules by the letter, or as its organisers applied them"
    parser.add_argument(
        "--rules", choices=("letter", "practice"), default="letter", help=help_of_rules
    )
    parser.add_argument("--unseen", type=Path, help="a folder with shards that nobody trained on")
    help_of_isolation = "run the script with your own rights: it can read and change what you can"
    parser.add_argument("--no-isolation", action="store_true", help=help_of_isolation)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    for name, path, there in (
        ("FOLDER", options.folder, Path.is_dir),
        ("--artifact", options.artifact, Path.is_file),
        ("--data", options.data, Path.is_dir),
        ("--tokenizer", options.tokenizer, Path.is_file),
        ("--best", options.best, Path.is_dir),
        ("--unseen", options.unseen, Path.is_dir),
    ):
        if path is not None and not there(path):
            parser.error(f"{name}: {path} is not a {'folder' if there == Path.is_dir else 'file'}")
    if (options.data is None) != (options.tokenizer is None):
        parser.error("--data and --tokenizer belong together: give both or none")
    if options.data and not (options.artifact or static_rules.find_artifact(options.folder)):
        parser.error("--data: there is not just one artifact in the folder; name it by --artifact")
    return options


def audit(options: argparse.Namespace) -> list[Verdict]:
    """Apply the static rules, and the dynamic ones if there is what they need."""
    verdicts = static_rules.check(options.folder, options.artifact, options.best, options.rules)
    if not options.data:
        reason = "the script was not run: that needs --data and --tokenizer"
        return [*verdicts, Verdict("dynamic", NOT_CHECKED, reason)]
    import dynamic_rules  # needs NumPy and sentencepiece, which the static rules do without

    artifact = options.artifact or static_rules.find_artifact(options.folder)
    assert artifact
    with contextlib.redirect_stdout(sys.stderr):  # its estimate of costs is not part of the result
        found = dynamic_rules.check(
            options.folder,
            artifact,
            options.data,
            options.tokenizer,
            unseen=options.unseen,
            isolated=not options.no_isolation,
        )
    return verdicts + found


def isolation_problem(options: argparse.Namespace) -> str:
    """Tell why the script cannot be run as the options ask for; "" if it can."""
    if not options.data or options.no_isolation:
        return ""
    import script  # needs NumPy

    try:
        script.check_isolation()
    except script.IsolationError as error:
        return str(error)
    return ""


def count(verdicts: list[Verdict]) -> dict[str, int]:
    """Count the rules in each state."""
    return {
        state: sum(v.state == state for v in verdicts) for state in (PASS, WARN, FAIL, NOT_CHECKED)
    }


def render_table(verdicts: list[Verdict]) -> str:
    """Lay out rules, states and evidence in columns, and a line of counts."""
    first = max(len(verdict.rule) for verdict in verdicts)
    indent = first + len(NOT_CHECKED) + 4
    lines = []
    for verdict in verdicts:
        head = f"{verdict.rule:{first}}  {verdict.state:{len(NOT_CHECKED)}}  "
        lines += textwrap.wrap(
            printable(verdict.evidence) or "-",
            WIDTH,
            initial_indent=head,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
    counts = ", ".join(f"{number} {state}" for state, number in count(verdicts).items())
    return "\n".join([*lines, f"{len(verdicts)} rules: {counts}"])


def printable(text: str) -> str:
    """Replace what could move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else "?" for c in text)


def main(arguments: list[str]) -> int:
    """Audit a folder and return the exit code."""
    options = parse_arguments(arguments)
    if problem := isolation_problem(options):
        print(f"audit.py: error: {problem}", file=sys.stderr)
        return 2
    verdicts = audit(options)
    if options.json:
        result = {
            "folder": str(options.folder),
            "counts": count(verdicts),
            "verdicts": [vars(verdict) for verdict in verdicts],
        }
        print(json.dumps(result, indent=2))
    else:
        print(render_table(verdicts))
    return int(any(verdict.state == FAIL for verdict in verdicts))


if __name__ == "__main__":
    program.run(main)
