"""Export a checkpoint as a complete Hugging Face folder: weights without padding, tokenizer, model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from seqlen_curriculum.analysis.drawing import draw_run
from seqlen_curriculum.analysis.read_run import LOGS, read_run
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.data.document_end import own_end
from seqlen_curriculum.data.tokenizer import located, tokenizer_files
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.export.model_card import ModelCard
from seqlen_curriculum.files import move, new_folder, sync_tree
from seqlen_curriculum.models.pretrained import load_model, save_pretrained, set_end_of_text
from seqlen_curriculum.models.pretrained_tokenizer import copy_tokenizer, load_tokenizer
from seqlen_curriculum.run_folder import MANIFEST
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint, read_checkpoint
from seqlen_curriculum.run_folder.model_folder import is_encoder, model_folder, sizes_in
from seqlen_curriculum.run_folder.own_files import check_own

__all__ = ["DTYPES", "export", "prepare_to_generate", "read_run_up_to"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICTURE = "curves.png"
_EXPORTED = {".json", ".safetensors", ".bin", ".txt", ".jinja", ".bpe", ".model"}
"""Suffixes of the files that an export may contain or be made from."""


def export(source: Path, out: Path, dtype: str | None = None, tokenizer: Path | None = None) -> Path:
    """Write the model of ``model_folder(source)`` into the new folder ``out`` and return the model's folder.

    ``dtype`` is a name in ``DTYPES``, None for the saved dtype. ``tokenizer`` is as in ``load_tokenizer``, None for the
    source's tokenizer, if any. ``out`` is created completely or not at all. Raises ConfigError, CheckpointError, and
    DataError for a damaged run log.
    """
    new_folder("--out", out)
    folder = model_folder(source)
    _check_links(source, folder)
    checkpoint = read_checkpoint(folder) if (folder / MANIFEST).exists() else None
    run = read_run_up_to(checkpoint) if checkpoint else None
    files = tokenizer or (folder if tokenizer_files(folder) else None)
    loaded = load_tokenizer(folder, tokenizer) if files else None
    end = own_end(files, loaded) if files and loaded else None
    model = load_model(folder, DTYPES[dtype] if dtype else None)
    # The largest float16 is (2 - 2**-10) * 2**15 = 65,504; from 65,520 on, values round to infinity.
    for name, weight in model.named_parameters():
        if dtype == "float16" and weight.isinf().any():
            raise ConfigError(
                f"--dtype float16: {name} in {folder} has values above the maximum of 65,504; give bfloat16"
            )
    prepare_to_generate(model, loaded.token_to_id(end) if loaded and end is not None else None)

    # Written beside ``out``, on the same disk, and renamed at the end, because a rename is atomic.
    unfinished = out.resolve().with_name(f".{out.resolve().name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
        unfinished.mkdir(parents=True)
        if files is not None:
            positions = sizes_in(model.config.to_dict()).get("max_position_embeddings")
            copy_tokenizer(located(files), unfinished, end, positions)
        _write(unfinished, out.resolve().name, model, files is not None, checkpoint, run)
        sync_tree(unfinished)
        move(unfinished, out.resolve())
    except OSError as error:
        raise CheckpointError(
            f"--out {out}: can't be written ({error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check_links(source: Path, folder: Path) -> None:
    """Raise CheckpointError for links out of a folder that somebody else may have made: an export is often published."""
    if folder != source and folder.is_symlink():
        raise CheckpointError(f"{folder}: is a link to {folder.resolve()}; give that folder to export it")
    for path in folder.iterdir():
        if path.suffix in _EXPORTED:
            check_own(path)


def read_run_up_to(checkpoint: Checkpoint) -> Run | None:
    """Return the run's log up to the checkpoint's step, or None if there is no log beside the checkpoint.

    Later steps are excluded: a card for step 610 shows neither later losses nor later rollbacks.
    """
    save = Path(os.path.abspath(checkpoint.folder)).parent  # not that of a link's target
    if not any((save / name).exists() for name in LOGS):
        return None
    run = read_run(save)
    records = [record for record in run.records if record["step"] <= checkpoint.step]
    rollbacks = [rollback.model_dump(mode="json") for rollback in checkpoint.rollbacks]
    return Run(run.name, records, run.info, rollbacks or None)


def prepare_to_generate(model: Any, end_of_text: int | None) -> None:
    """Enable the key-value cache, and set the token that ends a text, see ``set_end_of_text``."""
    set_end_of_text(model, end_of_text)
    if not is_encoder(model.config.to_dict()):
        model.config.use_cache = True


def _write(
    folder: Path, name: str, model: Any, has_tokenizer: bool, checkpoint: Checkpoint | None, run: Run | None
) -> None:
    save_pretrained(model, folder)
    has_curves = run is not None and bool(run.steps)
    if run is not None and has_curves:
        draw_run([run], folder / _PICTURE)
    card = ModelCard(
        name=name,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        sizes=sizes_in(model.config.to_dict()),
        dtype=str(model.dtype).removeprefix("torch."),
        has_tokenizer=has_tokenizer,
        step=checkpoint.step if checkpoint else None,
        settings=checkpoint.run if checkpoint else None,
        run=run,
        picture=_PICTURE if has_curves else None,
    )
    (folder / "README.md").write_text(card.markdown(), encoding="utf-8")
