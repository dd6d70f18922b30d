"""Run pre-training from a checked configuration: build the model and engine, resume, train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.document_end import own_end
from seqlen_curriculum.data.mask_tokens import open_objective, tokenizer_path
from seqlen_curriculum.data.objective import Masking, Objective
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.tokenizer import read_tokenizer
from seqlen_curriculum.data.training_data import RunData
from seqlen_curriculum.errors import CheckpointError, DivergenceError
from seqlen_curriculum.files import lock_folder, read_json, sync
from seqlen_curriculum.models.attention import set_window
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.masked_lm import MaskedLM
from seqlen_curriculum.models.pretrained import set_end_of_text
from seqlen_curriculum.models.pretrained_tokenizer import copy_tokenizer
from seqlen_curriculum.run_folder import ROLLBACKS, RUN_LOG
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.run_log import RunLog, read_run_log
from seqlen_curriculum.training.abilities import check_abilities
from seqlen_curriculum.training.build import build_executor
from seqlen_curriculum.training.checkpoint import Checkpoints
from seqlen_curriculum.training.compile import compile_model
from seqlen_curriculum.training.deterministic import be_deterministic
from seqlen_curriculum.training.ranks import on_rank_0
from seqlen_curriculum.training.rollback import log_skipped_steps, read_losses, roll_back
from seqlen_curriculum.training.run_info import record_launch
from seqlen_curriculum.training.spike_guard import RollbackRequested, SpikeGuard
from seqlen_curriculum.training.start import choose_attention, join_ranks
from seqlen_curriculum.training.telemetry import Telemetry, log_rank0
from seqlen_curriculum.training.trainer import Ending, StopSignals, Trainer
from seqlen_curriculum.training.utilization import utilization_of
from seqlen_curriculum.training.watchdog import Watchdog

__all__ = ["pretrain", "refuse_other_run"]


def pretrain(
    config: RunConfig,
    train: RunData,
    valid: Samples | None,
    save: Path,
    resume: str = "auto",
    until_step: int | None = None,
) -> Ending:
    """Train the model on ``train`` until its token budget, ``until_step`` or a signal; return which came first.

    ``save`` is the run's folder: checkpoints, ``runlog.jsonl``, ``run.json`` (the configuration and launches), and
    ``rollbacks.json`` after a rollback. ``resume``: ``auto`` resumes from the newest complete checkpoint in ``save``, if
    any. ``none`` requires a folder without a run. A path is a checkpoint folder of the same run, used if ``save`` has no
    checkpoint. Call it on every rank, under the ``deepspeed`` launcher, with model, data and training sections. Raises
    ConfigError, DataError, CheckpointError, DivergenceError.
    """
    return _Pretraining(config, train, valid, save, resume, until_step).run()


class _Pretraining:
    """The run in the folder ``save``: prepared once, then trained again from a checkpoint after each rollback."""

    def __init__(
        self,
        config: RunConfig,
        train: RunData,
        valid: Samples | None,
        save: Path,
        resume: str,
        until_step: int | None,
    ) -> None:
        if config.training is not None and config.training.deterministic:
            be_deterministic()
        join_ranks(config.deepspeed)
        config = config.with_buckets(train.buckets).for_ranks(dist.get_world_size())
        assert config.model is not None
        assert config.training is not None
        choose_attention(config.shortening.seq_length)
        self.plan, self.settings = config.plan, config.training
        self.train_data, self.valid_samples, self.until_step = train, valid, until_step
        self.objective = on_rank_0(lambda: open_objective(config))
        self.save, self.signals = save.resolve(), StopSignals()
        self.log = self.save / RUN_LOG
        self.checkpoints = Checkpoints(
            self.save,
            self.settings.keep_last,
            {**config.settings(), **_data_settings(train, self.objective)},
            self.settings.spike_skip_steps if self.settings.on_spike == "rollback" else 0,
            self.settings.save_steps,
            self.settings.async_checkpoints,
            self.signals.stop,
        )
        self.checkpoint = self._claim_folder(config, resume)
        self._build(config, config.model)

    def _claim_folder(self, config: RunConfig, resume: str) -> Checkpoint | None:
        """Lock the folder, record the launch in it, and return the checkpoint to resume from. Raises CheckpointError."""
        on_rank_0(lambda: lock_folder(self.save, "--save", "training into it"))
        checkpoint = self.checkpoints.find(resume)
        on_rank_0(lambda: refuse_other_run(self.save, resume, checkpoint))
        done_steps = checkpoint.step if checkpoint else 0
        on_rank_0(lambda: record_launch(self.save, config.as_file(), dist.get_world_size(), done_steps + 1))
        log_skipped_steps(self.checkpoints.rollbacks or (), done_steps)
        return checkpoint

    def _build(self, config: RunConfig, model_config: ModelConfig) -> None:
        """Build the model, and the executor that trains it."""
        self.tokenizer = on_rank_0(lambda: tokenizer_of(self.train_data, model_config))
        self.positions = model_config.max_position_embeddings
        torch.manual_seed(self.settings.seed)  # the same weights on every rank
        self.model = build_model(model_config, read_weights=self.checkpoint is None)
        check_abilities(self.model, self.plan.shortening.method, self.settings.compile)
        if self.tokenizer is not None:
            set_end_of_text(self.model.lm, self.tokenizer.end_id)
        # Models other than GPT-2 may use random numbers elsewhere: other dropout, dropped layers, noise in a router.
        self.has_dropout = model_config.dropout > 0 or not model_config.is_gpt2
        rate = self.plan.learning_rate if self.plan.lr_params is not None else None
        self.executor, self._weights_writer = build_executor(
            config.keys, config.deepspeed, self.model, self.plan.scheduler, rate
        )
        self.utilization = utilization_of(self.executor.engine, model_config)
        self.compiles = compile_model(config, self.model, self.executor.engine.device)

    def run(self) -> Ending:
        """Train to the end, returning to a checkpoint whenever the spike guard requests it."""
        with self.signals:  # also while a checkpoint is reloaded
            while True:
                try:
                    return self.train_from(self.checkpoint)
                except DivergenceError:  # a checkpoint that is still being written may be of a later step
                    with suppress(CheckpointError):
                        self.checkpoints.wait()
                    raise
                except RollbackRequested as request:
                    self.checkpoint = roll_back(self.checkpoints, self.log, request.spike)

    def train_from(self, checkpoint: Checkpoint | None) -> Ending:
        """Train from ``checkpoint``, or from the first step, until the budget, a signal or ``until_step``."""
        if checkpoint is not None:
            self.checkpoints.load(self.executor.engine, checkpoint)
        done_steps, evaluations = (checkpoint.step, checkpoint.evaluations) if checkpoint else (0, Evaluations())
        self._rewind_logs(done_steps)
        if self.settings.on_spike == "rollback":
            self.save_checkpoint(done_steps, evaluations)  # a rollback needs a checkpoint from before the first spike
        trainer = self._trainer(done_steps, evaluations)
        try:
            return trainer.train(done_steps + 1)
        finally:
            trainer.close()

    def _trainer(self, done_steps: int, evaluations: Evaluations) -> Trainer:
        plan, engine, rank = self.plan.holding(*evaluations.held), self.executor.engine, dist.get_rank()
        logs_samples = self.settings.log_sample_ids and self.executor.leads
        losses = read_losses(self.log, self.settings.spike_ratio)
        return Trainer(
            executor=self.executor,
            plan=plan,
            train_data=self.train_data,
            valid_samples=self.valid_samples,
            settings=self.settings,
            telemetry=Telemetry(
                self.log if rank == 0 else None, engine.monitor, done_steps, plan.timeline, self.utilization
            ),
            watchdog=Watchdog(self.settings.hang_seconds, plan.timeline.consumed_tokens, self.compiles),
            guard=SpikeGuard(self.settings, self.checkpoints.rollbacks or (), losses),
            signals=self.signals,
            save=self.save_checkpoint,
            wait_for_checkpoint=self.checkpoints.wait,
            evaluations=evaluations,
            sample_log=RunLog(self.save / f"samples.rank{rank}.jsonl") if logs_samples else None,
            set_window=self._set_window if plan.shortening.method == "window" else None,
            has_dropout=self.has_dropout,
            objective=self.objective,
            until_step=self.until_step,
        )

    def _set_window(self, seqlen: int | None) -> None:
        assert not isinstance(self.model, MaskedLM)  # config/objective.py refuses windows
        set_window(self.model, seqlen, restart_positions=self.plan.scheduler.config.restart_positions)

    def save_checkpoint(self, step: int, evaluations: Evaluations) -> None:
        """Save a checkpoint of ``step`` on all ranks, in the background if so configured. Raises CheckpointError."""
        self.checkpoints.save(self.executor.engine, step, self._model_writer, evaluations)

    def _model_writer(self) -> Callable[[Path], None]:
        """Return a function that writes the weights and the tokenizer, so that the folder can generate text."""
        write_weights = self._weights_writer()

        def write(folder: Path) -> None:
            write_weights(folder)
            if dist.get_rank() != 0:
                return
            if self.tokenizer is not None:
                copy_tokenizer(self.tokenizer.path, folder, self.tokenizer.end, self.positions)
            if self.log.exists():
                sync(self.log)  # a run must not resume after steps that a power failure removed from its log

        return write

    def _rewind_logs(self, done_steps: int) -> None:
        """Drop the records after the checkpoint; training writes them again, with the same values."""

        def rewind() -> None:
            dropped = RunLog.rewind(self.log, done_steps)
            if dropped:
                log_rank0(
                    f"resuming after step {done_steps}: {dropped} later records of {RUN_LOG} will be written again"
                )
            for path in self.save.glob("samples.rank*.jsonl"):
                RunLog.rewind(path, done_steps)

        on_rank_0(rewind)


def _data_settings(train: RunData, objective: Objective) -> dict[str, Any]:
    """Return the settings of the data that identify the run: content, not paths."""
    corpora = [corpus for source in train.sources for corpus, _, _ in source.ranges]
    fingerprints = {f"data.train.{number}": corpus.fingerprint() for number, corpus in enumerate(corpora)}
    mask = {"training.mask_token_id": objective.mask_id} if isinstance(objective, Masking) else {}
    return {**fingerprints, "data.train_samples": [source.num_samples for source in train.sources], **mask}


class RunTokenizer(NamedTuple):
    """The tokenizer that checkpoints contain."""

    path: Path
    end: str | None
    """The token that ends a document."""
    end_id: int | None


def tokenizer_of(train: RunData, model: ModelConfig) -> RunTokenizer | None:
    """Return the tokenizer beside the first corpus, else that in ``model.hf_checkpoint``, else None.

    Raises ConfigError if it is damaged.
    """
    path = tokenizer_path(train.sources[0].ranges[0][0].prefix, model)
    if path is None:
        return None
    if (path / "tokenizer_config.json").exists():
        read_json(path / "tokenizer_config.json")
    tokenizer = read_tokenizer(path)
    end = own_end(path, tokenizer)
    return RunTokenizer(path, end, None if end is None else tokenizer.token_to_id(end))


def refuse_other_run(save: Path, resume: str, checkpoint: Checkpoint | None) -> None:
    """Raise CheckpointError if the run would overwrite the log of another run in ``save``, or use its rollbacks."""
    if resume == "none" and (save / ROLLBACKS).exists():
        raise CheckpointError(
            f"{save / ROLLBACKS}: lists the skipped steps of a run, but --resume none starts a new one; choose another "
            "--save, delete this file, or give --resume auto to train the run that skips them"
        )
    first = next(read_run_log(save / RUN_LOG), None) if (save / RUN_LOG).exists() else None
    if first is None or (checkpoint is not None and checkpoint.folder.parent == save):
        return
    start = checkpoint.step + 1 if checkpoint else 1
    unusable = checkpoint is None and any(save.glob("global_step*"))
    if resume == "none" or unusable or first["step"] != start:
        raise CheckpointError(
            f"--save {save}: contains the log of a run that started at step {first['step']}, but no checkpoint to resume it "
            f"from; --resume {resume} would overwrite it with a run from step {start}. Choose another folder, move this one "
            "away, or give the --resume CHECKPOINT that the run started from"
        )
