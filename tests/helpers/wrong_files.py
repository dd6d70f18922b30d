"""A good file of a run, and wrong ones with what their messages say: for the checks, and for the JSON schema."""

import copy
from typing import Any

from helpers.settings import LINEAR, block

GOOD = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 3, "min_lr": 1e-5}},
    "model": {"preset": "tiny-200k"},
    "data": {"train": ["corpus/x"], "seq_length": 64},
    "training": {"train_tokens": 1e5},
}


WSD = {"type": "TokenWSDLR", "params": {"warmup_steps": 3, "decay_tokens": 1e4, "decay_type": "linear"}}


def wsd(**params):
    """GOOD with a WSD schedule, whose ``params`` are changed; a value of None removes the key."""
    kept = {name: value for name, value in {**WSD["params"], **params}.items() if value is not None}
    return changed(scheduler={**WSD, "params": kept})


WARMUP = {"start": 2, "increment": 2, "tokens": 1e4}


def changed(**values):
    """GOOD with ``section__key=value`` changes; a value of None removes the key."""
    config = copy.deepcopy(GOOD)
    for path, value in values.items():
        *parents, key = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[key]
        else:
            target[key] = value
    return config


WRONG_RUNS = {
    "seq_length typo": (changed(data__seq_lenght=64), "data.seq_lenght: unknown key; did you mean 'seq_length'?"),
    "section typo": (changed(curriculum_learing={}), "unknown key; did you mean 'curriculum_learning'?"),
    "scheduler typo": (changed(scheduler__type="TokenCosineLr"), "scheduler.type: 'TokenCosineLr' is not valid"),
    "curriculum above data": (changed(data__seq_length=32), "max_difficulty: 64 is above data.seq_length 32"),
    "data above model": (changed(data__seq_length=4096), "data.seq_length: 4096 is above the model's 1024 positions"),
    "curriculum above model": (
        changed(data=None, curriculum_learning__max_difficulty=4096),
        "max_difficulty: 4096 is above the model's 1024 positions",
    ),
    "enabled missing": (changed(curriculum_learning__enabled=None), "curriculum_learning.enabled: required"),
    "lr missing": (changed(optimizer={"type": "Adam"}), "optimizer.params.lr: required"),
    "lr zero": (changed(optimizer__params__lr=0), "optimizer.params.lr: 0 is not valid"),
    "warmup over budget": (changed(scheduler__params__warmup_steps=10_000), "scheduler.params.decay_tokens"),
    "unknown decay": (wsd(decay_type="exponential"), "scheduler.params.decay_type: 'exponential' is not valid: input"),
    "no decay": (wsd(decay_tokens=None), "scheduler.params.decay_tokens: required"),
    "decay over budget": (wsd(decay_tokens=2e5), "scheduler.params.decay_tokens: 200000 and the 384 tokens of the"),
    "wsd typo": (changed(scheduler={**WSD, "type": "TokenWsdLR"}), "scheduler.type: 'TokenWsdLR' is not valid"),
    "linear with a shape": (
        changed(scheduler={**WSD, "type": "TokenLinearLR"}),
        "scheduler.params.decay_type: unknown key",
    ),
    "two warmups": (changed(scheduler__params__warmup_tokens=5), "warmup_steps and warmup_tokens are given"),
    "budget below a step": (changed(training__train_tokens=7), "less than one token for each of the 8 rows"),
    "unknown preset": (changed(model__preset="gpt2-117"), "did you mean 'gpt2-117m'?"),
    "no batch size": (
        changed(train_batch_size="auto"),
        'train_batch_size: "auto" is filled in by Hugging Face\'s Trainer only',
    ),
    "keep none": (changed(training__keep_last=0), "training.keep_last: 0 is not valid"),
    "spike ratio of one": (changed(training__spike_ratio=1), "training.spike_ratio: 1 is not valid"),
    "on spike": (changed(training__on_spike="roll"), "training.on_spike: 'roll' is not valid"),
    "unknown leftovers": (changed(data__leftovers="keep"), "data.leftovers: 'keep' is not valid"),
    "no corpus": (changed(data__train=[]), "data.train: [] is not valid: give a list of corpus prefixes"),
    "no list of corpora": (changed(data__train="a"), "data.train: 'a' is not valid"),
    "no prefix": (changed(data__train=["a", 3]), "data.train: ['a', 3] is not valid"),
    "some weights": (changed(data__train=[[1, "a"], "b"]), "data.train: 'b' is not a [weight, prefix]"),
    "weight of 0": (changed(data__train=[[0, "a"], [1, "b"]]), "data.train: [0, 'a'] is not a [weight, prefix]"),
    "weight as text": (changed(data__train=[["1", "a"]]), "data.train: ['1', 'a'] is not a [weight, prefix]"),
    "blended twice": (changed(data__train=[[1, "a"], [2, "a"]]), "train names 'a' twice"),
    "valid twice": (changed(data__valid=["a", "a"]), "valid names 'a' twice"),
    "valid of nothing": (changed(data__valid=[]), "data.valid: [] is not valid"),
    "valid and split": (changed(data__valid=["a"], data__split="9,1"), "isn't used if valid is given"),
    "windows compiled": (
        changed(curriculum_learning__method="window", training__compile=True),
        'training.compile: true compiles one graph per length with curriculum_learning.method "window"',
    ),
    "optimizer list": (changed(optimizer=[]), "optimizer: [] is not an object"),
    "params string": (changed(optimizer__params="x"), "optimizer.params: 'x' is not an object"),
    "optimizer type": (changed(optimizer__type=None), "optimizer.type: required"),
    "zero null": (changed(zero_optimization=7), "zero_optimization: 7 is not an object"),
    "zero stage": (changed(zero_optimization__stage=9), "zero_optimization.stage: 9 is not valid"),
    "fp16 list": (changed(fp16=[]), "fp16: [] is not an object"),
    "clipping": (changed(gradient_clipping=-1), "gradient_clipping: -1 is not valid"),
    "lr infinite": (changed(optimizer__params__lr=1e300), "optimizer.params.lr: 1e+300 is not valid"),
    "scheduler case": (changed(scheduler__type="tokencosinelr"), "scheduler.type: 'tokencosinelr' is not valid"),
    "schedule type list": (changed(curriculum_learning__schedule_type=[]), "schedule_type: [] is not a schedule type"),
    "budget huge": (changed(training__train_tokens=1e19), "training.train_tokens: 1e+19 is not valid"),
    "ramp huge": (
        changed(curriculum_learning__schedule_config__total_curriculum_step=1e30),
        "total_curriculum_step: 1e+30 is not valid",
    ),
    "sum too large": (
        changed(
            data=None,
            model=None,
            training__train_tokens=1e15,
            curriculum_learning__min_difficulty=1,
            curriculum_learning__max_difficulty=2**24,
            curriculum_learning__schedule_config__difficulty_step=2**10,
            curriculum_learning__schedule_config__total_curriculum_step=1e6,
        ),
        "can't be counted in 64 bits",
    ),
    "seed huge": (changed(training__seed=10**30), "training.seed: "),
    "bad split": (changed(data__split="abc"), "data.split: 'abc' is not valid: write up to three shares"),
    "one beta": (
        changed(optimizer__params={"lr": 1e-3, "betas": [0.9]}),
        "optimizer.params: betas: [0.9] is not valid: give two numbers",
    ),
    "corpus twice": (changed(data__train=["x", "x"]), "train names 'x' twice"),
    "zero rows": (
        changed(
            train_batch_size=0, curriculum_learning__schedule_config={"curriculum_fraction": 0.3, "difficulty_step": 8}
        ),
        "train_batch_size: 0 is not valid",
    ),
    "zero typo": (changed(zero_optimizaton={"stage": 3}), "did you mean 'zero_optimization'?"),
    "scheduler without type": (changed(scheduler={"params": {}}), "scheduler.type: required"),
    "scheduler type number": (changed(scheduler__type=5), "scheduler.type: 5 is not valid"),
    "model list": (changed(model=[]), "model: [] is not an object"),
    "warmup typo": (changed(batch_size_warmp=WARMUP), "unknown key; did you mean 'batch_size_warmup'?"),
    "warmup key": (changed(batch_size_warmup={**WARMUP, "samples": 3}), "batch_size_warmup.samples: unknown key"),
    "warmup incomplete": (changed(batch_size_warmup={"start": 2}), "batch_size_warmup.increment: required"),
    "warmup of nothing": (
        changed(batch_size_warmup={**WARMUP, "tokens": 0}),
        "batch_size_warmup.tokens: 0 is not valid",
    ),
    "warmup start": (changed(batch_size_warmup={**WARMUP, "start": 8}), "start: 8 is not below train_batch_size 8"),
    "warmup increment": (
        changed(batch_size_warmup={**WARMUP, "increment": 4}, training=None, data=None),
        "increment: 4 doesn't divide the 6 rows from start 2 to train_batch_size 8",
    ),
    "bucket above": (changed(training__seqlen_bucket=65), "training.seqlen_bucket: 65 is above the longest length 64"),
    "bucket zero": (changed(training__seqlen_bucket=0), "training.seqlen_bucket: 0 is not valid"),
    "clip twice": (changed(optimizer__params__max_grad_norm=2.0, gradient_clipping=1.0), "max_grad_norm: 2.0 differs"),
}
"""Whole files, and a part of the message for each."""

WRONG_BLOCKS = {
    "length 0": (block(min_difficulty=0), "min_difficulty: 0 is not valid"),
    "negative length": (block(min_difficulty=-3), "min_difficulty: -3 is not valid"),
    "empty ramp": (block({"total_curriculum_step": 0, "difficulty_step": 8}), "total_curriculum_step: 0 is not valid"),
    "no rung": (block({"total_curriculum_step": 9, "difficulty_step": 0}), "difficulty_step: 0 is not valid"),
    "min above max": (block(min_difficulty=2048), "min_difficulty 2048 is above max_difficulty 1024"),
    "rung above max": (
        block({"total_curriculum_step": 9, "difficulty_step": 2000}),
        "difficulty_step 2000 .*min_difficulty 8 .*max_difficulty 1024",
    ),
    "negative root": (
        block({**LINEAR["schedule_config"], "root_degree": -1}, schedule_type="fixed_root"),
        "root_degree: -1 is not valid",
    ),
    "root missing": (block(schedule_type="fixed_root"), "root_degree: required"),
    "typo": (
        block({"total_curriculum_steps": 9, "difficulty_step": 8}),
        "unknown key; did you mean 'total_curriculum_step'?",
    ),
    "unknown type": (block(schedule_type="linear"), "did you mean 'fixed_linear'?"),
    "no type": ({"min_difficulty": 8}, "schedule_type: required"),
    "other metric": (block(curriculum_type="vocab"), "curriculum_type: 'vocab' is not valid"),
    "string number": (block(min_difficulty="8"), "min_difficulty: '8' is not valid"),
    "boolean number": (block(min_difficulty=True), "min_difficulty: True is not valid"),
    "half a token": (block(min_difficulty=8.5), "min_difficulty: 8.5 is not valid"),
    "two durations": (
        block({"total_curriculum_step": 9, "curriculum_fraction": 0.3, "difficulty_step": 8}),
        "total_curriculum_step and curriculum_fraction are given; give exactly one",
    ),
    "no duration": (block({"difficulty_step": 8}), "give exactly one of total_curriculum_step"),
    "fraction above 1": (
        block({"curriculum_fraction": 1.5, "difficulty_step": 8}),
        "curriculum_fraction: 1.5 is not valid",
    ),
    "stages don't match": (
        block({"difficulty": [8, 16], "max_step": [5, 10]}, schedule_type="fixed_discrete"),
        "difficulty has 2 entries and max_step 2",
    ),
    "stages go back": (
        block({"difficulty": [8, 16, 32], "max_step": [10, 10]}, schedule_type="fixed_discrete"),
        "does not increase",
    ),
    "stage outside": (
        block({"difficulty": [8, 4096], "max_step": [10]}, schedule_type="fixed_discrete"),
        r"\[4096\] are outside min_difficulty 8 to max_difficulty 1024",
    ),
    "turns don't match": (
        block({"difficulty": [8, 16], "steps": [5]}, schedule_type="fixed_mixed"),
        "difficulty has 2 entries and steps 1; give each length its steps",
    ),
    "turn outside": (
        block({"difficulty": [4, 16], "steps": [5, 5]}, schedule_type="fixed_mixed"),
        r"\[4\] are outside min_difficulty 8 to max_difficulty 1024",
    ),
    "turn of no steps": (
        block({"difficulty": [8, 16], "steps": [5, 0]}, schedule_type="fixed_mixed"),
        "steps.1: 0 is not valid",
    ),
    "empty turns": (block({"difficulty": [], "steps": []}, schedule_type="fixed_mixed"), "difficulty: "),
    "empty stages": (block({"difficulty": [], "max_step": []}, schedule_type="fixed_discrete"), "difficulty: "),
    "no such function": (block({"function": "math:nothing"}, schedule_type="custom"), "can't be imported"),
    "not a function": (block({"function": "math:pi"}, schedule_type="custom"), "is a float, not a function"),
    "not a path": (block({"function": "math"}, schedule_type="custom"), "write 'package.module:function'"),
}
"""``curriculum_learning`` blocks, and a pattern of the message."""

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 1000,
}

WRONG_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"preset": "gpt2-117"}, "model: preset 'gpt2-117' is unknown; did you mean 'gpt2-117m'?"),
    ({"preset": "bert"}, "model: preset 'bert' is unknown; valid names: gpt2-1.5b, gpt2-117m,"),
    (SIZES | {"hidden_size": 66}, "model: hidden_size 66 is not a multiple of num_attention_heads 4"),
    (SIZES | {"num_layer": 3}, "model.num_layer: unknown key; did you mean 'num_layers'?"),
    (SIZES | {"num_layers": 0}, "model.num_layers: 0 is not valid"),
    (SIZES | {"dropout": 1.0}, "model.dropout: 1.0 is not valid"),
    (SIZES | {"dropout": -0.1}, "model.dropout: -0.1 is not valid"),
    (SIZES | {"hidden_size": "64"}, "model.hidden_size: '64' is not valid"),
    ({"preset": 117}, "model.preset: 117 is not valid"),
]
"""``model`` sections, and the beginning of the message."""

BETWEEN_KEYS = {
    "curriculum above data",
    "data above model",
    "curriculum above model",
    "lr missing",
    "warmup over budget",
    "decay over budget",
    "two warmups",
    "budget below a step",
    "blended twice",
    "valid twice",
    "valid and split",
    "windows compiled",
    "sum too large",
    "corpus twice",
    "warmup start",
    "warmup increment",
    "bucket above",
    "clip twice",
    "one beta",
    "curriculum: min above max",
    "curriculum: rung above max",
    "curriculum: two durations",
    "curriculum: no duration",
    "curriculum: stages don't match",
    "curriculum: stages go back",
    "curriculum: stage outside",
    "curriculum: turns don't match",
    "curriculum: turn outside",
    "curriculum: no such function",
    "curriculum: not a function",
    "model: model: hidden_size 66 is not a multiple of num_attention_heads 4",
}
"""Of all these, by the names in tests/test_schema.py, what a JSON schema can't find: every key has a right name and type."""
