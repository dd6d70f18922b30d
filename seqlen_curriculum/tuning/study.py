"""A search in a folder, with the run folders of its probes and its complete state on disk.

``tuning.json`` contains the search, the verdicts so far and the time spent, from which a killed search resumes.
``tuned.json`` is the result: the given configuration with the best schedule.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from seqlen_curriculum.config.equivalence import count_identical_steps
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.files import lock_folder, replace_text
from seqlen_curriculum.tuning.cost import Cost, cost_of
from seqlen_curriculum.tuning.probes import ProbeRun, Trial, inherit
from seqlen_curriculum.tuning.search import BudgetSpent, Candidate, Outcome, Probe, tune, upcoming
from seqlen_curriculum.tuning.space import Settings, scheduled, space_of

__all__ = ["ProbeResult", "Study"]

_STATE, _RESULT, _PROBES = "tuning.json", "tuned.json", "probes"
_SAVE_SECONDS = 5.0

Watch = Callable[["ProbeResult", Trial], None]


@dataclass(frozen=True)
class ProbeResult:
    """A probe and its verdict, once it has finished."""

    number: int
    probe: Probe
    trial: Trial | None = None

    def record(self) -> dict[str, Any]:
        """Return the record for ``tuning.json``."""
        assert self.trial is not None
        return {**self.probe.candidate._asdict(), "until_step": self.probe.until_step, **self.trial._asdict()}

    @classmethod
    def read(cls, number: int, record: _Record) -> ProbeResult:
        """Parse a record of ``tuning.json``."""
        candidate = Candidate(record.min_difficulty, record.total_steps)
        return cls(number, Probe(candidate, record.until_step), Trial(record.stable, record.step, record.ratio))


class _Record(Section):
    """A probe in ``tuning.json``."""

    min_difficulty: Count
    total_steps: Count
    until_step: Count
    stable: bool
    step: CountOrZero
    ratio: float | None


class _State(Section):
    """``tuning.json``."""

    config: dict[str, Any]
    settings: dict[str, Any]
    seconds: Annotated[float, Field(ge=0)]
    probes: list[_Record]
    complete: bool | None = None
    best: dict[str, int] | None = None


@dataclass
class Study:
    """The search for the run of the configuration ``raw`` in the folder ``save``."""

    raw: Mapping[str, Any]
    settings: Settings
    save: Path
    launcher: Sequence[str]
    """The launcher's command line, to which ``script`` is appended."""
    script: Path
    most_tokens: int
    """Maximum tokens of all probes together."""
    most_seconds: float
    """Seconds over all calls, after which the running probe is stopped."""
    results: list[ProbeResult] = field(default_factory=list)
    """Results of the finished probes, in order."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.space = space_of(self.raw, self.settings)
        self._saved_at = time.monotonic()

    def open(self) -> None:
        """Lock the folder and read the state of an earlier call. Raises CheckpointError if it holds another search."""
        lock_folder(self.save, "--save", "tuning in it")
        (self.save / _PROBES).mkdir(exist_ok=True)
        path = self.save / _STATE
        if not path.exists():
            self._write()
            return
        try:
            state = _State.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path}: is not the state of a search ({error}); restore it, or tune in another --save"
            ) from error
        differing = [name for name, value in self.identity().items() if getattr(state, name) != value]
        if differing:
            raise CheckpointError(
                f"--save {self.save}: contains a search with another {' and another '.join(differing)}, according to its "
                f"{_STATE}; give the same ones again, or another folder"
            )
        self.seconds = state.seconds
        self.results = [ProbeResult.read(number, record) for number, record in enumerate(state.probes, start=1)]

    def run(self, watch: Watch) -> Outcome:
        """Search; call ``watch`` with the state of each probe while it runs, and with its result.

        Raises CheckpointError for a probe that fails for a reason other than a fluctuation.
        """
        known = {result.probe: result for result in self.results}

        def probe(question: Probe) -> bool:
            result = known.get(question)
            if result is None or result.trial is None:
                return self._probe(question, watch)
            # Judged in an earlier call, so a resumed search replays the same verdicts.
            watch(result, result.trial)
            return result.trial.stable

        outcome = tune(self.space, probe, lambda question: question in known or self.is_affordable(question))
        self._write(outcome)
        if outcome.best is not None:
            tuned = scheduled(self.raw, outcome.best.min_difficulty, total_curriculum_step=outcome.best.total_steps)
            replace_text(self.result, json.dumps(tuned, indent=2) + "\n")
        return outcome

    @property
    def first(self) -> Candidate:
        """The first schedule to try."""
        return Candidate(self.space.lengths[0], self.space.first_total)

    @property
    def result(self) -> Path:
        """The path of the result, once there is one."""
        return self.save / _RESULT

    def run_of(self, candidate: Candidate, save_steps: Sequence[int] = ()) -> ProbeRun:
        """Return the run that probes a schedule, with checkpoints after ``save_steps``."""
        raw = scheduled(self.raw, candidate.min_difficulty, total_curriculum_step=candidate.total_steps)
        training = self.raw["training"]
        raw["training"] = {
            **training,
            "eval_interval": self.space.eval_interval,
            "eval_rows": self.settings.eval_rows or training.get("eval_rows", 64),
            "save_interval": self.space.beginning_steps,  # at most this many steps are lost by a kill
            "keep_last": 1,
            "on_spike": "log",
            "stop_perplexity_ratio": self.settings.ratio,
            "save_steps": list(save_steps),
        }
        name = f"min{candidate.min_difficulty}-T{candidate.total_steps}"
        return ProbeRun(self.save / _PROBES / name, raw, self.settings.ratio)

    def runs(self) -> dict[Candidate, ProbeRun]:
        """Return the runs of all probed schedules, in order."""
        candidates = dict.fromkeys(result.probe.candidate for result in self.results)
        return {candidate: self.run_of(candidate) for candidate in candidates}

    def cost(self) -> Cost:
        """Return the cost of all probes so far, including an interrupted one."""
        total = Cost()
        for folder in sorted((self.save / _PROBES).glob("min*-T*/")):
            length, _, steps = folder.name.removeprefix("min").partition("-T")
            run = self.run_of(Candidate(int(length), int(steps)))
            total += cost_of(run.config, run.inherited_steps() + 1, run.last_step())
        return total

    def full_cost(self) -> Cost:
        """Return the cost of the whole run with the first schedule to try, including its own evaluations."""
        raw = scheduled(self.raw, self.first.min_difficulty, total_curriculum_step=self.first.total_steps)
        config = RunConfig.from_dict(raw)
        return cost_of(config, 1, config.timeline().steps)

    def is_affordable(self, question: Probe) -> bool:
        """Return whether time is left, and enough tokens for the remaining steps of the probe."""
        if self.seconds > self.most_seconds:
            return False
        run = self.run_of(question.candidate)
        trained_steps = run.last_step() if run.save.exists() else 0
        return (self.cost() + cost_of(run.config, trained_steps + 1, question.until_step)).tokens <= self.most_tokens

    def _probe(self, question: Probe, watch: Watch) -> bool:
        number = len(self.results) + 1
        run = self.run_of(question.candidate, self.steps_to_share(question))
        inherit(run, list(self.runs().values()), question.until_step)
        started, before = time.monotonic(), self.seconds

        def watch_budget(trial: Trial) -> None:
            self.seconds = before + time.monotonic() - started
            if time.monotonic() - self._saved_at > _SAVE_SECONDS:
                self._write()
            watch(ProbeResult(number, question), trial)
            if self.seconds > self.most_seconds:
                raise BudgetSpent  # propagates through ``ProbeRun.train``, which stops the run and lets it save

        # A short run may end before the few LR warmups of a probe.
        until_step = min(question.until_step, run.config.timeline().steps)
        trial = run.train(until_step, self.launcher, self.script, watch_budget)
        self.seconds = before + time.monotonic() - started
        self.results.append(ProbeResult(number, question, trial))
        self._write()
        watch(self.results[-1], trial)
        return trial.stable

    def steps_to_share(self, question: Probe) -> list[int]:
        """Return the steps up to which the probe equals a possible next one, which can inherit a checkpoint there.

        There are two possible next probes, one per verdict. If T is 40 in this probe and 80 in the next, and both start with
        16 steps of length 8, the next resumes from a checkpoint of step 16.
        """
        verdicts = [result.trial.stable for result in self.results if result.trial is not None]
        config, steps = self.run_of(question.candidate).config, set()
        for verdict in (True, False):
            following = upcoming(self.space, [*verdicts, verdict])
            if isinstance(following, Probe) and following.candidate != question.candidate:
                other = self.run_of(following.candidate).config
                steps.add(count_identical_steps(config, other, min(question.until_step, following.until_step)))
        return sorted(steps - {0, question.until_step})

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify a search, after a round trip through JSON."""
        return json.loads(json.dumps({"config": self.raw, "settings": self.settings.model_dump()}))  # type: ignore[no-any-return]

    def _write(self, outcome: Outcome | None = None) -> None:
        state = {
            **self.identity(),
            "seconds": self.seconds,
            "probes": [result.record() for result in self.results],
        }
        if outcome is not None:
            state |= {"complete": outcome.complete, "best": outcome.best and outcome.best._asdict()}
        replace_text(self.save / _STATE, json.dumps(state, indent=2) + "\n")
        self._saved_at = time.monotonic()
