"""Check a run's file for conflicts between sections and for settings that are allowed but ill-advised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from seqlen_curriculum.config.compatibility import engine_problems, length_problems
from seqlen_curriculum.config.decomposition import decomposition_problems
from seqlen_curriculum.config.documents import document_problems
from seqlen_curriculum.config.objective import objective_problems
from seqlen_curriculum.errors import ConfigError

if TYPE_CHECKING:
    from seqlen_curriculum.config.run import RunConfig

__all__ = ["conflicts", "growth_problems", "warnings"]

_JUMPING = ("fixed_discrete", "fixed_mixed", "custom")
"""Schedule types whose lengths may jump."""


def conflicts(config: RunConfig, complete: bool) -> list[str]:
    """Return one line per conflict between sections; build the schedule if ``complete`` (every section is valid)."""
    problems = [*_length_problems(config), *_budget_problems(config), *_evaluation_problems(config)]
    problems += decomposition_problems(config)
    problems += document_problems(config)
    problems += growth_problems(config)
    compiled = bool(config.training and config.training.compile)
    problems += engine_problems(config.keys, config.model, compiled, config.shortening.method)
    problems += objective_problems(config)
    can_plan = complete and config.training and config.keys.train_batch_size and (config.data or config.curriculum)
    if problems or not can_plan:
        return problems
    if config.needs_buckets and config.decomposed:
        return length_problems(config.keys, config.decomposed.piece_lengths)
    try:
        if config.keys.optimizer:
            config.plan.learning_rate()
        lengths = {row_tokens for _, row_tokens in config.plan.timeline.shapes()}
    except ConfigError as error:
        return error.problems
    return length_problems(config.keys, sorted({*lengths, config.data.seq_length} if config.data else lengths))


def _length_problems(config: RunConfig) -> Iterator[str]:
    seq_length = config.data.seq_length if config.data else None
    max_difficulty = config.curriculum.max_difficulty if config.curriculum else 0
    if seq_length and max_difficulty > seq_length:
        yield (
            f"curriculum_learning.max_difficulty: {max_difficulty} is above data.seq_length {seq_length}; lower it or raise "
            "data.seq_length"
        )
    elif config.model and (seq_length or max_difficulty) > config.model.max_position_embeddings:
        key = "data.seq_length" if seq_length else "curriculum_learning.max_difficulty"
        fix = "raise model.max_position_embeddings"
        if config.model.initial and not config.model.rope:
            learned = config.model.initial.learned_positions
            fix = "take another model.hf_checkpoint" if learned else "set model.rope to continue it at longer sequences"
        elif config.model.hf_config is not None:
            fix = "raise max_position_embeddings in model.hf_config"
        positions = config.model.max_position_embeddings
        yield f"{key}: {seq_length or max_difficulty} is above the model's {positions} positions; lower it or {fix}"


def _budget_problems(config: RunConfig) -> Iterator[str]:
    rows = config.keys.train_batch_size
    if config.training and rows and config.training.train_tokens < rows:
        yield (
            f"training.train_tokens: {config.training.train_tokens} is less than one token for each of the {rows} rows of "
            "a step; give the budget in tokens"
        )
    try:
        if config.batch_size_warmup and rows:
            config.batch_size_warmup.rows(rows)
    except ConfigError as error:
        yield str(error)


def growth_problems(config: RunConfig) -> Iterator[str]:
    """Yield the conflicts of batch growth with other settings. Its floor is checked once ``train_batch_size`` is known."""
    curriculum, rows = config.curriculum, config.keys.train_batch_size
    if curriculum is None or curriculum.min_tokens_per_step is None:
        return
    if config.batch_size_warmup:
        yield (
            "curriculum_learning.batch_growth: true doesn't work together with batch_size_warmup, which makes the first "
            "steps smaller; remove one of them"
        )
    # With a higher floor even the longest steps would grow, and no step would have train_batch_size rows.
    longest = config.shortening.used_tokens_per_sample(curriculum.max_difficulty)
    if rows and curriculum.min_tokens_per_step > rows * longest:
        yield (
            f"curriculum_learning.min_tokens_per_step: {curriculum.min_tokens_per_step} is above the {rows * longest} "
            f"tokens of a step at the longest length (train_batch_size {rows} x {longest}); lower it, or raise "
            "train_batch_size"
        )


def _evaluation_problems(config: RunConfig) -> Iterator[str]:
    if config.adapts and config.training and not config.training.eval_interval:
        yield (
            "training.eval_interval: 0 disables evaluation, which curriculum_learning.schedule_type adaptive needs; set it "
            "to a number of steps, or use fixed_linear"
        )


def warnings(config: RunConfig) -> list[str]:
    """Return one line for each setting that is allowed but ill-advised."""
    curriculum = config.curriculum
    lines = [f"no effect on this run: {', '.join(config.ignored)}; remove them"] if config.ignored else []
    if config.model and (unknown := config.model.ignored_keys):
        lines.append(f"model.hf_config: {', '.join(unknown)}: no keys of {config.model.model_type}; they are ignored")
    if curriculum is None or curriculum.min_difficulty == curriculum.max_difficulty:
        return lines
    if config.adapts:
        lines.append(
            "curriculum_learning.schedule_type adaptive: the plan assumes that validation perplexity never fluctuates; "
            "each fluctuation pauses the ramp for training.eval_interval steps"
        )
    if config.batch_size_warmup:
        lines.append(
            "batch_size_warmup and curriculum_learning are both on, and each makes the first steps smaller. The paper "
            "(Section 5.1) advises against it: batch size warmup gave no stability benefit, because fewer full-length "
            "sequences are not simpler, and the batch must stay a multiple of the data-parallel size. Remove "
            "batch_size_warmup"
        )
    if config.training and config.training.on_spike != "log" and curriculum.schedule_type in _JUMPING:
        lines.append(
            f'training.on_spike: "{config.training.on_spike}" compares each loss with the minimum of all earlier ones. '
            f'Lengths of curriculum_learning.schedule_type "{curriculum.schedule_type}" may jump, which raises the loss by '
            'itself. Raise training.spike_ratio above what the lengths alone cause, or set on_spike to "log"'
        )
    return lines
