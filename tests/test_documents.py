"""README, docs/ and configs/: what they say of the script, and what they link to."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import REPO, events, tracked

import frontier
import keeper
import train_gpt

LINK = re.compile(r"\]\((?!https?:)(.*?)\)")
TRACKED = tracked()
PAGES = [path for path in TRACKED if path.suffix == ".md"]
CONFIGS = [path for path in TRACKED if path.parent.name == "configs"]
RECORDED = [path for path in TRACKED if path.name == "config.env"]


def read(name: str) -> str:
    """The text of one of the repository's files."""
    return (REPO / name).read_text(encoding="utf-8")


def test_the_table_of_settings_says_what_the_script_says():
    """A setting that has just been added may be missing: --help has it."""
    page = read("docs/settings.md")
    table = page.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0].splitlines()
    rows = keeper.settings_table().splitlines()
    assert table[:2] == rows[:2]
    assert len(table) > 80
    assert table == [row for row in rows if row in table]


def test_the_readme_is_at_most_12_kib():
    assert len((REPO / "README.md").read_bytes()) <= 12 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(page):
    links = LINK.findall(without_code(page.read_text(encoding="utf-8")))
    dead = [link for link in links if not leads_somewhere(page, link)]
    assert dead == []


def without_code(text: str) -> str:
    """Leave out of a page what is shown as code: it may look like links and headings."""
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return re.sub("`[^`]*`", "code", "\n".join(lines))


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a relative link leads to a file of the repository, and to a heading in it."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not any(path == target or target in path.parents for path in TRACKED):
        return False
    return not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def documented_events() -> dict[str, set[str]]:
    """The events of metrics.jsonl and their fields, as docs/logs.md lists them."""
    table = read("docs/logs.md").split("<!-- events -->")[1].split("<!-- /events -->")[0]
    rows = [re.findall("`(.*?)`", row) for row in table.splitlines()]
    return {event: set(fields) for event, *fields in filter(None, rows)}


@pytest.fixture
def all_events(run, monkeypatch) -> list[dict]:
    """The events of runs that have every kind of them."""
    with pytest.raises(train_gpt.UserError, match="not finite"):
        run("exploding", TIED_EMBED_LR=1e38, ITERATIONS=6, MAX_BAD_STEPS=99)
    run("saved", SAVE_EVERY=2)
    run("saved", SAVE_EVERY=2, RESUME="auto")
    run("capped", ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=0.1)  # which would read all data often
    leap = torch.tensor([True, False])
    monkeypatch.setattr(frontier.RateGuard, "leaps", lambda self, now: leap)
    run("leaping", AUTO_LR_REDUCTION=1)
    folders = [Path("logs", name) for name in ("exploding", "saved", "capped", "leaping")]
    return [event for folder in folders for event in events(folder)]


def test_the_documents_list_the_events_and_their_fields(all_events):
    seen = {}
    for event in all_events:
        fields = set(event) - {"event"}
        seen.setdefault(event["event"], set()).add(frozenset(fields))
    assert seen == {event: {frozenset(fields)} for event, fields in documented_events().items()}


def test_events_are_as_their_schema_says_and_others_are_not(all_events):
    schema = json.loads(read("docs/metrics.schema.json"))
    described = {
        rule["if"]["properties"]["event"]["const"]: set(rule["then"]["properties"])
        for rule in schema["allOf"]
    }
    assert described == documented_events()
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert all(map(valid, all_events))
    assert not any(valid(event | {"step": "1"}) for event in all_events if "step" in event)
    lacking = [{k: v for k, v in event.items() if k != "step"} for event in all_events]
    assert not any(
        valid(e) for e, whole in zip(lacking, all_events, strict=True) if "step" in whole
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_valid(path):
    train_gpt.load_settings({"CONFIG": str(path)}, check_places=False)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_the_configuration_of_a_record_is_valid_for_its_script(path):
    command = [sys.executable, str(path.with_name("train_gpt.py")), "--settings"]
    done = subprocess.run(command, env={"CONFIG": str(path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FIT_BUDGET=" in done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_readme_names_a_configuration(path):
    assert f"`{path.name}`" in read("README.md")


def test_the_baseline_is_the_default():
    path = str(REPO / "configs" / "baseline.env")
    told = train_gpt.load_settings({"CONFIG": path}, check_places=False)
    assert dataclasses.replace(told, config="") == train_gpt.load_settings({}, check_places=False)
