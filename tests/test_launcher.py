"""Launcher variables that are left over, incomplete or wrong, and ranks that do not come."""

import re

import pytest
from conftest import run_cli
from programs import Server

import keeper

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
JOB = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}

# Each with the variable that the message must begin with.
BROKEN = {
    "RANK without a job": ({"RANK": "3"}, "RANK=3"),
    "LOCAL_RANK without a job": ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    "WORLD_SIZE without an address": ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD"),
    "LOCAL_WORLD_SIZE without a job": ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
    "a word": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
    "a fraction": ({"RANK": "1.5"}, "RANK=1.5"),
    "a negative rank": ({"RANK": "-1"}, "RANK=-1"),
    "no process": ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    "a rank outside of the job": (JOB | {"RANK": "2"}, "RANK=2"),
    "a local rank over the rank": (JOB | {"RANK": "0"}, "LOCAL_RANK=1"),
    "a local rank outside of the node": (JOB | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1"),
    "a port that is none": (JOB | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    "a port out of range": (JOB | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    "an empty address": (JOB | {"MASTER_ADDR": ""}, "WORLD_SIZE=2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_variables_are_named_with_what_to_do(case):
    environ, begin = BROKEN[case]
    problems = keeper.launcher_problems(environ)
    assert len(problems) == 1
    assert problems[0].startswith(begin)
    assert "torchrun" in problems[0]
    assert "unset" in problems[0]


RIGHT = {
    "none": {},
    "a job of one": {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", **MEETING},
    "an address that a cluster always sets": MEETING,
    "empty ones": {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
    "a rank of two": JOB,
    "the first rank of the second node": JOB | {"RANK": "1", "LOCAL_RANK": "0"},
    "without the size of a node": {k: v for k, v in JOB.items() if k != "LOCAL_WORLD_SIZE"},
}


@pytest.mark.parametrize("case", RIGHT)
def test_variables_of_a_job_are_accepted(case):
    assert keeper.launcher_problems(RIGHT[case]) == []


@pytest.mark.parametrize("environ", [{"RANK": "3"}, {"LOCAL_RANK": "1"}, {"WORLD_SIZE": "abc"}])
def test_a_run_ends_at_once_with_one_error(environ, tiny_env, tmp_path):
    done = run_cli(tiny_env | environ)
    (name,) = environ
    assert done.rc == 1
    assert re.match(rf"train_gpt\.py: error: .*\n  {name}=", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "logs").exists()


def test_a_local_rank_that_finds_a_problem_alone_says_it(tiny_env):
    """It cannot rely on another process of its node to say it: there may be none."""
    done = run_cli(tiny_env | JOB | {"NUM_LAYER": "2"})
    assert done.rc == 1
    assert "NUM_LAYER=2: no such setting" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_other_ranks_says_what_it_waits_for(rank, server: Server, tiny_env):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(29810 + rank)}
    run = server.start(tiny_env | JOB | place)
    try:
        run.until(lambda: "waits for" in run.output or run.poll() is not None)
    finally:
        run.send(9)
    line = f"rank {rank} waits for the other 1 ranks at 127.0.0.1:{29810 + rank}"
    assert line in run.wait().output
    assert ("rank 0 checks the validation data" in run.output) == (rank == 1)


def test_ranks_that_cannot_meet_are_an_error(server: Server, tiny_env):
    """As with two processes of rank 0, of which one alone can have the port."""
    runs = [server.start(tiny_env | JOB | {"RANK": "0", "LOCAL_RANK": "0"}) for _ in range(2)]
    second = runs[1]
    second.until(lambda: any(run.poll() is not None for run in runs))
    ended = [run for run in runs if run.poll() is not None]
    for run in runs:
        run.send(9)
    assert [run.returncode for run in ended] == [1]
    assert "Traceback" not in ended[0].output
    assert re.search(r"^train_gpt\.py: error: ", ended[0].output, re.M)
