"""The ``training`` section: when to stop, evaluate and save, and what to measure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from seqlen_curriculum.fields import Count, CountOrZero, Section, Seqlen

__all__ = ["TrainingConfig"]


class TrainingConfig(Section):
    """The ``training`` section: when to stop, evaluate and save."""

    train_tokens: Count
    """Stop at the first step whose end has consumed this many target tokens (Megatron-DeepSpeed's ``--train-tokens``)."""
    seed: CountOrZero = 1234
    """Seed of the initial weights, the order of samples and dropout."""
    eval_interval: CountOrZero = 100
    """Steps between evaluations at full length; another one follows the last step. 0: never evaluate."""
    eval_rows: Count = 64
    """Full-length rows of the validation split per evaluation; every evaluation reads the same rows."""
    save_interval: CountOrZero = 1000
    """Steps between checkpoints; another one follows the last step. 0: only that one."""
    keep_last: Count = 3
    """Newest checkpoints to keep; older ones are deleted once a newer one is complete. With ``on_spike: "rollback"`` the
    newest checkpoint from before the last ``spike_skip_steps`` steps stays too, because a rollback returns to it."""
    save_steps: list[Count] = Field(default_factory=list)
    """Further steps to save at; ``keep_last`` never deletes these checkpoints."""
    async_checkpoints: bool = False
    """Copy the state to host memory and write it to disk while training continues. A checkpoint counts once all ranks have
    written theirs, so a kill costs no more steps than without; each rank needs memory for what it saves."""
    on_spike: Literal["log", "stop", "rollback"] = "log"
    """What to do at a step whose training loss exceeds ``spike_ratio`` x the minimum of all earlier ones (the paper's loss
    ratio). ``log`` records it. ``stop`` ends the run without saving. ``rollback`` returns to a checkpoint, skips the steps
    up to the spike and continues, also if a loss or gradient is NaN or infinite, which otherwise ends the run."""
    spike_ratio: Annotated[float, Field(gt=1)] = 1.2
    """The loss ratio above which a step is a spike. 1.2 is the paper's, for 512 rows and more; fewer rows vary more."""
    spike_skip_steps: Count = 10
    """Steps that a rollback skips, up to and including the spike; their data is not trained on."""
    stop_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """End the run without saving whenever validation perplexity exceeds this multiple of the best so far; 1.3 is the
    paper's significant fluctuation. None: never."""
    micro_batch: Literal["balanced", "fixed"] = "balanced"
    """``balanced``: at short lengths a micro-batch has more rows, with at most as many tokens as at full length, and a step
    has fewer micro-batches; the gradient is the same to rounding. ``fixed``: ``train_micro_batch_size_per_gpu`` rows at
    every length."""
    compile: bool | None = None
    """``torch.compile`` the model's blocks, in at most 3 graphs whatever the lengths. None: on CUDA, for a GPT-2 whose ranks
    share neither model nor sequence, under ZeRO 0 to 2 and without attention windows; elsewhere off."""
    deterministic: bool = False
    """Use torch's deterministic algorithms alone, so that the same step on the same GPUs is bit-identical. Slower. CPU runs
    are bit-identical either way."""
    preflight: bool = True
    """Run the largest micro-batch before step 1, so that a lack of device memory is an error at once."""
    seqlen_bucket: Seqlen | None = None
    """Round every length of any schedule down to a multiple of this, as ``difficulty_step`` does for a ramp: fewer shapes,
    and multiples that suit the hardware. The longest length isn't rounded."""
    hang_seconds: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """End every rank, with the stacks of its threads, when a step doesn't end within this many seconds. Evaluations,
    checkpoints and ``torch.compile`` don't count. None: 50 x the median step so far (more for a step of more tokens), at
    least 600, and 3600 for the first step. 0: never."""
    variance_interval: CountOrZero = 20
    """Steps between measurements of Adam's variance and momentum (l1 norm and largest element). 0: never."""
    log_sample_ids: bool = False
    """Write the ids of the samples that each rank reads to ``SAVE/samples.rank*.jsonl``."""
