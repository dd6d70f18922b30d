"""Read and check ``model.hf_config``: the ``config.json`` of an architecture of transformers. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seqlen_curriculum.config.architectures import COMMON_KEYS, FAMILIES, REQUIRED, keys
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import suggest
from seqlen_curriculum.files import read_json
from seqlen_curriculum.run_folder import MANIFEST
from seqlen_curriculum.run_folder.hub import hub_folder, is_hub_name
from seqlen_curriculum.run_folder.model_files import code_in, dropout_problem
from seqlen_curriculum.run_folder.model_folder import CAUSAL, MASKED, SIZES, is_encoder, vocabulary
from seqlen_curriculum.strict_json import shown

__all__ = [
    "TOKENS",
    "causal_types",
    "classes",
    "config_problems",
    "read_hf_config",
    "size_problems",
    "split_keys",
    "with_sizes",
]

_MOST_LAYERS = 10_000
_GPT2_KEYS = keys(
    """
    model_type vocab_size n_positions n_embd n_layer n_head n_inner n_ctx activation_function resid_pdrop embd_pdrop
    attn_pdrop layer_norm_epsilon initializer_range scale_attn_weights scale_attn_by_inverse_layer_idx
    reorder_and_upcast_attn use_cache bos_token_id eos_token_id pad_token_id tie_word_embeddings add_cross_attention
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """
)
_NOT_GPT2S = keys("intermediate_size hidden_act attention_dropout rope_parameters rope_theta rope_scaling")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Keys with the ids of tokens, which depend on the tokenizer."""


def read_hf_config(path: str) -> dict[str, Any]:
    """Return the object in ``path``: a ``config.json``, a folder with one, or the name of a model on the Hub.

    The configuration of a checkpoint of this package gets its vocabulary without padding. Raises ConfigError,
    CheckpointError.
    """
    if not path:
        raise ConfigError("'' is not a path; give a config.json, a folder with one, or the object itself")
    place = hub_folder(path, weights=False) if is_hub_name(path) else Path(path)
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        missing = "has no config.json" if place.is_dir() else "there is no such file"
        raise ConfigError(f"{path}: {missing}; give a config.json, a folder with one, or the object itself")
    config = read_json(file)
    if (file.parent / MANIFEST).exists() and file.name == "config.json":
        config["vocab_size"] = vocabulary(file.parent)
    return config


def split_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration without the keys that its architecture doesn't have, and those keys.

    Only for a known architecture; transformers keeps such keys of others. Keys with a leading underscore are dropped.
    """
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"}
    known = known_keys(kept.get("model_type"))
    ignored = [key for key in kept if key not in known] if known else []
    return {key: value for key, value in kept.items() if key not in ignored}, ignored


def known_keys(model_type: object) -> frozenset[str]:
    """Return the keys of an architecture, none if it isn't known."""
    if model_type == "gpt2":
        return _GPT2_KEYS | (COMMON_KEYS - _NOT_GPT2S)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family.keys | COMMON_KEYS if family else frozenset()


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per reason why no causal language model or encoder can be built from ``config``."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        yield f'model_type: {shown(model_type)} is not the name of an architecture; write, for example, "llama"'
        return
    if problem := _type_problem(model_type, config):
        yield problem
        return
    if kernel := code_in(config):
        yield f"{kernel} names code to download, which is never run; remove the key"
    yield from _causal_problems(config)
    yield from _key_problems(model_type, config)
    yield from size_problems(config)
    if problem := dropout_problem(config):
        yield problem


def _type_problem(model_type: str, config: Mapping[str, Any]) -> str:
    masked = classes("MASKED_LM")
    known = set(masked) if is_encoder(config) else {*FAMILIES, "gpt2", *causal_types()}
    kind = "encoder for masked tokens" if is_encoder(config) else "causal language model"
    if model_type in known or not causal_types():  # without transformers other types are checked by the training
        return ""
    if model_type in masked and not config.get("architectures"):
        return (
            f"architectures: not given, and {shown(model_type)} has no causal language model; for training.objective "
            f'"masked" add "architectures": ["{masked[model_type]}"]'
        )
    if config.get("auto_map"):
        return (
            f"auto_map: {shown(config['auto_map'])} is Python code of the model, which is never run, and transformers "
            f"has no {kind} of model_type {shown(model_type)}; give an architecture of transformers"
        )
    meant = suggest(model_type, known)
    hint = f"; did you mean '{meant}'?" if meant else "; give the model_type of one, such as llama"
    return f"model_type: {shown(model_type)} has no {kind} in the installed transformers{hint}"


def _causal_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("is_encoder_decoder"):
        yield "is_encoder_decoder: true is not a causal language model; give a decoder, such as llama"
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    other = [name for name in names if not str(name).endswith((*CAUSAL, MASKED))]
    if other:
        yield (
            f"architectures: {shown(other[0])} is not a causal language model; remove the key, or name a ...ForCausalLM, or "
            f"a ...{MASKED}"
        )


def _key_problems(model_type: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that are misspelt or belong to another architecture; others are only ignored, with a warning."""
    known = known_keys(model_type)
    if not known:
        return
    elsewhere = dict.fromkeys(COMMON_KEYS, "llama") | dict.fromkeys(_GPT2_KEYS, "gpt2")
    elsewhere |= {key: name for name, family in FAMILIES.items() for key in family.keys}
    for key in split_keys(config)[1]:
        meant = _same_size(key, known) or suggest(key, known, cutoff=0.8)
        if meant and meant not in config:  # the first Llama has max_sequence_length beside max_position_embeddings
            yield f"{shown(key)[1:-1]}: unknown key of {model_type}; did you mean '{meant}'?"
        elif key in elsewhere and config[key]:
            yield f"{key}: {shown(config[key])} is a key of {elsewhere[key]}, not of {model_type}; remove it"


def _same_size(key: str, known: frozenset[str]) -> str | None:
    """Return the architecture's own name of a size: ``hidden_size`` for ``n_embd``."""
    names = next((names for names in SIZES.values() if key in names), ())
    return next((name for name in names if name in known), None)


def size_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes that are missing, of a wrong type, too many to plan, or don't divide each other.

    Of an architecture that isn't in ``FAMILIES`` only the number of layers is checked.
    """
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > _MOST_LAYERS:
        yield f"num_hidden_layers: {layers} is above {_MOST_LAYERS:,}; lower it"
    family = FAMILIES.get(config["model_type"])
    if family is None:
        return
    counted = {**family.defaults, **config}
    whole = [*REQUIRED, "max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window", *_EXPERTS]
    wrong = [key for key in REQUIRED if key not in config]
    yield from (f"{key}: required, but not given" for key in wrong)
    for key in whole:
        value = counted.get(key)
        if key in REQUIRED and key in config and value is None:
            value = "null"
        if value is not None and (type(value) is not int or value < 1):
            wrong.append(key)
            yield f"{key}: {shown(value)} is not valid: write a whole number of at least 1"
    if not wrong:
        yield from _head_problems(counted, family.checks_width, defaults=family.defaults.keys() - config.keys())
        yield from _list_problems(counted)


_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
)


def _head_problems(config: Mapping[str, Any], checks_width: bool, defaults: set[str]) -> Iterator[str]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads and (checks_width or not config.get("head_dim")):
        yield f"hidden_size: {width} is not a multiple of num_attention_heads {heads}; change one of them"
        return
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        source = " (the default)" if "num_key_value_heads" in defaults else ""
        yield (
            f"num_key_value_heads: {kv_heads}{source} doesn't divide num_attention_heads {heads}; set it to a divisor"
        )
    head_size = config.get("head_dim") or width // heads
    if head_size % 2:
        yield (
            f"head_dim: {head_size} is odd, but rotary positions rotate pairs; change hidden_size {width} or "
            f"num_attention_heads {heads}"
        )


def _list_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("layer_types", "mlp_only_layers"):
        value = config.get(key)
        if value is not None and not isinstance(value, list):
            yield f"{key}: {shown(value)} is not a list; write [...] or remove it"
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if isinstance(kinds, list) and len(kinds) != layers:
        yield f"layer_types: has {len(kinds)} entries for num_hidden_layers {layers}; give one for each layer"


def causal_types() -> frozenset[str]:
    """Return every ``model_type`` with a causal language model in the installed transformers, none without transformers."""
    return frozenset(classes("CAUSAL_LM"))


@lru_cache(maxsize=2)
def classes(task: str) -> dict[str, str]:
    """Return the class for ``task``, "CAUSAL_LM" or "MASKED_LM", of every ``model_type`` in the installed transformers.

    Empty without transformers. The list is read as text, because importing transformers imports torch and takes seconds.
    """
    package = find_spec("transformers")
    folders = package.submodule_search_locations if package else None
    if not folders:
        return {}
    try:
        text = (Path(folders[0]) / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    block = re.search(rf"^MODEL_FOR_{task}_MAPPING_NAMES = .*?^\)", text, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r'\("([^"]+)", "(\w+)"\)', block[0])) if block else {}


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return ``config`` with ``sizes``, by the names in ``SIZES``, and without the ids of tokens that no longer exist."""
    changed = dict(config)
    for size, value in sizes.items():
        changed |= {name: value for name in SIZES[size] if name in config}
    for key in TOKENS:
        if changed.get(key, 0) >= changed["vocab_size"]:
            del changed[key]
    return changed
