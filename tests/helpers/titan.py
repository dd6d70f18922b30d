"""torchtitan's own Trainer on a CPU: a tiny Llama, a recorder of its batches, and the launched ranks.

torchtitan knows no CPU. The device functions that it looks up in ``torch.cpu`` are added here, FlexAttention runs without
a compiler, and its refusal of gradients on a CPU is taken back: without a compiler it computes them by plain attention.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # before torch reads it

import torch
import torch.nn.attention.flex_attention as flex

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda *_: "CPU"
torch.cpu.get_device_properties = lambda *_: SimpleNamespace(total_memory=2**33)
torch.cpu.memory_stats = lambda *_: {}
torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = lambda: None
torch.cpu.current_device = lambda: 0
flex._validate_device = lambda *_: None
flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # without it the uncompiled function warns
barrier = torch.distributed.barrier
torch.distributed.barrier = lambda **_: barrier()  # gloo takes no device_ids
if not hasattr(torch.distributed, "set_timeout"):  # torch 2.14 has it
    torch.distributed.set_timeout = lambda *_: None

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.components.checkpoint import CheckpointManager  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.config import DebugConfig, TrainingConfig  # noqa: E402
from torchtitan.hf_datasets import DatasetConfig  # noqa: E402
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader  # noqa: E402
from torchtitan.models.common.rope import ComplexRoPE  # noqa: E402
from torchtitan.models.llama3 import _build_llama3_layers, model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from helpers.launching import free_port  # noqa: E402
from seqlen_curriculum.integrations.torchtitan import RunDataLoader, warm_up  # noqa: E402

END = "<|endoftext|>"


def sources(path):
    """The paragraphs of the standard library's sources in a folder, a short document each."""
    files = sorted(Path(path).glob("*.py"))
    return Dataset.from_list([{"text": text} for file in files for text in file.read_text().split("\n\n") if text])


DATASETS["sources"] = DatasetConfig(
    path=str(Path(json.__file__).parent), loader=sources, sample_processor=lambda sample: sample["text"]
)


def byte_tokenizer(folder):
    """Write a tokenizer of 256 bytes and an end of text; return its folder."""
    vocabulary = {**{letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END}))
    return str(folder)


def tiny_llama(attention="flex"):
    """The specification of a Llama of one layer with ``attention`` "flex" or "varlen"."""
    spec, width, vocabulary = model_registry("debugmodel"), 32, 257
    layers = _build_llama3_layers(
        n_layers=1,
        dim=width,
        n_heads=2,
        hidden_dim=64,
        rope=ComplexRoPE.Config(dim=width // 2, max_seq_len=64),
        attn_backend=attention,
    )
    model = dataclasses.replace(
        spec.model,
        dim=width,
        vocab_size=vocabulary,
        tok_embeddings=dataclasses.replace(spec.model.tok_embeddings, num_embeddings=vocabulary, embedding_dim=width),
        norm=dataclasses.replace(spec.model.norm, normalized_shape=width),
        lm_head=dataclasses.replace(spec.model.lm_head, in_features=width, out_features=vocabulary),
        layers=layers,
    )
    return dataclasses.replace(spec, model=model)


def config(folder, **training):
    """A configuration of torchtitan's Trainer: steps of 8 rows of 32 tokens on one rank, in two micro-batches."""
    defaults = {"local_batch_size": 4, "global_batch_size": 8, "seq_len": 32, "disable_cuda_graphs": True}
    return Trainer.Config(
        model_spec=tiny_llama(),
        hf_assets_path=byte_tokenizer(Path(folder) / "tokenizer"),
        dump_folder=str(folder),
        loss=CrossEntropyLoss.Config(global_vocab_size=257),
        optimizer=dataclasses.replace(default_adamw(lr=5e-3), implementation="for-loop"),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=5),
        training=TrainingConfig(mixed_precision_param="float32", **{**defaults, **training}),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="sources"),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(enable=True, interval=10, keep_latest_k=0, last_save_model_only=False),
        activation_checkpoint=None,
        debug=DebugConfig(seed=0),
    )


class Recorder:
    """What a trainer's model was given, and the loss, rate and token count of every step."""

    def __init__(self, trainer):
        self.trainer, self.batches, self.evaluated, self.metrics = trainer, [], [], {}
        self.hook = trainer.model_parts[0].register_forward_pre_hook(self.on_forward, with_kwargs=True)
        self._log, trainer.metrics_processor.log = trainer.metrics_processor.log, self.log

    def on_forward(self, model, inputs, options):
        rate = self.trainer.optimizers.optimizers[0].param_groups[0]["lr"]
        batch = {"step": self.trainer.step, "input": inputs[0].tolist(), "rate": rate}
        (self.batches if model.training else self.evaluated).append(
            {**batch, "positions": options["positions"].tolist()}
        )

    def log(self, step, loss, *others, extra_metrics):
        self.metrics[step] = {"loss": loss, "tokens": extra_metrics["n_tokens_seen"]}
        self._log(step, loss, *others, extra_metrics=extra_metrics)

    def rows(self, step, key="input"):
        """The rows of a step on this rank."""
        return [row for batch in self.batches if batch["step"] == step for row in batch[key]]

    def rates(self):
        """The rate of each step from the first recorded one on."""
        return list({batch["step"]: batch["rate"] for batch in self.batches}.values())


def train(config, curriculum=None):
    """Train with the real Trainer on this rank; return its recorder."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", free_port())
    trainer = (config if curriculum is None else warm_up(config, curriculum)).build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    recorder = Recorder(trainer)
    try:
        trainer.train()
    finally:
        recorder.hook.remove()
        trainer.close()
    return recorder


if __name__ == "__main__":  # a launched rank: CURRICULUM OUT, then folders to train in or to resume from step 20
    curriculum, out, *folders = sys.argv[1:]
    for number, folder in enumerate(folders):
        ranked = config(folder, local_batch_size=2)
        ranked.dataloader = RunDataLoader.Config()
        ranked.parallelism.spmd_backend = "partial_dtensor"
        if (Path(folder) / "checkpoint").exists():
            ranked.checkpoint.load_step = 20
        recorder = train(ranked, curriculum)
        results = {"batches": recorder.batches, "metrics": recorder.metrics}
        Path(f"{out}.{number}.{os.environ['RANK']}").write_text(json.dumps(results))
