"""A folder that Hugging Face's models are loaded from: one of our checkpoints, a run's folder, anybody's; without torch."""

from __future__ import annotations

from pathlib import Path

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.jsonfile import read_json
from seqlen_curriculum.ledger import begun_by, read_ledger, same_course
from seqlen_curriculum.manifest import MANIFEST, checkpoint_folders, read_checkpoint

__all__ = ["model_folder", "vocabulary"]


def model_folder(path: Path) -> Path:
    """The folder with a ``config.json`` that ``path`` means: itself, or a run's newest complete checkpoint.

    A checkpoint is verified against its manifest. Raises CheckpointError.
    """
    if not path.is_dir():
        state = (
            "is a file; give the folder it lies in"
            if path.exists()
            else "there is no such folder; give one that exists"
        )
        raise CheckpointError(f"{path}: {state}: a checkpoint, a run's --save folder or a Hugging Face model")
    if (path / MANIFEST).exists() or path.name.lstrip(".").startswith("global_step"):
        read_checkpoint(path)
        return path
    if (path / "config.json").is_file():
        return path
    return _newest_checkpoint(path)


def _newest_checkpoint(run: Path) -> Path:
    rollbacks = read_ledger(run)
    unusable = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            checkpoint = read_checkpoint(folder)
        except CheckpointError as error:
            unusable.append(str(error))
            continue
        if rollbacks is None or same_course(checkpoint.rollbacks, begun_by(rollbacks, checkpoint.step)):
            return folder
        unusable.append(f"{folder}: belongs to the course that a rollback abandoned")
    if unusable:
        raise CheckpointError(f"{run}: has no complete checkpoint; the newest of {len(unusable)}: {unusable[0]}")
    raise CheckpointError(
        f"{run}: has neither a config.json nor checkpoints global_step<N>; give a checkpoint, a run's --save folder that "
        "has one, or a Hugging Face model's folder"
    )


def vocabulary(folder: Path) -> int | None:
    """Token ids of the model in ``folder``, without the rows that our checkpoints add; None where nothing tells.

    Raises CheckpointError, ConfigError.
    """
    if (folder / MANIFEST).exists():
        size = read_checkpoint(folder).run.get("model.vocab_size")
        if isinstance(size, int):
            return size
    size = read_json(folder / "config.json").get("vocab_size")
    return size if isinstance(size, int) else None
