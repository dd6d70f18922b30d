"""The meaning of each key of a DeepSpeed configuration for a run: the only list of DeepSpeed's keys.

A key is passed to DeepSpeed, translated, dropped because it switches something off, refused, or dropped with a warning
because it has no effect. ``tests/test_deepspeed_rules.py`` compares the lists with the keys that DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CLOSED",
    "LISTED",
    "MAY_BE_AUTO",
    "MONITORS",
    "PASSED",
    "RENAMED",
    "RULES",
    "SECTIONS",
    "TYPES",
    "VALUES",
    "VALUES_IN_ANY_CASE",
    "Rule",
]

LISTED = "0.19.8"
"""The version of DeepSpeed whose keys are listed here."""
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""The package that each of DeepSpeed's monitors imports, by section."""


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


PASSED = _keys("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
    zero_optimization fp16 bf16 torch_autocast data_types communication_data_type seq_parallel_communication_data_type
    pipeline tensor_parallel sequence_parallel_size prescale_gradients gradient_predivide_factor gradient_allreduce_op
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown
    dump_state log_level disable_python_gc flops_profiler comms_logger tensorboard wandb csv_monitor comet checkpoint aio
    timers
""")
"""The top-level keys that DeepSpeed gets unchanged."""

_OUTPUT = "enabled output_path job_name"
SECTIONS: dict[str, frozenset[str]] = {
    section: _keys(names)
    for section, names in {
        "optimizer": "type params legacy_fusion",
        "scheduler": "type params",
        "zero_optimization": """
            stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
            allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
            elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
            cpu_offload_use_pin_memory cpu_offload prefetch_bucket_size stage3_prefetch_bucket_size
            param_persistence_threshold stage3_param_persistence_threshold model_persistence_threshold
            stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters max_reuse_distance
            stage3_max_reuse_distance gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save
            module_granularity_threshold stage3_module_granularity_threshold use_all_reduce_for_fetch_params
            stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential
            stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients
            parameter_alignment zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
            zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
            log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
            """,
        "zero_optimization.offload_optimizer": """
            device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
            cpuadam_cores_perc
            """,
        "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
        "fp16": """
            enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
            min_loss_scale fp16_master_weights_and_grads
            """,
        "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
        "torch_autocast": "enabled dtype lower_precision_safe_modules",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "pipeline": """
            stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned use_reentrant
            """,
        "tensor_parallel": """
            dtype autotp_size tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tensor_parallel tp
            injection_policy_tuple partition_config preset_model keep_module_on_host replace_with_kernel_inject
            kernel_inject
            """,
        "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
        "comms_logger": "enabled prof_all prof_ops verbose debug",
        "tensorboard": _OUTPUT,
        "csv_monitor": _OUTPUT,
        "wandb": "enabled group team project",
        "comet": "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
        "checkpoint": """
            tag_validation checkpoint_serialization writer load_universal use_node_local_storage parallel_write
            """,
        "checkpoint.writer": """
            type io_buffer_size io_buffer_double show_statistics data_parallel decoupled io_multiplier
            """,
        "checkpoint.parallel_write": "pipeline_stage",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
        "timers": "throughput",
        "timers.throughput": "enabled synchronized",
    }.items()
}
"""The keys of each section that DeepSpeed gets."""
CLOSED = _keys("""
    zero_optimization zero_optimization.offload_optimizer zero_optimization.offload_param fp16 bf16 tensor_parallel
    comms_logger tensorboard csv_monitor wandb comet timers.throughput
""")
"""The sections in which DeepSpeed refuses every other key; elsewhere it ignores them."""
RENAMED = frozenset({"bfloat16", "optimizer.params.max_grad_norm", "data_efficiency", "curriculum_learning"})
"""The keys that are read under another name, or by this package."""
_DTYPES = _keys("""
    torch.float16 fp16 float16 half torch.float32 fp32 float32 float torch.int8 int8 torch.bfloat16 bf16 bfloat16
""")
_REDUCED = _keys("fp16 bf16 fp32")
VALUES = {
    "communication_data_type": _REDUCED,
    "seq_parallel_communication_data_type": _REDUCED,
    "gradient_allreduce_op": _keys("mean sum"),
    "checkpoint.tag_validation": _keys("warn ignore fail"),
    "data_types.grad_accum_dtype": _DTYPES,
    "data_types.param_dtype": _DTYPES,
    "data_types.buffer_dtype": _DTYPES,
    "torch_autocast.dtype": _DTYPES,
}
"""The values of keys that DeepSpeed checks only on the ranks. It reads ``VALUES_IN_ANY_CASE`` in upper or lower case."""
VALUES_IN_ANY_CASE = _keys(
    "communication_data_type seq_parallel_communication_data_type gradient_allreduce_op checkpoint.tag_validation"
)
TYPES = {
    "optimizer.type": _keys("""
        adagrad adam adamw lamb muadam muadamw musgd lion muon Adagrad Adam AdamW Lamb MuAdam MuAdamW MuSGD Lion Muon ASGD
        Adadelta Adafactor Adamax LBFGS NAdam RAdam RMSprop Rprop SGD SparseAdam
    """),
    "scheduler.type": _keys("""
        LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR TokenCosineLR TokenLinearLR TokenWSDLR LambdaLR
        MultiplicativeLR StepLR
        MultiStepLR ConstantLR LinearLR ExponentialLR SequentialLR CosineAnnealingLR ChainedScheduler ReduceLROnPlateau
        CyclicLR CosineAnnealingWarmRestarts OneCycleLR PolynomialLR
    """),
}
"""Names of optimizers and schedulers of DeepSpeed and torch. A misspelling of one of them is an error."""
MAY_BE_AUTO = frozenset({"pipeline.stages", "data_types.keep_in_fp32_modules", "expert_parallel", "autotuning"})
"""The keys that have ``"auto"`` among their values in DeepSpeed itself."""


def is_off(value: object) -> bool:
    """Return whether a key's value only switches it off: false, null, 0, nothing, or every ``enabled`` in it false."""
    if isinstance(value, Mapping):
        switches = list(_switches(value))
        return not value or (bool(switches) and not any(switches))
    return not value or value == "none"


def _switches(section: Mapping[str, Any]) -> Iterator[object]:
    """Yield ``enabled`` of the section, or of the sections in it: compression_training has one for each method."""
    if "enabled" in section:
        yield section["enabled"]
        return
    for value in section.values():
        if isinstance(value, Mapping):
            yield from _switches(value)


@dataclass(frozen=True)
class Rule:
    """Treatment of a key that DeepSpeed must not get. If ``off`` returns True for its value, the key is dropped."""

    why: str
    """The reason and the fix; the end of the message."""
    has_no_effect: bool = False
    """True: drop the key with a warning. False: refuse it."""
    everywhere: bool = False
    """True: also in the file of a user's own training loop, which has no ``model`` section."""
    off: Callable[[Any], bool] = is_off


def _removed(why: str, off: Callable[[Any], bool] = is_off) -> Rule:
    return Rule(f"{why}, and DeepSpeed {LISTED} refuses the key; remove it", everywhere=True, off=off)


_MICS = "without MiCS, ZeRO stage 3 divides over all ranks, or over zero_hpz_partition_size of them"
_RECOMPUTE = "to recompute blocks, set model.activation_checkpointing to true; remove this key"
RULES: dict[str, Rule] = {
    "amp": _removed("Apex AMP was removed (use bf16, fp16 or torch_autocast)"),
    "compression_training": _removed("compression was removed"),
    "elasticity": _removed("elastic training was removed (a run here has the same steps on any number of ranks)"),
    "eigenvalue": _removed("quantized training was removed"),
    "graph_harvesting": _removed("graph harvesting was removed"),
    "nebula": _removed("Nebula was removed (use training.async_checkpoints)"),
    "progressive_layer_drop": _removed("progressive layer dropping was removed"),
    "quantize_training": _removed("quantized training was removed"),
    "sparse_attention": _removed("sparse attention was removed"),
    "sparse_gradients": _removed("compression of embedding gradients was removed"),
    "zero_optimization.mics_shard_size": _removed(_MICS, lambda value: is_off(value) or value == -1),
    "zero_optimization.mics_hierarchical_params_gather": _removed(_MICS),
    "zero_optimization.zeropp_loco_param": _removed("LoCo was removed (use zero_quantized_gradients)"),
    "activation_checkpointing": Rule(
        _RECOMPUTE, off=lambda value: isinstance(value, Mapping) and all(map(is_off, value.values()))
    ),
    "pipeline.activation_checkpoint_interval": Rule(_RECOMPUTE),
    "autotuning": Rule("it ends a run after measuring it; remove the block, and see slw benchmark and slw tune"),
    "hybrid_engine": Rule("it replaces the training engine by one for RLHF; remove the block"),
    "expert_parallel": Rule("the model section's models have no experts; remove the block"),
    "datastates_ckpt": Rule(
        "its checkpoints can't be resumed; remove it, and use training.async_checkpoints",
        off=lambda value: value is None or value is False,  # DeepSpeed takes {} for on
    ),
    "data_parallel_size": Rule("it follows from the number of ranks; remove it", off=lambda value: value is None),
    "managed_gradient_accumulation": Rule(
        "training decides where a step ends; remove it", off=lambda value: value is True
    ),
    "checkpoint.load_universal": Rule(
        "it reads DeepSpeed's universal checkpoints only; remove it: every checkpoint of a run can be resumed on another "
        "number of ranks"
    ),
    "checkpoint.writer": Rule(
        "only the checkpoints that training writes itself are verified and resumed; remove it, and see "
        "training.async_checkpoints",
        off=lambda value: value is None,  # DeepSpeed takes {} for its writer of the type FAST
    ),
    "compile": Rule(
        "DeepCompile is another compiler; remove the block, and use training.compile",
        off=lambda value: isinstance(value, Mapping) and not value.get("deepcompile"),
    ),
    "dataloader_drop_last": Rule("training reads its own data", has_no_effect=True),
    "disable_allgather": Rule("DeepSpeed does not use it", has_no_effect=True),
    "pipeline.partition": Rule("every stage has equally many blocks", has_no_effect=True),
    "pipeline.seed_layers": Rule("training.seed is used", has_no_effect=True),
    "use_data_before_expert_parallelism": Rule("the models have no experts", has_no_effect=True),
    "vocabulary_size": Rule("model.vocab_size is used", has_no_effect=True),
    "weight_quantization": Rule("it is for inference", has_no_effect=True),
}
"""The keys that DeepSpeed must not get, and why."""
