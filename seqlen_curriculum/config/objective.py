"""Check that ``training.objective`` suits the model, and for masked tokens the engine and the method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from seqlen_curriculum.config.model import ModelConfig

if TYPE_CHECKING:
    from seqlen_curriculum.config.run import RunConfig

__all__ = ["objective_problems"]


def objective_problems(config: RunConfig) -> Iterator[str]:
    """Yield one line per reason why the model can't be trained with the file's objective."""
    training, model = config.training, config.model
    if training is None:
        return
    masked = training.objective == "masked"
    if model is not None and masked and not model.is_encoder:
        yield (
            f'training.objective: "masked" needs an encoder, but {_source(model)} is a causal language model; give a model '
            'whose architectures in config.json is, for example, ["BertForMaskedLM"], or set it to "causal"'
        )
    elif model is not None and not masked and model.is_encoder:
        yield (
            f'training.objective: "causal" can\'t train the encoder of {_source(model)}, which sees later tokens; set it to '
            '"masked", or give a causal language model'
        )
    elif model is not None and masked and model.architecture and model.architecture.get("is_decoder"):
        yield (
            f'training.objective: "masked" needs an encoder, but is_decoder is true in the config.json of {_source(model)}, '
            "so that it doesn't see later tokens; set it to false there"
        )
    elif masked:
        yield from _masked_problems(config)


def _masked_problems(config: RunConfig) -> Iterator[str]:
    training, model = config.training, config.model
    assert training is not None
    for name, degree in config.keys.degrees.items():
        if degree > 1:
            yield (
                f'{name}: {degree} doesn\'t work with training.objective "masked", which trains data-parallel; set it to 1 '
                "(ZeRO 0 to 3 and offload work)"
            )
    if config.shortening.method == "window":
        yield (
            'curriculum_learning.method: "window" needs causal attention, which the encoders of training.objective "masked" '
            'don\'t have; set it to "truncate" or "segment"'
        )
    if model is not None and model.rope is not None:
        yield 'model.rope: lengthens causal language models, not the encoders of training.objective "masked"; remove it'
    if training.compile:
        yield 'training.compile: true doesn\'t work with training.objective "masked"; set it to false'
    if model is not None and training.mask_token_id is not None and training.mask_token_id >= model.vocab_size:
        yield (
            f"training.mask_token_id: {training.mask_token_id} is outside the model's vocabulary of {model.vocab_size}; "
            "give an id below it"
        )


def _source(model: ModelConfig) -> str:
    """Return the key that chooses the model, and its value."""
    value = model.preset if model.hf_checkpoint is None else model.hf_checkpoint
    return model.source if value is None or model.hf_config is not None else f"{model.source} {value}"
