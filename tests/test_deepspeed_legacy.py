"""A stand-in for Megatron-DeepSpeed, with its calls of DeepSpeed, trains with the legacy block on two ranks.

This module is also the launched script, whose functions import the integration: it changes DeepSpeed in their process.
"""

import argparse
import itertools
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler as DeepSpeedsOwn
from helpers.launching import ROOT
from helpers.parts import Part, do_parts, launch_parts

from seqlen_curriculum import CurriculumScheduler

FULL, ROWS, VOCAB, STEPS, SAVED = 32, 2, 20, 16, 6
BLOCK = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": FULL,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 12, "difficulty_step": 8},
}
CONFIG = {
    "train_micro_batch_size_per_gpu": ROWS,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "zero_force_ds_cpu_optimizer": False,
    "curriculum_learning": BLOCK,
}


def arguments(*flags):
    """The flags of a script that lets DeepSpeed add its own, as the global ``args`` of Megatron-DeepSpeed."""
    import deepspeed

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--seq-length", type=int, default=FULL)
    parser.add_argument("--local_rank", type=int, default=-1)
    return parser.parse_args(flags)


def language_model(args):
    """A model that truncates inside, as Megatron-DeepSpeed's GPTModel does."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB))

        def forward(self, tokens, labels, curriculum_seqlen=None):
            args.curriculum_seqlen = args.seq_length if curriculum_seqlen is None else curriculum_seqlen
            if curriculum_seqlen is not None:
                tokens, labels = tokens[:, :curriculum_seqlen], labels[:, :curriculum_seqlen]
            return torch.nn.functional.cross_entropy(self.layers(tokens).transpose(1, 2), labels, reduction="none")

    torch.manual_seed(0)
    return Model()


def rows():
    import torch

    tokens = (torch.arange(ROWS)[:, None] + torch.arange(FULL + 1)).remainder(VOCAB)
    return tokens[:, :-1], tokens[:, 1:]


def plain(folder, first=1):
    """Train, evaluate every 4 steps, save after step SAVED, and return what was seen. ``first`` > 1 resumes."""
    import deepspeed
    import torch
    from deepspeed.compression.compress import init_compression, redundancy_clean  # noqa: F401 - the tree imports them

    config = Path(folder) / f"ds{os.environ['RANK']}.json"
    config.write_text(json.dumps(CONFIG))
    args = arguments("--deepspeed", "--deepspeed_config", str(config))
    model = language_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer)
    if first > 1:
        engine.load_checkpoint(folder)
    seen = {
        "lengths": [],
        "losses": [],
        "evaluated": [],
        "of_engine": [],
        "enabled": engine.curriculum_enabled_legacy(),
    }
    for step in range(first, STEPS + 1):
        for _ in range(engine.gradient_accumulation_steps()):
            losses = engine(*rows())
            engine.backward(losses.mean())
            engine.step()
            seen["lengths"].append(losses.shape[1])
        seen["losses"].append(losses.mean().item())
        seen["of_engine"].append(engine.curriculum_scheduler_legacy.get_current_difficulty())
        if step % 4 == 0:
            engine.eval()
            with torch.no_grad():
                seen["evaluated"].append(engine(*rows()).shape[1])
            engine.train()
        if step == SAVED and first == 1:
            engine.save_checkpoint(folder)
    return seen


def pipeline(folder, first=1):
    """As ``plain`` on two stages, with Megatron-DeepSpeed's loop: the script sets the length and cuts its batches."""
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
    from torch import distributed as dist

    args, lengths = arguments("--deepspeed"), []
    args.curriculum_scheduler = CurriculumScheduler(BLOCK)

    def loss(logits, labels):
        lengths.append(labels.shape[1])
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    def cut(batch):
        return tuple(part[:, : args.curriculum_seqlen].contiguous() for part in batch)

    torch.manual_seed(0)
    layers = [torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCAB)]
    model = PipelineModule(layers, num_stages=2, loss_fn=loss, partition_method="uniform")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer, config=CONFIG)
    engine.set_batch_fn(cut)
    if first > 1:
        engine.load_checkpoint(folder)
    data, losses = itertools.repeat(rows()), []
    for iteration in range(first - 1, STEPS):
        seqlen = args.curriculum_scheduler.update_difficulty(iteration + 1)
        if iteration == 0 or seqlen != args.curriculum_seqlen:
            args.updated_rotary_to = seqlen
        args.curriculum_seqlen = seqlen
        losses.append(engine.train_batch(data_iter=data).item())
        if (iteration + 1) % 4 == 0:
            args.curriculum_seqlen = args.seq_length
            engine.reset_activation_shape()
            engine.eval_batch(data)
        if iteration + 1 == SAVED and first == 1:
            engine.save_checkpoint(folder)
    gathered = [None, None]
    dist.all_gather_object(gathered, lengths)
    return {"lengths": gathered[1], "losses": losses, "enabled": engine.curriculum_enabled_legacy()}


def zero_3(folder):
    """Three steps of a model that is built sharded."""
    import deepspeed
    import torch

    config = {**CONFIG, "zero_optimization": {"stage": 3}}
    args = arguments("--deepspeed")
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = language_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer, config=config)
    lengths = []
    for _ in range(2 * 3):
        losses = engine(*rows())
        engine.backward(losses.mean())
        engine.step()
        lengths.append(losses.shape[1])
    return {"lengths": lengths}


def refusals(folder):
    """The messages for configurations that would train at another length than the block's, and a block that is off."""
    import deepspeed
    import torch
    from deepspeed.compression.compress import init_compression

    def message(call, *given, **named):
        try:
            call(*given, **named)
        except ValueError as error:
            return str(error)
        return ""

    args, dense = arguments(), torch.nn.Linear(2, 2)
    model = language_model(args)

    def initialize(model, **changes):
        config = {**CONFIG, "curriculum_learning": {**BLOCK, **changes}}
        optimizer = torch.optim.AdamW(model.parameters())
        return deepspeed.initialize(args=args, model=model, optimizer=optimizer, config=config)[0]

    off = initialize(model, enabled=False)
    return {
        "no_keyword": message(initialize, dense),
        "method": message(initialize, model, method="segment"),
        "wrong": message(initialize, model, max_difficulty=4),
        "compression": message(init_compression, dense, {}),
        "off": [off.curriculum_enabled_legacy(), off(*rows()).shape[1]],
    }


def started(folder):
    """What a script sees that the example starts: its arguments, its neighbour, and a DeepSpeed that takes the block."""
    folder = Path(folder)
    (folder / "neighbour.py").write_text("VALUE = 7\n")
    lines = ["import json, sys, neighbour", "from deepspeed.compression.compress import init_compression"]
    script = folder / f"pretrain{os.environ['RANK']}.py"
    script.write_text(
        "\n".join([*lines, f"json.dump([sys.argv, neighbour.VALUE], open({str(script)!r} + '.json', 'w'))"])
    )
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = ["megatron_deepspeed.py", "--local_rank=0", str(script), "--deepspeed", "--data-path", "x"]
    try:
        runpy.run_path(str(ROOT / "examples" / "megatron_deepspeed.py"))["main"]()
    finally:
        sys.argv[:], sys.path[:] = argv, path
    return [str(script), json.loads(Path(f"{script}.json").read_text())]


def do(part, **given):
    import seqlen_curriculum.integrations.deepspeed_legacy  # noqa: F401

    parts = {"plain": plain, "pipeline": pipeline, "zero_3": zero_3, "refusals": refusals, "started": started}
    return parts[part](**given)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("legacy")
    parts = [Part(name, {"part": name, "folder": str(folder)}) for name in ("zero_3", "refusals", "started")]
    for name in ("plain", "pipeline"):
        given = {"part": name, "folder": str(folder / name)}
        (folder / name).mkdir()
        parts += [Part(name, given), Part(f"{name}_resumed", {**given, "first": SAVED + 1}, after=name)]
    return launch_parts(folder, __file__, parts, ranks=2)


def expected(steps=range(1, STEPS + 1)):
    """The lengths of DeepSpeed's own class, of both micro-batches of a step."""
    return [length for step in steps for length in [DeepSpeedsOwn(BLOCK).get_difficulty(step)] * 2]


def with_evaluations(lengths):
    """The lengths of training with those of the evaluations, of two micro-batches, after every fourth step."""
    return [
        length
        for first in range(0, len(lengths), 8)
        for length in lengths[first : first + 8] + [FULL] * 2 * (len(lengths) - first >= 8)
    ]


@pytest.mark.parametrize("linear", [(8, 1024, 100, 8), (64, 2048, 37, 8), (8, 64, 20, 8), (16, 100, 33, 4)])
def test_lengths_are_those_of_deepspeeds_class(linear):
    least, most, total, multiple = linear
    for schedule_type, more in [("fixed_linear", {}), ("fixed_root", {"root_degree": 2})]:
        config = {"total_curriculum_step": total, "difficulty_step": multiple, **more}
        sizes = {"min_difficulty": least, "max_difficulty": most}
        block = {**BLOCK, **sizes, "schedule_type": schedule_type, "schedule_config": config}
        ours, theirs = CurriculumScheduler(block), DeepSpeedsOwn(block)
        steps = range(1, 3 * total)
        assert [ours.update_difficulty(step) for step in steps] == [theirs.update_difficulty(step) for step in steps]


def test_a_model_that_truncates_gets_the_length_of_each_step(seen):
    assert seen["plain"]["lengths"] == expected()
    assert seen["plain"]["of_engine"] == expected()[::2]
    assert seen["plain"]["evaluated"] == [FULL] * 4
    assert seen["plain"]["losses"][-1] < seen["plain"]["losses"][0]
    assert seen["plain"]["enabled"] is True


def test_a_pipeline_trains_batches_that_the_script_cuts(seen):
    assert seen["pipeline"]["lengths"] == with_evaluations(expected())
    assert seen["pipeline"]["losses"][-1] < seen["pipeline"]["losses"][0]
    assert seen["pipeline"]["enabled"] is True


@pytest.mark.parametrize("part", ["plain", "pipeline"])
def test_a_resumed_run_continues_mid_warmup(seen, part):
    resumed = seen[f"{part}_resumed"]
    assert resumed["losses"] == seen[part]["losses"][SAVED:]
    if part == "plain":
        assert resumed["lengths"] == expected(range(SAVED + 1, STEPS + 1))


def test_zero_init_takes_the_block(seen):
    assert seen["zero_3"]["lengths"] == expected(range(1, 4))


def test_what_would_train_at_another_length_is_refused(seen):
    refused = seen["refusals"]
    assert "the forward of Linear takes no keyword 'curriculum_seqlen'" in refused["no_keyword"]
    assert "curriculum_learning.method: 'segment' is not available" in refused["method"]
    assert "max_difficulty" in refused["wrong"]
    assert "compression_training" in refused["compression"]


def test_the_example_starts_a_script_as_python_does(seen):
    script, (argv, value) = seen["started"]
    assert argv == [script, "--local_rank=0", "--deepspeed", "--data-path", "x"]
    assert value == 7


def test_a_block_that_is_off_trains_at_full_length(seen):
    assert seen["refusals"]["off"] == [False, FULL]


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed()
    do_parts(do)
    deepspeed.comm.destroy_process_group()
