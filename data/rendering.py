"""How a record, a JSON object or a row of a table, becomes the text of a document."""

import argparse
import importlib
import json
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from shards import DataError

ROLE_ALIASES = {"human": "user", "gpt": "assistant"}
TYPES = ("text", "instruction", "conversation")
PLACEHOLDERS = ("system", "instruction", "input", "output")

PLAIN = (
    "{% if tools %}Tools: {{ tools | tojson }}{{ '\\n\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)
CHATML = (
    "{% if tools %}<|im_start|>tools{{ '\\n' }}{{ tools | tojson }}<|im_end|>{{ '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}{{ '\\n' }}{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "<|im_end|>{{ '\\n' }}"
    "{% endfor %}"
)
TEMPLATES = {"plain": PLAIN, "chatml": CHATML}


class RecordError(Exception):
    """A record that makes no document: its kind, under which it is counted, and the details."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def library(name: str) -> ModuleType:
    """An optional module. Raises DataError with the line that installs it if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{package} cannot be imported ({error}): pip install {package}") from None


# ---- settings: how a record becomes text


@dataclass(frozen=True)
class RecordFormat:
    """How a record (a JSON object or a row) becomes text. "" means that there is no such field."""

    type: str = "text"
    text_field: str = "text"
    instruction_field: str = ""
    input_field: str = ""
    output_field: str = ""
    system_prompt_type: str = ""
    system_prompt_field: str = ""
    system_prompt: str = ""
    prompt_format: str = ""
    prompt_format_no_input: str = ""
    messages_field: str = "messages"
    system_field: str = ""
    tools_field: str = ""
    message_property_mappings: Mapping[str, str] = field(
        default_factory=lambda: {"role": "role", "content": "content"}
    )
    template: str = "plain"

    @property
    def uses_template(self) -> bool:
        """Whether records are rendered as conversations."""
        return self.type == "conversation" or (
            self.type == "instruction" and not self.prompt_format
        )

    @property
    def required_fields(self) -> list[str]:
        """The fields without which a record cannot become text."""
        return {
            "text": [self.text_field],
            "instruction": [self.instruction_field, self.output_field],
            "conversation": [self.messages_field],
        }[self.type]

    @property
    def optional_fields(self) -> list[str]:
        """The fields that a record may leave out or have as null."""
        named = {
            "text": [],
            "instruction": [self.input_field, self.system_prompt_field],
            "conversation": [self.system_field, self.tools_field],
        }[self.type]
        return [name for name in named if name]

    def problems(self) -> list[str]:
        """All that is wrong with the settings; reads the template's file, if there is one."""
        if self.type not in TYPES:
            return [f"--type {self.type}: must be one of {', '.join(TYPES)}"]
        found = []
        if not all(self.required_fields):
            flags = {
                "text": "--text-field",
                "instruction": "--instruction-field and --output-field",
                "conversation": "--messages-field",
            }
            found.append(f"--type {self.type} needs {flags[self.type]}")
        if self.type == "instruction":
            found += self._system_problems() + self._prompt_problems()
        if self.uses_template:
            try:
                compile_template(self.template)
            except DataError as error:
                found.append(str(error))
        return found

    def _system_problems(self) -> list[str]:
        """Each value of --system-prompt-type needs an option of its own, and only that."""
        if self.system_prompt_type not in ("", "field", "fixed"):
            return [f"--system-prompt-type {self.system_prompt_type}: must be field or fixed"]
        found = []
        for kind, flag, value in (
            ("field", "--system-prompt-field", self.system_prompt_field),
            ("fixed", "--system-prompt", self.system_prompt),
        ):
            if self.system_prompt_type == kind and not value:
                found.append(f"--system-prompt-type {kind} needs {flag}")
            if self.system_prompt_type != kind and value:
                found.append(f"{flag} needs --system-prompt-type {kind}")
        return found

    def _prompt_problems(self) -> list[str]:
        """A prompt format must hold the parts that the other options give, and no others."""
        given = {"instruction", "output"}
        given |= {"input"} if self.input_field else set()
        given |= {"system"} if self.system_prompt_type else set()
        found = []
        if self.prompt_format_no_input and not (self.prompt_format and self.input_field):
            found.append("--prompt-format-no-input needs --prompt-format and --input-field")
        for flag, text, parts in (
            ("--prompt-format", self.prompt_format, given),
            ("--prompt-format-no-input", self.prompt_format_no_input, given - {"input"}),
        ):
            used = set(re.findall(r"\{([A-Za-z_]\w*)\}", text))
            for name in sorted(used - parts):
                known = "nothing gives it" if name in PLACEHOLDERS else "no such placeholder"
                found.append(f"{flag}: {{{name}}}: {known}")
            found += [f"{flag}: has no {{{name}}}" for name in sorted(parts - used) if text]
        return found


# Field of RecordFormat, the type that it is for, help.
OPTIONS = (
    ("type", "", "text, instruction or conversation (text)"),
    ("text_field", "text", "the text (text)"),
    ("instruction_field", "instruction", "the question; required"),
    ("input_field", "instruction", "more about the question"),
    ("output_field", "instruction", "the answer; required"),
    ("system_prompt_type", "instruction", "field or fixed"),
    ("system_prompt_field", "instruction", "the system prompt, with --system-prompt-type field"),
    ("system_prompt", "instruction", "the system prompt, with --system-prompt-type fixed"),
    (
        "prompt_format",
        "instruction",
        "text with {system} {instruction} {input} {output}, instead of --template; a line break "
        "is a line break ($'...' in bash), not \\n",
    ),
    ("prompt_format_no_input", "instruction", "the same for records whose input is empty"),
    ("messages_field", "conversation", "the list of messages (messages)"),
    ("system_field", "conversation", "a system prompt, to be the first message"),
    ("tools_field", "conversation", "definitions of tools, for the template"),
    ("message_property_mappings", "conversation", 'JSON, like {"role": "from"}'),
    ("template", "", "plain, chatml, or a file with a Jinja chat template (plain)"),
)


def mappings(text: str) -> dict[str, str]:
    """The value of --message-property-mappings. Raises ArgumentTypeError if it is not right."""
    try:
        value = json.loads(typed_text(text))
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(v, str) and v for v in value.values()):
        raise argparse.ArgumentTypeError('must be like {"role": "from", "content": "value"}')
    return value


def typed_text(text: str) -> str:
    """A text as it was typed, whatever the locale. Raises ArgumentTypeError if it is not UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: {error.reason}") from None


def count(text: str) -> int:
    """A number from 0 up. Raises ArgumentTypeError if it is none."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how records become text, which `format_from` reads, and --subset,
    --split and --samples, for `Source`. Those not given are None, or "", "train" and 0."""
    group = parser.add_argument_group("records (.jsonl, .parquet, hf:)")
    for name, kind, text in OPTIONS:
        flag = "--" + name.replace("_", "-")
        only = f"; --type {kind}" if kind else ""
        special = {"message_property_mappings": mappings, "template": str}
        convert = special.get(name, typed_text)
        group.add_argument(flag, type=convert, help=(text + only).replace("%", "%%"))
    group.add_argument("--subset", default="", help="configuration of an hf: dataset")
    group.add_argument("--split", default="train", help="split of an hf: dataset (%(default)s)")
    group.add_argument(
        "--samples", type=count, default=0, metavar="N", help="use N records of each input; 0: all"
    )


def format_from(args: argparse.Namespace) -> RecordFormat:
    """The format that the options of `add_options` ask for. Raises DataError with all that is
    wrong, one problem a line."""
    given = {f.name: v for f in fields(RecordFormat) if (v := getattr(args, f.name)) is not None}
    format = RecordFormat(**given)
    found = [
        f"--{name.replace('_', '-')} needs --type {kind}"
        for name, kind, _ in OPTIONS
        if kind and name in given and format.type in TYPES and kind != format.type
    ]
    found += format.problems()
    if "template" in given and format.type in TYPES and not format.uses_template:
        found.append("--template needs records that are rendered as conversations")
    if found:
        raise DataError("\n".join(found))
    return format


# ---- rendering: from a record to its text


def raise_exception(message: str) -> None:
    """For templates: stop with a message."""
    raise library("jinja2").TemplateError(message)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """For templates: JSON for people and models. Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def compile_template(name: str) -> Any:
    """The Jinja template of a built-in name or in a file. Raises DataError if there is none, or
    its syntax is wrong."""
    jinja2, sandbox = library("jinja2"), library("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    try:
        source = TEMPLATES[name] if name in TEMPLATES else Path(name).read_text(encoding="utf-8")
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"--template {name}: line {error.lineno}: {error.message}") from None
    except (OSError, ValueError, RecursionError) as error:
        names = " nor ".join(TEMPLATES)
        raise DataError(
            f"--template {name}: neither {names} nor a readable file: {error}"
        ) from None


def string(record: Mapping[str, object], name: str, required: bool = True) -> str:
    """A field of a record; "" for an optional one that is missing or null. Raises RecordError."""
    value = record.get(name)
    if not required and (not name or value is None):
        return ""
    if name not in record:
        fields_there = ", ".join(map(repr, record)) or "no field"
        raise RecordError("field missing", f"no {name!r}; there is {fields_there:.300}")
    if not isinstance(value, str):
        raise RecordError("not a string", f"{name!r} is {reprlib.repr(value)}")
    return value


def message_text(message: Mapping[str, object]) -> str:
    """The content of a message: a string, or a list of text parts, which are joined. A message
    that calls tools needs none. Raises RecordError."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise RecordError(
                "malformed conversation", f"content is {reprlib.repr(content)}, not text"
            )
    return "".join(part["text"] for part in parts)


class Renderer:
    """Turns records into text. Raises DataError if the format's template cannot be used."""

    def __init__(self, format: RecordFormat) -> None:
        self.format = format
        self.names = {"role": "role", "content": "content", **format.message_property_mappings}
        self.template = compile_template(format.template) if format.uses_template else None

    def text(self, record: object) -> str:
        """The text of a record, not yet checked. Raises RecordError if it has none."""
        if not isinstance(record, Mapping):
            raise RecordError("not an object", f"{reprlib.repr(record)}")
        if self.format.type == "text":
            return string(record, self.format.text_field)
        if self.format.type == "instruction":
            return self._instruction(record)
        messages = self._messages(record.get(self.format.messages_field), record)
        if system := string(record, self.format.system_field, required=False):
            messages.insert(0, {"role": "system", "content": system})
        return self._render(messages, self._tools(record))

    def _instruction(self, record: Mapping[str, object]) -> str:
        format = self.format
        parts = {
            "system": format.system_prompt or string(record, format.system_prompt_field, False),
            "instruction": string(record, format.instruction_field),
            "input": string(record, format.input_field, required=False),
            "output": string(record, format.output_field),
        }
        has_input = bool(parts["input"].strip())
        if format.prompt_format:
            no_input = not has_input and format.prompt_format_no_input
            pattern = r"\{(" + "|".join(PLACEHOLDERS) + r")\}"
            # One pass: placeholders in the values are text.
            return re.sub(pattern, lambda m: parts[m[1]], no_input or format.prompt_format)
        question = parts["instruction"] + ("\n\n" + parts["input"] if has_input else "")
        turns = (("system", parts["system"]), ("user", question), ("assistant", parts["output"]))
        messages = [{"role": r, "content": c} for r, c in turns if c or r != "system"]
        return self._render(messages, None)

    def _messages(self, value: object, record: Mapping[str, object]) -> list[dict[str, Any]]:
        """The messages under the names that templates use, without properties that are null."""
        if self.format.messages_field not in record:
            string(record, self.format.messages_field)  # says which fields there are
        if not isinstance(value, list) or not value:
            raise RecordError(
                "malformed conversation", f"{reprlib.repr(value)} is no list of messages"
            )
        return [self._message(message) for message in value]

    def _message(self, message: object) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RecordError("malformed conversation", f"{reprlib.repr(message)} is no message")
        sources = self.names.values()
        found = {k: v for k, v in message.items() if k not in sources and v is not None}
        for name, source in self.names.items():
            if message.get(source) is not None:
                found[name] = message[source]
        role = found.get("role")
        if not isinstance(role, str) or not role:
            there = ", ".join(map(repr, message))
            detail = f"{self.names['role']!r} is {reprlib.repr(role)}; a message has {there:.300}"
            raise RecordError("malformed conversation", detail)
        return found | {"role": ROLE_ALIASES.get(role, role), "content": message_text(found)}

    def _tools(self, record: Mapping[str, object]) -> list[Any] | None:
        """The definitions of tools, a list or its JSON; None if there are none."""
        value = record.get(self.format.tools_field) if self.format.tools_field else None
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RecordError("malformed conversation", f"tools: not JSON: {error}") from None
        if value and not isinstance(value, list):
            raise RecordError("malformed conversation", f"tools: {reprlib.repr(value)} is no list")
        return value or None

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        try:
            return self.template.render(
                messages=messages,
                tools=tools,
                bos_token="",
                eos_token="",
                add_generation_prompt=False,
            )
        except Exception as error:  # templates are programs: anything can go wrong in them
            raise RecordError("template error", f"{type(error).__name__}: {error}") from None
