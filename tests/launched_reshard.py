"""Run by test_reshard.py: ``save`` on two ranks trains and saves, ``resume`` on other ranks continues each checkpoint.

usage: launched_reshard.py save|resume FOLDER; FOLDER/mixes.json lists [precision, what saves, what continues]; rank 0
writes FOLDER/save.json or resume.json
"""

import copy
import hashlib
import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from seqlen_curriculum import CheckpointError, initialize
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.training.build import write_model
from seqlen_curriculum.training.checkpoint import Checkpoints

ROWS, SAVED, LAST = 12, 3, 6  # rows divide over 1, 2 and 3 ranks; saved in the middle of the warmup
RUN = {
    "train_batch_size": ROWS,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_clipping": 0.5,
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 4,
        "max_difficulty": 16,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 4},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 5, "min_lr": 1e-3}},
    "training": {"train_tokens": 1000},
}
SETTINGS = {
    "fp32": {},
    "fp32 WarmupLR": {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 15, "hysteresis": 1}},
    "fp16 skipping": {"fp16": {"enabled": True, "initial_scale_power": 40}},  # no step is taken, so there is no state
}


def config(precision, kind):
    run = {**copy.deepcopy(RUN), **SETTINGS[precision], "zero_optimization": {"stage": int(kind[0])}}
    if "offloaded" in kind:
        run["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if "fused" in kind:
        del run["optimizer"]["params"]["torch_adam"]
    if "robin" in kind:
        run["zero_optimization"]["round_robin_gradients"] = True
    if "sums" in kind:
        run["data_types"] = {"grad_accum_dtype": "fp32"}
    return run


def engine_for(precision, kind, seed):
    torch.manual_seed(seed)
    # Odd sizes, so that shares end inside parameters and are padded.
    sizes = {"num_layers": 2, "hidden_size": 10, "num_attention_heads": 2, "vocab_size": 101}
    model = build_gpt2(ModelConfig(max_position_embeddings=16, **sizes))
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config(precision, kind))
    return engine


def train(engine, last):
    """Each step's loss, length and rate up to step ``last``. In fp16 the first one overflows and is skipped."""
    seen = []
    while engine.global_steps < last:
        step = engine.global_steps + 1
        seqlen = engine.curriculum_scheduler.update_difficulty(step)
        tokens = torch.randint(0, 101, (ROWS, seqlen + 1), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        total = torch.zeros((), dtype=torch.float64)
        for micro in mine.split(2):
            loss = engine(micro[:, :-1], micro[:, 1:])
            total += loss.detach() * len(micro) / ROWS
            engine.backward(loss * 2**9 if step == 1 and engine.fp16_enabled() else loss)
            rate = engine.get_lr()[0]
            engine.step()
        dist.all_reduce(total)
        seen.append((float(total), seqlen, rate))
    return seen


def state(engine):
    """Everything that a step changes: digests of weights and optimizer state, counters, the loss scale."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    states = ("exp_avg", "exp_avg_sq") if base.state else ()
    if states and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed would at the first step
    digests = {name: hashlib.sha256() for name in ("low", "fp32", *states)}
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            tensors = {"low": parameter.detach().float().clone()}
        if engine.zero_optimization_stage():
            tensors["fp32"] = safe_get_full_fp32_param(parameter)
            tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in states}
        elif parameter in base.state:  # not so in half precision, where stage 0 is refused
            tensors |= {"fp32": parameter.detach(), **{key: base.state[parameter][key] for key in states}}
        for key, tensor in tensors.items():
            digests[key].update(tensor.float().numpy().tobytes())
    scaler = getattr(optimizer, "loss_scaler", None)
    scaling = vars(scaler) if scaler and scaler.dynamic else {}
    return {
        **{key: digest.hexdigest() for key, digest in digests.items()},
        "steps": sorted({int(own["step"]) for own in base.state.values()}),
        "counters": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "scaler": {key: value for key, value in scaling.items() if isinstance(value, (int, float))},
    }


def checkpoints(folder, precision, kind):
    """Those of one kind of run: what the kinds have in common is the run, and each has a folder of its own."""
    (folder / precision / kind).mkdir(parents=True, exist_ok=True)
    return Checkpoints(folder / precision / kind, 1, {"precision": precision})


def save(folder, mixes):
    seen = {}
    for precision, kind in sorted({(precision, saved) for precision, saved, _ in mixes}):
        engine = engine_for(precision, kind, seed=0)
        train(engine, SAVED)
        checkpoints(folder, precision, kind).save(engine, SAVED, lambda path, of=engine.module: write_model(of, path))
        seen[f"{precision} {kind}"] = {"state": state(engine), "steps": train(engine, LAST)}
    return seen


def resume(folder, mixes):
    seen = {}
    for precision, saved, kind in mixes:
        engine = engine_for(precision, kind, seed=1)  # other weights: all must come from the checkpoint
        ours = checkpoints(folder, precision, saved)
        try:
            ours.load(engine, ours.find("auto"))
            result = {"state": state(engine), "steps": train(engine, LAST)}
        except CheckpointError as error:
            result = {"refusal": str(error)}
        seen[f"{precision} to {saved} to {kind}"] = result
    return seen


def main():
    mode, folder = sys.argv[-2], Path(sys.argv[-1])
    deepspeed.init_distributed()
    seen = {"save": save, "resume": resume}[mode](folder, json.loads((folder / "mixes.json").read_text()))
    if dist.get_rank() == 0:
        (folder / f"{mode}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
