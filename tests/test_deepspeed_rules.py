"""What each of DeepSpeed's keys means to a run, checked against the keys that the installed DeepSpeed reads."""

import copy
import importlib.util
import re

import deepspeed
import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from helpers.wrong_files import GOOD, changed

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.cli.launching import check_this_machine
from seqlen_curriculum.config.deepspeed_rules import (
    CLOSED,
    LISTED,
    PASSED,
    RENAMED,
    RULES,
    SECTIONS,
    TYPES,
    VALUES,
    VALUES_IN_ANY_CASE,
)
from seqlen_curriculum.training import machine

MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "tensor_parallel": TPTrainingConfig,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
OUTSIDE = {"sequence_parallel_size", "data_parallel_size"}
"""Keys that ``deepspeed.initialize`` reads before it makes a DeepSpeedConfig."""


class Recorder(dict):
    """A configuration that records the keys that are looked up in it, by section."""

    def __init__(self, values, seen, path=""):
        super().__init__(values)
        self.seen, self.path = seen, path
        seen.setdefault(path, set())
        for name, value in values.items():
            if isinstance(value, dict):
                super().__setitem__(name, Recorder(value, seen, f"{path}.{name}".lstrip(".")))

    def __copy__(self):
        return self

    def get(self, key, default=None):
        self.seen[self.path].add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.seen[self.path].add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.seen[self.path].add(key)
        return super().__getitem__(key)

    def keys(self):
        return self  # ``key in config.keys()``


def keys_that_deepspeed_reads():
    """Return the keys that DeepSpeedConfig looks up, by section."""
    seen = {}
    flat = ("optimizer", "scheduler", "torch_autocast", "data_types", "flops_profiler", "aio")
    sections = {**{name: {} for name in flat}, "checkpoint": {"writer": {}, "parallel_write": {}}, "timers": {}}
    sections["torch_autocast"] = {"dtype": "bf16"}
    deepspeed_config.DeepSpeedConfig(Recorder({"train_batch_size": 1, **sections}, seen))
    return seen


def test_every_key_that_deepspeed_reads_is_listed():
    assert deepspeed.__version__ == LISTED
    seen = keys_that_deepspeed_reads()
    listed = {key for key in (*PASSED, *RULES, *RENAMED) if "." not in key}
    assert seen.pop("") | OUTSIDE | {"bfloat16"} == listed
    named = {section: keys - {"enabled"} for section, keys in seen.items()}
    assert {section: keys - SECTIONS[section] for section, keys in named.items()} == {name: set() for name in named}


@pytest.mark.parametrize("section", sorted(CLOSED))
def test_the_keys_of_a_section_are_those_of_deepspeeds_model(section):
    fields = MODELS[section].model_fields
    removed = {key.rpartition(".")[2] for key in RULES if key.startswith(f"{section}.")}
    assert SECTIONS[section] == {*fields, *(field.alias for field in fields.values() if field.alias)} - removed
    assert MODELS[section].model_config["extra"] == "forbid"


def test_what_deepspeed_removed_is_refused_or_dropped_in_every_file():
    zero = {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    removed = {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS, *zero} - {"curriculum_learning"}
    assert {key for key, rule in RULES.items() if rule.everywhere} == removed


def file_with(path, value):
    """GOOD with one key of DeepSpeed's."""
    *parents, key = path.split(".")
    config = copy.deepcopy(GOOD)
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    place[key] = value
    return config


def loaded(path, value):
    return RunConfig.from_dict(file_with(path, value))


OFF = {
    "elasticity": {"enabled": False, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4]},
    "sparse_gradients": False,
    "amp": {"enabled": False, "opt_level": "O1"},
    "progressive_layer_drop": {"enabled": False, "theta": 0.5},
    "eigenvalue": {"enabled": False},
    "sparse_attention": None,
    "compression_training": {
        "weight_quantization": {
            "shared_parameters": {"enabled": False},
            "different_groups": {"w": {"params": {"bits": 8}}},
        },
        "layer_reduction": {"enabled": False},
    },
    "quantize_training": {"enabled": False},
    "nebula": {"enabled": False},
    "graph_harvesting": False,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.mics_hierarchical_params_gather": False,
    "zero_optimization.zeropp_loco_param": None,
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "autotuning": {"enabled": False},
    "hybrid_engine": {"enabled": False},
    "expert_parallel": {"enabled": False},
    "datastates_ckpt": False,
    "managed_gradient_accumulation": True,
    "checkpoint.load_universal": False,
    "checkpoint.writer": None,
    "compile": {"deepcompile": False},
    "pipeline.activation_checkpoint_interval": 0,
    "data_efficiency": {"enabled": False, "data_routing": {"random_ltd": {"enabled": True}}},
    "weight_quantization": {"enabled": False},
}
ON = {
    "elasticity": {"enabled": True},
    "sparse_gradients": True,
    "amp": {"enabled": True},
    "progressive_layer_drop": {"enabled": True},
    "eigenvalue": {"enabled": True},
    "sparse_attention": {"mode": "fixed"},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
    "quantize_training": {"enabled": True},
    "nebula": {"enabled": True},
    "graph_harvesting": True,
    "zero_optimization.mics_shard_size": 2,
    "zero_optimization.mics_hierarchical_params_gather": True,
    "zero_optimization.zeropp_loco_param": {"err_beta": 0.8},
    "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False},
    "autotuning": {"enabled": True},
    "hybrid_engine": {"enabled": True},
    "expert_parallel": {"enabled": True},
    "datastates_ckpt": {},
    "data_parallel_size": 2,
    "managed_gradient_accumulation": False,
    "checkpoint.load_universal": True,
    "checkpoint.writer": {"type": "PYTHON"},
    "compile": {"deepcompile": True},
    "pipeline.activation_checkpoint_interval": 1,
}
NO_EFFECT = {
    "dataloader_drop_last": True,
    "disable_allgather": True,
    "pipeline.partition": "uniform",
    "pipeline.seed_layers": True,
    "use_data_before_expert_parallelism": True,
    "vocabulary_size": 50257,
    "weight_quantization": {"enabled": True},
}


def test_every_rule_is_tried():
    assert set(ON) | set(NO_EFFECT) == set(RULES)


@pytest.mark.parametrize(("path", "value"), OFF.items(), ids=OFF)
def test_a_key_that_only_switches_something_off_is_dropped(path, value):
    config = loaded(path, value)
    place = config.deepspeed
    for key in path.split("."):
        place = (place or {}).get(key)
    assert place is None
    assert config.warnings() == RunConfig.from_dict(GOOD).warnings()


@pytest.mark.parametrize(("path", "value"), ON.items(), ids=ON)
def test_a_key_that_can_not_be_followed_is_refused_by_name(path, value):
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}: ") as caught:
        loaded(path, value)
    assert len(caught.value.problems) == 1
    own_loop = {name: section for name, section in file_with(path, value).items() if name != "model"}
    if RULES[path].everywhere:
        with pytest.raises(ConfigError, match=re.escape(path)):
            RunConfig.from_dict(own_loop)
    else:  # DeepSpeed knows it, and a loop of the user's own may use it
        assert path.partition(".")[0] in RunConfig.from_dict(own_loop).deepspeed


@pytest.mark.parametrize(("path", "value"), NO_EFFECT.items(), ids=NO_EFFECT)
def test_a_key_without_effect_is_named_in_one_warning(path, value):
    config = loaded(path, value)
    (line,) = [line for line in config.warnings() if path in line]
    assert line.startswith(f"no effect on this run: {path} (")
    assert RunConfig.from_dict(config.as_file()).warnings() == RunConfig.from_dict(GOOD).warnings()


def test_keys_that_deepspeed_does_not_know():
    config = RunConfig.from_dict(changed(my_note=3, _comment="x", checkpoint={"tag_validatoin": "Warn"}))
    (line,) = config.warnings()
    assert line.count("does not know it") == 2
    assert "my_note (" in line
    assert "checkpoint.tag_validatoin (" in line
    with pytest.raises(ConfigError, match=r"bf16\.loss_scale: unknown key of DeepSpeed"):
        loaded("bf16.loss_scale", 0)
    with pytest.raises(ConfigError, match=r"zero_optimization\.offload_param\.devise: .* did you mean 'device'"):
        loaded("zero_optimization.offload_param", {"devise": "cpu"})


@pytest.mark.parametrize("path", ["bf16.enabled", "train_batch_size", "zero_optimization.reduce_bucket_size"])
def test_values_that_only_hugging_faces_trainer_fills_in(path):
    for extra in ({}, {"gradient_clipping": "auto"}):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_dict({**file_with(path, "auto"), **extra})
        (problem,) = caught.value.problems
        assert path in problem
        assert all(key in problem for key in extra)
        assert "integrations.transformers" in problem
    assert loaded("pipeline.stages", "auto").keys.pipeline_stages == 1  # DeepSpeed's own default


@pytest.mark.parametrize("enabled", ["true", 1, None])
def test_enabled_is_true_or_false(enabled):
    with pytest.raises(ConfigError, match=r"^tensorboard\.enabled: .* write true or false"):
        loaded("tensorboard", {"enabled": enabled})


@pytest.mark.parametrize(("path", "value"), [("tensorboard", True), ("timers", 3), ("checkpoint", [])])
def test_a_section_is_an_object(path, value):
    with pytest.raises(ConfigError, match=rf"^{path}: .* is not an object"):
        loaded(path, value)


@pytest.mark.parametrize("path", VALUES)
def test_values_that_deepspeed_would_refuse_on_the_ranks(path):
    given = {*VALUES[path], *(value.upper() for value in VALUES[path] if path in VALUES_IN_ANY_CASE)}
    for value in given:
        assert loaded(path, value).deepspeed
    for value in ("fp8", 3, [], {}):
        with pytest.raises(ConfigError, match=rf"^{re.escape(path)}: .* is not valid"):
            loaded(path, value)


def test_the_values_are_those_of_deepspeed():
    names = {name for dtype in deepspeed_config.DtypeEnum for name in dtype._all_values if isinstance(name, str)}
    for path in (
        "torch_autocast.dtype",
        "data_types.grad_accum_dtype",
        "data_types.param_dtype",
        "data_types.buffer_dtype",
    ):
        assert VALUES[path] == names
    assert VALUES["gradient_allreduce_op"] == set(deepspeed_config.GRADIENT_ALLREDUCE_OP_SUPPORTED)
    assert VALUES["checkpoint.tag_validation"] == {
        mode.lower() for mode in deepspeed_config.CHECKPOINT_TAG_VALIDATION_MODES
    }
    for dtype in VALUES["communication_data_type"]:
        assert deepspeed_config.get_communication_data_type({"communication_data_type": dtype}) is not None


def test_the_optimizers_and_schedulers_are_those_of_deepspeed_and_torch():
    optimizers = {name for name, item in vars(torch.optim).items() if isinstance(item, type)} - {"Optimizer"}
    schedulers = {name for name in torch.optim.lr_scheduler.__all__ if name != "LRScheduler"}
    # Newer versions of torch have more.
    assert set(deepspeed_config.DEEPSPEED_OPTIMIZERS) <= TYPES["optimizer.type"]
    assert {"Adam", "AdamW", "SGD"} <= optimizers & TYPES["optimizer.type"]
    assert {*VALID_LR_SCHEDULES, "TokenCosineLR"} <= TYPES["scheduler.type"]
    assert {"StepLR", "CosineAnnealingLR"} <= schedulers & TYPES["scheduler.type"]


@pytest.mark.parametrize(
    ("path", "value", "meant"),
    [
        ("optimizer.type", "AdammW", "AdamW"),
        ("optimizer.type", "adamw_", "adamw"),
        ("scheduler.type", "WarmupDecay", "WarmupDecayLR"),
    ],
)
def test_a_misspelt_type_is_an_error(path, value, meant):
    config = copy.deepcopy(GOOD)
    config[path.partition(".")[0]]["type"] = value
    with pytest.raises(ConfigError, match=rf"^{path}: '{value}' is not known; did you mean '{meant}'\?"):
        RunConfig.from_dict(config)
    config[path.partition(".")[0]]["type"] = "SomethingOfTomorrow"
    assert RunConfig.from_dict(config).deepspeed


METRIC = {
    "difficulty_type": "value",
    "clustering_type": "single_cluster",
    "min_difficulty": 8,
    "max_difficulty": 64,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
}


def efficient(metrics, **sections):
    curriculum = {"enabled": True, "data_cluster_path": "clusters", "curriculum_metrics": metrics}
    sampling = {"enabled": True, "num_workers": 0, "curriculum_learning": curriculum}
    return changed(
        curriculum_learning=None, data_efficiency={"enabled": True, "seed": 1, "data_sampling": sampling, **sections}
    )


@pytest.mark.parametrize(
    ("metric", "method"), [("seqlen", "truncate"), ("seqlen_truncate", "truncate"), ("seqlen_reshape", "segment")]
)
def test_a_length_metric_of_the_newer_block_is_the_curriculum(metric, method):
    config = RunConfig.from_dict(efficient({metric: METRIC}))
    older = RunConfig.from_dict(changed(curriculum_learning__method=method))
    assert config.curriculum == older.curriculum
    assert [config.timeline().seqlen(step) for step in (1, 5, 11)] == [8, 32, 64]
    assert config.settings() == older.settings()
    assert "data_efficiency" not in config.deepspeed
    (line,) = config.warnings()
    assert "data_efficiency.seed (" in line
    assert "data_efficiency.data_sampling.curriculum_learning.data_cluster_path (" in line


def test_the_newer_block_that_is_off_is_no_curriculum():
    for path in ("", "data_sampling", "data_sampling.curriculum_learning"):
        file = efficient({"seqlen": METRIC})
        place = file["data_efficiency"]
        for key in filter(None, path.split(".")):
            place = place[key]
        place["enabled"] = False
        assert RunConfig.from_dict(file).curriculum is None
        del place["enabled"]
        if path:
            with pytest.raises(ConfigError, match=rf"^data_efficiency\.{path}\.enabled: required"):
                RunConfig.from_dict(file)


METRICS = "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics"
WRONG = {
    "another metric": (efficient({"vocabularyrarity": METRIC}), f"{METRICS}.vocabularyrarity: is not supported"),
    "one more metric": (efficient({"seqlen": METRIC, "loss": METRIC}), f"{METRICS}.loss: is not supported"),
    "two lengths": (
        efficient({"seqlen": METRIC, "seqlen_reshape": METRIC}),
        f"{METRICS}: seqlen, seqlen_reshape given",
    ),
    "no metric": (efficient({}), f"{METRICS}: none given"),
    "percentiles": (
        efficient({"seqlen": {**METRIC, "difficulty_type": "percentile"}}),
        f"{METRICS}.seqlen.difficulty_type: 'percentile' counts samples",
    ),
    "a length of 0": (
        efficient({"seqlen": {**METRIC, "min_difficulty": 0}}),
        f"{METRICS}.seqlen.min_difficulty: 0 is not",
    ),
    "both blocks": (
        {**efficient({"seqlen": METRIC}), "curriculum_learning": GOOD["curriculum_learning"]},
        "data_efficiency.data_sampling.curriculum_learning: given beside curriculum_learning",
    ),
    "random layer token dropping": (
        efficient({"seqlen": METRIC}, data_routing={"enabled": True, "random_ltd": {"enabled": True}}),
        "data_efficiency.data_routing.random_ltd: random layer token dropping is not supported",
    ),
    "only random layer token dropping": (
        changed(data_efficiency={"enabled": True, "data_routing": {"enabled": True, "random_ltd": {"enabled": True}}}),
        "data_efficiency.data_routing.random_ltd: random layer token dropping is not supported",
    ),
    "no object": (changed(data_efficiency=[]), "data_efficiency: [] is not an object"),
}


@pytest.mark.parametrize(("file", "message"), WRONG.values(), ids=WRONG)
def test_what_can_not_be_read_of_the_newer_block_is_refused_by_name(file, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(file)
    (problem,) = caught.value.problems
    assert problem.startswith(message)


def test_muon_does_not_work_with_a_pipeline():
    with pytest.raises(ConfigError, match=r"^optimizer\.type: Muon doesn't work with pipeline\.stages 2"):
        RunConfig.from_dict(changed(optimizer__type="Muon", pipeline={"stages": 2}))


def test_what_this_machine_lacks_is_reported_before_ranks_are_started(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(machine, "supported_precisions", lambda: {"fp16": False, "bf16": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError) as caught:
        check_this_machine({"fp16": {"enabled": True}, "wandb": {"enabled": True}})
    package, precision = caught.value.problems
    assert package.startswith("wandb.enabled: true, but wandb isn't installed; pip install wandb")
    assert precision.startswith(
        "fp16.enabled: true, but no GPU is seen, and this CPU has no fp16; set it to false (fp32)"
    )
    assert 'use "bf16": {"enabled": true} instead' in precision
    check_this_machine({"fp16": {"enabled": False}, "wandb": {"enabled": False}})


def test_a_dot_in_a_key_makes_no_section():
    with pytest.raises(ConfigError, match=r"^tensor_parallel\.\.\./\.: unknown key"):
        RunConfig.from_dict({**GOOD, "tensor_parallel.../.": 1})


def test_muon_at_stage_3_does_not_scatter_gradients():
    def muon(**zero):
        RunConfig.from_dict(changed(optimizer__type="Muon", zero_optimization=zero))

    with pytest.raises(
        ConfigError, match=r"^zero_optimization\.reduce_scatter: True doesn't work with .* Muon at stage 3"
    ):
        muon(stage=3)
    muon(stage=3, reduce_scatter=False)
    muon(stage=2)
