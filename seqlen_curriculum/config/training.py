"""The ``training`` section of the one file: when to stop, evaluate and save, and what to watch."""

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
    """Keys weights, sample order and dropout."""
    eval_interval: CountOrZero = 100
    """Steps between evaluations at full length; one more comes at the end. 0: never."""
    eval_rows: Count = 64
    """Full-length rows of the validation split per evaluation, the same ones each time."""
    save_interval: CountOrZero = 1000
    """Steps between checkpoints; one more comes at the end. 0: only then."""
    keep_last: Count = 3
    """Newest checkpoints to keep; older ones are deleted once a newer one is complete. With ``on_spike`` rollback one more
    stays where these are all of the last ``spike_skip_steps`` steps: the newest from before them, to go back to."""
    save_steps: list[Count] = Field(default_factory=list)
    """Steps whose checkpoints are written besides, and stay whatever ``keep_last`` says."""
    on_spike: Literal["log", "stop", "rollback"] = "log"
    """What to do at a step whose training loss is over ``spike_ratio`` times the least of all earlier ones (the paper's loss
    ratio). ``log``: say so. ``stop``: end the run, unsaved. ``rollback``: return to a checkpoint, pass over the steps up to
    the spike and go on by itself, also where a loss or gradient is NaN or infinite, which ends the run otherwise."""
    spike_ratio: Annotated[float, Field(gt=1)] = 1.2
    """The loss ratio above which a step is a spike. The paper's, for 512 rows and more; few rows vary more by themselves."""
    spike_skip_steps: Count = 10
    """Steps that a rollback passes over, the spiking one the last of them; their data is not trained on."""
    stop_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """End the run, unsaved, at an evaluation whose perplexity is over so many times the best before it; 1.3 is the paper's
    significant fluctuation. None: never."""
    micro_batch: Literal["balanced", "fixed"] = "balanced"
    """``balanced``: at short lengths a micro-batch has more rows, up to as many tokens as one at full length, and a step
    fewer of them; the gradient is the same to rounding. ``fixed``: ``train_micro_batch_size_per_gpu`` rows always."""
    compile: bool = False
    """``torch.compile`` the model's blocks, in at most 3 graphs whatever the lengths. Worth it on GPUs; slow to start."""
    preflight: bool = True
    """Try the largest micro-batch before step 1, so that one that doesn't fit the device's memory shows at once."""
    seqlen_bucket: Seqlen | None = None
    """Round every length down to a multiple of this, as ``difficulty_step`` does for a ramp: fewer shapes to compile, and
    multiples for the hardware, of any schedule. The longest length stays as it is."""
    variance_interval: CountOrZero = 20
    """Steps between measures of Adam's variance and momentum (their l1 norm and largest element). 0: never."""
    log_sample_ids: bool = False
    """Also write the ids of the samples each rank reads, to ``SAVE/samples.rank*.jsonl``."""
