"""The JSON schema of a run's file agrees with the checks on names and types, and is the file that is shipped."""

import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
from helpers.wrong_files import BETWEEN_KEYS, GOOD, SIZES, WARMUP, WRONG_BLOCKS, WRONG_MODELS, WRONG_RUNS, WSD, changed
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.cli import schema as command
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.config.run import OURS
from seqlen_curriculum.config.schema import run_schema
from seqlen_curriculum.fields import misspelt_sections
from seqlen_curriculum.files import read_json

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(
    path for path in CONFIGS.rglob("*.json") if not path.name.endswith(".schema.json") and path.parent.name != "studies"
)
NEED_A_MODEL = [path for path in SHIPPED if path.parent.name == "long_context"]
"""Files that are loaded with the folder of a model in test_long_context.py."""
PAGES = [CONFIGS.parent / "README.md", *sorted((CONFIGS.parent / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```jsonc\n(\{.*?)^```", re.DOTALL | re.MULTILINE)
SCHEMA = run_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
WRONG = {
    **{name: file for name, (file, _) in WRONG_RUNS.items()},
    **{f"curriculum: {name}": changed(curriculum_learning=block) for name, (block, _) in WRONG_BLOCKS.items()},
    **{f"model: {message}": changed(model=section) for section, message in WRONG_MODELS},
}


def problem(file):
    """What the schema finds wrong with a file, None where nothing is."""
    return best_match(VALIDATOR.iter_errors(file))


def ramp(**schedule):
    return {"schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8, **schedule}}


def block(kind, **changes):
    return changed(curriculum_learning={**GOOD["curriculum_learning"], "schedule_type": kind, **changes})


RIGHT = {
    "good": GOOD,
    "nothing": {},
    "commented": changed(_comment="c", _data={"train": 3}),
    "its schema": {"$schema": "run.schema.json", **GOOD},
    "null": changed(data=None) | {"fp16": None, "training": None, "curriculum_learning": None, "scheduler": None},
    "whole floats": changed(train_batch_size=8.0, training__train_tokens=1.5e9, data__seq_length=64.0),
    "keys of DeepSpeed": changed(
        bfloat16={"enabled": True}, wall_clock_breakdown=True, zero_optimization__overlap_comm=True
    ),
    "old clipping": changed(optimizer__params__max_grad_norm=1.0),
    "pipeline of its own": changed(pipeline={"stages": "auto"}),
    "pipeline": changed(pipeline={"stages": 2, "partition": "best"}),
    "weights": changed(data__train=[[0.7, "wiki"], [3, "books"]]),
    "own corpora": changed(data__valid=["a"], data__test=["b"]),
    "sizes": changed(model=SIZES),
    "preset and size": changed(model={"preset": "tiny-1m", "vocab_size": 300}),
    "warmup": changed(batch_size_warmup=WARMUP),
    "wsd": changed(scheduler=WSD),
    "linear rate": changed(scheduler={"type": "TokenLinearLR"}),
    "other scheduler": changed(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}),
    "off": changed(curriculum_learning={"enabled": False}),
    "off, with an old schedule": block("fixed_linear", enabled=False, schedule_config={"whatever": 1}),
    "root": block("fixed_root", **ramp(root_degree=2)),
    "adaptive": block("adaptive", **ramp(perplexity_ratio=1.5)),
    "tokens": block("fixed_linear", schedule_config={"total_curriculum_tokens": 1e4, "difficulty_step": 8}),
    "discrete": block("fixed_discrete", schedule_config={"difficulty": [8, 64], "max_step": [5]}),
    "mixed": block("fixed_mixed", schedule_config={"difficulty": [8, 64], "steps": [5, 5]}),
    "custom": block("custom", schedule_config={"function": "math:sqrt"}),
    "growth": block("fixed_linear", batch_growth=True, min_tokens_per_step=100),
    "window": block("fixed_linear", method="window", restart_positions=True),
    "spikes": changed(training={"train_tokens": 1e5, "on_spike": "rollback", "save_steps": [3], "compile": None}),
}


def test_it_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


def test_the_shipped_file_is_what_the_command_prints(capsys):
    """Written by ``slw schema > configs/run.schema.json``."""
    command.main([])
    assert capsys.readouterr().out == (CONFIGS / "run.schema.json").read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_names_the_schema_and_follows_it(path):
    raw = read_json(path, comments=True)
    assert (path.parent / raw["$schema"]).resolve() == CONFIGS / "run.schema.json"
    assert problem(raw) is None
    if path in NEED_A_MODEL:
        return
    assert problem(json.loads(json.dumps(RunConfig.load(path).as_file()))) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configurations_of_the_documentation_can_be_pasted_as_they_stand(page, tmp_path):
    for block in BLOCK.findall(page.read_text()):
        (tmp_path / "run.json").write_text(block)
        RunConfig.load(tmp_path / "run.json")
        assert problem(read_json(tmp_path / "run.json", comments=True)) is None


def test_the_documentation_has_a_whole_configuration_with_comments():
    assert any("//" in block for page in PAGES for block in BLOCK.findall(page.read_text()))


@pytest.mark.parametrize("file", RIGHT.values(), ids=RIGHT)
def test_right_files_pass(file):
    RunConfig.from_dict(file)
    assert problem(json.loads(json.dumps(file))) is None


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_by_name_or_type_fails(name):
    found = problem(json.loads(json.dumps(WRONG[name])))
    assert (found is None) == (name in BETWEEN_KEYS), found


def test_what_only_the_checks_between_keys_find_is_among_the_wrong_files():
    assert WRONG.keys() >= BETWEEN_KEYS


@pytest.mark.parametrize(
    "misspelt",
    [
        "curriculum_learnig", "curriculum_learnning", "curriculum-learning", "curiculum_learning", "batchsize_warmup",
        "trainning", "trianing", "zero_optimisation", "gradient_clippping", "optimiser", "train_batchsize",
    ],
)  # fmt: skip
def test_a_misspelt_section_fails_as_it_does_in_the_checks(misspelt):
    file = changed(**{misspelt: {}})
    with pytest.raises(ConfigError, match=rf"{misspelt}: unknown key; did you mean"):
        RunConfig.from_dict(file)
    assert problem(file) is not None  # and GOOD passes


@pytest.mark.parametrize(
    "kind", ["TokenCosine", "TokenCosinLR", "tokencosinelr", "TokenCosineLr", "TokenLinerLR", "TokenWSD"]
)
def test_a_misspelt_token_wise_schedule_is_no_other_scheduler(kind):
    assert problem(changed(scheduler={"type": kind})) is not None
    with pytest.raises(ConfigError, match=r"scheduler\.type"):
        RunConfig.from_dict(changed(scheduler={"type": kind}))


def test_no_key_of_deepspeed_is_taken_for_a_misspelling():
    keys = {key for key in deepspeed_keys() if not misspelt_sections({key: None}, {*OURS, *DeepSpeedKeys.model_fields})}
    assert {"steps_per_print", "wall_clock_breakdown", "activation_checkpointing", "data_efficiency"} <= keys
    assert len(keys) > 250
    guards = "|".join(SCHEMA["patternProperties"])
    assert [key for key in keys if re.fullmatch(guards, key)] == []


def deepspeed_keys():
    """Every name in a constant of DeepSpeed's ``constants`` and ``config`` modules."""
    import deepspeed

    for module in pkgutil.walk_packages([str(Path(deepspeed.__file__).parent / "runtime")], "deepspeed.runtime."):
        if module.name.rpartition(".")[2] not in ("constants", "config"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.isupper() and isinstance(value, str) and re.fullmatch(r"[a-z]\w+", value):
                yield value
            elif hasattr(value, "model_fields"):
                yield from value.model_fields


def sections(schema):
    return {"": schema, **schema["$defs"]}


def test_every_key_has_a_description():
    without = [
        f"{name}.{key}"
        for name, section in sections(SCHEMA).items()
        for key, described in section["properties"].items()
        if not described.get("description", "").endswith((".", '"', ")"))
    ]
    assert without == []
    assert [name for name, section in sections(SCHEMA).items() if "description" not in section] == []
    assert SCHEMA["$defs"]["TrainingConfig"]["properties"]["seed"]["description"] == (
        "Seed of the initial weights, the order of samples and dropout."
    )


def test_other_keys_are_allowed_in_sections_of_deepspeed_alone():
    open_sections = {name for name, section in sections(SCHEMA).items() if section["additionalProperties"]}
    optimizer = {"OptimizerKeys", "OptimizerParams"}
    assert open_sections == {"", "OtherScheduler", "ZeroKeys", "PipelineKeys", "TensorParallelKeys", *optimizer}
    assert set(SCHEMA["properties"]) == {"$schema", "curriculum_learning", *OURS, *DeepSpeedKeys.model_fields}
    assert SCHEMA["$defs"]["TrainingConfig"]["required"] == ["train_tokens"]


def test_an_editor_that_takes_a_number_with_a_point_for_no_integer_accepts_whole_ones():
    assert '"integer"' not in json.dumps(SCHEMA)
    assert problem(changed(training__train_tokens=1.5e9)) is None
    assert problem(changed(training__train_tokens=1.5)) is not None
