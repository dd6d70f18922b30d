"""Load a checkpoint into an engine, after checking that it belongs to the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint, differences
from seqlen_curriculum.training.checkpoint_files import shard_files
from seqlen_curriculum.training.reshard import load_resharded
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["check_same_run", "load_checkpoint", "zero_section"]

_FIXES = {
    "model.initial_weights": "; set model.hf_checkpoint to the folder that the run started from, with unchanged files, or "
    "leave it out where the checkpoint has None"
}
"""Fixes for settings that aren't keys of a configuration file."""


def check_same_run(checkpoint: Checkpoint, run: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless ``checkpoint`` belongs to the run with the settings ``run``, up to its step."""
    # These two change the shapes of the shards, which resharding can't undo, so the only fix is the saved value.
    for key in ("pipeline.stages", "tensor_parallel.autotp_size"):
        saved, current = checkpoint.run.get(key, 1), run.get(key, 1)
        if saved != current:
            raise CheckpointError(f"{checkpoint.folder}: saved with {key} {saved}; set it to {saved}, not {current}")
    # Schedules must agree up to this step only: tuning continues a probe with another ramp.
    changed = differences(checkpoint.run, run)
    if changed and not trains_identically(checkpoint.run, run, checkpoint.step):
        listed = "".join(f"\n  - {name}: {change}{_FIXES.get(name, '')}" for name, change in changed.items())
        raise CheckpointError(
            f"{checkpoint.folder}: made by another run; restore these settings, or start again in another --save:{listed}"
        )


def load_checkpoint(engine: Any, checkpoint: Checkpoint) -> None:
    """Load ``checkpoint`` into ``engine`` on all ranks, also under another ZeRO stage. Raises CheckpointError."""
    go_back = "move it away to resume from the previous one"
    try:
        _load(engine, checkpoint)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files without a CRC-32 make torch.load raise nearly anything
        raise CheckpointError(f"{checkpoint.folder}: can't be loaded ({error}); {go_back}") from error
    if engine.global_steps != checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.folder}: DeepSpeed found step {engine.global_steps}, but {checkpoint.step} was saved; {go_back}"
        )


def _load(engine: Any, checkpoint: Checkpoint) -> None:
    stage, ranks, zero = engine.zero_optimization_stage(), engine.dp_world_size, zero_section(engine)
    # Other ZeRO keys may change the layout of shards of the same size, which DeepSpeed would load without an error.
    same_layout = (checkpoint.data_ranks, checkpoint.zero) == (ranks, zero)
    if checkpoint.zero_stage == stage and (stage == 0 or same_layout):
        shard_files(engine)  # reads no pickled code, unlike DeepSpeed's
        engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
        return
    if checkpoint.zero.get("round_robin_gradients") or zero.get("round_robin_gradients"):
        raise CheckpointError(
            f"{checkpoint.folder}: zero_optimization.round_robin_gradients changes the order of shards; resume "
            f"with the saved zero_optimization {checkpoint.zero} on {checkpoint.data_ranks} data-parallel ranks"
        )
    saved_by = f"{checkpoint.data_ranks} data-parallel ranks under ZeRO stage {checkpoint.zero_stage}"
    log_rank0(f"{checkpoint.folder}: saved by {saved_by}, resuming on {ranks} under stage {stage}")
    load_resharded(engine, checkpoint.folder, checkpoint.zero_stage, checkpoint.data_ranks)


def zero_section(engine: Any) -> dict[str, Any]:
    """Return the file's ``zero_optimization`` after a round trip through JSON, comparable with a manifest."""
    section: dict[str, Any] = json.loads(json.dumps(engine.config.get("zero_optimization", {})))
    # In bf16 at stage 1 the type of accumulated gradients selects the optimizer, and with it the layout of the shards.
    return {**section, "optimizer": "BF16_Optimizer"} if isinstance(engine.optimizer, BF16_Optimizer) else section
