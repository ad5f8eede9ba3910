"""lab/generate.py: the model's next tokens, how they are drawn, text as it comes, chat, runs."""

import fcntl
import io
import json
import math
import os
import pty
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    CASE_MARKS,
    REPO,
    SPECIAL_TEXTS,
    VOCAB,
    cli_env,
    compose_documents,
    load_weights,
    random_model,
    resolve,
    run_main,
    small_letters,
    tiny_settings,
    train_tokenizer,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import TECHNIQUES

import train_gpt

sys.path.insert(0, str(REPO / "data"))
sys.path.insert(0, str(REPO / "lab"))
import caseops
import generate
import generate_chat
import generate_choice
import generate_model
import generate_run
import generate_text
import rendering
from generate_choice import Rule
from generate_model import Asked, UserError

TOOL = REPO / "lab" / "generate.py"
CPU = {"DEVICE": "cpu", "DTYPE": "fp32"}
EVERYTHING = [
    TECHNIQUES
    | {"NUM_LAYERS": 4, "LOOP_REPEATS": 1, "LOOP_FIRST": 1, "LOOP_LAST": 2, "SKIPS": "mudd"}
    | {"WINDOW_PATTERN": "SL", "WINDOW_TOKENS": 8, "SPARSE_ATTN_GATE": 4, "PARALLEL_LAST_N": 1}
    | {"ROPE_SCALING": "yarn", "EVAL_SEQ_LEN": 64, "EVAL_STRIDE": 16},
    TECHNIQUES
    | {"NUM_LAYERS": 4, "SMEAR_GATE": 2, "SKIPS": "gated", "TIE_EMBEDDINGS": 1}
    | {"CHANNEL_GAINS": 0, "RESID_MIX": 0, "EVAL_DOC_ISOLATED": 1},
]


def make_artifact(path: Path, dataset, **changed: object) -> Path:
    """An artifact of a model none of whose parameters is as initialized."""
    hp = resolve(tiny_settings(dataset, path.parent), **changed)
    path.write_bytes(train_gpt.pack_artifact(random_model(hp).state_dict(), hp))
    return path


@pytest.fixture(scope="session")
def artifact(dataset, tmp_path_factory) -> Path:
    """An artifact of a small model with a context of 24 tokens."""
    folder = tmp_path_factory.mktemp("artifact")
    changed = {"TRAIN_SEQ_LEN": 24, "TRAIN_BATCH_TOKENS": 240, "TIE_EMBEDDINGS": 0}
    return make_artifact(folder / "a.artifact", dataset, **changed)


def load(path: Path, dataset, **given_settings: str) -> generate_model.Model:
    """The model in an artifact, in fp32 on a CPU."""
    texts = {"TOKENIZER_PATH": str(dataset.tokenizer), **CPU, **given_settings}
    return generate_model.load_artifact(path, texts)


@pytest.fixture(scope="session")
def model(artifact, dataset) -> generate_model.Model:
    return load(artifact, dataset)


def nll_of_all(model, read: list[int]) -> torch.Tensor:
    """The NLL of every token behind others, each by a forward pass with it as the target."""
    inputs = torch.tensor([read] * VOCAB)
    with torch.no_grad():
        return model.gpt(inputs, torch.arange(VOCAB)[:, None])[:, -1]


def continued(model, document: list[int], asked: Asked) -> list[list[int]]:
    """The tokens of each sample."""
    found: list[list[int]] = [[] for _ in range(asked.samples)]
    for number, token in generate_model.go_on(model, document, asked):
        found[number] += [] if token is None else [token]
    return found


def spoken(model, prompt: str, asked: Asked) -> list[str]:
    """The text of each sample."""
    return generate_run.continuations(model, prompt, asked)


GREEDY = Rule(temperature=0)


# ---- the model


@pytest.mark.parametrize("changed", EVERYTHING, ids=["mudd", "gated"])
def test_logits_are_those_of_the_nll_with_all_techniques(changed, dataset, tmp_path):
    model = load(make_artifact(tmp_path / "a.artifact", dataset, **changed), dataset)
    documents = [[BOS, *range(300, 300 + length)] for length in (5, 40, 5, 1)]
    for document, logits in zip(documents, model.next_logits(documents), strict=True):
        read = [BOS, *document[1:][1 - model.context :]]
        shifted = torch.from_numpy(logits) + nll_of_all(model, read)
        assert shifted.std() < 1e-5, len(document)


def test_a_greedy_text_has_the_tokens_of_the_least_nll(model, dataset):
    document = [BOS, *dataset.sp.encode("The name of the")]
    (found,) = continued(model, document, Asked(GREEDY, length=30, stop=False))
    tokens = [*document]
    for token in found:
        last = max(i for i, known in enumerate(tokens) if known == BOS)
        own = tokens[last:]
        read = own if len(own) <= 24 else [BOS, *own[-23:]]
        assert token == nll_of_all(model, read).argmin(), len(tokens)
        tokens.append(token)
    assert len(tokens) > 30  # longer than the context


def test_a_context_that_is_given_is_what_the_model_reads(artifact, dataset):
    model = load(artifact, dataset, EVAL_SEQ_LEN="6")
    tokens = [BOS, *range(300, 320)]
    whole, cut = model.next_logits([tokens, [BOS, *tokens[-5:]]])
    assert np.array_equal(whole, cut)


def test_samples_of_other_lengths_get_the_logits_that_each_gets_alone(model):
    documents = [[BOS, 300], [BOS], [BOS, 301], [BOS, 300, 305]]
    together = model.next_logits(documents)
    for document, logits in zip(documents, together, strict=True):
        assert np.allclose(model.next_logits([document])[0], logits, atol=1e-5)


def test_many_rows_take_several_forward_passes(model, monkeypatch):
    monkeypatch.setattr(generate_model, "FORWARD_TOKENS", 5)
    documents = [[BOS, 300 + i] for i in range(5)]
    alone = [model.next_logits([document])[0] for document in documents]
    assert np.allclose(model.next_logits(documents), alone, atol=1e-5)


def test_logits_that_are_not_finite_end_in_an_error(model, monkeypatch):
    bad = torch.full((1, VOCAB), math.nan)
    monkeypatch.setattr(model.gpt, "logits", lambda tokens: bad)
    with pytest.raises(UserError, match="not finite"):
        model.next_logits([[BOS]])


# ---- the choice

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def shares_by_definition(logits: list[float], temperature: float) -> list[float]:
    """softmax(logits / T), term by term."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / math.fsum(weights) for w in weights]


@given(LOGITS, st.integers(0, 14), st.floats(0.1, 5))
def test_top_k_keeps_exactly_the_k_most_probable(logits, k, temperature):
    rule = Rule(temperature, top_k=k)
    tokens, p = generate_choice.candidates(np.array(logits, np.float32), rule)
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = ranked[: k or len(ranked)]
    assert tokens.tolist() == kept
    expected = shares_by_definition([logits[i] for i in kept], temperature)
    assert p.tolist() == pytest.approx(expected, abs=1e-12)


@given(LOGITS, st.floats(0.001, 1, exclude_max=True), st.integers(0, 5))
def test_top_p_keeps_exactly_the_smallest_set_that_reaches_p(logits, top_p, k):
    rule = Rule(1.0, top_k=k, top_p=top_p)
    tokens, p = generate_choice.candidates(np.array(logits, np.float32), rule)
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: k or None]
    shares = shares_by_definition([logits[i] for i in ranked], 1.0)
    count = len(tokens)
    assert tokens.tolist() == ranked[:count]
    assert math.fsum(shares[:count]) >= top_p - 1e-9
    assert math.fsum(shares[: count - 1]) < top_p + 1e-9
    assert math.fsum(p) == pytest.approx(1)


def test_top_p_is_reached_where_the_sum_is_p():
    tokens, _ = generate_choice.candidates(np.zeros(4, np.float32), Rule(1.0, top_p=0.5))
    assert tokens.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-5])
def test_a_low_temperature_is_greedy(temperature):
    logits = np.array([1.0, 3.0, 3.5, -2.0], np.float32)
    tokens, p = generate_choice.candidates(logits, Rule(temperature))
    assert (tokens[0], p.tolist()) == (2, [1, 0, 0, 0])


def chi_square(draws: list[int], shares: list[float]) -> float:
    """By how many deviations Pearson's statistic is over its mean."""
    counts = np.bincount(draws, minlength=len(shares))
    expected = len(draws) * np.array(shares)
    freedom = len(shares) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_as_softmax_says(temperature):
    logits = np.array([0.3, -1.0, 2.0, 1.5, 0.0, -0.5, 1.0, 0.8], np.float32)
    random = np.random.default_rng(3)
    draws = [generate_choice.choose(logits, Rule(temperature), random) for _ in range(20_000)]
    assert chi_square(draws, shares_by_definition(logits.tolist(), temperature)) < 3


def test_samples_of_a_model_are_drawn_by_its_nll(model):
    document = [BOS, 300, 301]
    asked = Asked(Rule(1.0), length=1, samples=4000, stop=False)
    draws = [tokens[0] % 8 for tokens in continued(model, document, asked)]
    p = (-nll_of_all(model, document)).exp().double()
    assert chi_square(draws, [p[i::8].sum().item() for i in range(8)]) < 3


def test_a_seed_gives_the_same_text_again(model):
    asked = Asked(length=20, samples=3)
    assert spoken(model, "The", asked) == spoken(model, "The", asked)


def test_another_seed_gives_another_text(model):
    first, second = (spoken(model, "The", Asked(length=20, seed=seed)) for seed in (1, 2))
    assert first != second


def test_samples_differ(model):
    assert len({*spoken(model, "The", Asked(length=20, samples=4))}) == 4


def test_a_sample_does_not_depend_on_the_number_of_samples(model):
    alone, *_ = spoken(model, "The", Asked(length=20))
    first, *_ = spoken(model, "The", Asked(length=20, samples=3))
    assert alone == first


# ---- text

PLAIN_TEXT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "challenge": {},
    "exact": PLAIN_TEXT,
    "unknown": {**PLAIN_TEXT, "byte_fallback": False},
    "dummy_prefix": {"add_dummy_prefix": True},
    "case_ops": {**PLAIN_TEXT, "user_defined_symbols": list(CASE_MARKS)},
    "case_ops_nfkc": {"user_defined_symbols": list(CASE_MARKS)},
}


@pytest.fixture(scope="session")
def all_texts(tmp_path_factory) -> dict[str, generate_text.Texts]:
    """The texts of tokenizers of all kinds."""
    folder = tmp_path_factory.mktemp("tokenizers")
    documents = compose_documents(60)
    found = {}
    for kind, changed in KINDS.items():
        written = map(small_letters, documents) if kind.startswith("case") else documents
        path = train_tokenizer(folder / kind, written, 420, **changed)
        hp = resolve({}, TOKENIZER_PATH=path, VOCAB_SIZE=420)
        found[kind] = generate_text.Texts(train_gpt.Tokenizer(hp))
    return found


def written(texts: generate_text.Texts, tokens: list[int]) -> list[str]:
    """The parts of the text that tokens become."""
    writer = generate_text.Writer(texts)
    return [*map(writer.write, tokens), writer.end()]


@pytest.mark.parametrize("kind", ["challenge", "exact", "dummy_prefix"])
@settings(max_examples=60)
@given(text=st.text(st.sampled_from("aB é日🚀\n▁") | st.characters(codec="utf-8"), max_size=12))
@example(text=" a")
def test_text_in_parts_is_what_the_tokenizer_has_kept(kind, text, all_texts):
    texts = all_texts[kind]
    tokens, _, _ = texts.encode(text)
    kept = texts.sp.normalize(text).replace("▁", " ")
    kept = kept.removeprefix(" ") if kind == "dummy_prefix" else kept
    assert "".join(written(texts, tokens)) == kept


@pytest.mark.parametrize("token", [0, 2], ids=["padding", "end"])
def test_control_tokens_show_nothing(token, all_texts):
    assert written(all_texts["exact"], [token]) == ["", ""]


def test_no_part_holds_half_a_character(all_texts):
    texts = all_texts["exact"]
    tokens, _, _ = texts.encode("a日本🚀é b")
    parts = written(texts, tokens)
    assert "".join(parts) == "a日本🚀é b"
    assert sum(map(texts.sp.is_byte, tokens)) > 5


@pytest.mark.parametrize("after", ["a", "é", ""], ids=["letter", "bytes", "end"])
def test_bytes_that_form_no_character_show_as_one_that_stands_for_it(after, all_texts):
    texts = all_texts["exact"]
    broken, _, _ = texts.encode("日")
    rest, _, _ = texts.encode(after)
    assert "".join(written(texts, broken[:2] + rest)) == "\ufffd" + after


def test_an_unknown_piece_shows_as_a_character_that_stands_for_it(all_texts):
    texts = all_texts["unknown"]
    tokens, _, _ = texts.encode("a日b")
    assert "".join(written(texts, tokens)) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["case_ops", "case_ops_nfkc"])
def test_capitals_come_back(kind, all_texts):
    texts = all_texts[kind]
    text = "The USA, iPhone McDonald a B"
    tokens, *missing = texts.encode(text)
    assert "".join(written(texts, tokens)) == text
    assert missing == [[], []]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_text_of_case_ops_is_written_as_the_data_is(text):
    assert generate_text.lower_case(text) == caseops.encode_case(text)


@given(st.text(st.sampled_from("aBcé1 " + CASE_MARKS)))
def test_capitals_are_restored_as_in_the_data(image):
    assert generate_text.Capitals(False).restore(image) == caseops.invert_case(image)


def test_a_joined_letter_is_a_capital_again_where_the_tokenizer_normalizes():
    assert generate_text.Capitals(True).restore("\ue001é \ue002aéb c") == "É AÉB c"


def test_a_word_in_capitals_goes_on_behind_the_prompt(all_texts, model, monkeypatch):
    texts = all_texts["case_ops"]
    monkeypatch.setattr(model, "texts", texts)
    writer = model.writer([BOS, *texts.encode("US")[0]])
    (token,) = [i for i, piece in enumerate(texts.tokenizer.pieces) if piece == "a"]
    assert writer.write(token) == "A"


@given(st.lists(st.sampled_from(["a", "\n", "\nUser", "User:", "U", "\nU"])))
def test_a_text_goes_through_up_to_the_stop(parts):
    until = generate_text.Until("\nUser:")
    got = ""
    for part in parts:
        got += until.pass_on(part)
        if until.found:
            break
    got += until.end()
    assert got == "".join(parts).split("\nUser:")[0]


def test_text_is_held_back_only_while_it_may_be_the_stop():
    until = generate_text.Until("\nUser:")
    assert [until.pass_on(part) for part in ("a\nUs", "a", "\nU", "X")] == [
        "a",
        "\nUsa",
        "",
        "\nUX",
    ]


# ---- a model that says what it is told


class Scripted(generate_model.Model):
    """A model that says these tokens, then BOS again and again, and keeps what it has read."""

    def __init__(self, texts: generate_text.Texts, tokens: list[int]) -> None:
        self.texts, self.tokens, self.start = texts, [*tokens], [texts.bos]
        self.context = 1000
        self.documents: list[list[int]] = []

    def next_logits(self, documents: list[list[int]]) -> np.ndarray:
        self.documents += [[*document] for document in documents]
        logits = np.zeros((len(documents), len(self.texts.bytes)), np.float32)
        logits[:, self.tokens.pop(0) if self.tokens else self.texts.bos] = 1
        return logits


def scripted(texts: generate_text.Texts, *said: str) -> Scripted:
    """A model that says these texts, and BOS after each."""
    tokens = []
    for text in said:
        tokens += [*texts.encode(text)[0], texts.bos]
    return Scripted(texts, tokens)


def test_a_text_ends_with_the_document(all_texts):
    model = scripted(all_texts["exact"], "one", "two")
    assert spoken(model, "x", Asked(GREEDY)) == ["one"]


def test_a_text_ends_at_its_length(all_texts):
    model = scripted(all_texts["exact"], "a" * 30)
    (tokens,) = continued(model, [BOS], Asked(GREEDY, length=7))
    assert len(tokens) == 7


def test_without_a_stop_the_next_document_begins_from_bos_alone(all_texts):
    texts = all_texts["exact"]
    model = scripted(texts, "one", "two")
    length = len(texts.encode("one")[0]) + 1 + len(texts.encode("two")[0])
    assert spoken(model, "x", Asked(GREEDY, length, stop=False)) == ["one\n\ntwo"]
    assert [BOS] in model.documents


def test_one_sample_may_end_before_the_others(all_texts):
    texts = all_texts["exact"]
    a, b = (texts.encode(letter)[0][0] for letter in "ab")

    class Alternating(Scripted):
        def next_logits(self, documents):
            logits = np.full((len(documents), len(texts.bytes)), -1e9, np.float32)
            for row, document in enumerate(documents):
                first = len(document) == 1
                logits[row, [a, BOS] if first else [b]] = 0
            return logits

    found = continued(Alternating(texts, []), [BOS], Asked(Rule(1.0), length=3, samples=20))
    assert {tuple(tokens) for tokens in found} == {(), (a, b, b)}


def test_without_bos_an_empty_prompt_is_an_error(all_texts):
    model = scripted(all_texts["exact"])
    model.start = []
    with pytest.raises(UserError, match="empty prompt"):
        model.encode("")


# ---- chat

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello you."},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "And now?"},
]


def test_templates_are_those_of_the_data():
    assert generate_chat.TEMPLATES == rendering.TEMPLATES


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_a_prompt_is_what_the_data_has_before_an_answer_and_its_end_what_follows(name):
    before, end = generate_chat.Template(name).frame(MESSAGES)
    answer = {"role": "assistant", "content": "ANSWER"}
    record = {"messages": [*MESSAGES, answer, {"role": "user", "content": "More"}]}
    form = rendering.RecordFormat(type="conversation", template=name)
    assert rendering.Renderer(form).text(record).startswith(f"{before}ANSWER{end}")
    assert end.strip()


def conversation(texts, *said: str, template: str = "plain") -> generate_chat.Conversation:
    """A conversation with a model that says this."""
    model = scripted(texts, *said)
    return generate_chat.Conversation(model, generate_chat.Template(template), "", Asked(GREEDY))


@pytest.mark.parametrize("kind", ["exact", "challenge", "case_ops", "case_ops_nfkc"])
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("plain", " Good day.\n\nUser: and then some"),
        ("chatml", "Good day.<|im_end|>\n<|im_start|>user"),
        ("plain", " Good day."),
    ],
    ids=["plain", "chatml", "document"],
)
def test_an_answer_ends_where_the_template_ends_it(kind, template, said, all_texts):
    talk = conversation(all_texts[kind], said, template=template)
    assert "".join(talk.answer("Hi")) == "Good day."


def test_the_next_prompt_holds_the_conversation_so_far(all_texts):
    talk = conversation(all_texts["exact"], " Yes.", " No.")
    for question in ("One?", "Two?"):
        "".join(talk.answer(question))
    read = talk.model.read(talk.model.documents[-1])
    assert read == "User: One?\n\nAssistant: Yes.\n\nUser: Two?\n\nAssistant: No."


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{% for %}", "line 1"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
    ids=["syntax", "refusal", "no_answer"],
)
def test_a_wrong_template_is_an_error(content, problem, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        generate_chat.Template(str(path)).frame(MESSAGES)


def test_piped_each_line_is_a_turn_and_each_answer_a_line(all_texts, monkeypatch):
    talk = conversation(all_texts["exact"], " It\nis.", " So.")
    pipe = io.TextIOWrapper(io.BytesIO(b"Is it?\n\nSo?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", pipe)
    shown = []
    generate_chat.chat(talk, shown.append)
    assert "".join(shown) == "It is.\nSo.\n"


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [(None, "closed"), (b"\xff\n", "line 1 .* not UTF-8")],
    ids=["none", "bad"],
)
def test_standard_input_that_cannot_be_read_is_an_error(stdin, problem, all_texts, monkeypatch):
    pipe = stdin and io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", pipe)
    with pytest.raises(UserError, match=problem):
        generate_chat.chat(conversation(all_texts["exact"]), print)


# ---- the command line


@pytest.fixture
def tool(artifact, dataset, monkeypatch, capsys):
    """Call the tool: exit code, standard output, standard error."""
    for name, value in (CPU | {"TOKENIZER_PATH": str(dataset.tokenizer)}).items():
        monkeypatch.setenv(name, value)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = generate.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_it_prints_prompt_and_continuation(tool, artifact, model):
    code, out, err = tool(artifact, "The name", "--length", 9, "--top-k", 4)
    expected = spoken(model, "The name", Asked(Rule(top_k=4), length=9))
    assert (code, out, err) == (0, f"The name{expected[0]}\n", "")


def test_it_prints_several_samples_one_after_the_other(tool, artifact, model):
    _, out, _ = tool(artifact, "The", "--length", 6, "--samples", 3)
    texts = spoken(model, "The", Asked(length=6, samples=3))
    marked = [f"--- sample {i} of 3\nThe{text}\n" for i, text in enumerate(texts, 1)]
    assert out == "".join(marked)


def test_without_a_prompt_a_document_begins(tool, artifact, model):
    _, out, _ = tool(artifact, "--length", 6)
    assert out == spoken(model, "", Asked(length=6))[0] + "\n"


def test_a_part_is_printed_as_soon_as_it_is_there(capsys):
    printer = generate.Printer("p ", 2)
    printer.begin()
    printer.take(1, "later")
    printer.take(0, "now")
    assert capsys.readouterr().out == "--- sample 1 of 2\np now"
    printer.take(0, None)
    assert capsys.readouterr().out == "\n--- sample 2 of 2\np later"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_cannot_drive_a_terminal(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    generate.show("a\x1b[2Jé\n\t")
    shown = "a\\x1b[2Jé\n\t" if is_terminal else "a\x1b[2Jé\n\t"
    assert capsys.readouterr().out == shown


def test_characters_that_become_bytes_are_named(tool, artifact):
    code, _, err = tool(artifact, "The 界界 name", "--length", 1)
    assert code == 0
    assert err == (
        "warning: the tokenizer has no piece for 界 (U+754C): the model reads single bytes\n"
    )


def test_characters_that_become_unknown_pieces_are_named(all_texts, capsys):
    generate_text.warn_of_missing(all_texts["unknown"], "a 日本 b\u200b")
    assert capsys.readouterr().err == (
        "warning: the tokenizer lacks 日 (U+65E5), 本 (U+672C), U+200B: "
        "the model reads an unknown piece instead\n"
    )


def cut(artifact, folder, dataset) -> list[object]:
    path = folder / "cut.artifact"
    path.write_bytes(artifact.read_bytes()[:-9])
    return [path]


def with_other_tokenizer(artifact, folder, dataset) -> list[object]:
    other = train_tokenizer(folder / "other.model", compose_documents(seed=9))
    return [artifact, "--tokenizer", other]


BAD = {
    "truncated or damaged": cut,
    "not the tokenizer that": with_other_tokenizer,
    "no such artifact": lambda artifact, folder, dataset: [folder / "none"],
    "no such tokenizer": lambda artifact, folder, dataset: [artifact, "--tokenizer", "none"],
    "not an artifact": lambda artifact, folder, dataset: [dataset.tokenizer],
    "not UTF-8": lambda artifact, folder, dataset: [artifact, "\udcff"],
    "neither plain nor chatml": lambda artifact, folder, dataset: [
        *[artifact, "--chat", "--template", "none"]
    ],
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_an_error_in_one_line(problem, tool, artifact, dataset, tmp_path):
    code, out, err = tool(*BAD[problem](artifact, tmp_path, dataset))
    assert (code, out) == (1, "")
    assert err.startswith("generate.py: error: ")
    assert err.count("\n") == 1
    assert problem in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b", "c"],
        ["a", "--temperature", "-1"],
        ["a", "--temperature", "nan"],
        ["a", "--top-p", "0"],
        ["a", "--top-k", "-1"],
        ["a", "--length", "0"],
        ["a", "--samples", "0"],
        ["a", "--seed", "-1"],
        ["a", "--chat", "b"],
        ["a", "--chat", "--samples", "2"],
        ["a", "--chat", "--no-stop"],
        ["a", "--system", "b"],
        ["a", "--once"],
        ["--run", "a", "--chat"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_an_error(arguments, tool):
    code, out, err = tool(*arguments)
    assert (code, out) == (2, "")
    assert "generate.py: error: " in err


def test_the_tokenizer_of_the_run_beside_the_artifact_is_found(
    tool, artifact, dataset, tmp_path, monkeypatch
):
    monkeypatch.delenv("TOKENIZER_PATH")
    copy = Path(shutil.copy(artifact, tmp_path))
    start = {"event": "start", "settings": {"tokenizer_path": str(dataset.tokenizer)}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    code, _, err = tool(copy, "--length", 1)
    assert (code, err) == (0, "")


def program_env(dataset) -> dict[str, str]:
    """What a program needs to find the tokenizer."""
    return cli_env(CPU | {"TOKENIZER_PATH": str(dataset.tokenizer)})


def test_a_closed_pipe_ends_it_without_a_word(artifact, dataset):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, TOOL, artifact, "The", "--length", "5"]
    done = subprocess.run(
        command, env=program_env(dataset), stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_on_a_terminal_one_can_talk_until_ctrl_d(artifact, dataset):
    master, slave = pty.openpty()
    command = [sys.executable, TOOL, artifact, "--chat", "--length", "3"]
    program = subprocess.Popen(
        command, env=program_env(dataset), stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    fcntl.fcntl(master, fcntl.F_SETFL, os.O_NONBLOCK)
    seen = ""
    for typed in (b"Hello\n", b"\x04"):
        prompts = seen.count("> ")
        end = time.monotonic() + 60
        while seen.count("> ") == prompts and time.monotonic() < end:
            try:
                seen += os.read(master, 4096).decode(errors="replace")
            except OSError:
                time.sleep(0.02)
        os.write(master, typed)
    assert program.wait(60) == 0, seen
    os.close(master)
    assert "> Hello" in seen


def test_without_a_turn_it_warns(tool, artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    code, out, err = tool(artifact, "--chat")
    assert (code, out) == (0, "")
    assert "no line on standard input" in err


# ---- a run's checkpoints


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Path:
    """The folder of a run with an average of its weights, and checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("runs")
    changed = {"ITERATIONS": 6, "SAVE_EVERY": 2, "SAVE_TOTAL_LIMIT": 9, "EMA_DECAY": 0.5}
    run_main(tiny_settings(dataset, out, EMA_BLEND=0.7, RUN_ID="r", **changed))
    return out / "r"


@pytest.fixture
def run_folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "logs" / "r"))


def samples_of(folder: Path) -> list[dict]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_checkpoint_has_the_weights_that_the_run_exported(finished):
    model = generate_model.load_checkpoint(finished / "checkpoint_0000006.pt", CPU)
    exported = load_weights(finished)
    for name, weight in model.gpt.state_dict().items():
        assert torch.allclose(weight, exported[name], atol=1e-6), name


def test_a_checkpoint_from_before_the_loops_visits_each_block_once(dataset, tmp_path):
    loops = {"NUM_LAYERS": 3, "LOOP_REPEATS": 1, "LOOP_FIRST": 1, "LOOP_LAST": 1}
    changed = {"SAVE_EVERY": 1, "SAVE_TOTAL_LIMIT": 9, "LOOP_START": 0.5, "RUN_ID": "r"}
    run_main(tiny_settings(dataset, tmp_path, **loops, **changed))
    paths = [tmp_path / "r" / f"checkpoint_000000{step}.pt" for step in (1, 4)]
    visits = [generate_model.load_checkpoint(path, CPU).gpt.visits for path in paths]
    assert visits == [[0, 1, 2], [0, 1, 1, 2]]


def test_each_checkpoint_and_the_artifact_go_on_with_each_prompt(tool, run_folder):
    code, out, _ = tool("--run", "r", "The", "And", "--length", 3)
    found = samples_of(run_folder)
    told = [(sample["step"], sample["prompt"], sample["file"]) for sample in found]
    steps = [(step, f"checkpoint_000000{step}.pt") for step in (2, 4, 6)]
    steps.append((6, "final_model.artifact"))
    assert (code, told) == (0, [(s, prompt, f) for s, f in steps for prompt in ("The", "And")])
    assert all(f"{sample['prompt']}{sample['text']}\n" in out for sample in found)


def test_every_picks_the_steps_that_it_divides(tool, run_folder):
    tool("--run", "r", "The", "--length", 3, "--every", 4, "--once")
    files = [sample["file"] for sample in samples_of(run_folder)]
    assert files == ["checkpoint_0000004.pt", "final_model.artifact"]


def test_what_is_sampled_already_is_not_sampled_again(tool, run_folder):
    tool("--run", "r", "The", "--length", 3)
    before = samples_of(run_folder)
    _, _, err = tool("--run", "r", "The", "--length", 3, "--once")
    assert samples_of(run_folder) == before
    assert "nothing new" in err


def test_a_line_that_a_crash_cut_off_spoils_no_other(tool, run_folder):
    path = run_folder / "samples.jsonl"
    path.write_text('{"step": 1, "prom')
    tool("--run", "r", "--every", 100, "--length", 3)
    cut_off, *lines = path.read_text().splitlines()
    assert cut_off == '{"step": 1, "prom'
    assert [json.loads(line)["step"] for line in lines] == [6]


def test_a_damaged_checkpoint_is_named_and_the_others_are_sampled(tool, run_folder):
    path = run_folder / "checkpoint_0000004.pt"
    path.write_bytes(path.read_bytes()[:-5])
    code, _, err = tool("--run", "r", "--length", 3)
    assert [sample["step"] for sample in samples_of(run_folder)] == [2, 6, 6]
    assert code == 1
    assert err == "warning: checkpoint_0000004.pt: truncated or damaged\n"


def test_a_checkpoint_that_the_run_has_deleted_costs_a_warning(tool, run_folder, monkeypatch):
    load_checkpoint = generate_run.load_checkpoint

    def delete_first(path, given_settings):
        if path.name == "checkpoint_0000002.pt":
            path.unlink()
        return load_checkpoint(path, given_settings)

    monkeypatch.setattr(generate_run, "load_checkpoint", delete_first)
    code, _, err = tool("--run", "r", "--length", 3)
    assert (code, [sample["step"] for sample in samples_of(run_folder)]) == (0, [4, 6, 6])
    assert "checkpoint_0000002.pt is gone" in err


def test_a_checkpoint_that_runs_code_is_refused(tool, run_folder, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    buffer = io.BytesIO()
    torch.save({"step": 2, "settings": {}, "params": Code()}, buffer)
    digest = train_gpt.sha256(buffer.getvalue()).digest()
    (run_folder / "checkpoint_0000002.pt").write_bytes(digest + buffer.getvalue())
    code, _, err = tool("--run", "r", "--length", 3, "--every", 2)
    assert code == 1
    assert "checkpoint_0000002.pt" in err
    assert not (tmp_path / "it ran").exists()


def test_a_checkpoint_of_a_newer_script_is_refused(run_folder):
    path = run_folder / "checkpoint_0000002.pt"
    state = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    state["settings"]["NEW_SETTING"] = "1"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(train_gpt.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    with pytest.raises(UserError, match="unknown settings NEW_SETTING"):
        generate_model.load_checkpoint(path, CPU)


def test_a_run_that_goes_on_is_followed_to_its_end(run_folder, monkeypatch):
    later = run_folder / "checkpoint_0000006.pt"
    hidden = later.rename(run_folder / "hidden")
    owners = iter([types.SimpleNamespace(pid=1), types.SimpleNamespace(pid=1), None])
    monkeypatch.setattr(generate_run, "find_owner", lambda folder: next(owners))
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            hidden.rename(later)

    monkeypatch.setattr(generate_run.time, "sleep", wait)
    sampler = generate_run.Sampler(run_folder, ["The"], Asked(length=2), 6, CPU, lambda text: None)
    generate_run.follow(sampler)
    assert [sample["file"] for sample in samples_of(run_folder)] == [
        *[later.name, "final_model.artifact"]
    ]


def test_a_run_without_checkpoints_is_an_error(tool, tmp_path):
    folder = tmp_path / "logs" / "empty"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"event": "start", "settings": {}}\n')
    code, _, err = tool("--run", "empty", "--once")
    assert code == 1
    assert "no checkpoints in it; SAVE_EVERY=n makes them" in err


def test_a_run_that_is_not_there_is_an_error(tool):
    code, _, err = tool("--run", "nowhere")
    assert code == 1
    assert "name a run's folder" in err


def test_samples_beside_a_run_leave_its_gpu_alone(monkeypatch):
    monkeypatch.delenv("DEVICE", raising=False)
    options = generate.parser().parse_intermixed_args(["--run", "r"])
    assert generate.given_settings(options)["DEVICE"] == "cpu"
