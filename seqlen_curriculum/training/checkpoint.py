"""Atomic checkpoints: written under a temporary name, renamed, verified before use.

A checkpoint folder ``global_step<N>`` contains DeepSpeed's files, the model in Hugging Face's format (``config.json``,
``model.safetensors``), and a manifest, which is written last. A checkpoint that doesn't include the rollbacks in
``rollbacks.json`` contains discarded steps and is skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from torch.distributed.distributed_c10d import _get_default_store

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.files import discard_folder, move, remove, replace_text, set_aside
from seqlen_curriculum.run_folder import CHECKPOINT_PREFIX, LATEST, ROLLBACKS
from seqlen_curriculum.run_folder.checkpoint_manifest import (
    Checkpoint,
    Manifest,
    checkpoint_folders,
    damage,
    read_checkpoint,
    seal,
)
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import Rollback, begun_by, read_rollbacks, steps_to_keep, write_rollbacks
from seqlen_curriculum.training.checkpoint_files import ModelWriter, PendingSave, shard_files, write_part
from seqlen_curriculum.training.load_checkpoint import check_same_run, load_checkpoint, zero_section
from seqlen_curriculum.training.ranks import on_all_ranks, on_rank_0
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["Checkpoints"]


class _DiscardedError(CheckpointError):
    """A complete checkpoint of steps that a rollback discarded."""


class Checkpoints:
    """The checkpoints of one run in the folder ``save``; ``run`` are the settings that identify the run.

    ``skip_steps`` is the number of steps that a rollback skips, 0 without rollbacks. Checkpoints of ``keep_steps`` are
    kept. ``in_background``: a checkpoint is copied to host memory and written while training continues. ``stop()`` is
    called to end the training loop if that fails.
    """

    def __init__(
        self,
        save: Path,
        keep_last: int,
        run: Mapping[str, Any],
        skip_steps: int = 0,
        keep_steps: Iterable[int] = (),
        in_background: bool = False,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.save_folder, self.keep_last, self.run = save.resolve(), keep_last, dict(run)
        self.skip_steps, self.keep_steps = skip_steps, keep_steps
        self.in_background, self._stop = in_background, stop
        self.rollbacks: Sequence[Rollback] | None = None
        """The rollbacks of the run. None before they are read; then a checkpoint may include any."""
        self._pending: PendingSave | None = None

    @cached_property
    def _store(self) -> Any:
        """A separate client of torch's store for the writing thread, because a client serves one caller at a time."""
        store: Any = _get_default_store()
        return store.clone()

    def save(self, engine: Any, step: int, model_writer: ModelWriter, evaluations: Evaluations | None = None) -> None:
        """Write checkpoint ``step`` on all ranks, then delete older ones that aren't needed.

        ``model_writer`` writes the Hugging Face files. ``evaluations`` are those up to the step. In the background mode this
        only copies the state; call ``wait`` for the rest. Raises CheckpointError if this checkpoint or the one being written
        fails; the previous checkpoint is then unchanged.
        """
        self.wait()
        final = self.save_folder / f"{CHECKPOINT_PREFIX}{step}"
        if on_rank_0(lambda: self._read_or_none(final)) is not None:
            return  # resumed at this step
        on_rank_0(self._delete_hidden)
        # The leading dot hides the unfinished folder from checkpoint_folders.
        unfinished = self.save_folder / f".{final.name}.tmp"
        files = shard_files(engine)
        if files:
            files.begin(self.in_background)
        try:
            engine.save_checkpoint(str(self.save_folder), tag=unfinished.name, save_latest=False)
            write_model = model_writer()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(self._fail(unfinished, final, str(error))) from error
        manifest = Manifest(
            step=step,
            data_ranks=engine.dp_world_size,
            zero_stage=int(engine.zero_optimization_stage()),
            zero=zero_section(engine),
            run=self.run,
            rollbacks=begun_by(self.rollbacks or (), step),
            evaluations=evaluations or Evaluations(),
            files={},
        )
        self._pending = PendingSave(
            self._store,
            write=partial(write_part, files, unfinished, write_model),
            publish=partial(self._publish, unfinished, final, manifest),
            fail=partial(self._fail, unfinished, final),
        )
        if self.in_background:
            self._pending.start()
        else:
            self._pending.run()
            self.wait()

    def wait(self) -> None:
        """Wait on all ranks for the checkpoint being written, if any. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        problem = pending.problem()
        dist.barrier()  # the store may end with rank 0, which must not exit before all ranks have read it
        if problem:
            raise CheckpointError(problem)

    def _delete_hidden(self) -> None:
        for left_by_a_kill in self.save_folder.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
            remove(left_by_a_kill)

    def find(self, resume: str) -> Checkpoint | None:
        """Return the checkpoint to resume from, the same on all ranks; ``resume`` is ``auto``, ``none`` or a folder.

        A checkpoint from another --save is used only if this folder has none, together with the rollbacks it includes.
        Raises CheckpointError if the given checkpoint is damaged, or all checkpoints are.
        """
        self.rollbacks = on_rank_0(lambda: read_rollbacks(self.save_folder))
        named = Path(resume).resolve() if resume not in ("auto", "none") else None
        checkpoint = None
        # When the command is rerun after a kill, the folder has later checkpoints of its own.
        if resume == "auto" or (named is not None and named.parent != self.save_folder):
            checkpoint = self.newest()
        if checkpoint is None and named is not None:
            checkpoint = on_rank_0(lambda: self._read(named))
            check_same_run(checkpoint, self.run)  # before reading gigabytes and building the model
            problem = self._damage(checkpoint)
            if problem:
                raise CheckpointError(f"{problem}; give another checkpoint, or restore this one from a copy")
        if self.rollbacks is None:
            self.rollbacks = checkpoint.rollbacks if checkpoint is not None else ()
        return checkpoint

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, the same on all ranks; rename damaged ones, with a warning.

        Raises CheckpointError if all are damaged.
        """
        before = on_rank_0(lambda: checkpoint_folders(self.save_folder))
        chosen = self.newest_whole(on_rank_0(self._set_unreadable_aside))
        left = on_rank_0(lambda: checkpoint_folders(self.save_folder))
        if chosen is None and before and not left:
            raise CheckpointError(
                f"{self.save_folder}: all of its {len(before)} checkpoints are damaged, see the warnings above; restore "
                "a copy of one, or start again in another --save"
            )
        if chosen is not None and len(left) < len(before):
            on_rank_0(lambda: replace_text(self.save_folder / LATEST, chosen.folder.name))
        return chosen

    def newest_whole(self, candidates: Sequence[Checkpoint]) -> Checkpoint | None:
        """Return the last of ``candidates`` whose files are unchanged; rename the damaged ones after it.

        Call it on all ranks, which share the reading. Raises CheckpointError for a checkpoint of another run.
        """
        for checkpoint in reversed(candidates):
            check_same_run(checkpoint, self.run)
            problem = self._damage(checkpoint)
            if not problem:
                return checkpoint
            on_rank_0(partial(self._set_aside, checkpoint.folder, problem))
        return None

    def _damage(self, checkpoint: Checkpoint) -> str:
        """Return a description of the damage to ``checkpoint``, the same on all ranks, "" without damage.

        Raises CheckpointError.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        problems = on_all_ranks(lambda: damage(checkpoint, rank, ranks))
        return next(filter(None, problems), "")

    def _set_unreadable_aside(self) -> list[Checkpoint]:
        """Return the usable checkpoints, oldest first; report the others, and rename incomplete ones."""
        for folder in checkpoint_folders(self.save_folder):
            try:
                self._read(folder)
            except _DiscardedError as error:
                log_rank0(f"skipping an unusable checkpoint: {error}")
            except CheckpointError as error:
                self._set_aside(folder, str(error))
        return self.complete()

    def _set_aside(self, folder: Path, problem: str) -> None:
        """Rename a damaged checkpoint, so that it is kept but not tried again."""
        log_rank0(f"warning: skipping an unusable checkpoint: {problem}; kept as {set_aside(folder).name}")

    def discard_newer_than(self, rollbacks: Sequence[Rollback], returned_to: Checkpoint) -> None:
        """Write ``rollbacks``, then delete the checkpoints that don't include them. Call it on all ranks."""

        def discard() -> None:
            checkpoints = self.complete()
            # If killed before this line, the run rolls back again. After it, the checkpoints to delete are not usable.
            write_rollbacks(self.save_folder, rollbacks)
            replace_text(self.save_folder / LATEST, returned_to.folder.name)
            for checkpoint in checkpoints:
                if not checkpoint.includes_rollbacks(rollbacks):
                    log_rank0(f"deleting a checkpoint of discarded steps: {checkpoint.folder}")
                    with suppress(OSError):  # no longer usable
                        _discard(checkpoint.folder)

        on_rank_0(discard)
        self.rollbacks = rollbacks

    def load(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Load ``checkpoint`` into ``engine`` on all ranks. Raises CheckpointError if it belongs to another run."""
        check_same_run(checkpoint, self.run)
        load_checkpoint(engine, checkpoint)

    def _publish(self, unfinished: Path, final: Path, manifest: Manifest, files: Mapping[str, int]) -> None:
        """Write the manifest of the folder ``unfinished`` and rename it to ``final``; ``files`` are already on disk."""
        seal(unfinished, manifest, files)
        if os.path.lexists(final):
            log_rank0(f"replacing an unusable checkpoint: {final}")
            _discard(final)
        move(unfinished, final)
        self._make_newest(final)

    def _fail(self, unfinished: Path, final: Path, problem: str) -> str:
        """Delete the unfinished checkpoint, request the training loop to stop, and return the message."""
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = self.complete()
        intact = f"the checkpoint {kept[-1].folder} is intact" if kept else "there is no earlier checkpoint"
        self._stop()
        return f"{final}: can't be written ({problem}); {intact}. Free space or fix the folder, then rerun the same command"

    def _make_newest(self, final: Path) -> None:
        """Make ``latest`` name the complete checkpoint ``final``, and delete checkpoints that aren't needed."""
        try:
            replace_text(self.save_folder / LATEST, final.name)
            self.drop_old()
        except OSError as error:
            self._stop()
            raise CheckpointError(
                f"{final}: is complete, but deleting older checkpoints or writing {LATEST} failed ({error}); fix that, then "
                "rerun the same command"
            ) from error

    def drop_old(self) -> None:
        """Delete the checkpoints that ``steps_to_keep`` doesn't list. Raises OSError."""
        folders = {checkpoint.step: checkpoint.folder for checkpoint in self.complete()}
        for step in sorted(
            folders.keys() - steps_to_keep([*folders], self.keep_last, self.skip_steps, self.keep_steps)
        ):
            _discard(folders[step])

    def complete(self) -> list[Checkpoint]:
        """Return the usable checkpoints, oldest first."""
        return [*filter(None, map(self._read_or_none, checkpoint_folders(self.save_folder)))]

    def _read_or_none(self, folder: Path) -> Checkpoint | None:
        try:
            return self._read(folder)
        except CheckpointError:
            return None

    def _read(self, folder: Path) -> Checkpoint:
        checkpoint = read_checkpoint(folder)
        if self.rollbacks is not None and not checkpoint.includes_rollbacks(self.rollbacks):
            raise _DiscardedError(
                f"{folder}: holds steps that a rollback discarded, according to {self.save_folder / ROLLBACKS}"
            )
        return checkpoint


def _discard(folder: Path) -> None:
    """Delete a checkpoint. Of a link to a checkpoint elsewhere, only the link is deleted. Raises OSError."""
    if folder.is_symlink():
        log_rank0(f"deleting the link {folder}, but not the checkpoint in {folder.resolve()}")
    discard_folder(folder)
