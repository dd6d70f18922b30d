"""The configuration of transformers for the architecture of the ``model`` section, and a new model from it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from seqlen_curriculum.config.hf_config import TOKENS
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.errors import ConfigError, SeqlenCurriculumError
from seqlen_curriculum.fields import suggest
from seqlen_curriculum.models.pretrained import drop_code, quiet, read_config

__all__ = ["architecture_config", "new_model", "source_of"]


def architecture_config(config: ModelConfig) -> Any:
    """Return the configuration of transformers for ``config.architecture``. Raises ConfigError."""
    try:
        if config.initial is not None:
            return read_config(config.initial.folder)
        assert config.architecture is not None
        with quiet():
            lm_config = _new_config(config.architecture)
        drop_code(lm_config)
    except SeqlenCurriculumError:
        raise
    except Exception as error:  # a wrong value raises one of many classes, also of other libraries
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source_of(config)}: transformers can't read its config.json: {problem}") from error
    return lm_config


def source_of(config: ModelConfig) -> str:
    """Return the key that names the architecture, with the folder of a pretrained model, for messages."""
    return config.source if config.initial is None else f"{config.source}: {config.hf_checkpoint}"


def _new_config(given: dict[str, Any]) -> Any:
    lm_config = AutoConfig.for_model(**copy.deepcopy(given))  # a copy, because transformers changes nested objects
    known = {field.name for field in dataclasses.fields(lm_config)} | set(lm_config.attribute_map)
    for key in given.keys() - known:
        if meant := suggest(key, known, cutoff=0.8):
            raise ValueError(f"{key}: unknown key of {given['model_type']}; did you mean '{meant}'?")
    # The default ids are those of the tokenizer of the family's first model, for example 2 for Llama's end.
    for key in TOKENS:
        if key not in given and hasattr(lm_config, key):
            setattr(lm_config, key, None)
    return lm_config


def new_model(config: ModelConfig, lm_config: Any) -> Any:
    """Return a causal language model or an encoder, with weights by the architecture's own init.

    It is in fp32 whatever the saved dtype. Raises ValueError for an architecture without one.
    """
    if config.initial is None:
        lm_config.vocab_size = config.padded_vocab_size
    auto = AutoModelForMaskedLM if config.is_encoder else AutoModelForCausalLM
    lm = auto.from_config(lm_config, dtype=torch.float32, trust_remote_code=False)
    if config.initial is None:
        # An embedding doesn't train its padding token. Rows are never padded, and in a corpus with another tokenizer that id
        # is an ordinary token.
        lm.get_input_embeddings().padding_idx = None
    return lm
