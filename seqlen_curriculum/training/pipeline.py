"""Models on DeepSpeed's pipeline engine: stages, and export of the weights to one Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from seqlen_curriculum.files import sync
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.causal_lm_stages import Words, stages_of, without_words
from seqlen_curriculum.models.gpt2 import CausalLM, save_config
from seqlen_curriculum.models.gpt2_pipeline_layers import WordEmbedding, hidden_loss, middle_layers, with_head
from seqlen_curriculum.models.pretrained import as_saved, save_configs, save_weights
from seqlen_curriculum.training.checkpoint_files import nothing_to_write

__all__ = ["ModelStages", "pipeline_of"]


def pipeline_of(model: CausalLM | AnyCausalLM, stages: int) -> ModelStages:
    """Return ``model`` partitioned into ``stages``. Raises ConfigError for an architecture that can't be cut."""
    if isinstance(model, CausalLM):
        weight = model.lm.transformer.wte.weight
        first, last = (TiedLayerSpec("words", WordEmbedding, weight, forward_fn=f) for f in (None, with_head))
        return ModelStages(model, WordEmbedding(weight), [first, *middle_layers(model), last], stages, hidden_loss)
    words, head, parts = Words(model.lm.get_input_embeddings()), model.head, stages_of(model, stages)
    assert head is not None  # stages_of requires it
    # The head computes the loss, after the forward of the last stage, which has its weights unless the embedding has them.
    tied = words.embedding.weight
    parts[-1].head = nn.ParameterList(weight for weight in head.parameters() if weight is not tied)
    layers: list[Any] = [words, *parts]
    if head.weight is tied:
        # DeepSpeed adds up the gradients of the first and the last stage.
        tie = partial(TiedLayerSpec, "words", Words, words.embedding, tied_weight_attr="embedding.weight")
        layers = [tie(), *parts, tie(forward_fn=without_words)]
    return ModelStages(model, words, layers, stages, partial(head))  # as a module it would be part of every stage


class ModelStages(PipelineModule):  # type: ignore[misc]
    """The ``layers`` of ``model`` partitioned into ``stages``; each rank keeps its own stage.

    The stages have an equal number of blocks if they divide. Every rank first builds the whole model in host memory, so the
    weights equal those of a run without a pipeline. ``words`` is the first layer; tied, it stands in ``layers`` as a spec.
    """

    def __init__(
        self,
        model: CausalLM | AnyCausalLM,
        words: nn.Module,
        layers: Sequence[Any],
        stages: int,
        loss: Callable[[Any, Tensor], Tensor],
    ) -> None:
        names = {id(parameter): name for name, parameter in model.lm.named_parameters()}
        # A tied last layer has no weights of its own.
        with_weights = [words, *(layer for layer in layers[1:] if isinstance(layer, nn.Module))]
        self._shapes = [
            {names[id(weight)]: weight.detach().to("meta") for weight in layer.parameters()} for layer in with_weights
        ]
        super().__init__(layers, num_stages=stages, loss_fn=loss, partition_method="type:GPT2Block|CausalLMStage")
        for parameter in self.parameters():
            # Without ZeRO, DeepSpeed's clipping omits the gradients of later stages from the norm unless they are marked.
            parameter.model_parallel = not parameter.ds_pipe_replicated
        mine = {id(parameter) for parameter in self.parameters()}
        for parameter in model.lm.parameters():
            if id(parameter) not in mine:
                parameter.data = parameter.data.new_empty(0)  # belongs to another stage: free the memory

    def hf_writer(self, model: CausalLM | AnyCausalLM) -> Callable[[Path], None]:
        """Copy this stage's weights to host memory, and return a function that writes them, one safetensors file per stage.

        When all ranks have written, the folder can be loaded with ``from_pretrained(folder)``.
        """
        files = [f"model-{stage + 1:05d}-of-{self.num_stages:05d}.safetensors" for stage in range(self.num_stages)]
        parameters, layout = dict(model.lm.named_parameters()), partial(as_saved, model.lm)
        if self._grid.get_data_parallel_id() != 0:
            return nothing_to_write
        places = {name: file for stage, file in enumerate(files) for name in layout(self._stage_shapes(stage))}
        own = layout({name: parameters[name].detach() for name in self._stage_shapes(self.stage_id)})
        mine = {name: weight.to("cpu", copy=True).contiguous() for name, weight in own.items()}

        def write(folder: Path) -> None:
            save_weights(mine, folder / files[self.stage_id])
            sync(folder / files[self.stage_id])  # only the node that wrote a file can flush it
            if dist.get_rank() == 0:
                index = {"metadata": {}, "weight_map": places}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
                dtype = next(iter(mine.values())).dtype
                if isinstance(model, CausalLM):
                    save_config(model, folder, dtype)
                else:
                    save_configs(model.lm, folder, dtype)

        return write

    def _stage_shapes(self, stage: int) -> dict[str, Tensor]:
        """Return the weights of a stage, without their values, by their names in the Hugging Face model."""
        return {
            name: weight
            for layer in self._shapes[self.parts[stage] : self.parts[stage + 1]]
            for name, weight in layer.items()
        }
