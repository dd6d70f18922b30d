"""A run as another trainer needs it: the length, tokens and rate of every optimizer step. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.config.run import OURS, RunConfig
from seqlen_curriculum.config.run_file import folder_of, read_run_file
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.run_folder.checkpoint_manifest import differences
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenRate, token_schedule

__all__ = ["TrainerPlan"]


@dataclass(frozen=True)
class TrainerPlan:
    """The schedule of a run whose engine, optimizer and batches belong to another trainer. Steps are 1-based."""

    config: RunConfig
    """Our sections of the file with the trainer's global batch."""
    timeline: Timeline
    learning_rate: TokenRate | None
    """The rate of every step; None where the file has no token-wise ``scheduler``, and the trainer schedules its own."""

    @classmethod
    def of(
        cls,
        config: str | Path | Mapping[str, Any],
        *,
        global_batch: int,
        max_lr: float | None = None,
        padding_free: bool = False,
    ) -> TrainerPlan:
        """Plan the run of a file, or of its content, for a trainer of ``global_batch`` rows per optimizer step.

        Only our sections are read: a trainer reads the keys of DeepSpeed by itself, where they may be ``"auto"``.
        ``max_lr`` is the rate of the trainer's optimizer, which a token-wise ``scheduler`` warms up to; default: the file's
        ``optimizer.params.lr``. ``padding_free`` batches keep every token and are cut into pieces that don't see one
        another. They need ``method: "window"``, which other batches can't have here.

        Raises ConfigError for another ``train_batch_size`` or rate in the file, and for what no trainer with steps of
        equal size can do: ``batch_size_warmup``, ``batch_growth`` and an ``adaptive`` schedule.
        """
        where = "" if isinstance(config, Mapping) else str(config)
        raw = config if isinstance(config, Mapping) else read_run_file(config)
        problems = [*_contradictions(raw, global_batch, max_lr), *_refused(raw), *_method_problems(raw, padding_free)]
        if problems:
            raise ConfigError(problems, where)
        names = [*OURS, "curriculum_learning", *(["scheduler"] if token_schedule(raw.get("scheduler")) else [])]
        ours = {name: raw[name] for name in names if raw.get(name) is not None}
        run = RunConfig.from_dict({**ours, "train_batch_size": global_batch}, where, require=("training",))
        if not isinstance(config, Mapping):
            run = replace(run, folder=folder_of(config))
        return cls(run, run.timeline(), run.plan.learning_rate(_rate_in(raw) if max_lr is None else max_lr))

    @property
    def steps(self) -> int:
        """Return the number of the last step, at whose end the token budget is consumed: a trainer's ``max_steps``."""
        return self.timeline.steps

    @property
    def global_batch(self) -> int:
        """Return the rows of every optimizer step over all ranks."""
        return self.config.global_batch

    @property
    def full_length(self) -> int:
        """Return the sequence length that the run ends with, in tokens."""
        return self.config.shortening.seq_length

    def seqlen(self, step: int) -> int:
        """Return the sequence length of ``step``, in tokens."""
        return self.timeline.seqlen(step)

    def consumed_tokens(self, step: int) -> int:
        """Return the target tokens trained on by the end of ``step``, over all ranks; 0 for step 0."""
        return self.timeline.consumed_tokens(step)

    def state(self) -> dict[str, Any]:
        """Return what identifies the schedule, for the trainer's checkpoint: JSON values."""
        return {"settings": self.config.settings(), "max_lr": self.learning_rate and self.learning_rate.max_lr}

    def check(self, state: Mapping[str, Any], step: int) -> None:
        """Raise CheckpointError unless ``state``, saved after ``step``, is of a run with the same steps so far."""
        ours = self.state()
        changed = differences(state["settings"], ours["settings"])
        if state["max_lr"] != ours["max_lr"]:
            changed["learning rate"] = f"{state['max_lr']} in the checkpoint, {ours['max_lr']} now"
        elif not changed or trains_identically(_with_rate(state), _with_rate(ours), step):
            return
        listed = "".join(f"\n  - {name}: {change}" for name, change in changed.items())
        raise CheckpointError(
            f"the checkpoint of step {step} is of another schedule; restore these settings, or start a new run:{listed}"
        )


def _with_rate(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``TrainerPlan.state`` with the peak rate of the trainer's optimizer, which the file lacks."""
    if state["max_lr"] is None:
        return dict(state["settings"])
    return {**state["settings"], "optimizer.type": "Adam", "optimizer.params.lr": state["max_lr"]}


def _rate_in(raw: Mapping[str, Any]) -> float | None:
    """Return the number at ``optimizer.params.lr`` of the file; None if it is missing or ``"auto"``."""
    optimizer = raw.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, Mapping) else None
    lr = params.get("lr") if isinstance(params, Mapping) else None
    return lr if isinstance(lr, int | float) else None


def _contradictions(raw: Mapping[str, Any], global_batch: int, max_lr: float | None) -> list[str]:
    """Return one line for each value of the file that differs from the trainer's own."""
    given = {
        "train_batch_size": (raw.get("train_batch_size"), global_batch, "rows per optimizer step over all ranks"),
        "optimizer.params.lr": (_rate_in(raw), max_lr, "its learning rate"),
    }
    return [
        f"{key}: {in_file} in the file, but the trainer has {of_trainer} ({what}); make them equal, or remove the key"
        for key, (in_file, of_trainer, what) in given.items()
        if isinstance(in_file, int | float) and of_trainer is not None and in_file != of_trainer
    ]


def _refused(raw: Mapping[str, Any]) -> list[str]:
    """Return one line for each feature that needs our own training loop."""
    block = raw.get("curriculum_learning")
    curriculum = block if isinstance(block, Mapping) and block.get("enabled") else {}
    data, training = raw.get("data"), raw.get("training")
    data = data if isinstance(data, Mapping) else {}
    objective = training.get("objective") if isinstance(training, Mapping) else None
    refused = {
        "training.objective": (objective == "masked", "its batches bring their own targets"),
        "data.order": (data.get("order") == "decomposed", "a trainer's steps all have the same rows"),
        "data.attention": (data.get("attention") == "document", "its model attends as it does without the file"),
        "batch_size_warmup": (raw.get("batch_size_warmup") is not None, "a trainer's steps all have the same rows"),
        "curriculum_learning.batch_growth": (
            bool(curriculum.get("batch_growth")),
            "a trainer's steps all have the same rows",
        ),
        "curriculum_learning.schedule_type": (
            curriculum.get("schedule_type") == "adaptive",
            "the trainer's evaluations can't decide on its lengths",
        ),
    }
    return [
        f"{key}: not available in another trainer ({reason}); remove it, or train with train_gpt2.py"
        for key, (is_set, reason) in refused.items()
        if is_set
    ]


def _method_problems(raw: Mapping[str, Any], padding_free: bool) -> list[str]:
    """Return a line if ``curriculum_learning.method`` doesn't count the tokens that the batches train."""
    curriculum = raw.get("curriculum_learning")
    method = curriculum.get("method", "truncate") if isinstance(curriculum, Mapping) else "truncate"
    if padding_free and method != "window":
        return [
            f"curriculum_learning.method: {method!r} counts the tokens of shortened rows, but padding-free batches keep all "
            'of them and limit what a token attends to; set "window", or switch packing off'
        ]
    if method == "window" and not padding_free:
        return [
            'curriculum_learning.method: "window" needs padding-free batches in another trainer, because its attention mask '
            'is that of our own models; set "truncate" or "segment"'
        ]
    return []
