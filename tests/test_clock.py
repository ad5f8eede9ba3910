"""The wallclock cap where the host is ahead of the device, in simulated time."""

import itertools

import pytest
from conftest import run_main

import train_gpt as tg

ISSUE = 0.01  # seconds that the host needs to ask for a step


class Machine:
    """A host and a device that works off, one after the other, what the host asks of it."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self.host = self.device = 0.0
        self.ends: list[float] = []

    def later(self, _):
        """Ask for a step: its end, for which the host can wait."""
        self.host += ISSUE
        self.device = max(self.device, self.host) + self.step_seconds
        self.ends.append(self.device)
        end = self.device

        def wait() -> float:
            self.host = max(self.host, end)
            return 0.0

        return wait

    def clock(self, synchronize: bool = False) -> float:
        if synchronize:
            self.host = max(self.host, self.device)
        return self.host


@pytest.fixture
def simulate(tiny_env, monkeypatch):
    """Train until a cap of simulated seconds: the machine."""

    numbers = itertools.count()

    def start(cap: float, step_seconds: float, **changed: object) -> Machine:
        machine = Machine(step_seconds)
        monkeypatch.setattr(tg, "AHEAD", {"cpu": 2})
        monkeypatch.setattr(tg, "later", machine.later)
        monkeypatch.setattr(
            tg.Run, "clock", lambda _, synchronize=False: machine.clock(synchronize)
        )
        settings = {"ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": cap, "TRAIN_LOG_EVERY": 0}
        settings |= {"NUM_LAYERS": 1, "MODEL_DIM": 32, "TRAIN_BATCH_TOKENS": 64}
        settings["RUN_ID"] = f"run{next(numbers)}"
        run_main(tiny_env | {k: str(v) for k, v in (settings | changed).items()})
        return machine

    return start


@pytest.mark.parametrize("cap", [10.0, 10.6])
@pytest.mark.parametrize("step_seconds", [0.3, 0.7, 4.0, 11.0])
def test_training_ends_with_the_step_that_passes_the_cap(simulate, cap, step_seconds):
    """Not some steps later, as the host would if it stopped by its own clock."""
    ends = simulate(cap, step_seconds).ends
    slack = 2 * ISSUE
    assert ends[-1] >= cap - slack
    assert all(end < cap + slack for end in ends[:-1])


@pytest.mark.parametrize("changed", [{"VAL_LOSS_EVERY": 7}, {"TRAIN_LOG_EVERY": 3}])
def test_waiting_for_the_device_now_and_then_changes_nothing(simulate, changed):
    ends = [simulate(10.0, 0.3, **settings).ends for settings in ({}, changed)]
    assert len(ends[0]) == len(ends[1])


def test_the_device_never_waits_for_the_host(simulate):
    """But for the start, where each step is waited for."""
    ends = simulate(10.0, 0.3).ends
    gaps = [b - a for a, b in itertools.pairwise(ends[10:])]
    assert gaps == pytest.approx([0.3] * len(gaps))


def test_the_log_tells_when_the_device_was_done(simulate, tmp_path):
    machine = simulate(10.0, 0.3, TRAIN_LOG_EVERY=5)
    lines = (tmp_path / "logs/run0.txt").read_text().splitlines()
    steps = [line.split() for line in lines if "train_loss:" in line and line.startswith("step:")]
    for fields in steps:
        step = int(fields[0].split(":")[1].split("/")[0])
        told = float(fields[2].removeprefix("train_time:").removesuffix("ms"))
        assert told == pytest.approx(1e3 * machine.ends[step - 1], abs=1)
    assert len(steps) > 10
