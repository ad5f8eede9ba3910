"""Judge the health of a run from its events: phase, plateau, divergence, spikes, early stop.

A training loss is noisy: on a real run of 13,780 steps its deviation is 0.08, and in most of the
run 50 steps lower it by less than 0.001. So a guard does not compare means: it fits a line to the
losses of a window, and speaks if the line's slope, with its standard error, leaves no doubt.
Windows are shares of the run that is expected, so that they suit short and long ones.
docs/watch.md has the rules, and how soon they see what.
"""

import math
import statistics
from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from metrics import Event, number

GUARDS = ("phase", "plateau", "divergence", "spikes", "early_stop")

# Shares of the steps that are expected.
WINDOW = 0.22  # in which a slope is measured
SHORT_WINDOW = 0.02  # in which a loss that leaps is seen soon
UNARMED = 0.10  # after the rates have risen, nothing is judged for so long
BETWEEN_LOOKS = 0.001
SILENCE = 0.10  # before a guard repeats itself

PLATEAU = 0.001  # of the loss: a window's second half that improves by less is flat
PLATEAU_SIGHT = 0.0025  # noise that moves a slope by more leaves it open what is flat
FLAT_DOUBT = 0.05  # how often chance may call a slope of just PLATEAU flat
RISE = 0.01  # of the loss: a window's second half that is higher by more diverges
RISE_DOUBT = 1e-4  # it is asked hundreds of times in a run
UNSTABLE = 0.15  # deviation of the losses from their line, as a share of the loss
UNSTEADY = 2.0  # times the deviation before
LEAST_POINTS = 8  # on which a line is fitted
MANY_POINTS = 50  # on which the correlation of neighbours is measured

SPIKE_DEVIATIONS = 5.0  # by chance, 3 are reached every 700 steps
SPIKE_NATS = 0.5
GRADIENT_SPIKE = 10.0  # times the mean norm
SPIKE_HISTORY = 100  # logged steps
SPIKE_SILENCE = 50  # steps

# The four criteria of early stop have the numbers that Surogate gives them.
CONVERGED_SCORE = 0.85
CONVERGED_EVALUATIONS = 5
EFFICIENCY = 0.5  # of its peak
DIVERGING_STEPS = 200
PLATEAU_STEPS = 500


@dataclass(frozen=True)
class Finding:
    """Say what a guard has found, and at which step: an alarm, or only a note."""

    guard: str
    step: int
    text: str
    is_alarm: bool = True


class Horizon:
    """Tell how long a run will be, and where its rates rise and fall, from its settings."""

    def __init__(self, settings: dict) -> None:
        def value(name: str, default: float = 0.0) -> float:
            found = number(settings, name)
            return default if math.isnan(found) else found

        kept = value("calibration_seconds") if settings.get("quant_method") == "gptq" else 0.0
        self.settings = settings
        self.iterations = value("iterations", math.inf)
        self.cap_ms = 1e3 * max(value("max_wallclock_seconds") - kept, 0.0)  # 0: none
        self.rise_steps = value("lr_warmup_steps")
        self.rise_share = value("lr_warmup_ratio")
        self.fall_steps = value("warmdown_iters")
        self.fall_share = number(settings, "warmdown_frac")  # nan: the steps count
        self.schedule = settings.get("lr_schedule", "linear")

    def total(self, step: float, ms: float) -> float:
        """Expect so many steps, if the pace stays: ITERATIONS, or what the cap leaves."""
        total = self.iterations
        if self.cap_ms and step > 0 and ms > 0:
            total = min(total, self.cap_ms * step / ms)
        return max(total, step)

    def rise(self, total: float) -> float:
        """Give the steps in which the rates rise."""
        return self.rise_steps or self.rise_share * total

    def fall(self, total: float) -> float:
        """Give the step from which the rates fall to the end; inf if they do not."""
        if self.schedule not in ("linear", "wsd"):
            return math.inf
        steps = self.fall_steps if math.isnan(self.fall_share) else self.fall_share * total
        return total - steps if steps > 0 else math.inf

    def may_stop(self, total: float) -> bool:
        """Tell whether no fall of the rates is still to come, which would lower the loss."""
        return self.schedule != "cosine" and math.isinf(self.fall(total))


@dataclass(frozen=True)
class Fit:
    """Hold a line through the losses of a window, as shares of their mean."""

    change: float  # of the line over half of the window
    error: float  # its standard error
    deviation: float  # of the losses from the line
    count: float  # of the losses, as if none went together
    correlation: float = 0.0  # of neighbours

    def bound(self, doubt: float) -> float:
        """Tell how far chance moves the change, but for a share `doubt` of windows."""
        return self.error * student(1 - doubt, self.count - 2)


def student(probability: float, freedom: float) -> float:
    """Give a quantile of Student's t over the median, by Wallace's approximation of 1959."""
    z = statistics.NormalDist().inv_cdf(probability)
    z *= (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z**2 / freedom))


@dataclass
class Series:
    """Hold losses by their steps, in the order of the steps."""

    steps: array = field(default_factory=lambda: array("d"))
    losses: array = field(default_factory=lambda: array("d"))

    def add(self, step: float, loss: float) -> None:
        """Add a loss; one that is not finite is left out."""
        if math.isfinite(loss) and (not self.steps or step > self.steps[-1]):
            self.steps.append(step)
            self.losses.append(loss)

    def until(self, step: float) -> "Series":
        """Copy the losses up to a step."""
        count = int(np.searchsorted(np.array(self.steps), step, side="right"))
        return Series(self.steps[:count], self.losses[:count])

    def fit(self, begin: float, end: float, correlation: float = 0.0) -> Fit | None:
        """Fit a line to the losses of steps in (begin, end]; None if they are too few.

        Losses that go together, with a correlation of neighbours, count as fewer.
        """
        steps = np.frombuffer(self.steps) if self.steps else np.empty(0)
        first, last = (int(np.searchsorted(steps, place, side="right")) for place in (begin, end))
        share = (1 - correlation) / (1 + correlation)
        count = (last - first) * share
        if count < LEAST_POINTS:
            return None
        x = steps[first:last] - steps[first:last].mean()
        y = np.frombuffer(self.losses)[first:last]
        mean = float(y.mean())
        spread = float(x @ x)
        slope = float(x @ y) / spread
        rest = y - mean - slope * x
        power = float(rest @ rest)
        deviation = math.sqrt(power / (last - first - 2))
        half = (end - begin) / 2
        scale = max(abs(mean), 1e-9)
        return Fit(
            change=slope * half / scale,
            error=deviation / math.sqrt(spread * share) * half / scale,
            deviation=deviation / scale,
            count=count,
            correlation=float(rest[:-1] @ rest[1:]) / power if power else 0.0,
        )


@dataclass
class Condition:
    """Follow whether something holds: since when, and when it was last told."""

    since: float = math.nan  # a step; nan: it does not hold
    told: float = -math.inf

    def update(self, holds: bool, step: float) -> None:
        """Note whether it holds at a step."""
        if not holds:
            self.since = math.nan
        elif math.isnan(self.since):
            self.since = step

    def lasts(self, step: float, steps: float = 0.0) -> bool:
        """Tell whether it has held for so many steps."""
        return step - self.since >= steps

    def is_news(self, step: float, silence: float) -> bool:
        """Tell whether it was not told for so many steps, and note that it is now."""
        if step < self.told + silence:
            return False
        self.told = step
        return True


@dataclass
class Past:
    """Hold what the guards know of one curve."""

    train: Series = field(default_factory=Series)
    val: Series = field(default_factory=Series)


class Guards:
    """Judge one run: `add` takes its events in their order, and gives what is to be said."""

    def __init__(self) -> None:
        self.earlier = Past()  # the run before, which a resumed one goes on with
        self.begin({})

    def begin(self, settings: dict, past: Past | None = None) -> None:
        """Begin a run."""
        self.horizon = Horizon(settings)
        self.past = past or Past()
        self.phase = "warmup"
        self.conditions = {name: Condition() for name in (*GUARDS, "nan", "sight")}
        self.losses: deque[float] = deque(maxlen=SPIKE_HISTORY)  # that spikes stand out of
        self.norms: deque[float] = deque(maxlen=SPIKE_HISTORY)
        self.scores: list[float] = []
        self.fastest = 0.0  # improvement of a window, after arming
        self.holding: dict[str, Finding] = {}  # what the last look found
        self.related = 0.0  # correlation of neighbouring losses
        self.looked = -math.inf
        self.step = 0
        self.total = math.inf

    def add(self, event: Event) -> list[Finding]:
        """Take in an event; give what the guards have found with it."""
        kind = event["event"]
        if kind == "start":
            self.earlier = self.past
            settings = event.get("settings")
            self.begin(settings if isinstance(settings, dict) else {})
        elif kind == "resume":
            step = number(event, "step")
            parts = (self.earlier.train.until(step), self.earlier.val.until(step))
            self.begin(self.horizon.settings, Past(*parts))
        elif kind in ("train", "val", "skipped_step"):
            return self.judge(event)
        return []

    def judge(self, event: Event) -> list[Finding]:
        """Judge a step."""
        step = number(event, "step")
        if not math.isfinite(step):
            return []
        self.step = int(step)
        kind = event["event"]
        if kind == "skipped_step":
            return self.say("spikes", "loss or gradient was not finite; the step was skipped")
        total = self.horizon.total(step, number(event, "train_time_ms"))
        self.total = total if math.isfinite(total) else math.inf
        if kind == "val":
            self.past.val.add(step, number(event, "val_loss"))
            return self.judge_evaluation()
        loss = number(event, "train_loss")
        alarms = self.judge_value(loss, number(event, "grad_norm"))
        self.past.train.add(step, loss)
        if self.step >= self.looked + BETWEEN_LOOKS * self.total:
            self.looked = self.step
            alarms += self.look()
        return alarms

    def say(
        self, guard: str, text: str, name: str = "", silence: float = SPIKE_SILENCE
    ) -> list[Finding]:
        """Raise an alarm, unless it was raised a short time ago."""
        self.holding[guard] = Finding(guard, self.step, text)
        is_news = self.conditions[name or guard].is_news(self.step, silence)
        return [self.holding[guard]] if is_news else []

    # ---- what holds

    @property
    def is_armed(self) -> bool:
        """Tell whether the run is far enough to be judged, and how long it will be is known."""
        begin = self.horizon.rise(self.total) + UNARMED * self.total
        return math.isfinite(self.total) and self.step >= begin

    @property
    def is_falling(self) -> bool:
        """Tell whether the warmdown has begun."""
        return self.step >= self.horizon.fall(self.total)

    def fit(self, series: Series, share: float) -> Fit | None:
        """Fit a line to the window that ends now; None if it would begin before the warmup ends."""
        begin = self.step - share * self.total
        if begin < self.horizon.rise(self.total):
            return None
        correlation = self.related if series is self.past.train else 0.0
        return series.fit(begin, self.step, correlation)

    def before(self) -> Fit | None:
        """Fit a line to the window that ends where the short one begins."""
        end = self.step - SHORT_WINDOW * self.total
        begin = max(end - WINDOW * self.total, self.horizon.rise(self.total))
        return self.past.train.fit(begin, end)

    def correlation(self) -> float:
        """Tell how far neighbouring losses go together: batches of the same text do.

        It is measured before the short window, for a loss that leaps would look like it. Few losses
        are far apart.
        """
        fit = self.before()
        if not fit or fit.count < MANY_POINTS:
            return 0.0
        return fit.correlation if fit.correlation > 2 / math.sqrt(fit.count) else 0.0

    def is_flat(self, series: Series) -> bool:
        """Tell whether a line certainly improves by less than PLATEAU in half of the window."""
        fit = self.fit(series, WINDOW)
        if not fit:
            return False
        bound = fit.bound(FLAT_DOUBT)
        return bound < PLATEAU_SIGHT and bound - fit.change < PLATEAU

    def rises(self) -> Fit | None:
        """Give the line of a window in which the loss certainly rises by more than RISE."""
        for share in (SHORT_WINDOW, WINDOW):
            fit = self.fit(self.past.train, share)
            if fit and fit.change - fit.bound(RISE_DOUBT) > RISE:
                return fit
        return None

    def is_unstable(self) -> bool:
        """Tell whether the losses certainly scatter more than UNSTABLE, and than before."""
        fit = self.fit(self.past.train, SHORT_WINDOW)
        before = self.before()
        if not (fit and before):
            return False
        least = fit.deviation * (1 - 2 / math.sqrt(2 * fit.count))
        return least > max(UNSTABLE, UNSTEADY * before.deviation)

    # ---- the guards

    def look(self) -> list[Finding]:
        """Judge the windows that end at this step."""
        self.holding = {}
        if not self.is_armed:
            return []
        self.related = self.correlation()
        rising = self.rises()
        judged = not (rising or self.is_falling)
        flat = judged and any(map(self.is_flat, (self.past.train, self.past.val)))
        self.conditions["divergence"].update(bool(rising), self.step)
        self.conditions["plateau"].update(flat, self.step)
        silence = SILENCE * self.total
        found = self.judge_phase(flat, rising)
        if flat:
            span = f"{WINDOW * self.total:.0f} steps"
            text = f"flat for {span}: half of them lower the loss by under {100 * PLATEAU:g}%"
            found += self.say("plateau", text, silence=silence)
        if rising:
            text = f"the loss rises: by {100 * rising.change:.1f}% in half of a window"
            found += self.say("divergence", text, silence=silence)
        return found + self.admit() + self.judge_stop()

    def admit(self) -> list[Finding]:
        """Note, once, that too few losses are logged to tell whether the run is flat."""
        fits = [self.fit(series, WINDOW) for series in (self.past.train, self.past.val)]
        bounds = [fit.bound(FLAT_DOUBT) if fit else math.inf for fit in fits]
        seen = self.conditions["sight"]
        if self.is_falling or not fits[0] or min(bounds) < PLATEAU_SIGHT:
            return []
        if -fits[0].change > bounds[0]:
            return []  # it certainly improves
        if not seen.is_news(self.step, math.inf):
            return []
        count = fits[0].count * (bounds[0] / PLATEAU_SIGHT) ** 2
        every = WINDOW * self.total / count
        text = "no plateau can be told: the losses are too few for their noise"
        if every >= 1:
            text += f"; TRAIN_LOG_EVERY={int(every)} would do"
        return [Finding("plateau", self.step, text, is_alarm=False)]

    def judge_phase(self, flat: bool, rising: Fit | None) -> list[Finding]:
        """Tell the phase, which stays as it was where nothing is certain."""
        fit = self.fit(self.past.train, WINDOW)
        improves = bool(fit) and -fit.change > fit.bound(FLAT_DOUBT)
        rules = {
            "unstable": self.is_unstable(),
            "diverging": rising,
            "warmdown": self.is_falling,
            "flat": flat,
            "converging": improves,
        }
        phase = next((name for name, holds in rules.items() if holds), self.phase)
        found = []
        if phase != self.phase:
            found += [Finding("phase", self.step, f"{self.phase} -> {phase}", is_alarm=False)]
        self.phase = phase
        if phase == "unstable":
            text = f"losses scatter by over {100 * UNSTABLE:g}% around their line"
            found += self.say("phase", text, silence=SILENCE * self.total)
        return found

    def judge_value(self, loss: float, norm: float) -> list[Finding]:
        """Compare a loss and a gradient norm with those before them."""
        if not math.isfinite(loss):
            return self.say("divergence", f"the loss is {loss}", "nan")
        text = ""
        if self.is_armed and len(self.losses) >= LEAST_POINTS:
            mean = statistics.fmean(self.losses)
            usual = statistics.fmean(self.norms)
            limit = mean + SPIKE_NATS
            if loss > limit:
                limit = max(limit, mean + SPIKE_DEVIATIONS * float(np.std(self.losses)))
            if loss > limit:
                text = f"the loss is {loss:.4f}, after {mean:.4f} on the mean"
            elif norm > GRADIENT_SPIKE * usual > 0:
                text = f"the gradient norm is {norm:.3g}, after {usual:.3g} on the mean"
            # A spike counts as the limit: it hardly moves the mean, and a new level becomes usual.
            loss = min(loss, limit)
            norm = min(norm, GRADIENT_SPIKE * usual) if usual > 0 else norm
        if self.step >= self.horizon.rise(self.total) + UNARMED / 2 * self.total:
            self.losses.append(loss)
            self.norms.append(norm)
        return self.say("spikes", text) if text else []

    def judge_evaluation(self) -> list[Finding]:
        """Score how far an evaluation's loss stands still (Surogate's convergence score)."""
        losses = self.past.val.losses
        if len(losses) < 3:
            return []
        last = np.array(losses[-5:])
        stability = np.clip(1 - last.std() / abs(last.mean()), 0, 1)
        gain = (last[-2] - last[-1]) / abs(last[-2])
        self.scores.append(float(0.6 * stability + 0.4 * np.clip(1 - 20 * gain, 0, 1)))
        return self.judge_stop() if self.is_armed else []

    def judge_stop(self) -> list[Finding]:
        """Say whether the run is to be stopped: it diverges, or nothing more is to come of it."""
        why = ""
        if self.conditions["divergence"].lasts(self.step, DIVERGING_STEPS):
            why = f"the loss has been rising for {DIVERGING_STEPS} steps"
        elif self.horizon.may_stop(self.total):
            why = self.is_done()
        return self.say("early_stop", why, silence=SILENCE * self.total) if why else []

    def is_done(self) -> str:
        """Say why a run whose rates will not fall has nothing more to gain; or nothing."""
        last = self.scores[-CONVERGED_EVALUATIONS:]
        if len(last) == CONVERGED_EVALUATIONS and min(last) > CONVERGED_SCORE:
            return f"validation has stood still for {CONVERGED_EVALUATIONS} evaluations"
        if self.conditions["plateau"].lasts(self.step, PLATEAU_STEPS):
            return f"the loss has been flat for {PLATEAU_STEPS} steps"
        fit = self.fit(self.past.train, WINDOW)
        if not fit:
            return ""
        self.fastest = max(self.fastest, -fit.change - fit.bound(FLAT_DOUBT))
        if -fit.change + fit.bound(FLAT_DOUBT) < EFFICIENCY * self.fastest:
            return f"a step gains under {100 * EFFICIENCY:g}% of what it gained at best"
        return ""
