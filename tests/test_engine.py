"""``initialize`` in a user's own loop: one launch on two ranks has many engines, each test looks at one or two of them.

The launched script is this file: ``SCENARIOS`` are its functions, ``PARTS`` what they are called with.
"""

import copy
import json
import resource
from functools import partial
from pathlib import Path

import deepspeed
import psutil
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler as DeepSpeedScheduler
from deepspeed.utils import safe_get_full_fp32_param
from helpers.parts import Part, do_parts, launch_parts
from helpers.settings import LINEAR

from seqlen_curriculum import ConfigError, CurriculumScheduler, RunConfig, initialize
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.models import cross_entropy, loss_head
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.training.accumulate import accumulate
from seqlen_curriculum.training.adam_moments import adam_moments
from seqlen_curriculum.training.build import build_executor, model_writer
from seqlen_curriculum.training.checkpoint import Checkpoints
from seqlen_curriculum.training.executor import DataParallel
from seqlen_curriculum.training.preflight import preflight

# The file of DeepSpeed's curriculum learning tutorial, to the letter.
PAPER_JSON = """{
  "train_batch_size": 4096,
  "gradient_accumulation_steps": 1,
  "steps_per_print": 1,
  "optimizer": {
    "type": "Adam",
    "params": {
      "lr": 0.00015,
      "max_grad_norm": 1.0,
      "betas": [0.9, 0.95]
    }
  },
  "gradient_clipping": 1.0,
  "fp16": {
    "enabled": true,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": false,
    "min_loss_scale": 1
  },
  "curriculum_learning": {
    "enabled": true,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 1024,
    "schedule_type": "fixed_linear",
    "schedule_config": {
      "total_curriculum_step": 15000,
      "difficulty_step": 8
    }
  }
}
"""
LENGTHS = [4, 8, 8, 12, 12, 16, 16, 16]  # 4 + 12 * t / 6, down to a multiple of 4
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


def zero_stage(stage, **precision):
    """Losses, lengths and rates of 8 steps."""
    engine, _ = engine_for(model(), run(zero_optimization={"stage": stage}, **precision))
    return train(engine, 8, rows=2)


def loss_in_chunks(stage):
    """The same, with the loss computed as on a GPU where the logits don't fit."""
    on_cpu = loss_head.mean_cross_entropy
    loss_head.mean_cross_entropy = lambda *head, **_: cross_entropy._chunked_cross_entropy(*head[:3], chunks=3)
    try:
        return zero_stage(stage)
    finally:
        loss_head.mean_cross_entropy = on_cpu


def micro_batches(stage, kind):
    """9 steps whose micro-batches change with the length, or are fixed."""
    config = run(train_batch_size=8, zero_optimization={"stage": stage}, training={"train_tokens": 20_000})
    config["curriculum_learning"]["schedule_config"] = {"total_curriculum_step": 8, "difficulty_step": 2}
    config["optimizer"]["params"]["lr"] = 2e-3  # noise has no structure to learn: higher rates amplify rounding
    engine, _ = engine_for(model(), config)
    losses, shapes = [], []
    for step in range(1, 10):
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
    return {"losses": losses, "micro_batches": shapes, "steps": engine.global_steps}


# A higher rate amplifies rounding from step to step.
CALM = {
    "gradient_clipping": 0,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "torch_adam": True}},
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 2}},
}


def moments(**changes):
    """Adam's state before the first step and after each of 3."""
    engine, _ = engine_for(model(), run(**CALM, **changes))
    measured = [adam_moments(DataParallel(engine))]
    for _ in range(3):
        train(engine, 1, rows=2)
        measured.append(adam_moments(DataParallel(engine)))
    return measured


def no_moments(**changes):
    """What is measured after a step where there are no moments, or none in fp32."""
    engine, _ = engine_for(model(), run(**changes))
    train(engine, 1, rows=2)
    return adam_moments(DataParallel(engine))


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


BF16 = {"bf16": {"enabled": True}}


def error_of_gradient_sum(stage, **types):
    """Relative error of the gradient of 2 ranks x 32 micro-batches in bf16 against their sum in fp64."""
    # Without momentum and at a rate of 1 the fp32 weights of a step fall by exactly the gradient.
    config = run(train_batch_size=64, zero_optimization={"stage": stage}, gradient_clipping=0, **BF16, **types)
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True}
    del config["scheduler"]
    settled, network = RunConfig.from_dict(config).for_ranks(2), model()
    copied = copy.deepcopy(network).bfloat16()
    executor, _ = build_executor(settled.keys, settled.deepspeed, network, settled.curriculum_scheduler())
    tokens = torch.randint(0, 128, (2, 32, 17), generator=torch.Generator().manual_seed(1))[dist.get_rank()]
    batches = [(row[None, :-1], row[None, 1:]) for row in tokens]
    exact = torch.zeros(sum(p.numel() for p in copied.parameters()), dtype=torch.float64)
    for batch in batches:
        gradients = torch.autograd.grad(copied(*batch) / len(batches), list(copied.parameters()))
        exact += torch.cat([gradient.flatten() for gradient in gradients]).double()
    dist.all_reduce(exact)

    def weights():
        return torch.cat([safe_get_full_fp32_param(p).flatten().double() for p in network.parameters()])

    before = weights()
    executor.train(batches, ())
    return float((before - weights() - exact / 2).norm() / (exact / 2).norm())


def bf16_checkpoint_with_bf16_sums(folder):
    """A run at stage 1 saved with DeepSpeed's own sums, continued with fp32 ones; then saved and continued once more."""
    config = RunConfig.from_dict(run(zero_optimization={"stage": 1}, **BF16)).for_ranks(2)
    checkpoints = Checkpoints(Path(folder), 9, config.settings())
    engine, _ = engine_for(model(), config)  # initialize leaves the sums to DeepSpeed
    train(engine, 3, rows=2)
    checkpoints.save(engine, 3, partial(model_writer, engine.module))
    seen = {"weights before": weight_norm(engine), "expected": train(engine, 2, rows=2)}

    def continued(step):
        network = model()
        rate = config.plan.learning_rate
        executor, write = build_executor(config.keys, config.deepspeed, network, config.curriculum_scheduler(), rate)
        checkpoints.load(executor.engine, checkpoints.find("auto"))
        seen[f"weights {step}"] = weight_norm(executor.engine)
        return executor.engine, write

    now, write = continued(3)
    seen |= {"optimizers": [type(one.optimizer).__name__ for one in (engine, now)], "first": train(now, 1, rows=2)}
    checkpoints.save(now, 4, write)
    seen["second"] = train(now, 1, rows=2)
    seen["second again"] = train(continued(4)[0], 1, rows=2)
    return seen


def weight_norm(engine):
    return float(sum(safe_get_full_fp32_param(p).double().square().sum() for p in engine.module.parameters()))


def zero_3_checkpoint(folder):
    """Save a sharded model after step 3; steps 4 and 5 as they were, and continued from the checkpoint."""
    folder = Path(folder)
    config = run(zero_optimization={"stage": 3})
    checkpoints = Checkpoints(folder, 1, RunConfig.from_dict(config).settings())
    engine, _ = engine_for(model(), config)
    train(engine, 3, rows=2)
    checkpoints.save(engine, 3, partial(model_writer, engine.module))
    expected = train(engine, 2, rows=2)
    again, _ = engine_for(model(), config)
    checkpoints.load(again, checkpoints.find("auto"))
    return {"expected": expected, "resumed": train(again, 2, rows=2), "folder": str(folder / "global_step3")}


def preflight_traces(preflights, **changes):
    """Losses of 4 steps, random state and counters, with preflights before and between the steps or without."""
    engine, _ = engine_for(model(), run(**changes))
    torch.manual_seed(7)
    losses = []
    for _ in range(2):
        if preflights:
            preflight(DataParallel(engine), rows=3, seqlen=16)
        losses += train(engine, 2, rows=2)[0]
    return [losses, torch.get_rng_state().tolist(), engine.skipped_steps, engine.global_samples]


def synchronizations(**changes):
    """How often DeepSpeed waits for the device in 4 steps of 2 micro-batches that our loop does."""
    config = RunConfig.from_dict(run(**changes)).for_ranks(2)
    executor, _ = build_executor(config.keys, config.deepspeed, model(), config.curriculum_scheduler())
    accelerator, calls = get_accelerator(), []
    accelerator.synchronize = lambda *_: calls.append(1)
    try:
        micro_batch = (torch.zeros((1, 8), dtype=torch.int64),) * 2
        for _ in range(4):
            executor.train([micro_batch] * 2, [])
    finally:
        del accelerator.synchronize
    return len(calls)


def out_of_memory():
    """The second rank alone may hold no more than 30 MB beyond what it has; both report it."""
    engine, _ = engine_for(model(positions=512), run())
    if dist.get_rank() == 1:
        held = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (held + 30_000_000, resource.RLIM_INFINITY))
    try:
        preflight(DataParallel(engine), rows=60, seqlen=512)
        problem = ""
    except ConfigError as error:
        problem = str(error)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    both = [None, None]
    dist.all_gather_object(both, problem)
    return both


def paper_json_in_deepspeed(path):
    network = model(positions=1024)
    try:
        deepspeed.initialize(model=network, model_parameters=network.parameters(), config=path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def paper_json(path):
    engine, _ = engine_for(model(positions=1024), path)
    losses, lengths, _ = train(engine, 2, rows=2048)
    return {"losses": losses, "lengths": lengths, "clipping": engine.gradient_clipping()}


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


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        zero_stage,
        loss_in_chunks,
        micro_batches,
        moments,
        no_moments,
        plain_torch,
        skipped_steps,
        error_of_gradient_sum,
        bf16_checkpoint_with_bf16_sums,
        zero_3_checkpoint,
        preflight_traces,
        synchronizations,
        out_of_memory,
        paper_json_in_deepspeed,
        paper_json,
        own_optimizer,
        own_pipeline,
    )
}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
SHARDINGS = {f"zero {stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}
OFFLOAD = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
PREFLIGHTS = {
    "zero 0": {},
    "zero 1": SHARDINGS["zero 1"],
    "zero 1 bf16": {**SHARDINGS["zero 1"], **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero 2 bf16": {**SHARDINGS["zero 2"], **BF16},
    "zero 2 fp16": {**SHARDINGS["zero 2"], **FP16},
    "zero 3": SHARDINGS["zero 3"],
}


def part(name, scenario, needs=(), **arguments):
    return Part(name, {"scenario": scenario.__name__, **arguments}, needs)


def parts_in(folder):
    files = {name: folder / f"paper {name}.json" for name in ("unchanged", "with fp16", "in fp32")}
    files["unchanged"].write_text(PAPER_JSON)
    paper = json.loads(PAPER_JSON)
    paper["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed would compile its own for minutes
    files["with fp16"].write_text(json.dumps(paper))
    del paper["fp16"]
    files["in fp32"].write_text(json.dumps(paper))
    return [
        *(part(f"zero {stage}", zero_stage, stage=stage) for stage in range(4)),
        *(part(f"chunks {stage}", loss_in_chunks, stage=stage) for stage in (1, 3)),
        part("bf16", zero_stage, ("bf16",), stage=1, bf16={"enabled": True}),
        part("synchronizations", synchronizations),
        part("asked to synchronize", synchronizations, timers={"throughput": {"enabled": True}}),
        *(
            part(f"{kind} {stage}", micro_batches, stage=stage, kind=kind)
            for stage in range(4)
            for kind in ("fixed", "balanced")
        ),
        *(part(f"moments {name}", moments, **zero) for name, zero in {**SHARDINGS, "offload": OFFLOAD}.items()),
        part("moments torch", plain_torch, steps=3),
        part("moments sgd", no_moments, optimizer={"type": "SGD", "params": {"lr": 1e-2}}),
        part("moments fp16", no_moments, ("fp16",), **FP16),
        part("skipped steps", skipped_steps, ("fp16",)),
        *(
            part(f"gradient sum {stage} {dtype}", error_of_gradient_sum, ("bf16",), stage=stage, **types)
            for stage in (1, 2, 3)
            for dtype, types in (("fp32", {}), ("bf16", {"communication_data_type": "bf16"}))
        ),
        part("bf16 checkpoint", bf16_checkpoint_with_bf16_sums, ("bf16",), folder=str(folder / "bf16")),
        part("zero 3 checkpoint", zero_3_checkpoint, folder=str(folder / "zero3")),
        *(
            part(f"preflight {name} {tried}", preflight_traces, needs_of(changes), preflights=tried, **changes)
            for name, changes in PREFLIGHTS.items()
            for tried in (False, True)
        ),
        part("out of memory", out_of_memory),
        part("paper in deepspeed", paper_json_in_deepspeed, path=str(files["unchanged"])),
        part("paper with fp16", paper_json, ("fp16",), path=str(files["with fp16"])),
        part("paper in fp32", paper_json, path=str(files["in fp32"])),
        part("own optimizer", own_optimizer),
        part("own pipeline", own_pipeline),  # the last: no other engine can follow it in a process
    ]


def needs_of(changes):
    return tuple({"bf16", "fp16"} & changes.keys())


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return launch_parts(folder, __file__, parts_in(folder), ranks=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_the_same_run(seen, stage):
    losses, lengths, rates = seen[f"zero {stage}"]
    reference = seen["zero 0"]
    assert lengths == LENGTHS
    assert losses == pytest.approx(reference[0], rel=1e-5)
    assert rates == reference[2]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_in_chunks_trains_the_same_run(seen, stage):
    losses, *plan = seen[f"chunks {stage}"]
    assert losses == pytest.approx(seen["zero 0"][0], rel=1e-5)
    assert plan == seen["zero 0"][1:]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_balanced_micro_batches_train_the_same_run(seen, stage):
    fixed, balanced = (seen[f"{kind} {stage}"] for kind in ("fixed", "balanced"))
    assert balanced["losses"] == pytest.approx(fixed["losses"], rel=1e-5)
    assert fixed["losses"] == pytest.approx(seen["fixed 0"]["losses"], rel=1e-5)
    assert set(fixed["micro_batches"]) == {4}
    assert sorted(set(balanced["micro_batches"])) == [1, 2, 4]  # 4 rows: all at once up to 4 tokens, one by one from 9
    assert fixed["steps"] == balanced["steps"] == 9


def test_bf16_follows_fp32(seen):
    losses, lengths, rates = seen["bf16"]
    assert lengths == LENGTHS
    assert losses == pytest.approx(seen["zero 0"][0], rel=2e-2)
    assert rates == seen["zero 0"][2]


def test_skipped_fp16_steps_count_their_tokens(seen):
    skipped = seen["skipped steps"]
    assert 0 < skipped["skipped"] < 12
    assert skipped["rates"] == skipped["planned"]
    assert skipped["lengths"][:8] == LENGTHS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_summed_in_fp32(seen, stage):
    assert seen[f"gradient sum {stage} fp32"] < 1e-4
    assert seen[f"gradient sum {stage} bf16"] > 2e-3


def test_a_bf16_run_saved_with_bf16_sums_continues_with_fp32_ones(seen):
    run = seen["bf16 checkpoint"]
    assert run["optimizers"] == ["DeepSpeedZeroOptimizer", "BF16_Optimizer"]
    assert run["weights 3"] == run["weights before"]
    losses, lengths, rates = (first + second for first, second in zip(run["first"], run["second"], strict=True))
    assert losses == pytest.approx(run["expected"][0], rel=1e-2)
    assert [lengths, rates] == run["expected"][1:]
    assert run["second again"] == run["second"]


def test_zero_3_resumes_exactly_and_saves_the_whole_model(seen):
    from transformers import AutoModelForCausalLM

    checkpoint = seen["zero 3 checkpoint"]
    assert checkpoint["resumed"] == checkpoint["expected"]
    loaded, info = AutoModelForCausalLM.from_pretrained(checkpoint["folder"], output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.transformer.wte.weight.shape == (128, 16)


def test_deepspeed_refuses_the_papers_own_file(seen):
    refusal = seen["paper in deepspeed"]
    assert refusal.startswith("DeepSpeedConfigError")
    assert "curriculum_learning" in refusal


@pytest.mark.parametrize("precision", ["with fp16", "in fp32"])
def test_the_papers_own_file_trains_here(seen, precision):
    paper = seen[f"paper {precision}"]
    assert paper["lengths"] == [8, 8]
    assert all(4 < loss < 6 for loss in paper["losses"])  # ln 128 = 4.85 at the start
    assert paper["clipping"] == 1.0


def test_deepspeeds_own_scheduler_agrees_at_every_step():
    """It is inside DeepSpeed's data pipeline."""
    theirs, ours = DeepSpeedScheduler(copy.deepcopy(PAPER_BLOCK)), CurriculumScheduler(PAPER_BLOCK)
    assert [step for step in range(1, 60_003) if theirs.get_difficulty(step) != ours.get_difficulty(step)] == []


def test_an_optimizer_of_the_users_own_gives_the_rate(seen):
    own = seen["own optimizer"]
    assert own["rates"] == own["planned"]
    assert own["train_batch_size"] == 4
    assert own["refusal"].startswith("DeepSpeed refuses its part of the configuration")


@pytest.mark.parametrize("kind", PREFLIGHTS)
def test_a_preflight_leaves_no_trace(seen, kind):
    assert seen[f"preflight {kind} True"] == seen[f"preflight {kind} False"]


def test_no_micro_batch_waits_for_the_device_unless_the_file_asks_for_timers(seen):
    assert seen["synchronizations"] == 0
    assert seen["asked to synchronize"] == 8  # two a micro-batch, from the third step on


def test_a_preflight_reports_to_all_ranks_who_is_out_of_memory(seen):
    first, second = seen["out of memory"]
    wanted = (
        "a micro-batch of 60 rows of 512 tokens, the largest of this run, does not fit the memory of rank 1; lower it"
    )
    assert first.startswith(f"train_micro_batch_size_per_gpu: {wanted}")
    assert second.startswith(f"train_micro_batch_size_per_gpu: {wanted}")
    assert "can't allocate memory" in second  # the device's own words, where it happened


def test_a_pipeline_of_the_users_own_follows_the_lengths(seen):
    own = seen["own pipeline"]
    assert own["train_batch_size"] == 2  # 1 row x 2 micro-batches: two ranks have one model between them
    assert own["lengths"] == [length for length in LENGTHS for _ in range(2)]
    assert own["losses"][-1] < own["losses"][0]


def test_misuse_is_problem_before_deepspeed_starts():
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    with pytest.raises(ConfigError, match="neither a path, a dict nor a RunConfig"):
        initialize(config=3)
    with pytest.raises(ConfigError, match=r"config\.json: can't be read"):
        initialize(config="config.json")
    with pytest.raises(ConfigError, match="given more than once"):
        initialize(config=config, config_params=config)
    with pytest.raises(ConfigError, match=r"batch_size_warmup: DeepSpeed's engine doesn't support it"):
        initialize(config={**config, "batch_size_warmup": {"start": 2, "increment": 2, "tokens": 100}})
    growth = {"batch_growth": True, "min_tokens_per_step": 64}
    with pytest.raises(ConfigError, match=r"curriculum_learning\.batch_growth: DeepSpeed's engine doesn't support it"):
        initialize(config={**config, "curriculum_learning": {**LINEAR, **growth}})
    ours = {"scheduler": {"type": "TokenCosineLR"}, "curriculum_learning": {"enabled": False, "max_difficulty": 8}}
    with pytest.raises(ConfigError, match="lr_scheduler= is given too"):
        initialize(None, None, lr_scheduler=object(), config={**config, **ours, "training": {"train_tokens": 1e4}})
    with pytest.raises(ConfigError, match="model: required, but not given"):
        initialize(config=config)
    with pytest.raises(TypeError, match="modell"):
        initialize(modell=None, config=config)


class Truncating(torch.nn.Linear):
    def forward(self, tokens, curriculum_seqlen=None):
        return super().forward(tokens[:, :curriculum_seqlen])


@pytest.mark.parametrize("keyword", ["curriculum_seqlen", "seqlen", "input"])
def test_a_model_that_takes_no_length_is_problem_before_deepspeed_starts(keyword):
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    block = {"enabled": False, "max_difficulty": 8}
    model = torch.nn.Embedding(4, 4) if keyword == "curriculum_seqlen" else Truncating(4, 4)
    refusal = (
        rf"curriculum_kwarg: the forward of {type(model).__name__} takes no keyword '{keyword}'; add it to forward's"
    )
    with pytest.raises(ConfigError, match=refusal):
        initialize(model=model, config={**config, "curriculum_learning": block}, curriculum_kwarg=keyword)


def test_a_length_that_no_section_gives_is_problem_before_deepspeed_starts():
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    with pytest.raises(ConfigError, match="'curriculum_seqlen' needs the step's length, but no section sets it; add"):
        initialize(model=Truncating(4, 4), config=config, curriculum_kwarg="curriculum_seqlen")


@pytest.mark.parametrize("sharding", [*SHARDINGS, "offload"])
def test_adams_moments_are_those_of_an_unsharded_run(seen, sharding):
    before, *measured = seen[f"moments {sharding}"]
    assert before == {}
    for ours, theirs in zip(measured, seen["moments torch"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(measured) == 3


@pytest.mark.parametrize("kind", ["sgd", "fp16"])
def test_where_there_are_no_true_moments_none_are_measured(seen, kind):
    assert seen[f"moments {kind}"] == {}


if __name__ == "__main__":
    deepspeed.init_distributed()
    do_parts(lambda scenario, **arguments: SCENARIOS[scenario](**arguments))
    dist.destroy_process_group()
