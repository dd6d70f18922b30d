"""A checkpoint as a complete Hugging Face folder: weights without padding, tokenizer, and a card that tells of the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from seqlen_curriculum.analysis.drawing import draw_run
from seqlen_curriculum.analysis.read_run import LOGS, read_run
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.data.tokenizer import END_OF_TEXT, tokenizer_files
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.export.model_card import Facts, model_card
from seqlen_curriculum.files import move, new_folder
from seqlen_curriculum.models.pretrained import copy_tokenizer, load_model, load_tokenizer, model_folder, quiet
from seqlen_curriculum.run_folder.checkpoint_manifest import MANIFEST, Checkpoint, read_checkpoint
from seqlen_curriculum.run_folder.model_folder import sizes_in

__all__ = ["DTYPES", "export"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICTURE = "curves.png"


def export(source: Path, out: Path, dtype: str | None = None, tokenizer: Path | None = None) -> Path:
    """Write the model of ``model_folder(source)`` into the new folder ``out``; return the former.

    ``dtype`` is a name of ``DTYPES``, None for the saved one; ``tokenizer`` as in ``load_tokenizer``, None for the source's
    own if it has one. ``out`` appears whole or not at all. Raises
    ConfigError, CheckpointError, and DataError for a damaged run log.
    """
    new_folder("--out", out)
    folder = model_folder(source)
    checkpoint = read_checkpoint(folder) if (folder / MANIFEST).exists() else None
    run = _run_up_to(checkpoint) if checkpoint else None
    files = tokenizer or (folder if tokenizer_files(folder) else None)
    end = load_tokenizer(folder, tokenizer).token_to_id(END_OF_TEXT) if files else None
    model = load_model(folder, DTYPES[dtype] if dtype else None)
    if dtype == "float16":
        _check_range(model, folder)
    _make_ready(model, end)
    unfinished = out.resolve().with_name(f".{out.resolve().name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
        unfinished.mkdir(parents=True)
        _write(unfinished, out.resolve().name, model, files, checkpoint, run)
        move(unfinished, out.resolve())
    except OSError as error:
        raise CheckpointError(
            f"--out {out}: can't be written ({error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check_range(model: Any, folder: Path) -> None:
    for name, weight in model.named_parameters():
        if weight.isinf().any():
            raise ConfigError(
                f"--dtype float16: {name} in {folder} has values beyond 65,504, its largest; give bfloat16, which holds them"
            )


def _run_up_to(checkpoint: Checkpoint) -> Run | None:
    """What the logs beside the checkpoint tell of the way to it."""
    save = checkpoint.folder.resolve().parent
    if not any((save / name).exists() for name in LOGS):
        return None
    run = read_run(save)
    records = [record for record in run.records if record["step"] <= checkpoint.step]
    seen = [rollback.model_dump(mode="json") for rollback in checkpoint.rollbacks]
    return Run(run.name, records, run.info, seen or None)


def _make_ready(model: Any, end_of_text: int | None) -> None:
    """For whoever loads it to generate: a cache, and ends that the vocabulary has."""
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.config, model.generation_config):
            now = getattr(config, name, None)
            if now is None or (isinstance(now, int) and now >= model.config.vocab_size):
                setattr(config, name, end_of_text)
    model.config.use_cache = True


def _write(
    folder: Path, name: str, model: Any, tokenizer: Path | None, checkpoint: Checkpoint | None, run: Run | None
) -> None:
    with quiet():
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # safetensors lets nobody else read them
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    drawn = run is not None and bool(run.steps)
    if run is not None and drawn:
        draw_run([run], folder / _PICTURE)
    facts = Facts(
        name=name,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        sizes=sizes_in(model.config.to_dict()),
        dtype=str(model.dtype).removeprefix("torch."),
        has_tokenizer=tokenizer is not None,
        step=checkpoint.step if checkpoint else None,
        settings=checkpoint.run if checkpoint else None,
        run=run,
        picture=_PICTURE if drawn else None,
    )
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
