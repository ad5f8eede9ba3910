"""lab/core.py: the CORE metric through the scoring protocol, against slow references."""

import io
import json
import math
import random
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    SPECIAL_TEXTS,
    resolve,
    run_main,
    small_letters,
    tiny_settings,
    train_tokenizer,
)
from field import Field, write_record
from hypothesis import given
from hypothesis import strategies as st

import train_gpt

sys.path.insert(0, str(REPO / "lab"))

import core
import core_bundle
import core_match
import core_prompts
import core_script
from core_bundle import CHOICE, LANGUAGE, SCHEMA, CoreError, Task

yaml = pytest.importorskip("yaml")
BASELINES = {"choice": 25, "pairs": 50, "words": 0}


def write_bundle(folder: Path, tasks: dict[str, dict], baselines=BASELINES) -> Path:
    """A bundle of tasks, each with its `items`."""
    (folder / "eval_data").mkdir(parents=True)
    entries = []
    for label, task in tasks.items():
        lines = "".join(json.dumps(item) + "\n" for item in task["items"])
        (folder / "eval_data" / f"{label}.jsonl").write_text(lines)
        entry = {"label": label, "dataset_uri": f"{label}.jsonl"}
        entry |= {"num_fewshot": [task["shots"]], "icl_task_type": task["kind"]}
        if "delimiter" in task:
            entry["continuation_delimiter"] = task["delimiter"]
        entries.append(entry)
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    rows = "".join(f"{label},some,{value}\n" for label, value in baselines.items())
    (folder / "eval_meta_data.csv").write_text("Eval Task,Kind,Random baseline\n" + rows)
    return folder


def make_items(kind: str, texts: list[str], count: int, seed: int = 0) -> list[dict]:
    """Examples of a kind, of words of texts."""
    rng = random.Random(seed)
    words = " ".join(texts).split()

    def some(least: int, most: int) -> str:
        start = rng.randrange(len(words) - most)
        return " ".join(words[start : start + rng.randint(least, most)])

    items = []
    for _ in range(count):
        if kind == CHOICE:
            choices = [some(2, 4) for _ in range(4)]
            items.append({"query": some(3, 9), "choices": choices, "gold": rng.randrange(4)})
        elif kind == SCHEMA:
            contexts = [some(3, 6), some(3, 6)]
            item = {"context_options": contexts, "continuation": some(3, 5)}
            items.append(item | {"gold": rng.randrange(2)})
        else:
            items.append({"context": f" {some(3, 9)} ", "continuation": some(1, 2)})
    return items


# ---- a reference, by nanochat's definition and token by token


def reference_prompts(kind, item, delimiter, shots) -> list[str]:
    """The prompts, by nanochat's templates in jinja2."""
    jinja2 = pytest.importorskip("jinja2")
    ends = {
        CHOICE: ("{{ e.query }}{{ d }}{{ e.choices[e.gold] }}", "{{ i.query }}{{ d }}{{ o }}"),
        SCHEMA: (
            "{{ e.context_options[e.gold] }}{{ d }}{{ e.continuation }}",
            "{{ o }}{{ d }}{{ i.continuation }}",
        ),
        LANGUAGE: (
            "{{ e.context | trim }}{{ d }}{{ e.continuation }}",
            "{{ i.context | trim }}{{ d }}{% if o %}{{ i.continuation }}{% endif %}",
        ),
    }
    shot, end = ends[kind]
    text = "{%- for e in shots -%}\n" + shot + "\n\n{% endfor -%}\n" + end
    template = jinja2.Template(text)
    options = item.get("choices") or item.get("context_options") or [False, True]
    prompts = [template.render(i=item, d=delimiter, shots=shots, o=o) for o in options]
    if kind == LANGUAGE:
        prompts[0] = prompts[0].strip()
    return prompts


def reference_score(task: dict, sp, context: int, logits, most=None) -> list[bool]:
    """Whether each example is right; `logits` gives those behind a list of tokens, (V,)."""
    items = list(task["items"])
    random.Random(1337).shuffle(items)
    items = items[:most]
    delimiter = task.get("delimiter", " ")
    right = []
    for index, item in enumerate(items):
        others = [i for i in range(len(items)) if i != index]
        drawn = random.Random(1234 + index).sample(others, task["shots"])
        shots = [items[i] for i in drawn]
        prompts = reference_prompts(task["kind"], item, delimiter, shots)
        streams = [[sp.bos_id(), *sp.encode(prompt)] for prompt in prompts]
        same = shared(streams) if task["kind"] != SCHEMA else 0
        if task["kind"] == SCHEMA:
            same = shared([tokens[::-1] for tokens in streams])
        found = []
        for tokens in streams:
            start = len(tokens) - same if task["kind"] == SCHEMA else same
            if task["kind"] == LANGUAGE:
                start = len(streams[0])
                assert streams[1][:start] == streams[0]
            cut = max(0, len(tokens) - context)
            found.append((tokens[cut:], start - cut))
        if task["kind"] == LANGUAGE:
            tokens, start = found[1]
            best = [int(np.argmax(logits(tokens[:i]))) for i in range(start, len(tokens))]
            right.append(best == tokens[start:])
            continue
        losses = []
        for tokens, start in found:
            each = []
            for i in range(start, len(tokens)):
                scores = np.asarray(logits(tokens[:i]), float)
                each.append(np.logaddexp.reduce(scores) - scores[tokens[i]])
            losses.append(np.mean(each))
        right.append(int(np.argmin(losses)) == item["gold"])
    return right


def shared(sequences: list[list[int]]) -> int:
    """The number of tokens with which all begin."""
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def bigram_logits(field: Field):
    """log p of the honest speaker, from its counts."""
    counts = np.load(field.artifact).astype(float)
    single = counts.sum(0) + 0.5
    table = counts + 4 * single / single.sum()
    table = np.log(table / table.sum(1, keepdims=True))
    return lambda tokens: table[tokens[-1]]


def make_answers(sp, logits, texts: list[str], count: int) -> list[dict]:
    """Examples of free text, every second with the most probable answer of two tokens."""
    items = make_items(LANGUAGE, texts, 50 * count, 3)
    right = []
    for item in items[count:]:
        prompt = item["context"].strip()
        tokens = [sp.bos_id(), *sp.encode(prompt)]
        begin = len(tokens)
        for _ in range(2):
            tokens.append(int(np.argmax(logits(tokens))))
        text = "".join(sp.id_to_piece(token) for token in tokens[begin:])
        answer = text.replace("▁", " ").removeprefix(" ")
        if [sp.bos_id(), *sp.encode(f"{prompt} {answer}")] == tokens:
            right.append(item | {"continuation": answer})
        if len(right) == count // 2:
            break
    assert len(right) > 1
    return items[: count - len(right)] + right


# ---- fixtures


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    """A tokenizer and a bigram model."""
    return Field(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="module")
def tasks(field) -> dict[str, dict]:
    """A task of each kind; half of the free answers are what the bigram model says."""
    logits = bigram_logits(field)
    return {
        "choice": {
            "kind": CHOICE,
            "shots": 2,
            "delimiter": "\nAnswer: ",
            "items": make_items(CHOICE, field.texts, 20, 1),
        },
        "pairs": {"kind": SCHEMA, "shots": 0, "items": make_items(SCHEMA, field.texts, 20, 2)},
        "words": {
            "kind": LANGUAGE,
            "shots": 1,
            "items": make_answers(field.sp, logits, field.texts, 24),
        },
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tasks) -> Path:
    """Those tasks in a folder."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "b", tasks)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The bigram model's script."""
    folder = write_record(tmp_path_factory.mktemp("records") / "plain", "honest/plain")
    return folder / "train_gpt.py"


@pytest.fixture
def trained(dataset, tmp_path, monkeypatch) -> tuple[Path, dict[str, str]]:
    """The artifact of a short run of train_gpt.py, and its settings, of which the tool's
    environment has those of the machine."""
    settings = tiny_settings(dataset, tmp_path / "logs", ITERATIONS=30)
    run_main(settings)
    for name in ("DEVICE", "DTYPE", "COMPILE", "VOCAB_SIZE"):
        monkeypatch.setenv(name, settings[name])
    return tmp_path / "logs" / "tiny" / "final_model.artifact", settings


def call(*arguments: object) -> int:
    """The tool's exit code."""
    return core.main([str(argument) for argument in arguments])


def problem_of(capsys, *arguments: object) -> str:
    """The one line that the tool says when it cannot go on."""
    assert call(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0].removeprefix("core.py: error: ")


# ---- the definition


TEXT = st.text("ab \n.", max_size=6)


@given(st.sampled_from([CHOICE, SCHEMA, LANGUAGE]), st.data(), TEXT)
def test_prompts_are_those_of_the_templates(kind, data, delimiter):
    def item():
        pair = data.draw(st.lists(TEXT, min_size=2, max_size=3))
        texts = {"query": data.draw(TEXT), "context": data.draw(TEXT)}
        texts["continuation"] = data.draw(TEXT)
        return texts | {OPTIONS[kind]: pair, "gold": 1} if kind in OPTIONS else texts

    OPTIONS = core_bundle.OPTIONS
    shots = [item() for _ in range(data.draw(st.integers(0, 2)))]
    asked = item()
    task = Task("t", kind, len(shots), delimiter, 0.0, [])
    expected = reference_prompts(kind, asked, delimiter, shots)
    assert core_prompts.render(task, asked, shots) == expected


def test_examples_come_in_the_order_of_seed_1337():
    items = [{"number": number} for number in range(9)]
    task = Task("t", CHOICE, 0, " ", 0.0, items)
    expected = list(range(9))
    random.Random(1337).shuffle(expected)
    assert [item["number"] for item in core_prompts.choose(task, 4)] == expected[:4]


def test_shots_are_drawn_from_the_others_with_the_seed_of_the_place():
    items = [{"number": number} for number in range(7)]
    others = [0, 1, 2, 4, 5, 6]
    expected = random.Random(1237).sample(others, 3)
    assert [item["number"] for item in core_prompts.draw_shots(items, 3, 3)] == expected


def test_too_few_examples_give_as_many_shots_as_there_are():
    items = [{"number": number} for number in range(3)]
    assert len(core_prompts.draw_shots(items, 0, 10)) == 2


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=4))
def test_the_common_prefix_is_what_all_begin_with(sequences):
    arrays = [np.array(tokens, np.uint16) for tokens in sequences]
    assert core_prompts.common_prefix(arrays) == shared(sequences)


def test_a_long_stream_keeps_its_end():
    example = core_prompts.Example([np.arange(10), np.arange(6)], [7, 4], 0)
    cropped = core_prompts.crop(example, 5, Counter())
    assert [list(tokens) for tokens in cropped.streams] == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]
    assert cropped.starts == [2, 3]


def test_of_an_answer_longer_than_the_context_the_end_is_scored_and_noted():
    notes = Counter()
    cropped = core_prompts.crop(core_prompts.Example([np.arange(10)], [2]), 5, notes)
    assert (cropped.starts, notes[core_prompts.LONG]) == ([1], 1)


@pytest.mark.parametrize(("starts", "option"), [((3, 2), 0), ((2, 3), 0)])
def test_an_empty_option_is_chosen_if_it_is_the_first_alone(starts, option):
    """As min() has it in nanochat: nan is no more than anything, nor less."""
    nll = [np.float32([1, 1]), np.float32([2, 2])]
    streams = [np.arange(3), np.arange(3)]
    example = core_prompts.Example(streams, list(starts), 0)
    assert core_prompts.choose_option(example, nll) == option


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_capitals_are_written_as_caseops_does(text):
    assert core_prompts.CASED.sub(core_prompts.write_case, text) == small_letters(text)


def test_the_metric_is_the_mean_of_centred_accuracies_and_its_error_binomial():
    first = core.Result(Task("a", CHOICE, 0, " ", 0.25, []), 100, 40, {})
    second = core.Result(Task("b", SCHEMA, 0, " ", 0.5, []), 50, 45, {})
    mean, error = core.core_metric([first, second])
    assert mean == pytest.approx((0.15 / 0.75 + 0.4 / 0.5) / 2)
    parts = [math.sqrt(0.4 * 0.6 / 100) / 0.75, math.sqrt(0.9 * 0.1 / 50) / 0.5]
    assert error == pytest.approx(math.hypot(*parts) / 2)


# ---- exact matches


@given(st.data(), st.integers(2, 60), st.sampled_from([0.3, 1.0, 3.0]))
def test_rivals_settle_what_the_argmax_is(data, size, sharpness):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    table = rng.normal(size=(size, size)) * sharpness
    table -= np.logaddexp.reduce(table, 1, keepdims=True)
    asked = []

    def score(streams, what):
        asked.extend(streams)
        return [-table[tokens[:-1], tokens[1:]] for tokens in streams]

    streams = [rng.integers(0, size, 5).astype(np.uint16) for _ in range(4)]
    streams.append(np.append(streams[0][:4], np.uint16(table[streams[0][3]].argmax())))
    nll = score(streams, "")
    asked.clear()
    examples = [core_prompts.Example([tokens], [4]) for tokens in streams]
    answers = [
        core_match.read_answer(one, of, size, -1) for one, of in zip(examples, nll, strict=True)
    ]
    core_match.settle(answers, core_match.Guesser(streams, size), score)
    best = [int(tokens[4]) == int(table[tokens[3]].argmax()) for tokens in streams]
    assert [answer.is_right for answer in answers] == best
    assert len(asked) <= len(streams) * (size - 1)


def test_a_rival_that_nobody_expects_is_found():
    """The last of 40 tokens has 0.3, the answer 0.2; the first round sees 0.35 of the others."""
    p = np.full(40, 0.15 / 22)
    p[:17] = 0.35 / 16
    p[5], p[39] = 0.2, 0.3
    nll = -np.log(p / p.sum())

    def score(streams, what):
        return [nll[tokens[1:]] for tokens in streams]

    stream = np.uint16([1, 5])
    example = core_prompts.Example([stream], [1])
    answer = core_match.read_answer(example, nll[stream[1:]], 40, -1)
    core_match.settle([answer], core_match.Guesser([], 40), score)
    assert not answer.is_right


def test_of_equal_tokens_the_lowest_is_the_best():
    def score(streams, what):
        return [np.full(len(tokens) - 1, np.float32(np.log(8))) for tokens in streams]

    streams = [np.uint16([1, 0]), np.uint16([1, 3])]
    examples = [core_prompts.Example([tokens], [1]) for tokens in streams]
    nll = score(streams, "")
    answers = [core_match.read_answer(examples[i], nll[i], 8, -1) for i in range(2)]
    core_match.settle(answers, core_match.Guesser(streams, 8), score)
    assert [answer.is_right for answer in answers] == [True, False]


def test_a_likely_token_needs_no_rival():
    stream = np.uint16([1, 5])
    example = core_prompts.Example([stream], [1])
    answer = core_match.read_answer(example, np.float32([0.69 - 0.01]), 8, -1)
    assert (answer.is_right, answer.open) == (True, [])


def test_a_token_below_the_mean_probability_needs_no_rival():
    example = core_prompts.Example([np.uint16([1, 5])], [1])
    answer = core_match.read_answer(example, np.float32([math.log(8) + 0.01]), 8, -1)
    assert (answer.is_right, answer.open) == (False, [])


def test_an_unknown_piece_is_never_the_right_answer():
    example = core_prompts.Example([np.uint16([1, 3])], [1])
    assert not core_match.read_answer(example, np.float32([0.01]), 8, 3).is_right


def test_nlls_of_no_distribution_are_refused():
    example = core_prompts.Example([np.uint16([1, 5])], [1])
    answer = core_match.read_answer(example, np.float32([0.8]), 8, -1)
    guesser = core_match.Guesser([], 8)
    with pytest.raises(CoreError, match="no distribution"):
        core_match.settle([answer], guesser, lambda s, w: [np.float32([0.9]) for _ in s])


# ---- the whole tool


def test_a_bigram_model_scores_what_its_probabilities_say(
    field, tasks, bundle, plain, tmp_path, capsys
):
    out = tmp_path / "core.json"
    given = (field.artifact, "--tokenizer", field.tokenizer, "--script", plain)
    assert call(*given, "--bundle", bundle, "--context", 128, "--out", out) == 0
    found = json.loads(out.read_text())
    logits = bigram_logits(field)
    centred = []
    for label, task in tasks.items():
        right = reference_score(task, field.sp, 128, logits)
        assert 0 < sum(right) < len(right)
        assert found["tasks"][label]["right"] == sum(right)
        accuracy, baseline = sum(right) / len(right), 0.01 * BASELINES[label]
        centred.append((accuracy - baseline) / (1 - baseline))
    assert found["core"] == pytest.approx(sum(centred) / 3)
    captured = capsys.readouterr()
    assert f"CORE {found['core']:.4f}" in captured.out
    assert "3 tasks, 64 examples, 144 streams" in captured.err


def test_a_cap_takes_the_first_of_the_shuffled(field, tasks, bundle, plain, tmp_path):
    out = tmp_path / "core.json"
    given = (field.artifact, "--tokenizer", field.tokenizer, "--script", plain)
    assert call(*given, "--bundle", bundle, "--max-per-task", 9, "--out", out) == 0
    found = json.loads(out.read_text())["tasks"]
    logits = bigram_logits(field)
    right = {
        label: sum(reference_score(t, field.sp, 1024, logits, 9)) for label, t in tasks.items()
    }
    assert {label: found[label]["right"] for label in tasks} == right


def test_a_trained_model_scores_what_its_logits_say(trained, dataset, tmp_path, monkeypatch):
    """Through train_gpt.py, whose context of 64 tokens crops the prompts; in this process."""
    artifact, settings = trained

    def start(script, place, tokens):
        run_main(script.environment(place, tokens))

    monkeypatch.setattr(core_script.Script, "run", start)
    hp, weights = train_gpt.load_artifact(artifact, resolve(settings))
    model = train_gpt.build_model(hp)
    model.load_state_dict(weights)

    @torch.no_grad()
    def logits(tokens: list[int]) -> np.ndarray:
        return model.logits(torch.tensor([tokens]))[0].numpy()

    texts = dataset.val_documents
    words = make_answers(dataset.sp, logits, texts, 6)
    tasks = {
        "choice": {"kind": CHOICE, "shots": 2, "items": make_items(CHOICE, texts, 8, 1)},
        "pairs": {"kind": SCHEMA, "shots": 0, "items": make_items(SCHEMA, texts, 8, 2)},
        "words": {"kind": LANGUAGE, "shots": 0, "items": words},
    }
    bundle = write_bundle(tmp_path / "bundle", tasks)
    out = tmp_path / "core.json"
    given = (artifact, "--tokenizer", dataset.tokenizer, "--bundle", bundle, "--out", out)
    assert call(*given) == 0
    found = json.loads(out.read_text())
    assert found["context"] == 64
    right = {label: sum(reference_score(t, dataset.sp, 64, logits)) for label, t in tasks.items()}
    assert all(right.values())
    assert {label: found["tasks"][label]["right"] for label in tasks} == right


def test_many_streams_are_scored_in_several_starts(field, plain, monkeypatch):
    monkeypatch.setattr(core_script, "MOST_STREAMS", 3)
    streams = [part[: 5 + i] for i, part in enumerate(field.documents[:7])]
    script = core_script.Script(plain, field.artifact, field.tokenizer)
    found = script.score(streams, "some")
    logits = bigram_logits(field)
    assert len(script.starts) == 3
    for tokens, nll in zip(streams, found, strict=True):
        expected = [-logits([tokens[i]])[tokens[i + 1]] for i in range(len(tokens) - 1)]
        np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_characters_that_the_tokenizer_lacks_are_noted(field, plain, tmp_path, capsys):
    tokenizer = train_tokenizer(tmp_path / "t.model", field.texts, 340, byte_fallback=False)
    items = make_items(CHOICE, field.texts, 3)
    items[0]["query"] = "ж"
    tasks = {"choice": {"kind": CHOICE, "shots": 0, "items": items}}
    bundle = write_bundle(tmp_path / "b", tasks)
    assert (
        call(field.artifact, "--tokenizer", tokenizer, "--script", plain, "--bundle", bundle) == 0
    )
    told = "note: choice: 1 example with characters that the tokenizer lacks"
    assert told in capsys.readouterr().out


# ---- bad input


BROKEN = {
    "no core.yaml": ("core.yaml", None, "No such file"),
    "not YAML": ("core.yaml", "a: [", "not YAML"),
    "no tasks": ("core.yaml", "icl_tasks: []", "no list icl_tasks"),
    "no baselines": ("eval_meta_data.csv", None, "No such file"),
    "another column": ("eval_meta_data.csv", "Task,Baseline\na,1\n", "no columns 'Eval Task'"),
    "not a number": ("eval_meta_data.csv", "Eval Task,Random baseline\na,x\n", "'x' is no number"),
    "a baseline of 100": ("eval_meta_data.csv", "Eval Task,Random baseline\na,100\n", "percentage"),
    "no baseline": ("eval_meta_data.csv", "Eval Task,Random baseline\na,1\n", "no row 'choice'"),
    "no data": ("eval_data/words.jsonl", None, "No such file"),
    "a line that is cut": ("eval_data/words.jsonl", '{"context": "a"', "line 1: not a whole JSON"),
    "an empty file": ("eval_data/words.jsonl", "", "line 1: not a whole JSON"),
    "no context": ("eval_data/words.jsonl", '{"continuation": "a"}', "no context"),
    "a list": ("eval_data/words.jsonl", '{"continuation": [], "context": "a"}', "is not text"),
    "a wrong gold": (
        "eval_data/pairs.jsonl",
        '{"context_options": ["a", "b"], "continuation": "c", "gold": 2}',
        "gold 2 is none of its 2 options",
    ),
    "not UTF-8": ("eval_data/words.jsonl", b"\xff", "byte 0 is not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_bundle_is_named(case, tasks, tmp_path):
    name, content, problem = BROKEN[case]
    path = write_bundle(tmp_path / "b", tasks) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CoreError) as caught:
        core_bundle.read_bundle(tmp_path / "b")
    assert str(path) in str(caught.value) or path.name == "eval_meta_data.csv"
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"icl_task_type": "generation"}, "icl_task_type generation; known are"),
        ({"dataset_uri": "../../secret.jsonl"}, "leads out of eval_data"),
        ({"num_fewshot": []}, "num_fewshot"),
        ({"continuation_delimiter": 3}, "no text"),
        ({"label": None}, "no label"),
    ],
)
def test_a_wrong_task_is_named(changed, problem, tasks, tmp_path):
    path = write_bundle(tmp_path / "b", tasks) / "core.yaml"
    content = yaml.safe_load(path.read_text())
    content["icl_tasks"][1] |= changed
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(CoreError, match=problem):
        core_bundle.read_bundle(tmp_path / "b")


def test_a_label_that_comes_twice_is_refused(tasks, tmp_path):
    path = write_bundle(tmp_path / "b", tasks) / "core.yaml"
    content = yaml.safe_load(path.read_text())
    content["icl_tasks"].append(content["icl_tasks"][0])
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(CoreError, match="two tasks have the label choice"):
        core_bundle.read_bundle(tmp_path / "b")


SCRIPTS = {
    "fails": ("print('x')\nraise SystemExit('t.py: error: no such thing')", "no such thing"),
    "is silent": ("", "left no fineweb_val_000000.npy"),
    "ends by a signal": ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9"),
    "saves less": ("value = np.zeros(1, 'f4')", "NLLs of"),
    "saves integers": ("value = np.zeros(n, 'i4')", "NLLs of"),
    "saves nan": ("value = np.full(n, np.nan, 'f4')", "negative or not finite"),
    "saves infinity": ("value = np.full(n, np.inf, 'f4')", "negative or not finite"),
    "saves negative NLLs": ("value = np.full(n, -1, 'f4')", "negative or not finite"),
    "saves objects": ("value = np.array([{}] * n)", "no array of numbers"),
}
SAVING = """
import os, numpy as np
from pathlib import Path
for path in Path(os.environ["DATA_PATH"]).glob("*.bin"):
    n = int(np.fromfile(path, "<i4", 3)[2]) - 1
    {}
    np.save(Path(os.environ["SAVE_NLL"]) / path.stem, value)
"""


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_script_that_does_not_speak_the_protocol_is_told(case, field, bundle, tmp_path, capsys):
    text, problem = SCRIPTS[case]
    script = tmp_path / "t.py"
    script.write_text(SAVING.format(text) if case.startswith("saves") else text)
    given = (field.artifact, "--tokenizer", field.tokenizer, "--script", script)
    told = problem_of(capsys, *given, "--bundle", bundle)
    assert told.startswith(str(script))
    assert problem in told


@pytest.mark.parametrize("name", ["artifact", "tokenizer", "script", "bundle"])
def test_a_missing_file_is_named(name, field, plain, bundle, capsys):
    files = {"artifact": field.artifact, "tokenizer": field.tokenizer, "script": plain}
    files |= {"bundle": bundle, name: Path("nowhere")}
    artifact = files.pop("artifact")
    options = [part for key, path in files.items() for part in (f"--{key}", path)]
    assert "nowhere: no such" in problem_of(capsys, artifact, *options)


def test_results_that_cannot_be_written_are_refused_first(field, plain, bundle, capsys):
    given = (field.artifact, "--tokenizer", field.tokenizer, "--script", plain)
    told = problem_of(capsys, *given, "--bundle", bundle, "--out", "no/where.json")
    assert "no file can be made there" in told


def test_another_kind_of_tokenizer_is_refused(field, plain, bundle, capsys):
    given = (field.artifact, "--tokenizer", field.artifact, "--script", plain)
    assert "not a SentencePiece model" in problem_of(capsys, *given, "--bundle", bundle)


def test_a_tokenizer_without_bos_is_refused(field, tmp_path):
    tokenizer = train_tokenizer(tmp_path / "t.model", field.texts, 340, bos_id=-1)
    with pytest.raises(CoreError, match="no BOS"):
        core_prompts.Tokenizer(tokenizer)


def test_a_tokenizer_that_is_not_the_artifacts_is_told(field, bundle, trained, capsys):
    artifact, _ = trained
    capsys.readouterr()
    told = problem_of(capsys, artifact, "--tokenizer", field.tokenizer, "--bundle", bundle)
    assert str(field.tokenizer) in told
    assert "train_gpt.py" in told


def test_an_answer_without_tokens_is_refused(field):
    tokenizer = core_prompts.Tokenizer(field.tokenizer)
    task = Task("words", LANGUAGE, 0, " ", 0.0, [{"context": "some", "continuation": " "}])
    with pytest.raises(CoreError, match="has no tokens"):
        core_prompts.prepare(task, tokenizer, 64, None)


def test_usage_errors_end_with_2(field):
    with pytest.raises(SystemExit) as caught:
        call(field.artifact, "--tokenizer", field.tokenizer, "--max-per-task", 0)
    assert caught.value.code == 2


def test_output_that_nobody_reads_ends_without_a_word(field, plain, bundle):
    command = [sys.executable, str(REPO / "lab" / "core.py"), str(field.artifact)]
    command += ["--tokenizer", str(field.tokenizer), "--script", str(plain)]
    command += ["--bundle", str(bundle), "--max-per-task", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0


# ---- the download


class Archive:
    """A server of one archive, and how often it was asked for."""

    def __init__(self) -> None:
        self.body, self.status, self.asked, self.missing = b"", 200, 0, 0
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                archive.asked += 1
                self.send_response(archive.status)
                self.send_header("Content-Length", str(len(archive.body) + archive.missing))
                self.end_headers()
                self.wfile.write(archive.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/eval_bundle.zip"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def archive(bundle, tmp_path):
    """A server of the bundle."""
    served = Archive()
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(bundle.rglob("*")):
            packed.write(file, f"eval_bundle/{file.relative_to(bundle)}")
        packed.writestr("__MACOSX/x", "rubbish")
    served.body = path.read_bytes()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_a_bundle_is_downloaded_once(archive, bundle, tmp_path):
    cache = tmp_path / "cache"
    folder = core_bundle.fetch_bundle(archive.url, cache)
    assert core_bundle.fetch_bundle(archive.url, cache) == folder
    assert archive.asked == 1
    assert core_bundle.read_bundle(folder) == core_bundle.read_bundle(bundle)
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == ["eval_bundle"]


def test_two_that_want_the_bundle_download_it_once(archive, tmp_path):
    cache = tmp_path / "cache"
    found: list[Path] = []
    both = [
        threading.Thread(target=lambda: found.append(core_bundle.fetch_bundle(archive.url, cache)))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert (len(found), archive.asked) == (2, 1)


def zipped(name: str, text: str = "x", mode: int = 0) -> bytes:
    """An archive of one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        packed.writestr(member, text)
    return file.getvalue()


BODIES = {
    "no archive": (b"hello", "not a whole zip archive"),
    "another archive": (zipped("readme.txt"), "no eval_bundle/core.yaml"),
    "a way out": (zipped("eval_bundle/../../evil"), "leads out"),
    "an absolute path": (zipped("/etc/evil"), "leads out"),
    "a link": (zipped("eval_bundle/link", "/etc", 0o120777), "leads out"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_bad_archive_leaves_nothing(case, archive, tmp_path):
    archive.body, problem = BODIES[case]
    cache = tmp_path / "cache"
    with pytest.raises(CoreError, match=problem):
        core_bundle.fetch_bundle(archive.url, cache)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert not list(tmp_path.rglob("evil"))


def test_a_server_that_refuses_is_named(archive, tmp_path):
    archive.status = 403
    with pytest.raises(CoreError, match=r"the server answers 403; .* --bundle"):
        core_bundle.fetch_bundle(archive.url, tmp_path)


def test_a_download_that_breaks_off_is_told(archive, tmp_path):
    archive.missing = 10
    with pytest.raises(CoreError, match="cannot be downloaded"):
        core_bundle.fetch_bundle(archive.url, tmp_path)


def test_a_server_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CoreError, match=r"cannot be downloaded .* --bundle"):
        core_bundle.fetch_bundle("http://127.0.0.1:1/eval_bundle.zip", tmp_path)


def test_the_tool_downloads_what_is_not_named(archive, field, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    given = (field.artifact, "--tokenizer", field.tokenizer, "--script", plain)
    assert call(*given, "--bundle-url", archive.url, "--max-per-task", 2) == 0
    assert (tmp_path / "home" / "birdie" / "eval_bundle" / "core.yaml").is_file()
