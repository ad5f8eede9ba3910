"""Runs that lose nothing: numbers that go bad, too little memory, ranks that die or stand still."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import SCRIPT, cli_env, events, load_weights, same_bits, shard_bytes, tiny_settings
from programs import free_port

import keeper
import train_gpt
from train_gpt import Run, UserError, load_settings

# The rates are those of every step alike, so that a step more or less changes nothing else. All
# kinds of updates are on.
EVEN = {
    "ITERATIONS": 6,
    "WARMDOWN_ITERS": 0,
    "MUON_MOMENTUM_WARMUP_STEPS": 0,
    "MUON_WD": 0.5,
    "ADAM_WD": 0.5,
    "EMBED_WD": 0.5,
    "GRAD_CLIP_NORM": 0.1,
    "TRAIN_LOG_EVERY": 1,
}
FC = "blocks.1.fc"
FAULTS = [(FC, "output", "nan"), (FC, "output", "inf"), (FC, "gradient", "nan")]
FAULTS += [("blocks.0.attn.c_k", "gradient", "-inf"), ("tok_emb", "output", "nan")]
ILLEGAL = "CUDA error: an illegal memory access was encountered"
FORMAT = "view size is not compatible: unsupported memory format"
CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."


@pytest.fixture
def faulty(run, monkeypatch):
    """The same with a fault, which is gone afterwards."""

    def start(fault: str, *arguments: object, name: str = "faulty", **changed: object) -> Path:
        with monkeypatch.context() as context:
            getattr(faults, fault)(context.setattr, *arguments)
            return run(name, **changed)

    return start


def losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["train_loss"] for event in events(folder, "train")}


def assert_close(a: Path, b: Path) -> None:
    """Two runs must end on the same weights up to rounding."""
    first, second = load_weights(a), load_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- numbers that go bad


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_a_bad_step_changes_no_bit_of_the_state(fault, run, monkeypatch):
    module, kind, value = fault
    faults.bad_number(monkeypatch.setattr, module, kind, [2], value)
    prints = faults.fingerprints(monkeypatch.setattr)
    run(**EVEN)
    kinds = {"weights", "momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert prints[0].keys() == {"weights"}  # the optimizers make their state in the first step
    assert prints[1].keys() == kinds
    unchanged = [[k for k in kinds if a.get(k) == b[k]] for a, b in itertools.pairwise(prints)]
    assert [sorted(names) for names in unchanged] == [[], [], sorted(kinds), [], [], []]


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_a_bad_step_is_logged(fault, faulty, capsys):
    module, kind, value = fault
    folder = faulty("bad_number", module, kind, [1, 2, 4], value, **EVEN)
    found = [(event["step"], event["in_a_row"]) for event in events(folder, "skipped_step")]
    assert found == [(1, 1), (2, 2), (4, 1)]
    assert len(re.findall(r"^skipped_step:\d+ ", capsys.readouterr().out, re.MULTILINE)) == 3


@pytest.mark.parametrize("kind", ["output", "gradient"])
@pytest.mark.parametrize("decay", [0, 0.5])
def test_training_goes_on_as_if_a_bad_batch_had_not_been(
    kind, decay, run, faulty, dataset, tmp_path
):
    """With the tokens of the batch of step 2 left out of the shard. The first of them is a target
    of the batch before, so it equals the first token after them."""
    folder = tmp_path / "shard"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(3, 500, size=5000)
    tokens[1024] = tokens[1536]
    for path in dataset.folder.glob("*_val_*"):
        shutil.copy(path, folder)
    settings = EVEN | {"DATA_PATH": folder, "EMA_DECAY": decay}
    with_it = write_train(folder, tokens)
    bad = faulty("bad_number", FC, kind, [2], **settings)
    with_it.unlink()
    write_train(folder, np.delete(tokens, np.arange(1024, 1536)))
    assert same_bits(bad, run("without", **settings | {"ITERATIONS": 5}))


def write_train(folder: Path, tokens: np.ndarray) -> Path:
    """Write the only training shard of a folder."""
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(shard_bytes(tokens))
    return path


@pytest.mark.parametrize("most", [1, 3])
def test_a_run_stops_after_so_many_bad_steps_in_a_row(most, faulty, tmp_path):
    steps = [1, 2, *range(4, 40)] if most == 3 else range(2, 40)
    settings = EVEN | {"MAX_BAD_STEPS": most, "ITERATIONS": 20}
    with pytest.raises(UserError, match=rf"skipped_step:{6 if most == 3 else 2}\b"):
        faulty("bad_number", FC, "output", [*steps], **settings)
    assert not (tmp_path / "logs" / "faulty" / "final_model.artifact").exists()


def test_a_run_that_ends_meanwhile_stops_too(faulty):
    """The last steps are looked at before anything is exported."""
    with pytest.raises(UserError, match=r"skipped_step:5\b"):
        faulty("bad_number", FC, "output", [3, 4, 5], **EVEN, MAX_BAD_STEPS=3)


def test_the_steps_of_priming_are_not_counted_as_bad(faulty):
    """They change nothing either, and are more here than bad steps may be."""
    settings = EVEN | {"WARMUP_STEPS": 4, "MAX_BAD_STEPS": 3}
    folder = faulty("bad_number", FC, "output", [0, 1], **settings)
    found = [(event["step"], event["in_a_row"]) for event in events(folder, "skipped_step")]
    assert found == [(0, 1), (1, 2)]


def test_the_diagnosis_names_the_learning_rates(faulty):
    rates = {"MATRIX_LR": 0.0123, "SCALAR_LR": 0.0234, "TIED_EMBED_LR": 0.0345}
    with pytest.raises(UserError, match=r"0\.0123.*0\.0234.*0\.0345"):
        faulty("bad_number", FC, "output", [*range(40)], **EVEN | rates | {"MAX_BAD_STEPS": 2})


MODULES = ["blocks.0.attn.c_q", "blocks.0.proj", "blocks.1.attn.proj", "blocks.1.fc", "tok_emb"]


@pytest.mark.parametrize("module", MODULES)
def test_the_diagnosis_names_the_first_layer_whose_output_is_bad(module, faulty):
    with pytest.raises(UserError, match=rf"output of {re.escape(module)}\b"):
        faulty("bad_number", module, "output", [*range(40)], **EVEN, MAX_BAD_STEPS=2)


@pytest.mark.parametrize("module", ["blocks.0.fc", "blocks.1.proj", "blocks.1.fc"])
def test_the_diagnosis_names_the_first_layer_whose_gradient_is_bad(module, faulty):
    with pytest.raises(UserError, match=rf"gradient of {re.escape(module)}\b"):
        faulty("bad_number", module, "gradient", [*range(40)], **EVEN, MAX_BAD_STEPS=2)


def test_the_diagnosis_is_of_the_batch_that_was_bad(faulty):
    """Not of one that was trained on before the number was known."""
    with pytest.raises(UserError, match=r"output of blocks\.1\.fc\b"):
        faulty("bad_batch", FC, 1, **EVEN, MAX_BAD_STEPS=1)


def test_the_last_good_checkpoint_is_named(faulty):
    settings = EVEN | {"MAX_BAD_STEPS": 2, "SAVE_EVERY": 2, "ITERATIONS": 20}
    with pytest.raises(UserError, match=r"checkpoint_\d+\.pt"):
        faulty("bad_number", FC, "output", [*range(4, 40)], **settings)


# ---- memory

PRIMED = {"WARMUP_STEPS": 2, "ADAM_EPS": 1e-3, "GRAD_CLIP_NORM": 0.1, "TRAIN_LOG_EVERY": 1}


@pytest.mark.parametrize(("rows", "tokens"), [(5, 256), (2, 128), (1, 64)])
@pytest.mark.parametrize("message", ["", CPU_MEMORY])
def test_too_little_memory_halves_the_micro_batches(rows, tokens, message, run, faulty, capsys):
    folder = faulty("little_memory", rows, message, **PRIMED)
    assert "out of memory" in capsys.readouterr().out
    same = run("same", MICRO_BATCH_TOKENS=tokens, **PRIMED)
    assert_close(folder, same)
    assert losses(folder) == pytest.approx(losses(same), abs=1e-6)


def test_memory_is_given_back_once_nothing_of_the_failed_step_is_left(run, monkeypatch):
    """Blocks of the larger micro-batches would keep it from the smaller ones."""
    forward, left, alive = train_gpt.Attention.forward, [], []

    def watch(*inputs):
        left.append(weakref.ref(inputs[1]))
        return forward(*inputs)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def freed(device):
        alive.append((device.type, sum(reference() is not None for reference in left)))
        monkeypatch.undo()

    monkeypatch.setattr(train_gpt.Attention, "forward", watch)
    monkeypatch.setattr(keeper, "free_memory", freed)
    monkeypatch.setattr(train_gpt.torch, "logsumexp", fail)
    run("freed", **PRIMED)
    assert left
    assert alive == [("cpu", 0)]


def test_memory_that_suffices_is_not_mentioned(faulty, capsys):
    faulty("little_memory", 8, **PRIMED)
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize("message", ["", CPU_MEMORY])
def test_too_little_memory_for_one_sequence_is_an_error(message, faulty):
    with pytest.raises(UserError, match="out of memory with a single sequence"):
        faulty("little_memory", 0, message, **PRIMED)


@pytest.mark.parametrize("message", ["shapes cannot be multiplied", ILLEGAL, FORMAT])
def test_other_errors_in_priming_are_not_swallowed(message, faulty):
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        faulty("little_memory", 0, message, **PRIMED)
    assert not isinstance(caught.value, UserError)


def test_too_little_memory_in_training_is_not_swallowed(faulty):
    with pytest.raises(torch.OutOfMemoryError):
        faulty("little_memory", 0, **PRIMED | {"WARMUP_STEPS": 0})


# ---- two ranks

SUMMED = EVEN | {"ADAM_EPS": 1e-3}
LONG = SUMMED | {"ITERATIONS": 60, "SAVE_EVERY": 5}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def answers(server, dataset, out) -> dict[str, list[dict]]:
    """Runs of two ranks with faults of one of them, by the name of their RUN_ID."""

    def job(name: str, *planted: list, **changed: object) -> dict:
        env = tiny_settings(dataset, out, **SUMMED | {"RUN_ID": name} | changed)
        return {"nproc": 2, "env": env, "faults": planted}

    bad = ["bad_number", 1, FC, "gradient"]
    jobs = {
        "healthy": job("healthy"),
        "bad": job("bad", [*bad, [2]]),
        "stuck": job("stuck", [*bad, [*range(40)]], MAX_BAD_STEPS=2),
        "memory": job("memory", ["little_memory", 1, 2], WARMUP_STEPS=2),
        "still": job("still", ["stand_still", 1, 3, 2.0]),
        "long": job("long", **LONG),
    }
    return faults.forked(server, out / "answers", jobs)


def ended_well(ranks: list[dict]) -> None:
    assert [rank["rc"] for rank in ranks] == [0, 0], "\n".join(rank["log"] for rank in ranks)


def test_one_bad_rank_stops_the_update_on_both(answers):
    """Nothing that a rank keeps may change, and all of it in the steps around."""
    ended_well(answers["bad"])
    for rank in answers["bad"]:
        before, after, later = rank["prints"][2:5]
        assert before == after
        assert [kind for kind in after if after[kind] == later[kind]] == []


def test_a_step_that_was_bad_on_one_rank_is_logged_once(answers, out):
    ended_well(answers["bad"])
    assert [event["step"] for event in events(out / "bad", "skipped_step")] == [2]
    assert "".join(rank["log"] for rank in answers["bad"]).count("skipped_step:") == 1


def test_the_rank_that_is_bad_names_the_layer(answers):
    assert [rank["kind"] for rank in answers["stuck"]] == ["UserError", "UserError"]
    assert f"gradient of {FC}" in answers["stuck"][1]["error"]


def test_too_little_memory_on_one_rank_is_overcome(answers, out):
    ended_well(answers["memory"])
    assert_close(out / "healthy", out / "memory")
    assert losses(out / "healthy") == pytest.approx(losses(out / "memory"), abs=1e-5)


def test_ranks_that_differ_in_memory_score_all_tokens(answers, out):
    """Which windows a rank scores must not depend on how many sequences it can hold."""
    scores = [events(out / case, "final")[0]["val_loss"] for case in ("healthy", "memory")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_too_little_memory_on_a_rank_is_told(answers):
    assert "out of memory" in "".join(rank["log"] for rank in answers["memory"])


def test_a_rank_that_stood_still_changes_nothing(answers, out):
    ended_well(answers["still"])
    assert same_bits(out / "healthy", out / "still")
    assert losses(out / "healthy") == losses(out / "still")


# ---- torchrun


class Torchrun:
    """A torchrun that runs in the background, and its ranks."""

    def __init__(self, env: dict[str, str], *options: str, cwd: Path | None = None) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT)]
        self.process = subprocess.Popen(
            command,
            env=cli_env(env),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )

    def rank(self, number: int) -> int:
        """The process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in map(int, children.split()):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environ:
                return pid
        raise LookupError(number)

    def kill_when(self, path: Path, rank: int) -> None:
        """SIGKILL a rank as soon as a file is there."""
        deadline = time.monotonic() + 60
        while not path.exists():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"{path}: {self.end()}")
            time.sleep(0.005)
        os.kill(self.rank(rank), signal.SIGKILL)

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Wait; the exit code and the output."""
        try:
            text = self.process.communicate(timeout=seconds)[0]
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, text


two_processes = ("--standalone", "--nproc_per_node=2")
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")


@linux
def test_a_rank_that_is_killed_takes_the_job_down_within_a_minute(dataset, tmp_path):
    env = tiny_settings(dataset, tmp_path, **SUMMED | {"ITERATIONS": 10**6, "SAVE_EVERY": 5})
    job = Torchrun(env, *two_processes)
    job.kill_when(tmp_path / "tiny" / "checkpoint_0000005.pt", rank=1)
    code, text = job.end(seconds=60)
    assert code not in (0, None)
    assert "SIGKILL" in text


@pytest.fixture
def meet(dataset, tmp_path, monkeypatch):
    """Let rank 0 of two meet the other at one store; the store that it is given for that."""
    kept, given = torch.distributed.HashStore(), []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(kept, 0, 2)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, store, **__: given.append(store)
    )
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}

    def start(attempt: int, local_world_size: int) -> torch.distributed.Store:
        here = {"TORCHELASTIC_RESTART_COUNT": attempt, "LOCAL_WORLD_SIZE": local_world_size}
        for name, value in (env | here).items():
            monkeypatch.setenv(name, str(value))
        run_id = {"RUN_ID": f"attempt{attempt}"}
        run = Run(load_settings(tiny_settings(dataset, tmp_path, **run_id)))
        run.start()
        return given.pop()

    return start


def test_restarted_ranks_do_not_see_what_dead_ones_told(meet):
    meet(0, local_world_size=2).set("address", "of a dead rank")
    assert not meet(1, local_world_size=2).check(["address"])


def test_nodes_that_count_restarts_apart_still_meet(meet):
    meet(0, local_world_size=1).set("address", "of the other node's rank")
    assert meet(1, local_world_size=1).check(["address"])


@linux
def test_torchrun_restarts_a_job_whose_rank_was_killed(dataset, answers, out, tmp_path):
    env = tiny_settings(dataset, tmp_path, **LONG | {"RESUME": "auto"})
    job = Torchrun(env, *two_processes, "--max-restarts=2")
    job.kill_when(tmp_path / "tiny" / "checkpoint_0000010.pt", rank=1)
    code, text = job.end(seconds=150)
    assert code == 0, text
    assert len(re.findall(r"resume:\S+ step:\d+", text)) == 1, text
    assert same_bits(out / "long", tmp_path / "tiny")


@pytest.fixture(scope="module")
def nodes(dataset, out) -> tuple[list[Path], list[dict[str, str]]]:
    """Folders of two nodes that share nothing, and settings for each."""
    folders = [out / "node_a", out / "node_b"]
    environs = []
    for folder in folders:
        shutil.copytree(dataset.folder, folder / "data")
        shutil.copy(dataset.tokenizer, folder / "tokenizer.model")
        (folder / "logs").mkdir()
        places = {"DATA_PATH": "data", "TOKENIZER_PATH": "tokenizer.model", "OUT_DIR": "logs"}
        environs.append(tiny_settings(dataset, folder / "logs", **SUMMED | places))
    return folders, environs


def run_nodes(folders: list[Path], environs: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Run two torchrun agents that meet on the loopback device."""
    place = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=1"]
    options += ["--local-addr=127.0.0.1", place]
    pairs = zip(folders, environs, strict=True)
    agents = [Torchrun(env, *options, cwd=folder) for folder, env in pairs]
    return [agent.end() for agent in agents]


@pytest.fixture(scope="module")
def trained_on_nodes(nodes) -> list[tuple[int, str]]:
    return run_nodes(*nodes)


def only(paths: list[Path]) -> Path:
    (path,) = (path for path in paths if path.exists())
    return path


def test_two_nodes_without_a_shared_folder_end_as_one_does(trained_on_nodes, nodes, answers, out):
    assert [code for code, _ in trained_on_nodes] == [0, 0], trained_on_nodes
    folder = only([node / "logs/tiny/final_model.pt" for node in nodes[0]]).parent
    assert_close(out / "healthy", folder)
    assert losses(folder) == pytest.approx(losses(out / "healthy"), abs=1e-6)
    assert events(folder, "final")[0]["val_bpb"] == pytest.approx(
        events(out / "healthy", "final")[0]["val_bpb"], abs=1e-6
    )


def test_two_nodes_score_an_artifact_that_each_has(nodes, answers, out):
    folders, environs = nodes
    for folder in folders:
        shutil.copy(out / "healthy" / "final_model.artifact", folder / "a.artifact")
    scoring = {"EVAL_ONLY": "1", "ARTIFACT": "a.artifact", "RUN_ID": "scored"}
    ends = run_nodes(folders, [env | scoring for env in environs])
    assert [code for code, _ in ends] == [0, 0], ends
    folder = only([node / "logs/scored/metrics.jsonl" for node in folders]).parent
    assert events(folder, "final")[0]["val_bpb"] == pytest.approx(
        events(out / "healthy", "final")[0]["val_bpb"], abs=1e-6
    )
