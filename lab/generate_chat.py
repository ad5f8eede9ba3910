"""Talk with a model that was trained on conversations, as data/prepare.py writes them.

Its documents are conversations that a chat template has made into text. A prompt is the text of
the conversation so far, up to where the next answer would stand; the answer ends where the
template ends it, or with the document. The templates are those of `prepare.py --template`.
"""

import contextlib
import json
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from generate_model import Asked, Model, UserError, check_text, stream
from generate_text import Until, tell, warn_of_missing

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
Message = dict[str, str]  # role and content


def say(role: str, content: str) -> Message:
    """Make a message."""
    return {"role": role, "content": content}


# ===================================== TEMPLATES =====================================


def to_json(value: Any, **options: Any) -> str:
    """Write JSON for models; Jinja's own filter writes it for HTML."""
    return json.dumps(value, **{"ensure_ascii": False} | options)


def refuse(message: str) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


class Template:
    """A chat template: `plain`, `chatml`, or that in a file. Raises UserError if it is wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = to_json
        try:
            source = TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8")
            self.compiled = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"--template {name}: line {error.lineno}: {error.message}") from None
        except (OSError, ValueError, RecursionError) as error:
            names = " nor ".join(TEMPLATES)
            problem = f"neither {names} nor a readable file: {error}"
            raise UserError(f"--template {name}: {problem}") from None

    def render(self, messages: list[Message]) -> str:
        """Give the text of a conversation. Raises UserError."""
        try:
            return self.compiled.render(
                messages=messages,
                tools=None,
                bos_token="",
                eos_token="",
                add_generation_prompt=False,
            )
        except Exception as error:  # templates are programs: anything can go wrong in them
            raise UserError(f"--template {self.name}: {type(error).__name__}: {error}") from None

    def frame(self, messages: list[Message]) -> tuple[str, str]:
        """Give the text before the next answer, and the text that ends the answer."""
        answer = uuid.uuid4().hex  # stands for the answer, and is in no message
        question = uuid.uuid4().hex
        last = [*messages, say("assistant", answer)]
        before, found, end = self.render(last).partition(answer)
        if not found:
            raise UserError(f"--template {self.name}: it leaves out what the assistant says")
        if not end.strip():  # what follows is known of an answer that is not the last message
            longer = self.render([*last, say("user", question)])
            end = longer.partition(answer)[2].partition(question)[0]
        return before, end


# ===================================== CONVERSATION =====================================


class Conversation:
    """A conversation of a person and a model."""

    def __init__(self, model: Model, template: Template, system: str, asked: Asked) -> None:
        self.model = model
        self.template = template
        self.messages = [say("system", system)] if system else []
        self.asked = asked

    def answer(self, question: str) -> Iterator[str]:
        """Yield the answer to the next question, part by part. Raises UserError."""
        self.messages.append(say("user", question))
        before, end = self.template.frame(self.messages)
        # A tokenizer joins a space to the word behind it, so the space is for the model to say.
        document = self.model.encode(before.rstrip(" "))
        until = Until(self.as_read(end))
        turn = len(self.messages)
        asked = replace(self.asked, samples=1, seed=self.asked.seed + turn)
        said = ""
        for _, text in stream(self.model, document, asked):
            part = until.end() if text is None else until.pass_on(text)
            part = part if said else part.lstrip()
            said += part
            if part:
                yield part
            if until.found:
                break
        self.messages.append(say("assistant", said.strip()))

    def as_read(self, end: str) -> str:
        """Give the text that ends an answer as the tokenizer leaves it, less blanks behind it.

        Most tokenizers make line ends spaces.
        """
        text = self.model.read(self.model.encode(f"x{end}x"))
        return text[1:-1].rstrip()


def chat(conversation: Conversation, show: Any) -> None:
    """Hold a conversation on the terminal; without one, a line is a turn. Raises UserError."""
    if sys.stdin is None:
        raise UserError("--chat: standard input is closed; there is nothing to answer")
    if sys.stdin.isatty():
        talk(conversation, show)
        return
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    count = 0
    for number, line in enumerate(sys.stdin, 1):
        question = check_text(line.strip(), f"line {number} of standard input")
        if not question:
            continue
        count += 1
        warn_of_missing(conversation.model.texts, question)
        said = "".join(conversation.answer(question))
        show(" ".join(said.split()) + "\n")
    if not count:
        tell("warning: --chat: no terminal, and no line on standard input")


def talk(conversation: Conversation, show: Any) -> None:
    """Hold a conversation on a terminal."""
    with contextlib.suppress(ImportError):  # lines can be edited with it
        import readline  # noqa: F401
    tell("Say something; Ctrl-D ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            show("\n")
            return
        if not question:
            continue
        warn_of_missing(conversation.model.texts, check_text(question, "what was typed"))
        for part in conversation.answer(question):
            show(part)
        show("\n")
