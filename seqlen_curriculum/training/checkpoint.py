"""Checkpoints that are whole or absent: written under a temporary name, moved into place, verified before use.

A checkpoint folder ``global_step<N>`` holds DeepSpeed's files, the model as a Hugging Face folder (``config.json``,
``model.safetensors``), and last of all its manifest (manifest.py). One that has not seen a rollback which ``rollbacks.json``
tells of belongs to the course that was abandoned then, and is passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deepspeed import comm as dist

from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.files import move, replace_text
from seqlen_curriculum.run_folder.checkpoint_manifest import (
    MANIFEST,
    Checkpoint,
    checkpoint_folders,
    differences,
    read_checkpoint,
)
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import (
    ROLLBACKS,
    Rollback,
    begun_by,
    read_rollbacks,
    same_course,
    steps_to_keep,
    write_rollbacks,
)
from seqlen_curriculum.training.reshard import load_resharded
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["Checkpoints", "on_rank_0"]

T = TypeVar("T")
_HOW = {
    "model.initial_weights": "; set model.hf_checkpoint to the folder that the run began from, its files as they were, or "
    "leave it out where the checkpoint has None"
}
"""How a setting is restored that no file has under its name."""


class Checkpoints:
    """The checkpoints of one run in the folder ``save``; ``run`` are the settings that another run may not share.

    ``skip_steps`` are those that a rollback passes over, 0 where none is to be made; checkpoints of ``keep_steps`` stay.
    """

    def __init__(
        self, save: Path, keep_last: int, run: Mapping[str, Any], skip_steps: int = 0, keep_steps: Iterable[int] = ()
    ) -> None:
        self.save_folder, self.keep_last, self.run = save.resolve(), keep_last, dict(run)
        self.skip_steps, self.keep_steps = skip_steps, keep_steps
        self.rollbacks: Sequence[Rollback] | None = None
        """Those of the run. None as long as nothing is known of them: then checkpoints of any course will do."""

    def save(
        self, engine: Any, step: int, write_model: Callable[[Path], None], evaluations: Evaluations | None = None
    ) -> None:
        """Write checkpoint ``step`` on all ranks; older ones that need not be kept go once it is complete.

        ``write_model(folder)`` adds the Hugging Face files; ``evaluations`` are those up to the step. Raises
        CheckpointError, the previous checkpoint untouched.
        """
        final = self.save_folder / f"global_step{step}"
        if on_rank_0(lambda: self._read_or_none(final)) is not None:
            return  # resumed at this very step
        unfinished = self.save_folder / f".{final.name}.tmp"
        if dist.get_rank() == 0:
            for left_by_a_kill in self.save_folder.glob(".global_step*.tmp"):
                shutil.rmtree(left_by_a_kill)
        dist.barrier()
        try:
            engine.save_checkpoint(str(self.save_folder), tag=unfinished.name, save_latest=False)
            write_model(unfinished)
            dist.barrier()
            on_rank_0(lambda: self._publish(unfinished, final, step, engine, evaluations or Evaluations()))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = next(reversed(self.complete()), None)
            intact = f"the checkpoint {kept.folder} is intact" if kept else "there is no earlier checkpoint"
            raise CheckpointError(
                f"{final}: can't be written ({error}); {intact}. Free space or fix the folder, then give the same command"
            ) from error
        on_rank_0(lambda: self._make_newest(final))

    def find(self, resume: str) -> Checkpoint | None:
        """The checkpoint to continue from, the same on all ranks: of ``auto``, ``none`` or a checkpoint folder's path.

        A checkpoint from elsewhere is where a folder without one of its own starts; it brings the rollbacks it has seen.
        """

        def named() -> Checkpoint:
            path = Path(resume).resolve()
            own = None if path.parent == self.save_folder else self.newest()
            return own or self._read(path)

        self.rollbacks = on_rank_0(lambda: read_rollbacks(self.save_folder))
        finders: dict[str, Callable[[], Checkpoint | None]] = {"none": lambda: None, "auto": self.newest}
        found = on_rank_0(finders.get(resume, named))
        if found is not None:
            self._check_same_run(found)  # before the model is built
        if self.rollbacks is None:
            self.rollbacks = found.rollbacks if found is not None else ()
        return found

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint of this course; says which newer folders it passes over, and why."""
        for folder in reversed(checkpoint_folders(self.save_folder)):
            try:
                return self._read(folder)
            except CheckpointError as error:
                log_rank0(f"passing over an unusable checkpoint: {error}")
        return None

    def discard_newer_than(self, rollbacks: Sequence[Rollback], returned_to: Checkpoint) -> None:
        """Write ``rollbacks`` down, and only then drop the checkpoints that have not seen the last of them. On all ranks."""

        def drop() -> None:
            of_the_last_course = self.complete()
            write_rollbacks(self.save_folder, rollbacks)
            replace_text(self.save_folder / "latest", returned_to.folder.name)
            for checkpoint in of_the_last_course:
                if not includes_rollbacks(checkpoint, rollbacks):
                    log_rank0(f"deleting a checkpoint of the abandoned course: {checkpoint.folder}")
                    shutil.rmtree(checkpoint.folder, ignore_errors=True)  # what is left is passed over

        on_rank_0(drop)
        self.rollbacks = rollbacks

    def load(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Continue ``engine`` from ``checkpoint`` on all ranks. Raises CheckpointError if it is another run's."""
        self._check_same_run(checkpoint)
        go_back = "move it away to continue from the one before"
        try:
            self._load(engine, checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes make torch.load raise nearly anything
            raise CheckpointError(f"{checkpoint.folder}: can't be loaded ({error}); {go_back}") from error
        if engine.global_steps != checkpoint.step:
            raise CheckpointError(
                f"{checkpoint.folder}: DeepSpeed found step {engine.global_steps}, {checkpoint.step} was saved; {go_back}"
            )

    @staticmethod
    def _load(engine: Any, checkpoint: Checkpoint) -> None:
        stage, ranks = engine.zero_optimization_stage(), engine.dp_world_size
        # Other keys of ZeRO may lay the same shards out otherwise, which DeepSpeed would load without a word.
        same_layout = (checkpoint.data_ranks, checkpoint.zero) == (ranks, _zero_section(engine))
        if checkpoint.zero_stage == stage and (stage == 0 or same_layout):
            engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
            return
        if any(section.get("round_robin_gradients") for section in (checkpoint.zero, _zero_section(engine))):
            raise CheckpointError(
                f"{checkpoint.folder}: zero_optimization.round_robin_gradients lays shards out in an order of its own; "
                f"continue with the saved zero_optimization {checkpoint.zero} on {checkpoint.data_ranks} data-parallel ranks"
            )
        saved_by = f"{checkpoint.data_ranks} data-parallel ranks under ZeRO stage {checkpoint.zero_stage}"
        log_rank0(f"{checkpoint.folder}: saved by {saved_by}, continuing on {ranks} under stage {stage}")
        load_resharded(engine, checkpoint.folder, checkpoint.zero_stage, checkpoint.data_ranks)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        for key in ("pipeline.stages", "tensor_parallel.autotp_size"):
            saved, ours = (run.get(key, 1) for run in (checkpoint.run, self.run))
            if saved != ours:
                raise CheckpointError(f"{checkpoint.folder}: saved with {key} {saved}; set it to {saved}, not {ours}")
        changed = differences(checkpoint.run, self.run)
        if changed and not trains_identically(checkpoint.run, self.run, checkpoint.step):
            listed = "".join(f"\n  - {name}: {line}{_HOW.get(name, '')}" for name, line in changed.items())
            raise CheckpointError(
                f"{checkpoint.folder}: made by another run; restore these settings, or start anew in another --save:{listed}"
            )

    def _publish(self, unfinished: Path, final: Path, step: int, engine: Any, evaluations: Evaluations) -> None:
        sizes = {str(f.relative_to(unfinished)): f.stat().st_size for f in sorted(unfinished.rglob("*")) if f.is_file()}
        sharding = {"data_ranks": engine.dp_world_size, "zero_stage": int(engine.zero_optimization_stage())}
        sharding["zero"] = _zero_section(engine)
        seen = [rollback.model_dump(mode="json") for rollback in begun_by(self.rollbacks or (), step)]
        state = {"rollbacks": seen, "evaluations": evaluations.model_dump()}
        manifest = {"step": step, **sharding, "run": self.run, **state, "files": sizes}
        replace_text(unfinished / MANIFEST, json.dumps(manifest, indent=2))
        if final.exists():
            log_rank0(f"replacing an unusable checkpoint: {final}")
            shutil.rmtree(final)
        move(unfinished, final)

    def _make_newest(self, final: Path) -> None:
        """Point at the complete checkpoint ``final`` and drop what it makes needless."""
        try:
            replace_text(self.save_folder / "latest", final.name)  # DeepSpeed's own pointer, for its tools
            self.drop_old()
        except OSError as error:
            raise CheckpointError(
                f"{final}: is complete, but what comes after it failed ({error}); mend that, then give the same command"
            ) from error

    def drop_old(self) -> None:
        """Delete the checkpoints of this course that ``steps_to_keep`` has no use for. Raises OSError."""
        found = self.complete()
        keep = steps_to_keep(
            [checkpoint.step for checkpoint in found], self.keep_last, self.skip_steps, self.keep_steps
        )
        for checkpoint in found:
            if checkpoint.step not in keep:
                shutil.rmtree(checkpoint.folder)

    def complete(self) -> list[Checkpoint]:
        """The complete checkpoints of this course, oldest first."""
        folders = checkpoint_folders(self.save_folder)
        return [found for folder in folders if (found := self._read_or_none(folder))]

    def _read_or_none(self, folder: Path) -> Checkpoint | None:
        try:
            return self._read(folder)
        except CheckpointError:
            return None

    def _read(self, folder: Path) -> Checkpoint:
        """``read_checkpoint`` of this course only."""
        checkpoint = read_checkpoint(folder)
        if self.rollbacks is not None and not includes_rollbacks(checkpoint, self.rollbacks):
            raise CheckpointError(
                f"{folder}: belongs to the course that a rollback abandoned, by {self.save_folder / ROLLBACKS}"
            )
        return checkpoint


def on_rank_0(function: Callable[[], T]) -> T:
    """``function()`` on rank 0; its value, or its error, on every rank: file systems may show ranks other moments."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except SeqlenCurriculumError as error:
            outcome[1] = str(error)
        except OSError as error:  # or the others would wait for ever
            outcome[1] = f"{error}; free space or fix the folder, then give the same command"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    value: T = outcome[0]
    return value


def includes_rollbacks(checkpoint: Checkpoint, rollbacks: Sequence[Rollback]) -> bool:
    """Whether it was trained with the steps skipped that ``rollbacks`` skip before it, and no others."""
    return same_course(checkpoint.rollbacks, begun_by(rollbacks, checkpoint.step))


def _zero_section(engine: Any) -> dict[str, Any]:
    """``zero_optimization`` as the file has it, and as JSON gives it back."""
    section: dict[str, Any] = json.loads(json.dumps(engine.config.get("zero_optimization", {})))
    return section
