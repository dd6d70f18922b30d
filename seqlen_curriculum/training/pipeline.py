"""GPT-2 on DeepSpeed's pipeline engine: stages, and export of the weights to one Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec

from seqlen_curriculum.files import sync
from seqlen_curriculum.models.gpt2 import CausalLM, save_config
from seqlen_curriculum.models.gpt2_pipeline_layers import WordEmbedding, hidden_loss, middle_layers, with_head
from seqlen_curriculum.models.pretrained import save_weights
from seqlen_curriculum.training.checkpoint_files import nothing_to_write

__all__ = ["GPT2Stages"]


class GPT2Stages(PipelineModule):  # type: ignore[misc]
    """``model`` partitioned into ``stages`` with an equal number of blocks if they divide; each rank keeps its own stage.

    Every rank first builds the whole model in host memory, so the weights equal those of a run without a pipeline.
    """

    def __init__(self, model: CausalLM, stages: int) -> None:
        weight = model.lm.transformer.wte.weight
        middle = middle_layers(model)
        names = {id(parameter): name for name, parameter in model.lm.named_parameters()}
        # The head has no weights of its own.
        layers_with_weights = (WordEmbedding(weight), *middle)
        self._names = [[names[id(parameter)] for parameter in layer.parameters()] for layer in layers_with_weights]
        first, last = (TiedLayerSpec("words", WordEmbedding, weight, forward_fn=f) for f in (None, with_head))
        super().__init__(
            [first, *middle, last], num_stages=stages, loss_fn=hidden_loss, partition_method="type:GPT2Block"
        )
        for parameter in self.parameters():
            # Without ZeRO, DeepSpeed's clipping omits the gradients of later stages from the norm unless they are marked.
            parameter.model_parallel = not parameter.ds_pipe_replicated
        mine = {id(parameter) for parameter in self.parameters()}
        for parameter in model.lm.parameters():
            if id(parameter) not in mine:
                parameter.data = parameter.data.new_empty(0)  # belongs to another stage: free the memory

    def hf_writer(self, model: CausalLM) -> Callable[[Path], None]:
        """Copy this stage's weights to host memory, and return a function that writes them, one safetensors file per stage.

        When all ranks have written, the folder can be loaded with ``from_pretrained(folder)``.
        """
        files = [f"model-{stage + 1:05d}-of-{self.num_stages:05d}.safetensors" for stage in range(self.num_stages)]
        parameters = dict(model.lm.named_parameters())
        if self._grid.get_data_parallel_id() != 0:
            return nothing_to_write
        names = self._stage_names(self.stage_id)
        mine = {name: parameters[name].detach().to("cpu", copy=True).contiguous() for name in names}

        def write(folder: Path) -> None:
            save_weights(mine, folder / files[self.stage_id])
            sync(folder / files[self.stage_id])  # only the node that wrote a file can flush it
            if dist.get_rank() == 0:
                places = {name: file for stage, file in enumerate(files) for name in self._stage_names(stage)}
                index = {"metadata": {}, "weight_map": places}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
                save_config(model, folder, next(iter(mine.values())).dtype)

        return write

    def _stage_names(self, stage: int) -> list[str]:
        """Return the names of the weights of a stage's layers in the Hugging Face model."""
        return [name for names in self._names[self.parts[stage] : self.parts[stage + 1]] for name in names]
