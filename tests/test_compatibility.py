"""Engines that can't work together and degrees that don't divide are refused by the file alone."""

import copy

import pytest

from seqlen_curriculum import ConfigError, RunConfig

RUN = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "curriculum_learning": {
        "enabled": True,
        "min_difficulty": 8,
        "max_difficulty": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 20, "difficulty_step": 4},
    },
    "model": {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "vocab_size": 257,
    },
    "data": {"train": ["x"], "seq_length": 64},
    "training": {"train_tokens": 9_000},
}
MISTAKES = {
    "two precisions": (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "fp16.enabled and bf16.enabled: only one precision",
    ),
    "more stages than layers": ({"pipeline": {"stages": 3}}, "pipeline.stages: 3 is above model.num_layers 2"),
    "pipeline under ZeRO-2": (
        {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 2}},
        "zero_optimization.stage: 2 .*pipeline.stages 2",
    ),
    "half precision pipeline": (
        {"pipeline": {"stages": 2}, "bf16": {"enabled": True}},
        "zero_optimization.stage: half precision with pipeline.stages 2",
    ),
    "pipeline with fp32 sums": (
        {
            "pipeline": {"stages": 2},
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        "data_types.grad_accum_dtype: fp32 accumulates bf16 gradients wrongly with pipeline.stages 2",
    ),
    "pipeline of shards": (
        {"pipeline": {"stages": 2}, "sequence_parallel_size": 2},
        "sequence_parallel_size: 2 doesn't work together with pipeline.stages 2",
    ),
    "DeepSpeed's older name of bf16": (
        {"pipeline": {"stages": 2}, "bfloat16": {"enabled": True}},
        "zero_optimization.stage: half precision with pipeline.stages 2",
    ),
    "both names of bf16": (
        {"bfloat16": {"enabled": True}, "bf16": {"enabled": True}},
        "bfloat16: DeepSpeed's older name of bf16, which is given too",
    ),
    "misspelt stages": ({"pipeline": {"stage": 2}}, "stage is unknown; did you mean 'stages'"),
    "no stages": ({"pipeline": {"stages": 0}}, "pipeline.stages: 0"),
    "heads over tensor ranks": (
        {"tensor_parallel": {"autotp_size": 4}},
        "tensor_parallel.autotp_size: 4 doesn't divide the 6 heads",
    ),
    "heads over sequence ranks": (
        {"sequence_parallel_size": 4},
        "sequence_parallel_size: 4 doesn't divide the 6 heads",
    ),
    "lengths over sequence ranks": (
        {"sequence_parallel_size": 3},
        r"sequence_parallel_size: 3 doesn't divide the length 8 \(10 of this run's 15 lengths\)",
    ),
    "half precision over tensor ranks": (
        {"tensor_parallel": {"autotp_size": 2}, "bf16": {"enabled": True}},
        "half precision with tensor_parallel.autotp_size 2 needs stage 1",
    ),
    "tensor ranks of sequence ranks": (
        {"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 3},
        "tensor_parallel.autotp_size: 2 doesn't work together with sequence_parallel_size 3",
    ),
    "tensor ranks of stages": (
        {"tensor_parallel": {"autotp_size": 2}, "pipeline": {"stages": 2}},
        "tensor_parallel.autotp_size: 2 doesn't work together with pipeline.stages 2",
    ),
    "layers cut otherwise": (
        {"tensor_parallel": {"autotp_size": 2, "partition_config": {"use_default_specs": True}}},
        "tensor_parallel.partition_config: {'use_default_specs': True}",
    ),
    "compiled under ZeRO-3": (
        {"zero_optimization": {"stage": 3}, "training": {"train_tokens": 9_000, "compile": True}},
        "training.compile: true .*zero_optimization.stage 3",
    ),
}


LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 257,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 6, "num_local_experts": 4}
MISTAKES_BY_ARCHITECTURE = {
    "layers over stages": (LLAMA, {"pipeline": {"stages": 3}}, "pipeline.stages: 3 is above model.num_layers 2"),
    "grouped heads over tensor ranks": (
        LLAMA,
        {"tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel.autotp_size: 2 doesn't divide the 3 heads of num_key_value_heads",
    ),
    "grouped heads over sequence ranks": (
        LLAMA,
        {"sequence_parallel_size": 2},
        "sequence_parallel_size: 2 doesn't divide the 3 heads of num_key_value_heads",
    ),
    "a default of grouped heads": (
        {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
        | {"model_type": "mistral", "hidden_size": 192, "num_attention_heads": 24, "intermediate_size": 63},
        {"tensor_parallel": {"autotp_size": 3}},
        "tensor_parallel.autotp_size: 3 doesn't divide the 8 heads of num_key_value_heads",
    ),
    "the inner size over tensor ranks": (
        LLAMA,
        {"tensor_parallel": {"autotp_size": 3}},
        "tensor_parallel.autotp_size: 3 doesn't divide intermediate_size 64",
    ),
    "experts over tensor ranks": (
        MIXTRAL,
        {"tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel.autotp_size: 2 doesn't work with num_local_experts 4",
    ),
    "routers over stages": (
        {**MIXTRAL, "output_router_logits": True},
        {"pipeline": {"stages": 2}},
        "pipeline.stages: 2 doesn't work with output_router_logits true",
    ),
}


@pytest.mark.parametrize(
    ("architecture", "sections", "message"), MISTAKES_BY_ARCHITECTURE.values(), ids=MISTAKES_BY_ARCHITECTURE
)
def test_an_architecture_is_refused(architecture, sections, message):
    model = {"hf_config": architecture}
    RunConfig.from_dict({**copy.deepcopy(RUN), "model": model})
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.from_dict({**copy.deepcopy(RUN), "model": model, **sections})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "sections", [{"pipeline": {"stages": 2}}, {"sequence_parallel_size": 2}, {"zero_optimization": {"stage": 3}}]
)
def test_an_architecture_is_accepted(sections):
    RunConfig.from_dict({**RUN, "model": {"hf_config": {**LLAMA, "num_key_value_heads": 6}}, **sections})


@pytest.mark.parametrize(("sections", "message"), MISTAKES.values(), ids=MISTAKES)
def test_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({**copy.deepcopy(RUN), **sections})


@pytest.mark.parametrize(
    "sections",
    [
        {"pipeline": {"stages": 2}},
        {"pipeline": {"stages": "auto"}, "zero_optimization": {"stage": 3}},
        {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
        {"sequence_parallel_size": 2},
        {"tensor_parallel": {"autotp_size": 3}},
        {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
        {"tensor_parallel": {"autotp_size": 1, "preset_model": "llama"}},
        {"fp16": {"enabled": False}, "bf16": {"enabled": True}},
    ],
)
def test_accepted(sections):
    RunConfig.from_dict({**RUN, **sections})


def test_ranks_that_share_a_model_read_the_same_rows():
    config = RunConfig.from_dict({**RUN, "pipeline": {"stages": 2}})
    assert (
        config.for_ranks(4).keys.gradient_accumulation_steps == 2
    )  # 8 rows over 2 data-parallel ranks, 2 a micro-batch
    with pytest.raises(ConfigError, match=r"pipeline\.stages 2: doesn't divide the 3 ranks"):
        config.for_ranks(3)


def test_the_older_name_of_bf16_is_part_of_the_run():
    settings = RunConfig.from_dict({**RUN, "bfloat16": {"enabled": True}}).settings()
    assert settings == RunConfig.from_dict({**RUN, "bf16": {"enabled": True}}).settings()


HALF = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
PIPELINE = {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("sections", "added", "dtype"),
    [
        ({}, False, "fp32"),
        ({"torch_autocast": {"enabled": True}}, False, "fp32"),
        (HALF, True, "fp32"),
        ({**HALF, "zero_optimization": {"stage": 3}}, True, "fp32"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, True, "fp32"),
        ({**HALF, "data_types": {"buffer_dtype": "fp32"}}, True, "fp32"),
        # DeepSpeed can't, or the file decides
        ({"bf16": {"enabled": True}}, False, "bf16"),
        ({**HALF, **PIPELINE}, False, "bf16"),
        ({"fp16": {"enabled": True}, **PIPELINE}, False, "fp16"),
        ({**HALF, "data_types": {"grad_accum_dtype": "fp32"}}, False, "fp32 and bf16"),
        ({**HALF, "communication_data_type": "fp16"}, False, "bf16 and fp16"),
    ],
)
def test_16_bit_gradients_accumulate_and_reduce_in_fp32(sections, added, dtype):
    config = RunConfig.from_dict({**RUN, **sections})
    wanted = {
        "data_types": {**sections.get("data_types", {}), "grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    assert config.keys.fp32_gradients == (wanted if added else {})
    assert config.keys.gradient_dtype == dtype
    # What DeepSpeed is given beyond the file doesn't make another run of it: checkpoints without it continue.
    assert not any(value == "fp32" for name, value in config.settings().items() if name not in flat_names(sections))


def flat_names(sections):
    return {f"{name}.{key}" for name, value in sections.items() if isinstance(value, dict) for key in value}
