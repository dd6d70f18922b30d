"""Sequence length warmup in Axolotl: a plugin for its YAML file.

    plugins:
      - seqlen_curriculum.integrations.axolotl.SequenceLengthWarmupPlugin
    sequence_length_warmup: run.json

Axolotl's datasets, model, optimizer and checkpoints stay. The plugin gives Axolotl's trainer to ``warm_up``, which cuts each
micro-batch where the training loop takes it, sets ``max_steps`` to the run's number of steps, and sets the rate of every
step if the file has a token-wise ``scheduler``. Evaluations are at full length.

With ``sample_packing`` the documents of a packed row are cut into pieces of at most ``seqlen`` tokens that don't attend to
each other. All tokens are trained, so the file needs ``method: "window"``. Without packing rows are truncated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.integrations.transformers import warm_up

__all__ = ["SequenceLengthWarmupArgs", "SequenceLengthWarmupPlugin"]

_NO_TOKEN_ROWS = {
    "rl": "preference data has several answers per row",
    "reward_model": "preference data has several answers per row",
    "process_reward_model": "its labels belong to steps of an answer",
    "processor_type": "an image's tokens can't be cut",
}
"""Keys of trainers whose batches aren't rows of tokens that can be shortened."""
_RATE_KEYS = (
    "warmup_steps",
    "warmup_ratio",
    "cosine_min_lr_ratio",
    "cosine_constant_lr_ratio",
    "lr_quadratic_warmup",
    "jagged_restart_steps",
    "lr_scheduler_kwargs",
)


class SequenceLengthWarmupArgs(BaseModel):
    """The plugin's keys in Axolotl's YAML file."""

    sequence_length_warmup: str | dict[str, Any] | None = None
    """A file with our sections (relative to the working directory), or the sections themselves."""

    @model_validator(mode="after")
    def _is_given(self) -> SequenceLengthWarmupArgs:
        if not self.sequence_length_warmup:
            raise ValueError(
                "sequence_length_warmup: required by SequenceLengthWarmupPlugin, but not given; set it to a file with "
                "curriculum_learning and training sections, or remove the plugin"
            )
        return self


class SequenceLengthWarmupPlugin(BasePlugin):  # type: ignore[misc]
    """Give Axolotl's trainer a sequence length warmup. Its key is ``sequence_length_warmup``."""

    def get_input_args(self) -> str:
        """Return the import path of the model of the plugin's keys."""
        return f"{SequenceLengthWarmupArgs.__module__}.{SequenceLengthWarmupArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:  # noqa: ARG002 - Axolotl's signature
        """Load nothing. Axolotl calls this before it prepares data, so contradictions are reported before that work."""
        _check(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set up the warmup of a new trainer. Raises ConfigError for what contradicts the plan."""
        _check(cfg)
        packs = bool(cfg.sample_packing)
        if packs:
            trainer.padding_free = True  # packed rows have position ids that restart, and no attention mask
        # Packed rows keep their width, so micro-batches of short steps already have as many tokens as any other.
        warm_up(trainer, _curriculum(cfg), balance=False if packs else None)
        problems = list(_plan_problems(cfg, trainer.plan))
        if problems:
            raise ConfigError(problems)


def _curriculum(cfg: Any) -> Any:
    value = cfg.sequence_length_warmup
    return value.to_dict() if hasattr(value, "to_dict") else value  # Axolotl's mappings have a default for every key


def _check(cfg: Any) -> None:
    """Raise ConfigError if Axolotl's configuration contradicts a warmup, whatever the plan is."""
    problems = list(_problems(cfg))
    if problems:
        raise ConfigError(problems)


def _problems(cfg: Any) -> Iterator[str]:
    """Yield one line for each key of Axolotl's configuration under which batches can't be shortened correctly."""
    for key, reason in _NO_TOKEN_ROWS.items():
        if cfg[key]:
            yield f"{key}: {cfg[key]!r} is not available with a sequence length warmup ({reason}); remove one of the two"
    if (cfg.context_parallel_size or 1) > 1:
        yield (
            f"context_parallel_size: {cfg.context_parallel_size} splits rows over ranks before they can be cut; set it "
            "to 1"
        )
    if cfg.sample_packing and not cfg.attn_decontaminates_packing:
        yield (
            f"attn_implementation: {cfg.attn_implementation!r} lets packed documents attend to each other, so that they "
            'can\'t be cut into pieces; set "flash_attention_2" or "sdpa"'
        )


def _plan_problems(cfg: Any, plan: Any) -> Iterator[str]:
    """Yield one line for each value of Axolotl's configuration that the plan replaces."""
    if cfg.sequence_len != plan.full_length:
        yield (
            f"sequence_len: {cfg.sequence_len} in Axolotl's configuration, but the warmup ends at {plan.full_length} "
            "(curriculum_learning.max_difficulty); make them equal"
        )
    if cfg.max_steps and cfg.max_steps != plan.steps:
        yield (
            f"max_steps: {cfg.max_steps} in Axolotl's configuration, but training.train_tokens are consumed after "
            f"{plan.steps} steps; remove it"
        )
    if plan.learning_rate is None:
        return
    keys = [*(["lr_scheduler"] if (cfg.lr_scheduler or "cosine") != "cosine" else []), *_RATE_KEYS]
    for key in keys:
        if cfg[key]:
            yield f"{key}: {cfg[key]!r} contradicts the file's scheduler, which sets the rate; remove one of the two"
