"""One pre-training run from a checked configuration: model, engine, resume, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from seqlen_curriculum.config.deepspeed import batch_shape
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.tokenizer import read_tokenizer, tokenizer_files
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.files import lock_folder
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.gpt2 import CausalLM, set_window
from seqlen_curriculum.models.pretrained import copy_tokenizer
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import ROLLBACKS
from seqlen_curriculum.run_folder.run_log import RunLog, read_run_log
from seqlen_curriculum.training.adaptive import Adaptive
from seqlen_curriculum.training.build import assemble
from seqlen_curriculum.training.checkpoint import Checkpoints, on_rank_0
from seqlen_curriculum.training.compile import compile_blocks
from seqlen_curriculum.training.rollback import log_skipped_steps, read_losses, roll_back
from seqlen_curriculum.training.run_info import record_launch
from seqlen_curriculum.training.spike_guard import RollbackRequested, SpikeGuard
from seqlen_curriculum.training.telemetry import Telemetry, log_rank0
from seqlen_curriculum.training.trainer import StopSignals, Trainer

__all__ = ["pretrain", "refuse_other_run"]

_RUNLOG = "runlog.jsonl"


def pretrain(
    config: RunConfig,
    train: TrainingData,
    valid: Samples | None,
    save: Path,
    resume: str = "auto",
    until_step: int | None = None,
) -> bool:
    """Train the file's model on ``train`` until its token budget; False if a signal stopped it earlier (and it saved).

    ``until_step`` ends it after that step, as a signal would.

    ``save`` is the run's folder: checkpoints, ``runlog.jsonl``, ``run.json`` (what it was trained with), and
    ``rollbacks.json`` once there was one. ``resume``: ``auto`` continues from the newest complete checkpoint in ``save`` if
    there is one, ``none`` wants a folder without a run, a path names a checkpoint folder of the same run, which a folder
    without one of its own starts from. Call it on every rank, under the ``deepspeed`` launcher, with the model, data and
    training sections given. Raises ConfigError, DataError, CheckpointError, DivergenceError.
    """
    model_config, training = config.model, config.training
    assert model_config is not None
    assert training is not None
    deepspeed.init_distributed()
    config = config.for_ranks(dist.get_world_size())
    rank, save = dist.get_rank(), save.resolve()
    skip_steps = training.spike_skip_steps if training.on_spike == "rollback" else 0
    checkpoints = Checkpoints(
        save, training.keep_last, {**config.settings(), **_data_settings(train)}, skip_steps, training.save_steps
    )
    on_rank_0(lambda: lock_folder(save, "--save", "training into it"))
    checkpoint = checkpoints.find(resume)
    on_rank_0(lambda: refuse_other_run(save, resume, checkpoint))
    first_step = checkpoint.step + 1 if checkpoint else 1
    on_rank_0(lambda: record_launch(save, config.as_file(), dist.get_world_size(), first_step))
    log_skipped_steps(checkpoints.rollbacks or (), first_step - 1)
    torch.manual_seed(training.seed)  # the same weights on every rank
    model = build_model(model_config, read_weights=checkpoint is None)
    executor, write_weights = assemble(config, model)
    write = with_tokenizer(write_weights, on_rank_0(lambda: tokenizer_of(train, model_config)))
    engine = executor.engine
    if training.compile:
        compile_blocks(model.lm.transformer.h, engine.device)
    _, micro_batch, _ = batch_shape(config.keys, dist.get_world_size())
    logs_samples = training.log_sample_ids and executor.leads
    windowed = config.curriculum if config.curriculum is not None and config.curriculum.method == "window" else None
    signals = StopSignals()

    def train_from(checkpoint: Checkpoint | None) -> bool:
        if checkpoint is not None:
            checkpoints.load(engine, checkpoint)
        done_steps, evaluations = (checkpoint.step, checkpoint.evaluations) if checkpoint else (0, Evaluations())
        planned = replace(config, held=tuple(evaluations.held))
        timeline = planned.timeline()
        _rewind_logs(save, done_steps)
        if training.on_spike == "rollback":
            checkpoints.save(engine, done_steps, write, evaluations)  # if it isn't there: to go back to before the next
        so_far = read_losses(save / _RUNLOG, training.spike_ratio)
        telemetry = Telemetry(save / _RUNLOG if rank == 0 else None, engine.monitor, done_steps, timeline)
        trainer = Trainer(
            executor=executor,
            timeline=timeline,
            train_data=train.along(timeline),
            valid_samples=valid,
            micro_batch=micro_batch,
            settings=training,
            telemetry=telemetry,
            guard=SpikeGuard(training, checkpoints.rollbacks or (), so_far),
            signals=signals,
            save=lambda step, evaluations: checkpoints.save(engine, step, write, evaluations),
            evaluations=evaluations,
            sample_log=RunLog(save / f"samples.rank{rank}.jsonl") if logs_samples else None,
            until_step=until_step,
        )
        if config.adapts:
            trainer.adapt = Adaptive(planned)
            trainer.adapt.follow(trainer)
        if windowed is not None:
            assert isinstance(model, CausalLM)  # the configuration says so
            trainer.set_window = partial(set_window, model, restart_positions=windowed.restart_positions)
        try:
            return trainer.train(done_steps + 1)
        finally:
            telemetry.close()
            if trainer.sample_log is not None:
                trainer.sample_log.close()

    with signals:  # also while it goes back
        while True:
            try:
                return train_from(checkpoint)
            except RollbackRequested as abandoned:
                checkpoint = roll_back(checkpoints, save / _RUNLOG, abandoned.spike)


def _data_settings(train: TrainingData) -> dict[str, Any]:
    """What of the data makes the run the run it is; not where it lies."""
    corpora = [corpus for source in train.sources for corpus, _, _ in source.ranges]
    fingerprints = {f"data.train.{number}": corpus.fingerprint() for number, corpus in enumerate(corpora)}
    return {**fingerprints, "data.train_samples": [source.num_samples for source in train.sources]}


def tokenizer_of(train: TrainingData, model: ModelConfig) -> Path | None:
    """Where the tokenizer lies: that which ``prepare_data.py`` left beside the first corpus, else ``model.hf_checkpoint``'s.

    None without either. Raises ConfigError if it is damaged.
    """
    path = Path(f"{train.sources[0].ranges[0][0].prefix}.tokenizer.json")
    if not path.exists():
        if model.initial is None or not tokenizer_files(model.initial.folder):
            return None
        path = model.initial.folder
    read_tokenizer(path)
    return path


def with_tokenizer(write_weights: Callable[[Path], None], tokenizer: Path | None) -> Callable[[Path], None]:
    """``write_weights`` that adds the tokenizer's files, so that the folder it writes is all that text needs."""

    def write(folder: Path) -> None:
        write_weights(folder)
        if tokenizer is not None:
            on_rank_0(lambda: copy_tokenizer(tokenizer, folder))

    return write


def refuse_other_run(save: Path, resume: str, checkpoint: Checkpoint | None) -> None:
    """A run that doesn't continue from a checkpoint in ``save`` must not write over another one's log there.

    Nor does one that begins anew skip another one's steps. Raises CheckpointError.
    """
    if resume == "none" and (save / ROLLBACKS).exists():
        raise CheckpointError(
            f"{save / ROLLBACKS}: lists the skipped steps of a run, and --resume none starts another; choose another "
            "--save, delete this file, or give --resume auto to train the run that skips them"
        )
    first = next(read_run_log(save / _RUNLOG), None) if (save / _RUNLOG).exists() else None
    if first is None or (checkpoint is not None and checkpoint.folder.parent == save):
        return
    start = checkpoint.step + 1 if checkpoint else 1
    unusable = checkpoint is None and any(save.glob("global_step*"))
    if resume == "none" or unusable or first["step"] != start:
        raise CheckpointError(
            f"--save {save}: holds the log of a run that began with step {first['step']} and no checkpoint to continue it "
            f"from; --resume {resume} would begin another with step {start} over it. Choose another folder, move this one "
            "away, or give the --resume CHECKPOINT that it began with"
        )


def _rewind_logs(save: Path, done_steps: int) -> None:
    """Records after the checkpoint are written again, with the same values, as training continues."""
    if dist.get_rank() == 0:
        dropped = RunLog.rewind(save / _RUNLOG, done_steps)
        if dropped:
            log_rank0(f"continuing after step {done_steps}: {dropped} later records of {_RUNLOG} will be written again")
        for path in save.glob("samples.rank*.jsonl"):
            RunLog.rewind(path, done_steps)
    dist.barrier()
