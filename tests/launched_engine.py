"""Run on two ranks by test_engine.py: many engines in one launch. Rank 0 writes what it saw as JSON.

usage: launched_engine.py OUT_FILE PAPER_JSON
"""

import copy
import json
import resource
import sys
from pathlib import Path

import deepspeed
import psutil
import torch
from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler as DeepSpeedScheduler

from seqlen_curriculum import ConfigError, CurriculumScheduler, RunConfig, initialize
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.training.accumulate import accumulate
from seqlen_curriculum.training.adam_moments import adam_moments
from seqlen_curriculum.training.build import write_model
from seqlen_curriculum.training.checkpoint import Checkpoints
from seqlen_curriculum.training.executor import DataParallel
from seqlen_curriculum.training.preflight import preflight

BLOCK = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 4,
    "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 4},
}
PAPER_BLOCK = {**BLOCK, "min_difficulty": 8, "max_difficulty": 1024}
PAPER_BLOCK["schedule_config"] = {"total_curriculum_step": 60_000, "difficulty_step": 8}
RUN = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_clipping": 0.5,
    "curriculum_learning": BLOCK,
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 2, "min_lr": 1e-3}},
    "training": {"train_tokens": 1000},
}


def model(positions=16):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 128}
    return build_gpt2(ModelConfig(max_position_embeddings=positions, **sizes))


def train(engine, steps, rows, device_rows_seed=1):
    """``steps`` optimizer steps as a user's own loop would do them; (losses, lengths, rates) of each."""
    losses, lengths, rates = [], [], []
    for _ in range(steps):
        step = engine.global_steps + 1
        seqlen = engine.curriculum_scheduler.update_difficulty(step)
        generator = torch.Generator().manual_seed(device_rows_seed * 1000 + step)
        tokens = torch.randint(0, 128, (dist.get_world_size(), rows, seqlen + 1), generator=generator)[dist.get_rank()]
        total = 0.0
        for row in range(0, rows, engine.train_micro_batch_size_per_gpu()):
            micro = tokens[row : row + engine.train_micro_batch_size_per_gpu()]
            loss = engine(micro[:, :-1], micro[:, 1:])
            total += float(loss.detach()) / engine.gradient_accumulation_steps()
            engine.backward(loss)
            rates_now = engine.get_lr()[0]
            engine.step()
        mean = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        lengths.append(seqlen)
        rates.append(rates_now)
    return losses, lengths, rates


def engine_for(model, config):
    engine, _, _, lr_scheduler = initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine, lr_scheduler


def run(**changes):
    return {**copy.deepcopy(RUN), **changes}


def zero_stages():
    """The same losses, lengths and rates whatever shards the run, and under bf16."""
    seen = {}
    for stage in (0, 1, 2, 3):
        engine, _ = engine_for(model(), run(zero_optimization={"stage": stage}))
        seen[f"zero {stage}"] = train(engine, 8, rows=2)
    engine, _ = engine_for(model(), run(zero_optimization={"stage": 1}, bf16={"enabled": True}))
    seen["bf16"] = train(engine, 8, rows=2)
    return seen


def balanced():
    """50 steps whose micro-batches change with the length, against fixed ones, under every ZeRO stage."""
    seen = {}
    for stage in (0, 1, 2, 3):
        for kind in ("fixed", "balanced"):
            config = run(train_batch_size=8, zero_optimization={"stage": stage}, training={"train_tokens": 20_000})
            config["curriculum_learning"]["schedule_config"] = {"total_curriculum_step": 40, "difficulty_step": 2}
            config["optimizer"]["params"]["lr"] = 2e-3  # noise has no structure to learn: higher rates amplify rounding
            engine, _ = engine_for(model(), config)
            losses, shapes = [], []
            for step in range(1, 51):
                seqlen = engine.curriculum_scheduler.update_difficulty(step)
                generator = torch.Generator().manual_seed(step)
                tokens = torch.randint(0, 128, (2, 4, seqlen + 1), generator=generator)[dist.get_rank()]
                rows = balanced_rows(4, 1, 16, seqlen) if kind == "balanced" else 1
                batches = [(part[:, :-1], part[:, 1:]) for part in torch.split(tokens, rows)]
                loss = accumulate(engine, batches)
                engine.step()
                dist.all_reduce(loss)
                losses.append(float(loss) / dist.get_world_size())
                shapes.append(len(batches))
            seen[f"{kind} {stage}"] = {"losses": losses, "micro_batches": shapes, "steps": engine.global_steps}
    return seen


# A higher rate amplifies rounding from step to step.
CALM = {
    "gradient_clipping": 0,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "torch_adam": True}},
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 2}},
}


def moments():
    """Adam's state as measured under every ZeRO stage and offload, and summed up in an unsharded run of plain torch."""
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    stages = {**{f"zero {stage}": {"stage": stage} for stage in range(4)}, "offload": offload}
    seen = {}
    for name, zero in stages.items():
        engine, _ = engine_for(model(), run(**CALM, zero_optimization=zero, zero_force_ds_cpu_optimizer=False))
        seen[name] = [adam_moments(DataParallel(engine))]  # no step taken yet
        for _ in range(3):
            train(engine, 1, rows=2)
            seen[name].append(adam_moments(DataParallel(engine)))
    fp16, _ = engine_for(model(), run(fp16={"enabled": True, "initial_scale_power": 8}))
    train(fp16, 1, rows=2)
    sgd, _ = engine_for(model(), run(optimizer={"type": "SGD", "params": {"lr": 1e-2}}))
    train(sgd, 1, rows=2)
    seen |= {name: adam_moments(DataParallel(engine)) for name, engine in (("fp16", fp16), ("sgd", sgd))}
    return {**seen, "torch": plain_torch(steps=3)}


def plain_torch(steps):
    """The run of ``train`` with both ranks' rows in one batch and neither DeepSpeed nor our code around torch's Adam."""
    config = RunConfig.from_dict(run(**CALM))
    network, timeline = model(), config.timeline()
    rate, optimizer, seen = config.plan.learning_rate(), torch.optim.AdamW(network.parameters(), weight_decay=0), []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, 128, (2, 2, timeline.seqlen(step) + 1), generator=generator).flatten(0, 1)
        network(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state.values()
        root = torch.cat([one["exp_avg_sq"].flatten() for one in state]).double().sqrt()
        momentum = torch.cat([one["exp_avg"].flatten() for one in state]).double().abs()
        sizes = (root.sum(), root.max(), momentum.sum(), momentum.max())
        names = ("variance_norm", "variance_max", "momentum_norm", "momentum_max")
        seen.append({name: float(size) for name, size in zip(names, sizes, strict=True)})
    return seen


def skipped_steps():
    """A loss scale no gradient survives: fp16 skips the first steps, whose tokens were read all the same."""
    fp16 = {"enabled": True, "initial_scale_power": 28, "hysteresis": 1}
    engine, lr_scheduler = engine_for(model(), run(zero_optimization={"stage": 1}, fp16=fp16))
    _, lengths, rates = train(engine, 12, rows=2)
    rate = lr_scheduler.rate
    return {
        "skipped": engine.skipped_steps,
        "rates": rates,
        "lengths": lengths,
        "planned": [rate(step) for step in range(1, 13)],
    }


def zero_3_checkpoint(folder):
    """A sharded model is saved whole, and continues as if nothing had happened."""
    config = run(zero_optimization={"stage": 3})
    checkpoints = Checkpoints(folder, 1, RunConfig.from_dict(config).settings())
    engine, _ = engine_for(model(), config)
    train(engine, 3, rows=2)
    checkpoints.save(engine, 3, lambda path: write_model(engine.module, path))
    expected = train(engine, 2, rows=2)
    again, _ = engine_for(model(), config)
    checkpoints.load(again, checkpoints.find("auto"))
    return {"expected": expected, "resumed": train(again, 2, rows=2), "folder": str(folder / "global_step3")}


def preflight_traces():
    """What a preflight before and between steps changes: losses of 4 steps, random state, skipped steps."""
    seen = {}
    kinds = {
        "zero 0": {},
        "zero 1": {"zero_optimization": {"stage": 1}},
        "zero 2 fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 8}},
        "zero 3": {"zero_optimization": {"stage": 3}},
    }
    for kind, changes in kinds.items():
        for tried in (False, True):
            engine, _ = engine_for(model(), run(**changes))
            torch.manual_seed(7)
            losses = []
            for _ in range(2):
                if tried:
                    preflight(DataParallel(engine), rows=3, seqlen=16)
                losses += train(engine, 2, rows=2)[0]
            random_state = torch.get_rng_state().tolist()
            seen[f"{kind}, {tried}"] = [losses, random_state, engine.skipped_steps, engine.global_samples]
    return seen


def out_of_memory():
    """The second rank alone may hold no more than 300 MB beyond what it has; both are told."""
    engine, _ = engine_for(model(positions=512), run())
    if dist.get_rank() == 1:
        held = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (held + 300_000_000, resource.RLIM_INFINITY))
    try:
        preflight(DataParallel(engine), rows=600, seqlen=512)
        told = ""
    except ConfigError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    both = [None, None]
    dist.all_gather_object(both, told)
    return both


def paper_json(path):
    """DeepSpeed's tutorial file, unchanged: DeepSpeed refuses it, we train it."""
    network = model(positions=1024)
    try:
        deepspeed.initialize(model=network, model_parameters=network.parameters(), config=str(path))
        refusal = ""
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    engine, _ = engine_for(network, str(path))
    losses, lengths, _ = train(engine, 2, rows=2048)
    return {"refusal": refusal, "losses": losses, "lengths": lengths, "clipping": engine.gradient_clipping()}


def own_optimizer():
    """deepspeed.initialize's positional arguments, a client optimizer, the batch given by its parts."""
    config = run()
    del config["optimizer"], config["train_batch_size"]
    config["gradient_accumulation_steps"] = 2
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.25)
    engine, _, _, lr_scheduler = initialize(None, network, optimizer, config=config)
    _, _, rates = train(engine, 4, rows=2)
    try:
        initialize(None, network, optimizer, config={**config, "scheduler": {"type": "Foo", "params": {}}})
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    return {
        "rates": rates,
        "planned": [lr_scheduler.rate(step) for step in range(1, 5)],
        "train_batch_size": engine.train_batch_size(),
        "refusal": refusal,
    }


def own_pipeline():
    """A PipelineModule of the user's, the batch given by its parts, a loader that cuts to the length in force."""
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(128, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 128)]
    network = PipelineModule(
        layers, 2, loss_fn=lambda out, y: torch.nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())
    )
    config = run(gradient_accumulation_steps=2)
    del config["train_batch_size"]
    engine, _ = engine_for(network, config)
    lengths = []

    def micro_batches():
        while True:
            lengths.append(engine.curriculum_scheduler.get_current_difficulty())
            tokens = torch.arange(lengths[-1] + 1)[None] % 128
            yield tokens[:, :-1], tokens[:, 1:]

    losses = [float(engine.train_batch(micro_batches())) for _ in range(8)]
    return {"train_batch_size": engine.train_batch_size(), "lengths": lengths, "losses": losses}


def deepspeed_scheduler():
    """Steps of the paper's block at which DeepSpeed's own scheduler, still inside its data pipeline, disagrees."""
    theirs, ours = DeepSpeedScheduler(copy.deepcopy(PAPER_BLOCK)), CurriculumScheduler(PAPER_BLOCK)
    return [step for step in range(1, 60_003) if theirs.get_difficulty(step) != ours.get_difficulty(step)]


def main():
    out, paper = Path(sys.argv[-2]), Path(sys.argv[-1])
    deepspeed.init_distributed()
    seen = {
        "zero_stages": zero_stages(),
        "balanced": balanced(),
        "moments": moments(),
        "skipped_steps": skipped_steps(),
        "zero_3_checkpoint": zero_3_checkpoint(out.parent / "zero3"),
        "preflight_traces": preflight_traces(),
        "out_of_memory": out_of_memory(),
        "paper_json": paper_json(paper),
        "own_optimizer": own_optimizer(),
        "deepspeed_scheduler": deepspeed_scheduler(),
        "own_pipeline": own_pipeline(),  # the last: no other engine can follow it in a process
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
