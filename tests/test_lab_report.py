"""lab/report.py: the numbers on its page, the page in a browser, and what it says of bad input."""

import html
import http.client
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, load_weights, run_main, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

pytest.importorskip("plotly", reason="plotly is not installed")
sys.path.insert(0, str(REPO / "lab"))
import report
import report_artifact
import report_curves
import report_facts
from metrics import History

TOOL = REPO / "lab" / "report.py"
NAN = math.nan


# ---- runs


def train_event(step: int, loss: float, **more: object) -> dict:
    """An event after a training step of 100 ms."""
    rates = {"lr_scale": 1 - step / 100, "momentum": 0.9, "grad_norm": 1.5, "memory_mib": 600.0}
    event = {"event": "train", "step": step, "train_time_ms": 100.0 * step, "train_loss": loss}
    return event | {"tokens_per_second": 5120.0} | rates | more


def val_event(step: int, bpb: float) -> dict:
    """An event after validation."""
    event = {"event": "val", "step": step, "train_time_ms": 100.0 * step, "val_bpb": bpb}
    return event | {"tokens_per_second": 5120.0 if step else 0.0, "val_loss": 1.5 * bpb}


START = {"event": "start", "versions": "python:3", "settings": {"matrix_lr": 0.04, "seed": 1}}
FINAL = {"event": "final", "val_loss": 4.5, "val_bpb": 3.0123, "max_bytes": 16_000_000}
FINAL |= {"code_bytes": 40_000, "artifact_bytes": 1_000_000}
EVENTS = [
    START,
    val_event(0, 4.0),
    *(train_event(step, 7 - step / 10) for step in range(1, 21)),
    val_event(20, 3.0),
]


def text_of(events: list[dict]) -> str:
    """Events as lines of metrics.jsonl."""
    return "".join(json.dumps(event) + "\n" for event in events)


def write_run(folder: Path, events: list[dict]) -> Path:
    """A run's folder with these events."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(text_of(events))
    return folder


def history_of(*events: dict) -> History:
    """The history of a run that logged these events after its start."""
    history = History()
    for event in (START, *events):
        history.add(event)
    return history


def page_of(*folders: Path) -> str:
    """The page of runs."""
    return report.Report(folders).page().decode()


def words_of(page: str) -> str:
    """What stands in the page's elements, without its scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run the tool."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# ---- numbers


def test_the_running_mean_is_that_of_as_many_values_on_both_sides():
    values = [float(v) for v in np.random.default_rng(0).normal(size=130)]
    reach = 4  # 130 / 40, rounded up
    slow = [np.mean(values[i - min(i, reach) : i + min(i, reach) + 1]) for i in range(130)]
    assert report_curves.running_mean(values) == pytest.approx(slow)


def test_the_running_mean_has_gaps_where_the_values_have_and_leaves_them_out():
    means = report_curves.running_mean([3.0, 1.0, NAN, math.inf, 5.0, 7.0])
    assert means == pytest.approx([3, 2, NAN, NAN, 6, 6], nan_ok=True)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=30))
def test_percentiles_are_those_of_all_steps(pairs):
    times = [float(time) for time, _ in pairs]
    counts = [float(count) for _, count in pairs]
    every = np.sort(np.repeat(times, np.array(counts, int)))
    for share in (0.5, 0.9, 0.99, 1.0):
        place = math.ceil(round(share * len(every), 9)) - 1
        assert report_curves.percentile(times, counts, share) == every[place]


def test_step_times_are_means_since_the_event_before():
    events = [train_event(1, 7.0), train_event(11, 6.0, train_time_ms=2100.0)]
    assert report_curves.step_times(events) == [100.0, 200.0]


def test_a_clock_that_went_back_is_a_gap():
    events = [train_event(2, 7.0), train_event(3, 6.0, train_time_ms=150.0)]
    assert report_curves.step_times(events) == pytest.approx([100.0, NAN], nan_ok=True)


def test_losses_that_are_not_finite_are_gaps():
    losses = [3.0, NAN, math.inf, 2.0]
    events = [train_event(step + 1, loss) for step, loss in enumerate(losses)]
    assert report_curves.curves(history_of(*events))["train"]["loss"] == [3.0, None, None, 2.0]


def test_tokens_are_those_that_were_trained_on():
    table = report_curves.curves(history_of(train_event(20, 6.0)))["train"]
    assert (table["step"], table["seconds"], table["tokens"]) == ([20.0], [2.0], [10240.0])


def test_a_long_curve_keeps_its_extremes_and_its_ends():
    losses = np.random.default_rng(0).normal(size=20_000)
    losses[[777, 12_345]] = [99.0, -99.0]
    losses[5000] = NAN
    table = {
        "step": [float(i) for i in range(20_000)],
        "loss": [None if math.isnan(loss) else float(loss) for loss in losses],
    }
    thin = report_curves.thin(table, ["loss"])
    assert {0, 777, 5000, 12_345, 19_999} <= set(thin["step"])
    assert len(thin["step"]) < 2500


@given(st.integers(0, 10**6), st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_shares_sum_up_and_are_in_proportion(total, weights):
    parts = report_artifact.share_out(total, weights)
    whole = sum(weights)
    assert sum(parts) == total
    if whole > 1e-3:
        pairs = zip(parts, weights, strict=True)
        assert all(abs(part - total * weight / whole) <= 1 for part, weight in pairs)


# ---- what is said of a run


def test_settings_that_differ_are_listed_and_no_others():
    runs = [{"a": 1, "b": "x", "run_id": "1"}, {"a": 2, "b": "x", "run_id": "2", "c": ""}]
    rows = report_facts.differing(runs)
    assert rows == [("A", ["1", "2"]), ("C", ["–", "(empty)"])]


def test_of_one_run_the_settings_that_are_not_at_their_default_are_listed(tmp_path):
    page = words_of(page_of(write_run(tmp_path / "one", EVENTS)))
    assert "<code>SEED</code></th><td>1</td><td>1337</td>" in page
    assert "MATRIX_LR" not in page


TROUBLES = {
    "disk nearly full": {"event": "warning", "text": "disk nearly full"},
    "step 7 was skipped": {"event": "skipped_step", "step": 7, "in_a_row": 1},
    "from step 9 on, the rates are times 0.5: loss": {"event": "lr_reduction", "step": 9}
    | {"scale": 0.5, "reason": "loss"},
    "1 of the logged training losses": train_event(21, NAN),
}


@pytest.mark.parametrize("said", TROUBLES)
def test_what_went_wrong_is_said(said):
    (line,) = report_facts.problems(history_of(TROUBLES[said]))
    assert said in line


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (text_of(EVENTS), 0),
        (text_of(EVENTS) + '{"event": "tra', 0),  # it may be in the making
        (text_of(EVENTS) + '{"event": "tra' + text_of([FINAL]), 1),
        (text_of(EVENTS) + '\0\0\n[]\n{"step": 3}\n' + text_of([FINAL]), 3),
    ],
)
def test_damaged_lines_are_counted(tmp_path, text, count):
    path = write_run(tmp_path / "a", []) / "metrics.jsonl"
    path.write_text(text)
    assert report_facts.damaged_lines(path) == count


def test_a_run_that_died_is_shown_and_said_to_be_unfinished(tmp_path):
    page = words_of(page_of(write_run(tmp_path / "dead", EVENTS)))
    assert "not finished: it goes on, or it died" in page
    assert "bits per byte, at step 20" in page


def test_the_size_is_shown_against_the_cap(tmp_path):
    page = words_of(page_of(write_run(tmp_path / "a", [*EVENTS, FINAL])))
    assert "1,040,000 of 16,000,000 bytes (6.5%)" in page
    assert "<b>3.0123</b>" in page


def test_events_of_an_older_script_lack_fields_and_nothing_else(tmp_path):
    old = {"lr_scale", "momentum", "grad_norm", "memory_mib"}
    events = [{k: v for k, v in event.items() if k not in old} for event in EVENTS]
    parts = report.Report([write_run(tmp_path / "old", events)]).current()
    table = parts["runs"][0]["train"]
    assert table["grad_norm"] == [None] * 20
    assert table["loss"][:2] == [6.9, 6.8]


def test_samples_are_shown_the_latest_first_and_the_prompt_once(tmp_path):
    lines = [{"step": 5, "prompt": "A", "text": "A cat"}, {"step": 9, "prompt": "A", "text": "dog"}]
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(lines[0]) + "\nnot json\n" + json.dumps(lines[1]) + "\n")
    samples = report_facts.read_samples(path)
    assert samples == [("9", [("A", "dog")]), ("5", [("A", " cat")])]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda child: st.lists(child, max_size=2) | st.dictionaries(st.text(max_size=4), child),
    max_leaves=4,
)
FIELDS = ["step", "train_time_ms", "tokens_per_second", "train_loss", "val_loss", "val_bpb", "text"]
FIELDS += [
    "settings",
    "versions",
    "scale",
    "code_bytes",
    "artifact_bytes",
    "max_bytes",
    "grad_norm",
]
FIELDS += ["parameters", "flops_per_token", "reason", "lr_scale"]
KINDS = ["start", "model", "forecast", "resume", "train", "val", "warning", "final", "new"]
KINDS += ["skipped_step", "lr_reduction", "stopping_early"]
ANY_EVENT = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(KINDS), ANY_EVENT), max_size=6))
def test_any_event_of_any_version_makes_a_page(tmp_path_factory, events):
    lines = [START, *({"event": kind, **fields} for kind, fields in events)]
    parts = report.Report([write_run(tmp_path_factory.mktemp("any") / "a", lines)]).current()
    json.loads(report.json_text(parts), parse_constant=pytest.fail)


@given(st.binary())
def test_any_samples_are_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any_samples.jsonl"
    path.write_bytes(data)
    assert isinstance(report_facts.read_samples(path), list)


# ---- artifacts

FORMS = {
    "zstd": {"BIGRAM_BUCKETS": 2048, "BIGRAM_DIM": 64},
    "rans": {"BIGRAM_BUCKETS": 2048, "BIGRAM_DIM": 64, "COMPRESSOR": "rans"},
    "gptq": {"QUANT_METHOD": "gptq", "COMPRESSOR": "rans", "CALIBRATION_TOKENS": 512},
    "no levels": {},
}


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """Make finished runs, once each; never to be changed."""
    made = {}

    def make(form: str) -> Path:
        if form not in made:
            out = tmp_path_factory.mktemp("finished")
            run_main(tiny_settings(dataset, out, RUN_ID="a_run", **FORMS[form]))
            made[form] = out / "a_run"
        return made[form]

    return make


@pytest.fixture
def a_copy(finished, tmp_path):
    """A finished run whose files a test may change."""
    return Path(shutil.copytree(finished("zstd"), tmp_path / "a_copy"))


@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_of_all_parts_sum_up_to_the_file(finished, form):
    path = finished(form) / "final_model.artifact"
    parts = report_artifact.Artifact(path).parts()
    assert sum(part.total for part in parts) == path.stat().st_size


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_has_a_part_of_its_shape(finished, form):
    parts = report_artifact.Artifact(finished(form) / "final_model.artifact").parts()
    raw = {name: [*w.shape] for name, w in load_weights(finished(form)).items()}
    assert {part.name: part.shape for part in parts if part.role != "file"} == raw


@pytest.mark.parametrize("form", ["rans", "gptq"])
def test_the_information_of_levels_is_the_length_of_their_stream(finished, form):
    artifact = report_artifact.Artifact(finished(form) / "final_model.artifact")
    histograms, bits = artifact.rans_weights()
    longest = 512  # columns of a lane, which has 64 rows and a state of 4 bytes
    shapes = [artifact.table[name][-1][1] for name in artifact.matrices]
    lanes = sum(math.ceil(rows / 64) * math.ceil(cols / longest) for rows, cols in shapes)
    assert histograms + 4 * lanes + sum(bits) / 8 == pytest.approx(len(artifact.coded), rel=0.02)


def test_random_levels_take_the_bytes_and_zeros_take_none(tmp_path, finished, dataset):
    hp = report_artifact.Artifact(finished("zstd") / "final_model.artifact").hp
    hp = train_gpt.replace(hp, tokenizer_path=str(dataset.tokenizer))
    hp = train_gpt.replace(hp, bigram_buckets=2048, vocab_size=2048)
    state = {
        name: torch.zeros(w.shape) for name, w in train_gpt.build_model(hp).state_dict().items()
    }
    torch.manual_seed(0)
    torch.nn.init.uniform_(state["tok_emb.weight"])
    path = tmp_path / "half.artifact"
    path.write_bytes(train_gpt.pack_artifact(state, hp))
    parts = {part.name: part for part in report_artifact.Artifact(path).parts()}
    assert parts["tok_emb.weight"].bits > 6.5
    assert parts["bigram.table.weight"].bits < 0.05


def test_the_error_is_relative_to_the_raw_weights(a_copy, dataset):
    path = a_copy / "final_model.artifact"
    given = {"TOKENIZER_PATH": str(dataset.tokenizer), "DEVICE": "cpu"}
    _, stored = train_gpt.load_artifact(path, train_gpt.load_settings(given, check_places=False))
    torch.save({name: 2 * w for name, w in stored.items()}, a_copy / "final_model.pt")
    errors = report_artifact.errors(a_copy, str(dataset.tokenizer))
    assert {name for name, w in stored.items() if w.any()} == {n for n, e in errors.items() if e}
    assert [e for e in errors.values() if e is not None] == pytest.approx([0.5] * len(errors))


def spoil_artifact(folder: Path) -> None:
    """Change a byte of the artifact."""
    path = folder / "final_model.artifact"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILED = {
    "no artifact": (lambda f: (f / "final_model.artifact").unlink(), "artifact: not there"),
    "damaged artifact": (spoil_artifact, "truncated or damaged"),
    "empty artifact": (lambda f: (f / "final_model.artifact").write_bytes(b""), "cut off"),
    "no raw weights": (lambda f: (f / "final_model.pt").unlink(), "final_model.pt: not there"),
    "damaged raw weights": (lambda f: (f / "final_model.pt").write_bytes(b"x"), "cannot be read"),
    "other raw weights": (lambda f: torch.save({}, f / "final_model.pt"), "other tensors"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_cannot_be_shown_of_an_artifact_is_noted(a_copy, kind):
    spoil, said = SPOILED[kind]
    spoil(a_copy)
    notes = re.findall(r'<p class="note">(.*?)</p>', words_of(page_of(a_copy)))
    assert [note for note in notes if said in note] != []


def test_a_tokenizer_that_is_not_there_costs_the_errors_alone(a_copy, tmp_path):
    weights = report.inspect(a_copy, str(tmp_path / "none.model"))
    assert "is not there; name it by TOKENIZER_PATH" in weights.notes[0]
    assert len(weights.parts) > 10


def test_another_tokenizer_is_told_apart(a_copy, tokenizer):
    (note,) = report.inspect(a_copy, str(tokenizer)).notes
    assert "not the tokenizer" in note


def test_an_artifact_that_is_not_the_scored_one_is_told(a_copy):
    events = [json.loads(line) for line in (a_copy / "metrics.jsonl").read_text().splitlines()]
    events[-1]["artifact_bytes"] += 1
    (a_copy / "metrics.jsonl").write_text(text_of(events))
    assert "but the one scored had" in words_of(page_of(a_copy))


# ---- the tool


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
    """Two runs of the folder logs: the tool then needs no defaults, and starts at once."""
    return [write_run(tmp_path / "logs" / name, EVENTS) for name in ("a", "b")]


class Outside(HTMLParser):
    """Lists what a page names to be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [
            f"{tag} {v}" for k, v in attributes if k in ("src", "href", "data", "action")
        ]


def test_the_page_holds_plotly_once_and_names_nothing_else_to_fetch(tmp_path):
    page = page_of(write_run(tmp_path / "a", EVENTS))
    parser = Outside()
    parser.feed(page)
    assert parser.found == ["link data:,"]
    assert page.count("* plotly.js v") == 1


def test_the_page_is_written_into_the_first_runs_folder(two_runs, tmp_path):
    done = run_tool("a", "b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("logs/a/report.html")
    assert (two_runs[0] / "report.html").read_bytes().endswith(b"</html>\n")


def test_out_and_out_dir_name_places(two_runs, tmp_path):
    (tmp_path / "logs").rename(tmp_path / "elsewhere")
    env = os.environ | {"OUT_DIR": str(tmp_path / "elsewhere")}
    done = run_tool("a", "b", "--out", tmp_path / "page.html", env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").is_file()


BAD = {
    "not there": (None, "no metrics.jsonl there"),
    "empty": ("", "no event 'start'"),
    "cut off in its only line": (json.dumps(START)[:30], "no event 'start'"),
    "of another program": ('{"loss": 3}\n', "no event 'start'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_run_that_cannot_be_shown_is_one_line(tmp_path, kind):
    text, said = BAD[kind]
    if text is not None:
        (write_run(tmp_path / "bad", []) / "metrics.jsonl").write_text(text)
    done = run_tool(tmp_path / "bad")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_usage_error_is_2():
    assert run_tool().returncode == 2


def test_a_page_of_before_outlives_a_failure_to_write(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(report.ReportError, match="No space left"):
        report.write(path, b"new")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["page.html"]
    assert path.read_bytes() == b"old"


def test_a_closed_console_ends_without_a_word(two_runs):
    line = f"{shlex.join([sys.executable, str(TOOL), *map(str, two_runs)])} | true"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


# ---- the server


@pytest.fixture
def served(tmp_path):
    """A run whose page is served, and the port."""
    folder = write_run(tmp_path / "going", EVENTS)
    handler = type("TestHandler", (report.Handler,), {"report": report.Report([folder])})
    with report.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, server.server_port
        server.shutdown()


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    """Ask the server; status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_the_server_tells_what_is_new_and_nothing_otherwise(served):
    folder, port = served
    _, body = get(port, "/data.json")
    version = json.loads(body)["version"]
    assert get(port, f"/data.json?{version}") == (204, b"")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text_of([train_event(21, 1.25)]))
    status, body = get(port, f"/data.json?{version}")
    assert (status, json.loads(body)["runs"][0]["train"]["loss"][-1]) == (200, 1.25)


def test_the_server_serves_the_page_and_no_file(served):
    _, port = served
    assert get(port, "/")[1].endswith(b"</html>\n")
    assert get(port, "/metrics.jsonl")[0] == 404


def test_another_sites_name_for_this_machine_gets_nothing(served):
    _, port = served
    assert get(port, "/data.json", Host="evil.example:80")[0] == 403


def test_a_run_that_vanishes_is_an_error_in_words(served):
    folder, port = served
    (folder / "metrics.jsonl").unlink()
    status, body = get(port, "/data.json")
    assert status == 503
    assert b"no event 'start'" in body or b"No such file" in body


def test_ctrl_c_ends_the_server_quietly(two_runs):
    command = [sys.executable, str(TOOL), *map(str, two_runs), "--serve", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert re.match(r"http://127\.0\.0\.1:\d+/", line), said
    assert (process.returncode, said) == (130, "")


def test_a_port_that_is_taken_is_one_line(served):
    folder, port = served
    with pytest.raises(report.ReportError, match=f"--serve {port}: Address already in use"):
        report.serve(report.Report([folder]), port)


# ---- in a browser

PROBE = """<script>
setTimeout(() => {
  const count = query => document.querySelectorAll(query).length;
  const lines = id => count(`#${id} .scatterlayer .trace`);
  const titles = () => [...document.querySelectorAll("#loss .xtitle")].map(e => e.textContent);
  const before = titles();
  const chart = document.querySelector("#loss .chart");
  Plotly.Fx.hover(chart, [{ curveNumber: 1, pointNumber: 1 }]);
  const hover = document.querySelector("#loss .hoverlayer").textContent;
  document.querySelector("input[value=seconds]").click();
  const found = {
    inner: innerWidth, client: document.documentElement.clientWidth,
    scroll: document.documentElement.scrollWidth, before, after: titles(),
    lines: lines("loss"), bpb: lines("bpb"),
    small: ["lr_scale", "momentum", "grad_norm", "step_ms"].map(lines),
    bytes: count(".bytes .treemaplayer .slice"), dots: count("#error .scatterlayer .points path"),
    hover,
    legend: document.querySelector(".cards h2").textContent.trim(), title: document.title,
    back: getComputedStyle(document.body).backgroundColor, images: count("img"),
    drawn: document.querySelector("#loss .gridlayer path").style.stroke,
  };
  parent.postMessage(found, "*");
}, 1500);
</script>"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><pre></pre>
<script>
addEventListener("message", event => {
  document.querySelector("pre").textContent = JSON.stringify(event.data);
});
</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 3000px"></iframe>"""


def find_browser() -> str | None:
    """A browser of Chromium's family."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A headless browser."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened = 0

    def open(self, url: str, *more: str) -> tuple[str, list[str]]:
        """The DOM of a page when all is quiet, and what it wrote to the console."""
        self.opened += 1
        profile = self.folder / f"profile_{self.opened}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        options += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=6000", "--dump-dom"]
        command = [find_browser(), *options, *more, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        shutil.rmtree(profile, ignore_errors=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def measure(self, page: bytes, width: int, *more: str) -> dict:
        """What the probe finds on a page of this width."""
        folder = self.folder / f"measured_{self.opened}"
        folder.mkdir()
        text = page.decode().replace("</body>", PROBE + "</body>")
        (folder / "page.html").write_text(text)
        (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
        dom, said = self.open(f"file://{folder}/frame.html", *more)
        found = re.search("<pre>(.*?)</pre>", dom)[1]
        assert found, said
        return json.loads(html.unescape(found)) | {"console": said}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser; skips where there is none."""
    if not find_browser():
        pytest.skip("no Chromium here; apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    if "<html" not in browser.open("about:blank")[0]:
        pytest.skip("Chromium does not start here")
    return browser


@pytest.fixture(scope="module")
def narrow(browser, finished, tmp_path_factory):
    """What a page of two runs, a finished one and one that died, is on a phone."""
    died = write_run(tmp_path_factory.mktemp("narrow") / ("a_long_name" * 9), EVENTS)
    page = report.Report([finished("zstd"), died]).page()
    return browser.measure(page, 400)


def test_a_browser_draws_all_charts(narrow):
    assert narrow["lines"] == 6
    assert narrow["bpb"] == 3
    assert narrow["small"] == [2, 2, 2, 2]
    assert narrow["bytes"] > 20
    assert narrow["dots"] > 5


def test_a_browser_has_no_complaints(narrow):
    assert narrow["console"] == []


def test_nothing_scrolls_sideways_on_400_pixels(narrow):
    assert narrow["inner"] == 400
    assert narrow["scroll"] == narrow["client"]


def test_the_switch_changes_the_axis(narrow):
    assert (narrow["before"], narrow["after"]) == (["step"], ["seconds of training"])


@pytest.mark.parametrize(("scheme", "back"), [(0, "rgb(16, 17, 20)"), (1, "rgb(247, 247, 245)")])
def test_the_page_is_dark_or_light_as_the_reader_wishes(browser, tmp_path, scheme, back):
    page = report.Report([write_run(tmp_path / "a", EVENTS)]).page()
    found = browser.measure(page, 1280, f"--blink-settings=preferredColorScheme={scheme}")
    grid = {0: "rgb(38, 41, 47)", 1: "rgb(236, 235, 231)"}[scheme]
    assert (found["back"], found["drawn"]) == (back, grid)


HOSTILE = '<img src=x onerror="document.title=1"><script>'


def test_texts_of_a_run_are_texts_and_nothing_else(browser, tmp_path):
    named = START | {"settings": {HOSTILE: HOSTILE, "seed": HOSTILE}, "versions": HOSTILE}
    warned = {"event": "warning", "text": HOSTILE}
    folder = write_run(tmp_path / HOSTILE, [named, *EVENTS[1:], warned])
    sample = {"step": HOSTILE, "prompt": HOSTILE, "text": HOSTILE + "</script>"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    found = browser.measure(report.Report([folder]).page(), 1280)
    assert (found["legend"], found["title"]) == (HOSTILE, HOSTILE)
    assert (found["images"], found["console"]) == (0, [])
    assert HOSTILE[:39] + "… mean" in found["hover"]


def test_no_text_ends_a_script_of_the_page():
    text = report.json_text({"name": "</script><!--<script>"})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><!--<script>"}


def test_gaps_are_drawn_without_complaint(browser, tmp_path):
    losses = [NAN, 5.0, math.inf, 4.0, NAN]
    events = [train_event(step, loss, grad_norm=loss) for step, loss in enumerate(losses, 1)]
    found = browser.measure(
        report.Report([write_run(tmp_path / "a", [START, *events])]).page(), 1280
    )
    assert (found["lines"], found["console"]) == (2, [])


def test_a_console_error_would_be_seen(browser, tmp_path):
    page = report.Report([write_run(tmp_path / "a", EVENTS)]).page()
    spoiled = page.replace(b"let data =", b'console.error("a complaint"); let data =')
    (line,) = browser.measure(spoiled, 1280)["console"]
    assert "a complaint" in line


def test_a_served_page_takes_in_what_comes_later(browser, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "going", EVENTS)
    shown = report.Report([folder])
    page = shown.page

    def page_then_end(poll):
        text = page(0.2)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(text_of([train_event(21, 1.25), val_event(21, 2.5), FINAL]))
        return text

    monkeypatch.setattr(shown, "page", page_then_end)
    handler = type("TestHandler", (report.Handler,), {"report": shown})
    with report.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dom, said = browser.open(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert said == []
    assert "<b>3.0123</b>" in words_of(dom)
    assert "updates while the run goes on" in words_of(dom)
