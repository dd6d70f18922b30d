"""One pre-training run from a checked configuration: model, engine, resume, train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from seqlen_curriculum.config import RunConfig
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.models.gpt2 import CausalLM, build_gpt2, save_hf
from seqlen_curriculum.runlog import RunLog
from seqlen_curriculum.training.checkpoint import Checkpoints
from seqlen_curriculum.training.engine import initialize
from seqlen_curriculum.training.telemetry import Telemetry, say
from seqlen_curriculum.training.trainer import Trainer

__all__ = ["pretrain", "write_model"]

_RUNLOG = "runlog.jsonl"


def pretrain(config: RunConfig, train: Samples, valid: Samples | None, save: Path, resume: str = "auto") -> bool:
    """Train the file's model on ``train`` until its token budget; False if a signal stopped it earlier (and it saved).

    ``save`` is the run's folder: checkpoints and ``runlog.jsonl``. ``resume``: ``auto`` continues from the newest complete
    checkpoint in ``save`` if there is one, ``none`` wants a folder without a run, a path names a checkpoint folder; one
    outside ``save`` starts a branch, whose settings may differ. Call it on every rank, under the ``deepspeed`` launcher,
    with the model, data and training sections given. Raises ConfigError, DataError, CheckpointError, DivergenceError.
    """
    assert config.model is not None
    assert config.training is not None
    deepspeed.init_distributed()
    rank, timeline = dist.get_rank(), config.timeline()
    settings = {**config.settings(), "data.train_samples": train.num_samples}
    checkpoints = Checkpoints(save, config.training.keep_last, settings)
    checkpoint = checkpoints.find(resume)
    if checkpoint is None or checkpoint.folder.parent != save.resolve():
        _refuse_other_run(save, resume)
    torch.manual_seed(config.training.seed)  # the same weights on every rank
    model = build_gpt2(config.model)
    engine, rows_per_rank, micro_batch = _engine(config, model)
    if checkpoint is not None:
        checkpoints.load(engine, checkpoint)
    done_steps = checkpoint.step if checkpoint else 0
    _rewind_logs(save, done_steps)
    telemetry = Telemetry(save / _RUNLOG if rank == 0 else None, engine.monitor, done_steps, timeline)
    trainer = Trainer(
        engine=engine,
        timeline=timeline,
        train_samples=train,
        valid_samples=valid,
        rows_per_rank=rows_per_rank,
        micro_batch=micro_batch,
        settings=config.training,
        telemetry=telemetry,
        save=lambda step: checkpoints.save(engine, step, lambda folder: write_model(model, folder)),
        sample_log=RunLog(save / f"samples.rank{rank}.jsonl") if config.training.log_sample_ids else None,
    )
    try:
        return trainer.train(done_steps + 1)
    finally:
        telemetry.close()
        if trainer.sample_log is not None:
            trainer.sample_log.close()


def _engine(config: RunConfig, model: CausalLM) -> tuple[Any, int, int]:
    """The engine, the rows of a rank in a step, and those of a micro-batch."""
    rows_per_rank, micro_batch, accumulation = config.batch_shape(dist.get_world_size())
    shape = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    shaped = replace(config, deepspeed={**config.deepspeed, **shape})
    engine, *_ = initialize(config=shaped, model=model, model_parameters=model.parameters())
    if engine.zero_optimization_stage() == 0 and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        say(
            "warning: half precision at ZeRO stage 0 updates weights unlike fp32 does; set zero_optimization.stage to 1"
        )
    return engine, rows_per_rank, micro_batch


def _refuse_other_run(save: Path, resume: str) -> None:
    """A run that starts anew must not write over another one's log and checkpoints."""
    if (save / _RUNLOG).exists() and (resume != "auto" or any(save.glob("global_step*"))):
        raise CheckpointError(
            f"--save {save}: holds a run already and --resume {resume} would start another over it; choose another folder, "
            "or move this one away"
        )


def _rewind_logs(save: Path, done_steps: int) -> None:
    """Records after the checkpoint are written again, with the same values, as training continues."""
    if dist.get_rank() == 0:
        dropped = RunLog.rewind(save / _RUNLOG, done_steps)
        if dropped:
            say(f"continuing after step {done_steps}: {dropped} later records of {_RUNLOG} will be written again")
        for path in save.glob("samples.rank*.jsonl"):
            RunLog.rewind(path, done_steps)
    dist.barrier()


def write_model(model: CausalLM, folder: Path) -> None:
    """The weights as a Hugging Face folder, gathered one by one where ZeRO-3 shards them."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        save_hf(model, folder, weights)
