"""A search in a folder: its probes are run folders there, and all it knows is on disk at any moment.

``tuning.json`` holds what is searched, the verdicts so far and the time spent; killed, the search is told its verdicts again
and goes on. ``tuned.json`` is the answer: the file that was given, with the schedule that was found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    """A probe and, once it is through, how it came out."""

    number: int
    probe: Probe
    trial: Trial | None = None

    def record(self) -> dict[str, Any]:
        """For ``tuning.json``."""
        assert self.trial is not None
        return {**self.probe.candidate._asdict(), "until_step": self.probe.until_step, **self.trial._asdict()}

    @classmethod
    def read(cls, number: int, record: _Record) -> ProbeResult:
        """From ``tuning.json``."""
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
    """The search for the run of the file ``raw`` in the folder ``save``. ``launcher`` begins the command of ``script``."""

    raw: Mapping[str, Any]
    settings: Settings
    save: Path
    launcher: Sequence[str]
    script: Path
    most_tokens: int
    """Not to be exceeded by all probes together."""
    most_seconds: float
    """After so many, over all calls, the running probe is stopped."""
    findings: list[ProbeResult] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.space = space_of(self.raw, self.settings)
        self._saved_at = time.monotonic()

    def open(self) -> None:
        """Lock the folder and read what an earlier call found. Raises CheckpointError where it holds another search."""
        lock_folder(self.save, "--save", "tuning in it")
        (self.save / _PROBES).mkdir(exist_ok=True)
        path = self.save / _STATE
        if not path.exists():
            self._write()
            return
        state = _read_state(path)
        differing = [name for name, value in self._identity().items() if getattr(state, name) != value]
        if differing:
            raise CheckpointError(
                f"--save {self.save}: holds a search with another {' and another '.join(differing)}, by {_STATE} there; "
                "give what it was begun with, or another folder"
            )
        self.seconds = state.seconds
        self.findings = [ProbeResult.read(number, record) for number, record in enumerate(state.probes, start=1)]

    def run(self, watch: Watch) -> Outcome:
        """Search; ``watch`` is told how each probe stands, and at last how it came out.

        Raises CheckpointError for a probe that fails otherwise than by a fluctuation.
        """
        known = {finding.probe: finding for finding in self.findings}

        def probe(question: Probe) -> bool:
            finding = known.get(question)
            if finding is None or finding.trial is None:
                return self._probe(question, watch)
            watch(finding, finding.trial)
            return finding.trial.stable

        outcome = tune(self.space, probe, lambda question: question in known or self._affordable(question))
        self._write(outcome)
        if outcome.best is not None:
            found = scheduled(self.raw, outcome.best.min_difficulty, total_curriculum_step=outcome.best.total_steps)
            replace_text(self.result, json.dumps(found, indent=2) + "\n")
        return outcome

    @property
    def first(self) -> Candidate:
        """The schedule that is tried first."""
        return Candidate(self.space.lengths[0], self.space.first_total)

    @property
    def result(self) -> Path:
        """Where the answer lies once there is one."""
        return self.save / _RESULT

    def run_of(self, candidate: Candidate, save_steps: Sequence[int] = ()) -> ProbeRun:
        """The run that probes a schedule."""
        raw = scheduled(self.raw, candidate.min_difficulty, total_curriculum_step=candidate.total_steps)
        raw["training"] = {**raw["training"], **self._probe_training(), "save_steps": list(save_steps)}
        name = f"min{candidate.min_difficulty}-T{candidate.total_steps}"
        return ProbeRun(self.save / _PROBES / name, raw, self.settings.ratio)

    def runs(self) -> dict[Candidate, ProbeRun]:
        """Of all schedules that have been probed, in their order."""
        candidates = dict.fromkeys(finding.probe.candidate for finding in self.findings)
        return {candidate: self.run_of(candidate) for candidate in candidates}

    def cost(self) -> Cost:
        """Of all probes so far, also one that was cut off."""
        total = Cost()
        for folder in sorted((self.save / _PROBES).glob("min*-T*/")):
            length, _, steps = folder.name.removeprefix("min").partition("-T")
            run = self.run_of(Candidate(int(length), int(steps)))
            total += cost_of(run.config, run.inherited_steps() + 1, run.last_step())
        return total

    def full_cost(self) -> Cost:
        """Of the whole run, with the first schedule that is tried and the file's own evaluations."""
        raw = scheduled(self.raw, self.first.min_difficulty, total_curriculum_step=self.first.total_steps)
        config = RunConfig.from_dict(raw)
        return cost_of(config, 1, config.timeline().steps)

    def _affordable(self, question: Probe) -> bool:
        if self.seconds > self.most_seconds:
            return False
        run = self.run_of(question.candidate)
        done = run.last_step() if run.save.exists() else 0
        return (self.cost() + cost_of(run.config, done + 1, question.until_step)).tokens <= self.most_tokens

    def _probe(self, question: Probe, watch: Watch) -> bool:
        number = len(self.findings) + 1
        run = self.run_of(question.candidate, self._partings(question))
        inherit(run, list(self.runs().values()), question.until_step)
        started, before = time.monotonic(), self.seconds

        def watched(trial: Trial) -> None:
            self.seconds = before + time.monotonic() - started
            if time.monotonic() - self._saved_at > _SAVE_SECONDS:
                self._write()
            watch(ProbeResult(number, question), trial)
            if self.seconds > self.most_seconds:
                raise BudgetSpent

        until_step = min(question.until_step, run.config.timeline().steps)
        trial = run.train(until_step, self.launcher, self.script, watched)
        self.seconds = before + time.monotonic() - started
        self.findings.append(ProbeResult(number, question, trial))
        self._write()
        watch(self.findings[-1], trial)
        return trial.stable

    def _partings(self, question: Probe) -> list[int]:
        """Up to which steps the schedules that may be probed next are the same: checkpoints there are of use."""
        verdicts = [finding.trial.stable for finding in self.findings if finding.trial is not None]
        nexts = (upcoming(self.space, [*verdicts, verdict]) for verdict in (True, False))
        config, steps = self.run_of(question.candidate).config, set()
        for following in nexts:
            if isinstance(following, Probe) and following.candidate != question.candidate:
                other = self.run_of(following.candidate).config
                steps.add(count_identical_steps(config, other, min(question.until_step, following.until_step)))
        return sorted(steps - {0, question.until_step})

    def _probe_training(self) -> dict[str, Any]:
        """What of the training section is a probe's own."""
        settings, training = self.settings, self.raw["training"]
        return {
            "eval_interval": self.space.eval_interval,
            "eval_rows": settings.eval_rows or training.get("eval_rows", 64),
            "save_interval": self.space.beginning_steps,  # a kill costs no more
            "keep_last": 1,
            "on_spike": "log",
            "stop_perplexity_ratio": settings.ratio,
        }

    def _identity(self) -> dict[str, Any]:
        return json.loads(json.dumps({"config": self.raw, "settings": asdict(self.settings)}))  # type: ignore[no-any-return]

    def _write(self, outcome: Outcome | None = None) -> None:
        probes = [finding.record() for finding in self.findings]
        state = {**self._identity(), "seconds": self.seconds, "probes": probes}
        if outcome is not None:
            state |= {"complete": outcome.complete, "best": outcome.best and outcome.best._asdict()}
        replace_text(self.save / _STATE, json.dumps(state, indent=2) + "\n")
        self._saved_at = time.monotonic()


def _read_state(path: Path) -> _State:
    try:
        return _State.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path}: can't be read as the state of a search ({error}); restore it, or tune in another --save"
        ) from error
