"""The ``training`` section: token budget, evaluation, checkpoints and measurements."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from seqlen_curriculum.fields import Count, CountOrZero, Section, Seqlen

__all__ = ["MLM_PROBABILITY", "TrainingConfig"]

MLM_PROBABILITY = 0.15
"""BERT's share of predicted tokens (Devlin et al. 2019, section 3.1)."""


class TrainingConfig(Section):
    """The ``training`` section: token budget, evaluation, checkpoints and measurements."""

    train_tokens: Count
    """Token budget: stop after the step that reaches this many target tokens (Megatron-DeepSpeed's ``--train-tokens``). With
    ``objective: "masked"`` all tokens of a row count, not only the masked ones."""
    objective: Literal["causal", "masked"] = "causal"
    """``causal``: predict the next token. ``masked``: predict masked tokens from both sides (BERT), with an encoder in
    ``model``."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the tokens of a row that are predicted with ``objective: "masked"``: ``round(share * seqlen)`` of them, at
    least 1. None: 0.15, as in BERT. ModernBERT uses 0.3."""
    mask_token_id: CountOrZero | None = None
    """Id of the mask token with ``objective: "masked"``. None: that of the tokenizer."""
    seed: CountOrZero = 1234
    """Seed of the initial weights, the order of samples and dropout."""
    eval_interval: CountOrZero = 100
    """Steps between evaluations at full length. The last step is evaluated too. 0: never evaluate."""
    eval_rows: Count = 64
    """Full-length rows of the validation split per evaluation; every evaluation reads the same rows."""
    save_interval: CountOrZero = 1000
    """Steps between checkpoints. The last step is saved too. 0: save only the last step."""
    keep_last: Count = 3
    """Number of newest checkpoints to keep. Older ones are deleted once a newer one is complete. With
    ``on_spike: "rollback"`` the newest checkpoint from before the last ``spike_skip_steps`` steps is kept too, because a
    rollback returns to it."""
    save_steps: list[Count] = Field(default_factory=list)
    """Additional steps to save at. ``keep_last`` never deletes these checkpoints."""
    async_checkpoints: bool = False
    """Copy the state to host memory and write it to disk while training continues. A checkpoint is complete once all ranks
    have written their part, so that a kill loses no more steps than without this. Each rank needs memory for its part."""
    on_spike: Literal["log", "stop", "rollback"] = "log"
    """Action at a step whose training loss exceeds ``spike_ratio`` x the minimum of all earlier ones (the paper's loss
    ratio). ``log`` records it. ``stop`` ends the run without saving. ``rollback`` returns to a checkpoint, skips the steps
    up to the spike and continues. It also handles a NaN or infinite loss or gradient, which otherwise ends the run."""
    spike_ratio: Annotated[float, Field(gt=1)] = 1.2
    """Loss ratio above which a step is a spike. The paper uses 1.2 with 512 rows and more; fewer vary more."""
    spike_skip_steps: Count = 10
    """Number of steps that a rollback skips, up to and including the spike. Their data is not trained on."""
    stop_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """End the run without saving if validation perplexity exceeds this multiple of the best so far. Above 1.3 the paper
    calls a fluctuation significant. None: never."""
    micro_batch: Literal["balanced", "fixed"] = "balanced"
    """``balanced``: at short lengths, use more rows per micro-batch (at most the tokens of a full-length one) and fewer
    micro-batches per step. The gradient is the same up to rounding. ``fixed``: ``train_micro_batch_size_per_gpu`` rows at
    every length."""
    compile: bool | None = None
    """Compile the model with ``torch.compile``, in a few graphs for all lengths. True: its blocks, and on a GPU its loss.
    None: only the loss, on a GPU. False: nothing."""
    deterministic: bool = False
    """Use only torch's deterministic algorithms, which are slower, so that the same step on the same GPUs is bit-identical.
    CPU runs are bit-identical either way."""
    preflight: bool = True
    """Run the largest micro-batch before step 1, so that running out of device memory is an error at the start."""
    seqlen_bucket: Seqlen | None = None
    """Round every length except the longest down to a multiple of this, as ``difficulty_step`` does for a ramp. This gives
    fewer shapes, and lengths that suit the hardware."""
    hang_seconds: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """End every rank and print the stacks of its threads if a step takes longer than this many seconds. Evaluations,
    checkpoints and ``torch.compile`` don't count. None: 50 x the median step so far (more for a step of more tokens), at
    least 600, and 3600 for the first step. 0: never."""
    variance_interval: CountOrZero = 20
    """Steps between measurements of Adam's variance and momentum (l1 norm and largest element). 0: never."""
    log_sample_ids: bool = False
    """Write the ids of the samples that each rank reads to ``SAVE/samples.rank*.jsonl``."""

    @model_validator(mode="after")
    def _masks_are_used(self) -> TrainingConfig:
        for name in ("mlm_probability", "mask_token_id"):
            value = getattr(self, name)
            if value is not None and self.objective == "causal":
                raise ValueError(
                    f'{name} {value} is not used with objective "causal"; remove it, or set objective to "masked"'
                )
        return self

    @property
    def predicted_share(self) -> float:
        """The share of tokens with ``objective: "masked"`` that are predicted."""
        return MLM_PROBABILITY if self.mlm_probability is None else self.mlm_probability

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify the objective; empty for ``causal``, as in checkpoints of earlier versions."""
        if self.objective == "causal":
            return {}
        return {"objective": self.objective, "mlm_probability": self.predicted_share}
