"""Every internal of DeepSpeed, torch and transformers that the package relies on.

A renamed one fails here, in seconds, by name. Most of them would otherwise break in silence: a gradient norm that vanishes,
shards that are saved as whole weights.
"""

import ast
import inspect
import os
import re
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.fx.experimental._config
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import constants
from deepspeed.comm.torch import TorchBackend
from deepspeed.git_version_info import installed_ops
from deepspeed.module_inject import autotp_config
from deepspeed.module_inject import layers as autotp_layers
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.layers import GatherFromTensorParallelRegion, ScatterToTensorParallelRegion
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.monitor.wandb import WandbMonitor
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime import utils as runtime_utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep, ReduceGrads, ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups, mixed_precision_linkage, safe_get_local_optimizer_state
from torch._dynamo import callback as compile_callbacks
from torch.distributed import distributed_c10d, rendezvous
from torch.nn.attention import varlen
from torch.utils import cpp_extension, file_baton
from transformers import core_model_loading
from transformers.pytorch_utils import Conv1D

import seqlen_curriculum
from seqlen_curriculum.training.machine import SHM_BYTES

PACKAGE = Path(seqlen_curriculum.__file__).parent

FUNCTIONS = [  # (owner, name, the parameters that we give), and who relies on it
    (deepspeed, "init_distributed", "distributed_port", "start.py"),
    (DeepSpeedEngine, "__init__", "args model config_class", "deepspeed_legacy.py"),
    (deepspeed, "set_optimizer_flags", "config_class model", "muon.py"),
    (DeepSpeedEngine, "set_gradient_accumulation_boundary", "is_boundary", "accumulate.py, executor.py"),
    (DeepSpeedEngine, "set_train_micro_batch_size", "micro_batch_size", "accumulate.py"),
    (DeepSpeedEngine, "set_train_batch_size", "train_batch_size", "accumulate.py"),
    (DeepSpeedEngine, "get_global_grad_norm", "", "executor.py"),
    (DeepSpeedEngine, "gradient_clipping", "", "executor.py"),
    (runtime_utils, "clip_grad_norm_", "parameters max_norm mpu", "executor.py"),
    (DeepSpeedEngine, "zero_optimization", "", "executor.py, adam_moments.py"),
    (DeepSpeedEngine, "zero_optimization_stage", "", "checkpoint.py, reshard.py, adam_moments.py"),
    (DeepSpeedEngine, "optimizer_name", "", "adam_moments.py"),
    (DeepSpeedEngine, "fp16_enabled", "", "executor.py, trainer.py, reshard.py, utilization.py"),
    (DeepSpeedEngine, "bfloat16_enabled", "", "executor.py, reshard.py, utilization.py"),
    (DeepSpeedEngine, "torch_autocast_enabled", "", "utilization.py"),
    (DeepSpeedEngine, "torch_autocast_dtype", "", "utilization.py"),
    (DeepSpeedEngine, "save_checkpoint", "save_dir tag save_latest", "checkpoint.py"),
    (DeepSpeedEngine, "load_checkpoint", "load_dir tag", "load_checkpoint.py"),
    (TorchCheckpointEngine, "create", "info", "checkpoint_files.py"),
    (TorchCheckpointEngine, "save", "state_dict path", "checkpoint_files.py: DeepSpeed calls ours"),
    (TorchCheckpointEngine, "load", "path map_location", "checkpoint_files.py"),
    (TorchCheckpointEngine, "commit", "info", "checkpoint_files.py"),
    (PipelineEngine, "_exec_schedule", "pipe_schedule", "executor.py: dry_run"),
    (PipelineEngine, "_take_model_step", "", "executor.py: the gradient norm of an unsharded pipeline"),
    (PipelineEngine, "reset_activation_shape", "", "pipeline.py: shapes that change"),
    (PipelineEngine, "set_dataiterator", "iterator", "executor.py: dry_run"),
    (PipelineEngine, "eval_batch", "data_iter num_micro_batches", "executor.py"),
    (PipelineEngine, "is_first_stage", "", "executor.py"),
    (PipelineParallelGrid, "get_data_parallel_id", "", "executor.py, pipeline.py"),
    (PipelineParallelGrid, "get_pipe_parallel_group", "", "executor.py"),
    (PipelineModule, "__init__", "layers num_stages loss_fn partition_method", "pipeline.py"),
    (TiedLayerSpec, "__init__", "key typename forward_fn tied_weight_attr", "pipeline.py"),
    (DeepSpeedZeroOptimizer, "update_lp_params", "", "reshard.py"),
    (DeepSpeedZeroOptimizer, "load_state_dict", "state_dict_list load_from_fp32_weights", "reshard.py"),
    (BF16_Optimizer, "update_lp_params", "", "reshard.py"),
    (BF16_Optimizer, "load_state_dict", "state_dict_list load_from_fp32_weights", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "load_state_dict", "state_dict_list", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_prologue", "", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_epilogue", "", "reshard.py"),
    (groups, "_init_tp_mesh_device", "tensor_model_parallel_size", "tensor_parallel.py"),
    (groups, "get_tensor_model_parallel_group", "", "tensor_parallel.py, executor.py"),
    (groups, "get_tensor_model_parallel_rank", "", "executor.py, tensor_parallel.py"),
    (DeepSpeedEngine, "tensor_parallel_config", "", "tensor_parallel.py"),
    (GatherFromTensorParallelRegion, "forward", "group input partition_sizes", "tensor_parallel.py"),
    (ScatterToTensorParallelRegion, "forward", "group input partition_sizes tp_index", "tensor_parallel.py"),
    (groups, "get_data_parallel_rank", "", "executor.py"),
    (groups, "get_data_parallel_world_size", "", "engine.py: the user's mpu has it too"),
    (groups, "get_model_parallel_rank", "", "reshard.py: our mpu is this module"),
    (
        DistributedAttention,
        "__init__",
        "local_attention sequence_process_group scatter_idx gather_idx",
        "sequence_parallel.py",
    ),
    (DistributedAttention, "forward", "query key value batch_dim_idx rotary_pos_emb args", "sequence_parallel.py"),
    (WandbMonitor, "log", "data step commit", "monitors.py"),
    (compile_callbacks.callback_handler, "register_start_callback", "callback", "watchdog.py"),
    (compile_callbacks.callback_handler, "register_end_callback", "callback", "watchdog.py"),
    (compile_callbacks.callback_handler, "remove_start_callback", "callback", "watchdog.py"),
    (compile_callbacks.callback_handler, "remove_end_callback", "callback", "watchdog.py"),
    (os, "_exit", "status", "watchdog.py"),
    (distributed_c10d, "_get_default_store", "", "preflight.py, cli/common.py, checkpoint.py"),
    (type(get_accelerator()), "default_generator", "device_index", "seeding.py"),
    (type(get_accelerator()), "set_device", "device_index", "prefetch.py"),
    (torch._dynamo, "reset", "", "compile.py"),
    (torch.cuda, "is_bf16_supported", "including_emulation", "machine.py"),
    (torch.nn.utils, "get_total_norm", "", "executor.py"),
    (varlen, "varlen_attn", "scale window_size enable_gqa", "document_attention.py"),
    (transformers.AttentionInterface, "register", "", "sequence_parallel.py, models"),
    (
        core_model_loading,
        "revert_weight_conversion",
        "model state_dict",
        "models/pretrained.py: names in a saved folder",
    ),
    (transformers.PreTrainedConfig, "standardize_rope_params", "", "models/rope.py"),
    (transformers.PreTrainedConfig, "validate_rope", "", "models/rope.py"),
]

SOURCES = [  # (owner, what must occur in its source), and who relies on it
    (DeepSpeedConfig, "_reject_removed_config_keys(self._param_dict)", "deepspeed_legacy.py"),
    (DeepSpeedConfig, "_REMOVED_TOP_LEVEL_CONFIG_KEYS.items()", "deepspeed_legacy.py: it removes the block's key"),
    (PipelineEngine, "self._take_model_step(", "executor.py replaces it"),
    (PipelineEngine, "if self._compute_loss ", "executor.py: dry_run sets it"),
    (PipelineEngine, "self.module.loss_fn(", "executor.py: dry_run sets it"),
    (PipelineEngine, "add_to_total_loss(self.total_loss,", "executor.py: dry_run clears it"),
    (PipelineEngine, "if self.total_additional_losses is None", "executor.py: dry_run clears it"),
    (PipelineEngine, "self.stage_id = ", "executor.py"),
    (PipelineEngine, "self.num_stages = ", "executor.py"),
    (PipelineEngine, "self.grid = ", "executor.py"),
    (PipelineEngine, "if reduce_dp and self.is_data_parallel", "executor.py: evaluation turns the average off"),
    (PipelineParallelGrid, "self.data_parallel_size = ", "executor.py"),
    (PipelineModule, "p.ds_pipe_replicated = ", "executor.py, pipeline.py: tied weights are counted once"),
    (PipelineModule, "self._grid = ", "pipeline.py"),
    (PipelineModule, "self.parts = ", "pipeline.py"),
    (PipelineModule, "self.stage_id = ", "pipeline.py"),
    (DeepSpeedEngine, "self.clip_fp32_gradients()", "executor.py replaces it"),
    (DeepSpeedEngine, "mpu=self.mpu)", "executor.py: clips as DeepSpeed does"),
    (DeepSpeedEngine, "self.basic_optimizer = ", "adam_moments.py"),
    (DeepSpeedEngine, "self.checkpoint_engine = ", "checkpoint_files.py replaces it"),
    (DeepSpeedEngine, "self.checkpoint_engine.save(", "checkpoint_files.py"),
    (PipelineModule, "checkpoint_engine.save(", "checkpoint_files.py"),
    (TorchCheckpointEngine, "self.zipfile_serialization = ", "checkpoint_files.py"),
    (DeepSpeedEngine, "self.global_steps += 1", "engine.py: skip_step; reshard.py"),
    (DeepSpeedEngine, "self.global_samples += ", "engine.py: skip_step; reshard.py"),
    (DeepSpeedEngine, "self.skipped_steps += ", "reshard.py, adam_moments.py"),
    (DeepSpeedEngine, "self.dp_world_size = ", "accumulate.py, executor.py, checkpoint.py, reshard.py"),
    (DeepSpeedEngine, "self.lr_scheduler.step(", "engine.py"),
    (DeepSpeedEngine, "self.mpu = ", "reshard.py"),
    (DeepSpeedEngine, "self.monitor = ", "telemetry.py"),
    (DeepSpeedEngine, "global_steps=self.global_steps", "reshard.py: the names in a checkpoint's model states"),
    (DeepSpeedEngine, "global_samples=self.global_samples", "reshard.py"),
    (DeepSpeedEngine, "skipped_steps=self.skipped_steps", "reshard.py"),
    (DeepSpeedEngine, "optimizer_state_dict=self.optimizer.state_dict()", "reshard.py"),
    (DeepSpeedEngine, "return BFLOAT16", "checkpoint.py: fp32 sums have an optimizer of their own in bf16 at stage 1"),
    (DeepSpeedEngine, "unsupported mix of {model_dtype=}", "config/deepspeed.py: no fp32 sums at stage 0"),
    (
        PipelineEngine,
        "weight._hp_grad if self.using_bf16_optimizer else weight.grad",
        "config/deepspeed.py, compatibility.py: no fp32 sums in pipelines, which lose tied gradients in fp16",
    ),
    (PipelineEngine, "self.optimizer.update_hp_grads(clear_lp_grads=False)", "the same: in bf16 they count twice"),
    (deepspeed, "\n        set_optimizer_flags(config_class, model)", "muon.py replaces it"),
    (DeepSpeedEngine, "bool(p.use_muon) is use_muon", "muon.py sets it"),
    (original_muon, "@compiler.compile()\ndef muon_update(", "muon.py: _torchdynamo_orig_callable, on a CPU"),
    (MonitorMaster, "self.enabled = ", "telemetry.py"),
    (MonitorMaster, "self.tb_monitor = ", "monitors.py"),
    (MonitorMaster, "self.wandb_monitor = ", "monitors.py"),
    (MonitorMaster, "self.csv_monitor = ", "monitors.py"),
    (MonitorMaster, "self.comet_monitor = ", "monitors.py"),
    (csvMonitor, "self.log_dir = ", "monitors.py"),
    (DeepSpeedZeroOptimizer, "self.optimizer = ", "reshard.py"),
    (DeepSpeedZeroOptimizer, "state_dict['dynamic_loss_scale']", "reshard.py"),
    (DeepSpeedZeroOptimizer, "state_dict['overflow']", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "state_dict['dynamic_loss_scale']", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "state_dict['overflow']", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "self.fp16_groups", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "self.fp32_partitioned_groups_flat", "reshard.py"),
    (DeepSpeedZeroOptimizer_Stage3, "self.dp_process_group = ", "reshard.py"),
    (partition_parameters, "param.ds_shape = ", "reshard.py"),
    (partition_parameters, "param.ds_id = ", "build.py: whether a parameter is sharded"),
    (safe_get_local_optimizer_state, "param._z3_optimizer", "adam_moments.py"),
    (
        DeepSpeedEngine,
        "optimizer_parameters.pop(TORCH_ADAM_PARAM",
        "configs: torch_adam; the other parameters, as fused, are torch.optim.AdamW's",
    ),
    (
        deepspeed.comm.comm,
        "from mpi4py import MPI",
        "start.py: without it a process of its own is the only rank",
    ),
    (TorchBackend, "os.environ.get('LOCAL_RANK', 0)", "start.py: DeepSpeed takes it for the number of the device"),
    (TorchBackend, 'create_op_builder("ShareMemCommBuilder")', "machine.py: what is compiled on a CPU"),
    (file_baton, "os.O_CREAT | os.O_EXCL", "extensions.py: a lock is a file"),
    (cpp_extension, "os.path.join(build_directory, 'lock')", "extensions.py"),
    (rendezvous, "TORCHELASTIC_USE_AGENT_STORE", "launchers.py: who listens at the port"),
    (autotp_layers, "setattr(weight, DS_TENSOR_MODEL_PARALLEL, True)", "tensor_parallel.py: shards are marked"),
    (autotp_layers, "weight.gather_params = self.gather_params", "tensor_parallel.py: shards know how to be gathered"),
    (AutoTP, "param.register_hook(make_grad_allreduce_hook(", "tensor_parallel.py: gradients of a norm of each head"),
]


def source(owner):
    """The text of its file, and of those of its base classes in the same library. (inspect.getsource takes seconds.)"""
    library = inspect.getmodule(owner).__name__.partition(".")[0]
    bases = inspect.getmro(owner)[1:] if inspect.isclass(owner) else ()
    parts = [owner, *(base for base in bases if base.__module__.startswith(library))]
    return "\n".join(Path(inspect.getsourcefile(part)).read_text() for part in parts)


def identify(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "").rpartition(".")[2]


@pytest.mark.parametrize(("owner", "name", "parameters", "user"), FUNCTIONS, ids=identify)
def test_a_function_is_there_and_takes_what_we_give(owner, name, parameters, user):
    function = getattr(owner, name, None)
    assert function is not None, f"{user} relies on {owner.__name__}.{name}"
    missing = set(parameters.split()) - inspect.signature(function).parameters.keys()
    assert not missing, f"{user} gives {owner.__name__}.{name} {missing}"


def test_initialize_takes_what_deepspeeds_does_in_its_order():
    theirs = inspect.signature(deepspeed.initialize).parameters
    ours = inspect.signature(seqlen_curriculum.initialize).parameters
    assert list(ours) == [*theirs, "curriculum_kwarg"]
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
        assert f"\n        {name}: " in seqlen_curriculum.initialize.__doc__


@pytest.mark.parametrize(("owner", "text", "user"), SOURCES, ids=identify)
def test_what_we_read_and_set_is_there(owner, text, user):
    assert text in source(owner), f"{user} relies on {text!r} in {owner.__name__}"


def test_where_zero_1_and_2_keep_a_parameter():
    """Parameters of 3 and 5 elements; this rank has elements 2 to 5 of the 8: one of the first, three of the second."""
    first, second, elsewhere = (torch.nn.Parameter(torch.zeros(numel)) for numel in (3, 5, 2))
    flat = torch.zeros(4)
    mixed_precision_linkage.link_hp_params([first, second, elsewhere], flat, {}, {}, False, 7, 2, 4, None)
    assert second._hp_mapping.param_group_index == 7
    found = [
        (
            mapping.lp_fragment_address.start,
            mapping.get_hp_fragment_address().start,
            mapping.get_hp_fragment_address().numel,
        )
        for mapping in (first._hp_mapping, second._hp_mapping)
    ]
    assert found == [(2, 0, 1), (0, 1, 3)]
    assert elsewhere._hp_mapping is None


def test_clipping_counts_a_parameter_that_is_marked_model_parallel():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.model_parallel = False
    assert not runtime_utils.is_model_parallel_parameter(parameter)
    parameter.model_parallel = True
    assert runtime_utils.is_model_parallel_parameter(parameter)


def test_shards_of_tensor_parallel_are_marked_under_the_name_that_we_read():
    from seqlen_curriculum.training import tensor_parallel

    shard = torch.nn.Parameter(torch.zeros(1))
    assert not tensor_parallel.is_sharded(shard)
    setattr(shard, autotp_layers.DS_TENSOR_MODEL_PARALLEL, True)
    assert tensor_parallel.is_sharded(shard)


def test_tensor_parallel_understands_our_partition():
    from seqlen_curriculum.training.tensor_parallel import _GPT2_SPECS

    config = autotp_config.AutoTPConfig.from_dict({"use_default_specs": False, "layer_specs": _GPT2_SPECS})
    kinds = {}
    for layer in ("attn.c_attn", "mlp.c_fc", "attn.c_proj", "mlp.c_proj", "ln_1"):
        spec = config.find_matching_spec(f"transformer.h.0.{layer}.weight")
        kinds[layer] = spec.partition_type.value if spec else None
    assert kinds == {
        "attn.c_attn": "column",
        "mlp.c_fc": "column",
        "attn.c_proj": "row",
        "mlp.c_proj": "row",
        "ln_1": None,
    }
    assert not config.use_default_specs


@pytest.mark.parametrize("stage", [0, 1])
def test_the_dry_run_of_a_pipeline_does_all_but_the_update(stage):
    from seqlen_curriculum.training.executor import _WithoutUpdate

    instructions = [instruction for step in _WithoutUpdate(2, 2, stage).steps() for instruction in step]
    kinds = [type(instruction) for instruction in instructions]
    assert (kinds.count(ForwardPass), kinds.count(BackwardPass)) == (2, 2)
    assert not {OptimizerStep, ReduceGrads, ReduceTiedGrads} & set(kinds)


def test_transformers_has_the_plans_that_models_are_divided_by():
    for config in (transformers.LlamaConfig, transformers.Qwen3Config, transformers.GPTNeoXConfig):
        assert config.base_model_tp_plan
        assert "layers" in config.base_model_pp_plan
    assert transformers.Qwen3Config.base_model_tp_plan["layers.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert transformers.Olmo2Config.base_model_tp_plan["layers.*.self_attn.o_proj"] == "rowwise_split_input"


def test_the_names_in_a_checkpoint_are_those_of_checkpoints_on_disk():
    names = {
        "SINGLE_PARTITION_OF_FP32_GROUPS": "single_partition_of_fp32_groups",
        "FP32_FLAT_GROUPS": "fp32_flat_groups",
        "BASE_OPTIMIZER_STATE": "base_optimizer_state",
        "OPTIMIZER_STATE_DICT": "optimizer_state_dict",
        "PARAM_SHAPES": "param_shapes",
        "PARAM_SLICE_MAPPINGS": "param_slice_mappings",
        "LOSS_SCALER": "loss_scaler",
        "MODEL_FILE_PREFIX": "mp_rank_",
        "MODEL_FILE_SUFFIX": "_model_states.pt",
        "ZERO_FILE_PREFIX": "zero_pp_rank_",
        "OPTIM_FILE_SUFFIX": "_optim_states.pt",
    }
    assert {name: getattr(constants, name) for name in names} == names


def test_shared_memory_of_cpu_ranks_has_the_name_that_we_free():
    (kernel,) = Path(deepspeed.__file__).parent.rglob("csrc/cpu/comm/shm.cpp")
    assert '#define SHM_BUFFER_NAME "deepspeed_allreduce_buffer"' in kernel.read_text()


def test_shared_memory_is_taken_where_the_launcher_says_that_all_ranks_are_local_and_is_as_large_as_we_check():
    (interface,) = Path(deepspeed.__file__).parent.rglob("csrc/cpu/comm/shm_interface.cpp")
    assert re.search(r"if \(size >= 1 && size == ls\) \{ all_ranks_local_p = true; \}", interface.read_text())
    text = interface.with_name("shm.cpp").read_text()
    assert "char buffer[2 * NAIVE_ALLREDUCE_THRESHOLD + 2 * MAX_BUF_SIZE];" in text
    naive, largest = (
        eval(re.search(rf"#define {name} ([\d* ]+)\n", text)[1])
        for name in ("NAIVE_ALLREDUCE_THRESHOLD", "MAX_BUF_SIZE")
    )
    assert 0.95 * SHM_BYTES < 2 * naive + 2 * largest < SHM_BYTES


def test_parts_that_may_have_to_be_compiled_are_known_by_name():
    accelerator = get_accelerator()
    for builder, name in (("ShareMemCommBuilder", "deepspeed_shm_comm"), ("FusedAdamBuilder", "fused_adam")):
        assert accelerator.create_op_builder(builder).name == name
    assert accelerator.create_op_builder("CPUAdamBuilder").name == "cpu_adam"
    assert name in installed_ops


def test_conv1d_has_the_sizes_and_the_orientation_that_tensor_parallel_turns_round():
    layer = Conv1D(3, 2)
    assert (layer.nf, layer.nx, tuple(layer.weight.shape)) == (3, 2, (2, 3))


def test_transformers_attends_by_the_name_in_the_configuration():
    config = transformers.GPT2Config(attn_implementation="sdpa")
    assert config._attn_implementation == "sdpa"


def test_the_norm_of_many_gradients_is_the_total_norm_to_the_last_bit():
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in range(1, 300, 7)]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # executor.py
    assert torch.equal(norm, torch.nn.utils.get_total_norm(gradients))


def test_compiling_for_any_size_is_a_switch_of_torch():
    assert isinstance(torch.fx.experimental._config.use_duck_shape, bool)


def private_names(path):
    """Those that a file reads from other modules and objects."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        yield from (name for name in names if name.startswith("_") and not name.endswith("__"))


def test_every_private_name_that_training_uses_is_listed_here():
    """``engine._exec_schedule`` and the like; names that the package itself defines are its own."""
    package = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    used = {(path.name, name) for path in (PACKAGE / "training").glob("*.py") for name in private_names(path)}
    defined = {
        name for _, name in used if re.search(rf"def {name}\b|self\.{name}\b.* = |^{name} = ", package, re.MULTILINE)
    }
    listed = Path(__file__).read_text()
    unlisted = {
        f"{file}: {name}" for file, name in used if name not in defined and not re.search(rf"\b{name}\b", listed)
    }
    assert not unlisted


def test_a_store_gives_further_clients():
    assert callable(torch.distributed.TCPStore.clone)  # type: ignore[attr-defined]  # checkpoint.py
