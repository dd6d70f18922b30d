"""Checkpoints that are whole or absent: written under a temporary name, moved into place, verified before use.

A checkpoint folder ``global_step<N>`` holds DeepSpeed's files, the model as a Hugging Face folder (``config.json``,
``model.safetensors``), and last of all its manifest. One that doesn't include the rollbacks in ``rollbacks.json`` holds
steps that a rollback has discarded, and is skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.files import move, replace_text
from seqlen_curriculum.run_folder import CHECKPOINT_PREFIX, LATEST, ROLLBACKS
from seqlen_curriculum.run_folder.checkpoint_manifest import (
    Checkpoint,
    Manifest,
    checkpoint_folders,
    differences,
    file_sizes,
    read_checkpoint,
    write_manifest,
)
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import Rollback, begun_by, read_rollbacks, steps_to_keep, write_rollbacks
from seqlen_curriculum.training.reshard import load_resharded
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["Checkpoints", "on_rank_0"]

T = TypeVar("T")
_FIXES = {
    "model.initial_weights": "; set model.hf_checkpoint to the folder that the run began from, its files as they were, or "
    "leave it out where the checkpoint has None"
}
"""How to restore a setting that no configuration file has under its name."""


class Checkpoints:
    """The checkpoints of one run in the folder ``save``; ``run`` are the settings that another run may not share.

    ``skip_steps`` is how many steps a rollback skips, 0 where none will be made; checkpoints of ``keep_steps`` are kept.
    """

    def __init__(
        self, save: Path, keep_last: int, run: Mapping[str, Any], skip_steps: int = 0, keep_steps: Iterable[int] = ()
    ) -> None:
        self.save_folder, self.keep_last, self.run = save.resolve(), keep_last, dict(run)
        self.skip_steps, self.keep_steps = skip_steps, keep_steps
        self.rollbacks: Sequence[Rollback] | None = None
        """The run's. None as long as they are not known: then a checkpoint may include any."""

    def save(
        self, engine: Any, step: int, write_model: Callable[[Path], None], evaluations: Evaluations | None = None
    ) -> None:
        """Write checkpoint ``step`` on all ranks, then delete older ones that need not be kept.

        ``write_model(folder)`` adds the Hugging Face files; ``evaluations`` are those up to the step. Raises
        CheckpointError, with the previous checkpoint untouched.
        """
        final = self.save_folder / f"{CHECKPOINT_PREFIX}{step}"
        if on_rank_0(lambda: self._read_or_none(final)) is not None:
            return  # resumed at this very step
        # The dot keeps it out of checkpoint_folders: nobody takes a half-written folder for a checkpoint.
        unfinished = self.save_folder / f".{final.name}.tmp"
        if dist.get_rank() == 0:
            for left_by_a_kill in self.save_folder.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
                shutil.rmtree(left_by_a_kill)
        dist.barrier()
        try:
            engine.save_checkpoint(str(self.save_folder), tag=unfinished.name, save_latest=False)
            write_model(unfinished)
            dist.barrier()  # the manifest lists the files of all ranks, so all must have written theirs
            on_rank_0(lambda: self._publish(unfinished, final, step, engine, evaluations or Evaluations()))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = self.complete()
            intact = f"the checkpoint {kept[-1].folder} is intact" if kept else "there is no earlier checkpoint"
            raise CheckpointError(
                f"{final}: can't be written ({error}); {intact}. Free space or fix the folder, then rerun the same command"
            ) from error
        on_rank_0(lambda: self._make_newest(final))

    def find(self, resume: str) -> Checkpoint | None:
        """Return the checkpoint to continue from, the same on all ranks; ``resume`` is ``auto``, ``none`` or a folder.

        A checkpoint of another --save starts a folder that has none of its own; it brings the rollbacks it includes.
        """

        def chosen() -> Checkpoint | None:
            if resume == "none":
                return None
            if resume == "auto":
                return self.newest()
            path = Path(resume).resolve()
            # The same command again, after a kill: by now the folder has checkpoints of its own, which are further on.
            own = self.newest() if path.parent != self.save_folder else None
            return own or self._read(path)

        self.rollbacks = on_rank_0(lambda: read_rollbacks(self.save_folder))
        checkpoint = on_rank_0(chosen)
        if checkpoint is not None:
            self._check_same_run(checkpoint)  # before the model is built
        if self.rollbacks is None:
            self.rollbacks = checkpoint.rollbacks if checkpoint is not None else ()
        return checkpoint

    def newest(self) -> Checkpoint | None:
        """Return the newest usable checkpoint; log which newer folders are not usable, and why."""
        for folder in reversed(checkpoint_folders(self.save_folder)):
            try:
                return self._read(folder)
            except CheckpointError as error:
                log_rank0(f"passing over an unusable checkpoint: {error}")
        return None

    def discard_newer_than(self, rollbacks: Sequence[Rollback], returned_to: Checkpoint) -> None:
        """Write ``rollbacks`` and only then delete the checkpoints that don't include them. Call it on all ranks."""

        def discard() -> None:
            checkpoints = self.complete()
            # Killed before this line, the run rolls back again; killed after it, what is left to delete is not usable.
            write_rollbacks(self.save_folder, rollbacks)
            replace_text(self.save_folder / LATEST, returned_to.folder.name)
            for checkpoint in checkpoints:
                if not checkpoint.includes_rollbacks(rollbacks):
                    log_rank0(f"deleting a checkpoint of discarded steps: {checkpoint.folder}")
                    shutil.rmtree(checkpoint.folder, ignore_errors=True)

        on_rank_0(discard)
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
        stage, ranks, zero = engine.zero_optimization_stage(), engine.dp_world_size, _zero_section(engine)
        # Other keys of ZeRO may lay the same shards out in another way, which DeepSpeed would load without an error.
        same_layout = (checkpoint.data_ranks, checkpoint.zero) == (ranks, zero)
        if checkpoint.zero_stage == stage and (stage == 0 or same_layout):
            engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
            return
        if checkpoint.zero.get("round_robin_gradients") or zero.get("round_robin_gradients"):
            raise CheckpointError(
                f"{checkpoint.folder}: zero_optimization.round_robin_gradients lays shards out in an order of its own; "
                f"continue with the saved zero_optimization {checkpoint.zero} on {checkpoint.data_ranks} data-parallel ranks"
            )
        saved_by = f"{checkpoint.data_ranks} data-parallel ranks under ZeRO stage {checkpoint.zero_stage}"
        log_rank0(f"{checkpoint.folder}: saved by {saved_by}, continuing on {ranks} under stage {stage}")
        load_resharded(engine, checkpoint.folder, checkpoint.zero_stage, checkpoint.data_ranks)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        # These two change the shapes of the shards, which no resharding undoes: the message names the one way out.
        for key in ("pipeline.stages", "tensor_parallel.autotp_size"):
            saved, current = checkpoint.run.get(key, 1), self.run.get(key, 1)
            if saved != current:
                raise CheckpointError(
                    f"{checkpoint.folder}: saved with {key} {saved}; set it to {saved}, not {current}"
                )
        # Schedules may differ as long as they agree up to this step: tuning continues one probe with another's ramp.
        changed = differences(checkpoint.run, self.run)
        if changed and not trains_identically(checkpoint.run, self.run, checkpoint.step):
            listed = "".join(f"\n  - {name}: {change}{_FIXES.get(name, '')}" for name, change in changed.items())
            raise CheckpointError(
                f"{checkpoint.folder}: made by another run; restore these settings, or start anew in another --save:{listed}"
            )

    def _publish(self, unfinished: Path, final: Path, step: int, engine: Any, evaluations: Evaluations) -> None:
        """Complete the folder ``unfinished`` with its manifest, and move it to ``final``."""
        manifest = Manifest(
            step=step,
            data_ranks=engine.dp_world_size,
            zero_stage=int(engine.zero_optimization_stage()),
            zero=_zero_section(engine),
            run=self.run,
            rollbacks=begun_by(self.rollbacks or (), step),
            evaluations=evaluations,
            files=file_sizes(unfinished),
        )
        write_manifest(unfinished, manifest)
        if final.exists():
            log_rank0(f"replacing an unusable checkpoint: {final}")
            shutil.rmtree(final)
        move(unfinished, final)

    def _make_newest(self, final: Path) -> None:
        """Point at the complete checkpoint ``final``, and delete the checkpoints that it makes needless."""
        try:
            replace_text(self.save_folder / LATEST, final.name)
            self.drop_old()
        except OSError as error:
            raise CheckpointError(
                f"{final}: is complete, but deleting older checkpoints or writing {LATEST} failed ({error}); fix that, then "
                "rerun the same command"
            ) from error

    def drop_old(self) -> None:
        """Delete the checkpoints that ``steps_to_keep`` doesn't list. Raises OSError."""
        checkpoints = self.complete()
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = steps_to_keep(steps, self.keep_last, self.skip_steps, self.keep_steps)
        for checkpoint in checkpoints:
            if checkpoint.step not in keep:
                shutil.rmtree(checkpoint.folder)

    def complete(self) -> list[Checkpoint]:
        """Return the usable checkpoints, oldest first."""
        checkpoints = [self._read_or_none(folder) for folder in checkpoint_folders(self.save_folder)]
        return [checkpoint for checkpoint in checkpoints if checkpoint is not None]

    def _read_or_none(self, folder: Path) -> Checkpoint | None:
        try:
            return self._read(folder)
        except CheckpointError:
            return None

    def _read(self, folder: Path) -> Checkpoint:
        checkpoint = read_checkpoint(folder)
        if self.rollbacks is not None and not checkpoint.includes_rollbacks(self.rollbacks):
            raise CheckpointError(
                f"{folder}: holds steps that a rollback discarded, according to {self.save_folder / ROLLBACKS}"
            )
        return checkpoint


def on_rank_0(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its value on every rank, or raise CheckpointError on every rank.

    All ranks decide by what rank 0 sees, because a shared file system may show them different moments.
    """
    outcome: list[Any] = [None, None]  # the value and the problem
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except SeqlenCurriculumError as error:
            outcome[1] = str(error)
        except OSError as error:  # not raised here, or the other ranks would wait for ever
            outcome[1] = f"{error}; free space or fix the folder, then rerun the same command"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    value: T = outcome[0]
    return value


def _zero_section(engine: Any) -> dict[str, Any]:
    """The file's ``zero_optimization``, as JSON gives it back: comparable with a manifest's."""
    section: dict[str, Any] = json.loads(json.dumps(engine.config.get("zero_optimization", {})))
    # In bf16 at stage 1 the type of the gradients' sum decides which of DeepSpeed's optimizers lays out the shards.
    return {**section, "optimizer": "BF16_Optimizer"} if isinstance(engine.optimizer, BF16_Optimizer) else section
