#!/usr/bin/env python3
"""Plan a run: from one depth and a horizon to a CONFIG file, with the arithmetic on stderr.

    python lab/plan.py DEPTH=12 TARGET_PARAM_DATA_RATIO=20 GPUS=8xH100 > my.env
    python lab/plan.py CONFIG=configs/baseline.env RUN=logs/A    what a configuration takes
    python lab/plan.py DEPTH=12 --explain MUON_WD                where a value comes from
    python lab/plan.py --from nanochat -- --depth 12 --matrix-lr .02
    python lab/plan.py --from surogate config.yaml

A word is NAME=VALUE: an option below, or a setting of train_gpt.py, which wins over what the dial
derives. CONFIG names a file of settings, which the dial and the other words override. The
environment is not read. docs/plan.md says more.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import plan_cost as cost
import plan_foreign as foreign
from plan_dial import (
    CHINCHILLA,
    DIAL,
    DIFFERENCES,
    SHAPED_BY_DEPTH,
    Deriver,
    PlanError,
    UsageError,
    Value,
    Values,
    core,
    keeper,
    nanochat_flops,
    resolve,
    scaling_params,
    shard_tokens,
)

HEADINGS = {"model": "Model, and its artifact", "result": "Training", "run": "Places and speed"}
PLACES = ("data_path", "tokenizer_path", "run_id", "out_dir")
Rows = list[tuple[str, str]]  # label and text


class Request(NamedTuple):
    """What the command line asks for."""

    words: list[str]
    explain: list[str]
    source: str  # "nanochat", "surogate", or empty
    file: str
    foreign: list[str]


def parse_arguments(arguments: list[str]) -> Request:
    """Read the command line. Raises UsageError."""
    ours, rest = arguments, []
    if "--" in arguments:
        end = arguments.index("--")
        ours, rest = arguments[:end], arguments[end + 1 :]
    request = Request([], [], "", "", rest)
    words = list(ours)
    while words:
        word = words.pop(0)
        if word == "--explain":
            request.explain.append(next_word(words, "--explain: expected a name").upper())
        elif word == "--from":
            source = next_word(words, "--from: expected nanochat or surogate")
            file = ""
            if source == "surogate":
                file = next_word(words, "--from surogate: expected a YAML file")
            request = request._replace(source=source, file=file)
        elif word.startswith("-") or "=" not in word:
            raise UsageError(f"{word}: expected NAME=VALUE, --explain NAME, --from or --help")
        else:
            request.words.append(word)
    check_source(request)
    return request


def next_word(words: list[str], problem: str) -> str:
    """Take the next word. Raises UsageError if there is none."""
    if not words:
        raise UsageError(problem)
    return words.pop(0)


def check_source(request: Request) -> None:
    """Say what is wrong with --from. Raises UsageError."""
    if request.source not in ("", "nanochat", "surogate"):
        raise UsageError(f"--from {request.source}: expected nanochat or surogate")
    if request.foreign and request.source != "nanochat":
        raise UsageError("--: only --from nanochat has words behind it")


def read_words(words: Iterable[str]) -> tuple[dict[str, object], dict[str, str]]:
    """Divide NAME=VALUE words into options of the dial, read, and settings. Raises UsageError."""
    dial: dict[str, object] = {}
    settings: dict[str, str] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name in DIAL:
            try:
                dial[name] = DIAL[name].read(text)
            except (ValueError, OverflowError):
                raise UsageError(f"{word}: expected {DIAL[name].expected}") from None
            continue
        if name not in core.FIELDS:
            advice = foreign.closest(name.upper(), [*DIAL, *core.FIELDS])
            raise UsageError(f"{word}: no such name{advice or '; see --help'}")
        try:
            core.parse_setting(name, text)
        except ValueError as error:
            raise UsageError(f"{word}: {error}") from None
        settings[name] = text
    return dial, settings


def read_config(path: str) -> Values:
    """Read a CONFIG file. Raises PlanError."""
    try:
        texts = core.read_dotenv(path)
    except core.UserError as error:
        raise PlanError(str(error)) from None
    for name, text in texts.items():
        try:
            core.parse_setting(name, text)
        except ValueError as error:
            raise PlanError(f"{path}: {name}={text}: {error}") from None
    return {name: Value(text, path, "config") for name, text in texts.items()}


def make_deriver(request: Request) -> Deriver:
    """Gather all that was given, what is ours over what was translated. Raises PlanError."""
    dial, settings = read_words(request.words)
    path = settings.pop("CONFIG", "")
    config = read_config(path) if path else {}
    given = {name: Value(text, "given", "given") for name, text in settings.items()}
    notes: list[str] = []
    if request.source:
        if request.source == "nanochat":
            translated = foreign.from_nanochat(request.foreign, DIAL)
        else:
            translated = foreign.from_surogate(request.file, DIAL)
        words = [f"{name}={text}" for name, text in translated.words.items()]
        words += [f"{name}={value.text}" for name, value in translated.values.items()]
        theirs, _ = read_words(words)
        dial = theirs | dial
        given = translated.values | given
        notes = translated.notes
    if "DEPTH" not in dial:
        for name in SHAPED_BY_DEPTH:
            if name in dial:
                raise UsageError(f"{name}: needs DEPTH")
    flops = "nanochat" if request.source == "nanochat" else "own"
    deriver = Deriver(dial, given, config, flops)
    deriver.notes += notes
    return deriver


# ===================================== THE FILE =====================================


def dotenv(values: Values, command: list[str]) -> str:
    """Write settings as a CONFIG file, each with where it comes from."""
    lines = [comment(f"python lab/plan.py {shlex.join(command)}")]
    for role, heading in HEADINGS.items():
        names = [name for name, f in core.FIELDS.items() if f.metadata["role"] == role]
        names = [name for name in names if name in values]
        if names:
            lines += ["", f"# {heading}"]
        for name in names:
            text, why, _ = values[name]
            quoted = shlex.quote(text) if text else ""
            lines.append(f"{name}={quoted}  {comment(why)}")
    return "\n".join(lines)


def comment(text: str) -> str:
    """Write a comment, in one line whatever the text has."""
    return "# " + " ".join(text.split())


# ===================================== THE ARITHMETIC =====================================


def short(x: float) -> str:
    """Write a large number with its unit, such as 1.32 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= size:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"


def duration(seconds: float) -> str:
    """Write a time for a person."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def parameter_rows(hp: cost.Config) -> Rows:
    """Say how many parameters there are, and what for."""
    counts = cost.parameters_by_role(cost.shapes_of(hp))
    total = counts.total()
    rows = [("parameters", f"{total:,}")]
    rows += [(f"  {role}", f"{n:,}  {n / total:.1%}") for role, n in counts.most_common()]
    N = scaling_params(hp)
    rows.append(("  nanochat's N", f"{N:,}  matrices of the blocks, and the output head"))
    return rows


def flops_row(hp: cost.Config) -> tuple[str, str]:
    """Say what training on a token takes, as train_gpt.py counts it, and as nanochat does."""
    flops = keeper.flops_per_token(hp)
    text = f"{flops:.4g}"
    if hp.loop_repeats:
        text += f"; {keeper.flops_per_token(hp, loops=False):.4g} before the loops"
    theirs = f"nanochat counts {nanochat_flops(hp):.4g}: all keys of a window, attended to or not"
    return "FLOPs a token", f"{text}\n{theirs}"


def length_rows(hp: cost.Config, speed: cost.Speed, price: float | None) -> Rows:
    """Say how many steps and tokens come, how long that takes, and what it costs."""
    batch = keeper.planned_tokens(replace(hp, iterations=1))
    cap = core.training_seconds(hp)
    steps = float(hp.iterations)
    rows = [("tokens a step", f"{batch:,.0f}"), ("speed", speed_text(speed, batch))]
    by_cap = cap * speed.rate / batch
    if cap and by_cap == by_cap:
        ends = "the cap ends it" if by_cap < steps else "the cap is not reached"
        text = f"{by_cap:,.0f} in {duration(cap)}; ITERATIONS={hp.iterations}: {ends}"
        rows.append(("steps in the cap", text))
        steps = min(steps, by_cap)
    elif cap:
        rows.append(("steps in the cap", f"unknown, of {hp.iterations}, in {duration(cap)}"))
    tokens = steps * batch
    rows.append(("steps", f"{steps:,.0f}"))
    rows += token_rows(hp, tokens)
    if speed.rate == speed.rate:
        seconds = tokens / speed.rate
        text = duration(seconds) + ", without compiling, validation and export"
        if price is not None:
            text += f"; {price * seconds / 3600:.2f} at {price:g} an hour"
        rows.append(("training time", text))
    elif price is not None:
        rows.append(("cost", "unknown, as the speed is"))
    return rows


def speed_text(speed: cost.Speed, batch: float) -> str:
    """Say how fast training is, and how that is known."""
    if speed.rate != speed.rate:
        return speed.why
    step = f"{1e3 * batch / speed.rate:.1f} ms a step"
    return f"{speed.rate:,.0f} tokens/s, {step}\n{speed.why}"


def token_rows(hp: cost.Config, tokens: float) -> Rows:
    """Say how many tokens come, beside parameters and data."""
    total = cost.parameters_by_role(cost.shapes_of(hp)).total()
    each = tokens / total
    share = each / CHINCHILLA
    text = f"{short(tokens)}, {each:.4g} a parameter; Chinchilla's {CHINCHILLA} are"
    text += f" {short(CHINCHILLA * total)}: {share:.0%}"
    ratio = f"{tokens / scaling_params(hp):.4g} (tokens / N)"
    flops = f"{tokens * keeper.flops_per_token(hp):.4g}"
    rows = [("tokens", text), ("  nanochat's ratio", ratio), ("FLOPs in all", flops)]
    data = shard_tokens(hp)
    if data:
        rows.append(("epochs", f"{tokens / data:.3g} of {short(data)} tokens in {hp.data_path}"))
    return rows


def memory_rows(hp: cost.Config, devices: cost.Devices) -> Rows:
    """Say what one device must hold."""
    need = cost.memory(hp, devices)
    room = devices.card.memory * 1e9 if devices.card else 0
    text = f"{need.total / 2**20:,.0f} MiB"
    if room:
        verdict = "it fits" if need.total < 0.95 * room else "too much: lower MICRO_BATCH_TOKENS"
        text += f" of {room / 2**20:,.0f}: {verdict}"
    sequences = cost.rows_of(hp, devices.kind, devices.count)
    parts = [
        ("  weights, gradients", need.weights),
        ("  optimizer, own share", need.state),
        ("  batches loaded ahead", need.batches),
        (f"  {sequences} x {hp.train_seq_len} tokens", need.activations + need.micro),
    ]
    if need.update:
        parts.append(("  or Muon's update", need.update))
    if need.process:
        parts.append(("  process, allocator", need.process))
    sizes = [(label, f"{size / 2**20:,.0f}") for label, size in parts]
    return [("memory a device", text), *sizes]


def artifact_rows(hp: cost.Config) -> Rows:
    """Say what code and artifact take of the cap."""
    made = cost.artifact(hp)
    left = made.cap - made.total
    verdict = f"{left:,} left" if left >= 0 else f"OVER by {-left:,}"
    rows = [("code and artifact", f"{made.total:,} of {made.cap:,}: {verdict}\n{made.note}")]
    rows += [("  code", f"{made.code:,}")]
    rows += [(f"  {role}", f"{size:,}") for role, size in made.parts.most_common() if size]
    return rows


def find_speed(deriver: Deriver, hp: cost.Config, devices: cost.Devices) -> cost.Speed:
    """Take the speed that was given, measured, or estimated, in this order. Raises PlanError."""
    dial = deriver.dial
    if "SPEED" in dial:
        return cost.Speed(dial["SPEED"], "given: SPEED")
    if "RUN" in dial:
        return cost.measured_speed(hp, dial["RUN"], devices)
    peak = dial["PEAK"] * 1e12 if "PEAK" in dial else None
    return cost.estimated_speed(hp, devices, peak, dial.get("MFU"))


def warnings(deriver: Deriver, hp: cost.Config, speed: cost.Speed) -> list[str]:
    """Say what a user should know before the run."""
    found = list(deriver.notes)
    batch = keeper.planned_tokens(replace(hp, iterations=1))
    by_cap = core.training_seconds(hp) * speed.rate / batch
    derived = deriver.values.get("ITERATIONS")
    aimed = derived and derived.source != "config"
    if aimed and 0 < by_cap < hp.iterations:
        text = (
            f"MAX_WALLCLOCK_SECONDS={hp.max_wallclock_seconds:g} ends the run at step {by_cap:,.0f}"
        )
        found.append(f"{text}, before ITERATIONS={hp.iterations}; 0 lets it go on")
    if "DEPTH" in deriver.dial and "MUON_WD" in deriver.values and by_cap and not aimed:
        found.append("MUON_WD follows the model's size alone, not how long the cap lets it train")
    return found


def layout(rows: Rows, width: int) -> list[str]:
    """Set labels and texts side by side; a text's further lines below its first."""
    lines = []
    for label, text in rows:
        first, *further = text.split("\n")
        lines.append(f"{label:{width}}  {first}".rstrip())
        lines += [" " * (width + 2) + line for line in further]
    return lines


def arithmetic(deriver: Deriver, hp: cost.Config) -> str:
    """Write all numbers of the plan. Raises PlanError."""
    told = deriver.dial.get("GPUS")
    devices = cost.parse_devices(str(told)) if told else cost.devices_here()
    if hp.device == "cpu" and devices.kind != "cpu":
        devices = cost.parse_devices(f"{devices.count}xcpu")
    speed = find_speed(deriver, hp, devices)
    price = deriver.dial.get("PRICE")
    blocks = [
        [*parameter_rows(hp), flops_row(hp)],
        length_rows(hp, speed, price),
        memory_rows(hp, devices),
        artifact_rows(hp),
    ]
    width = max(len(label) for block in blocks for label, _ in block)
    lines: list[str] = []
    for block in blocks:
        lines += [*layout(block, width), ""]
    if "DEPTH" in deriver.dial:
        lines += [
            "the model is not nanochat's in this:",
            *(f"  {text}" for text in DIFFERENCES),
            "",
        ]
    lines += [f"note: {text}" for text in warnings(deriver, hp, speed)]
    return "\n".join(lines).rstrip()


def explain(name: str, deriver: Deriver, hp: cost.Config) -> str:
    """Say where a value comes from. Raises UsageError for a name that is unknown."""
    if name in deriver.values:
        text, why, source = deriver.values[name]
        where = {"given": "given: ", "config": "from ", "dial": ""}[source]
        where = "" if why.startswith("given") else where
        return f"{name}={text}\n  {where}{why}"
    if name in core.FIELDS:
        value = getattr(hp, name.lower())
        about = core.FIELDS[name].metadata["doc"]
        return f"{name}={value}\n  train_gpt.py's default: {about}"
    if name in DIAL:
        option = DIAL[name]
        if name in deriver.dial:
            return f"{name}={deriver.dial[name]}\n  given: {option.about}"
        default = "" if option.default is None else option.default
        return f"{name}={default}\n  not given: {option.about}"
    advice = foreign.closest(name, [*DIAL, *core.FIELDS])
    raise UsageError(f"--explain {name}: no such name{advice}")


# ===================================== MAIN =====================================


def usage() -> str:
    """Write what --help prints."""
    rows = [(name, f"{o.about} ({o.expected})") for name, o in DIAL.items()]
    rows = [
        (name, text if DIAL[name].default is None else f"{text}, default {DIAL[name].default}")
        for name, text in rows
    ]
    lines = ["Options:", *(f"    {name:24} {text}" for name, text in rows)]
    return "\n".join([str(__doc__), *lines])


def plan(arguments: list[str]) -> tuple[str, str]:
    """Give what goes to stdout and stderr. Raises PlanError."""
    if arguments in (["--help"], ["-h"]):
        return usage(), ""
    request = parse_arguments(arguments)
    if not (request.words or request.source):
        raise UsageError("nothing to plan: give DEPTH=12, CONFIG=my.env or --from; see --help")
    deriver = make_deriver(request)
    values = deriver.derive()
    hp = resolve({name: value.text for name, value in values.items()})
    if request.explain:
        return "\n".join(explain(name, deriver, hp) for name in request.explain), ""
    report = arithmetic(deriver, hp)
    return dotenv(values, arguments), report


def main(arguments: list[str]) -> int:
    """Run the program. Returns its exit code."""
    try:
        out, report = plan(arguments)
        print(out, flush=True)
        if report:
            print(report, file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as problem:
        print(f"plan.py: error: {problem}", file=sys.stderr)
        return 2
    except (PlanError, core.UserError) as problem:
        print(f"plan.py: error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
