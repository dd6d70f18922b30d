"""Run files with random faults, each a function of its number: odd values, keys, types, sizes, characters and bytes."""

import copy
import json
import random
from pathlib import Path

from helpers.launching import ROOT
from helpers.settings import block
from helpers.wrong_files import GOOD

CONFIG_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG_SIZES["max_position_embeddings"] = 64
SCHEDULES = [
    ("fixed_linear", {"curriculum_fraction": 0.3, "difficulty_step": 8}),
    ("fixed_linear", {"total_curriculum_tokens": 30_000, "difficulty_step": 1}),
    ("fixed_root", {"total_curriculum_step": 12, "difficulty_step": 8, "root_degree": 2}),
    ("adaptive", {"total_curriculum_step": 12, "difficulty_step": 8, "perplexity_ratio": 1.3}),
    ("fixed_discrete", {"difficulty": [8, 16, 64], "max_step": [5, 9]}),
    ("fixed_mixed", {"difficulty": [8, 64, 16], "steps": [3, 2, 1]}),
]
MORE_KEYS = {
    "batch_size_warmup": {"start": 2, "increment": 2, "tokens": 5_000},
    "fp16": {"enabled": True},
    "pipeline": {"stages": 2},
    "tensor_parallel": {"autotp_size": 2},
    "sequence_parallel_size": 2,
    "bfloat16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "_comment": "x",
}
TEXTS = [
    "",
    " ",
    "auto",
    "8",
    "x" * 5_000,
    "é\u202e\u2028",
    "\ud800",
    "a\0b",
    "a\nb\x1b[31m",
    "../..",
    "/dev/null",
    "a.b=c",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    0.5,
    -0.0,
    5e-324,
    1e-30,
    1e15,
    1e15 + 2,
    1e30,
    1.7e308,
    2**24,
    2**24 + 1,
    2**31,
    2**63,
    2**64,
]
NUMBERS += [10**15, 10**18, 10**308, 10**400, -(10**400)]
OTHERS = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"enabled": True},
    {"enabled": "yes"},
    [1, "a"],
    ["a", "a"],
]
FRAGMENTS = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5_000,
    "[" * 2_000,
    "{" * 70,
    '"\\ud800"',
    "\\",
    '"',
    ",",
    "}",
    "//",
    "/*",
    "#",
]
FRAGMENTS += ["\0", "\ufeff", "\u2028", "0x10", "01", "1_000", "'", "\r\n", ":", "tru"]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]}
SHAPE = {**CONFIG_SIZES, "num_key_value_heads": 2, "vocab_size": 300}
ARCHITECTURES = [
    {"model_type": "llama", **SHAPE, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "head_dim": None},
    {"model_type": "qwen3_moe", **SHAPE, **EXPERTS, "use_sliding_window": True, "sliding_window": 16, "head_dim": 16},
    {
        "model_type": "qwen2",
        **SHAPE,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    {"model_type": "bloom", "n_layer": 2, "n_head": 2, "hidden_size": 32, "vocab_size": 257, "n_positions": 64},
    {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 257,
        "n_inner": 48,
    },
]
"""Configurations of architectures, two of which aren't Llama-like."""


class Twin(str):
    """A key that equals no other one, so that an object can hold it twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def bases(tiny_run):
    """Return valid runs: all shipped ones, the tests' run, and every type of schedule with other sections beside it."""
    files = [
        path
        for path in sorted((ROOT / "configs").rglob("*.json"))
        if path.name != "run.schema.json" and path.parent.name != "studies"
    ]
    blocks = [block(schedule, schedule_type=kind, max_difficulty=64) for kind, schedule in SCHEDULES]
    grown = {**blocks[0], "batch_growth": True, "min_tokens_per_step": 256}
    windows = {**blocks[2], "method": "window", "restart_positions": True}
    blocks += [grown, windows, {**blocks[2], "method": "segment"}]
    runs = [*map(json.loads, map(Path.read_text, files)), tiny_run, GOOD]
    runs += [{**GOOD, "model": {"hf_config": copy.deepcopy(config)}} for config in ARCHITECTURES]
    return runs + [{**GOOD, "curriculum_learning": curriculum} for curriculum in blocks]


def mutated_run(number, runs):
    """Return the bytes of a file, overrides and a number of ranks."""
    draw = random.Random(f"run {number}")
    run = copy.deepcopy(draw.choice(runs))
    only_numbers = draw.random() < 0.5  # most of these runs are planned, most others refused
    for name in draw.sample(
        sorted(MORE_KEYS), draw.choice([0, 0, 0, 1]) if only_numbers else draw.choice([0, 0, 1, 2])
    ):
        run[name] = copy.deepcopy(MORE_KEYS[name])
    for _ in range(draw.choice([0, 1, 1, 2, 3, 8])):
        draw.choice([_scale, _shift, _count] if only_numbers else MUTATIONS)(draw, run)
    text = json.dumps(run, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2]))
    if draw.random() < 0.2 and not only_numbers:
        text = _edited(draw, text)
    content = text.encode("utf-16" if draw.random() < 0.01 else "utf-8", "surrogatepass")
    if draw.random() < 0.03 and not only_numbers:
        at = draw.randrange(len(content) + 1)
        content = content[:at] + draw.randbytes(draw.randrange(4)) + content[at + draw.randrange(4) :]
    overrides = [_override(draw, run) for _ in range(0 if only_numbers else draw.choice([0, 0, 0, 1, 2]))]
    return content, overrides, draw.choice([1, 1, 1, 1, 2, 3, 8, 2**40])


def any_count(draw):
    """Return a number of steps, tokens, rows or ranks from 1 to just above the largest valid one."""
    return draw.choice([1, 1, 1.0]) * int(10 ** draw.uniform(0, 15.1))


def odd_value(draw):
    if draw.random() < 0.4:
        return any_count(draw)
    kind = draw.choice([TEXTS, NUMBERS, OTHERS])
    value = copy.deepcopy(draw.choice(kind))
    if draw.random() < 0.03:
        value = [value] * draw.choice([2, 100, 100 if isinstance(value, str) else 20_000])
    for _ in range(draw.choice([0, 0, 0, 0, 1, 2, 80]) if draw.random() < 0.1 else 0):
        value = draw.choice([[value], {"a": value}])
    return value


def _places(value):
    """Yield (container, key) of every value at any depth."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _place(draw, run, of=(dict, list)):
    places = [(container, key) for container, key in _places(run) if isinstance(container, of)]
    return draw.choice(places) if places else (run, "train_batch_size")


def _replace(draw, run):
    container, key = _place(draw, run)
    container[key] = odd_value(draw)


def _number(draw, run):
    """Return the container and the key of a random number; of a new one in a run without numbers."""
    numbers = [(box, key) for box, key in _places(run) if type(box[key]) in (int, float)]
    if not numbers:
        run["train_batch_size"] = 8
    return draw.choice(numbers or [(run, "train_batch_size")])


def _scale(draw, run):
    container, key = _number(draw, run)
    factor = draw.choice([0, -1, 0.5, 0.5, 2, 2, 2, 3, 10, 1000, 1e6, 1e9])
    value = container[key] * (factor if abs(container[key]) < 1e290 else int(factor))  # 10**400 is above any float
    container[key] = int(value) if isinstance(container[key], int) and abs(value) < 1e300 else value


def _shift(draw, run):
    container, key = _number(draw, run)
    change = draw.choice([-1, 1, 1, 0.5])
    container[key] += change if abs(container[key]) < 1e290 else int(change)


def _count(draw, run):
    container, key = _number(draw, run)
    container[key] = any_count(draw)


def _misspell(draw, run):
    container, key = _place(draw, run, dict)
    at = draw.randrange(len(key) + 1)
    other = (
        key[:at] + draw.choice(["", "x", "_", "é", "\ud800", "\0", key[at:].upper()]) + key[at + draw.randrange(2) :]
    )
    container[other] = container.pop(key, 8)


def _move(draw, run):
    container, key = _place(draw, run, dict)
    value = container.pop(key, 8)
    other, at = _place(draw, run)
    (other[at] if isinstance(other[at], dict) else run)[key] = value


def _duplicate(draw, run):
    container, key = _place(draw, run, dict)
    container[Twin(key)] = copy.deepcopy(container.get(key)) if draw.random() < 0.5 else odd_value(draw)


def _delete(draw, run):
    container, key = _place(draw, run)
    if isinstance(container, list) or key in container:
        del container[key]


def _swap(draw, run):
    (one, first), (other, second) = _place(draw, run), _place(draw, run)
    one[first], other[second] = copy.deepcopy(other.get(second) if isinstance(other, dict) else other[second]), 8


def _add(draw, run):
    container, _ = _place(draw, run, dict)
    container[draw.choice([*TEXTS, "extra", "lr", "stage", "enabled"])] = odd_value(draw)


MUTATIONS = [_replace, _replace, _replace, _scale, _scale, _shift, _misspell, _move, _duplicate, _delete, _swap, _add]


def _edited(draw, text):
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(text) + 1)
        cut = draw.choice([0, 0, 1, 5, len(text)])
        text = text[:at] + draw.choice([*FRAGMENTS, "", chr(draw.randrange(0x20, 0x7F))]) + text[at + cut :]
    return text


def _override(draw, run):
    path, value = [], run
    while isinstance(value, dict) and value and (not path or draw.random() < 0.9):
        path.append(draw.choice(sorted(value)))
        value = value[path[-1]]
    path += draw.choice([[], [], [], ["x"], [""]])
    return ".".join(path) + draw.choice(["=", "=", "=", ""]) + json.dumps(odd_value(draw))
