"""Layers cut over two ranks train the run of one rank, under every ZeRO stage, and leave folders that any tool loads.

Two launches: all runs on two ranks, each from its beginning and once more from amid the warmup; the reference on one.
"""

import json

import numpy as np
import pytest
from conftest import launch
from test_training import records

from seqlen_curriculum import CheckpointError, RunConfig
from seqlen_curriculum.data.run_data import open_run_data

ZERO = "zero_optimization.stage={}".format
RUNS = {
    **{f"zero{stage}": [ZERO(stage)] for stage in range(4)},
    "bf16": [ZERO(1), "bf16.enabled=true"],
    "checkpointing": [ZERO(1), "model.activation_checkpointing=true"],
    "dropout": [ZERO(1), "model.dropout=0.1"],
    "compile": [ZERO(1), "training.compile=true"],
}
SAME_AS_ONE_RANK = [name for name in RUNS if name not in ("bf16", "dropout")]
RESUMED = [name for name in RUNS if name not in ("checkpointing", "compile")]
MID_WARMUP = 8


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run):
    """The tiny run without dropout, whose length changes 14 times in 24 steps and whose gradients are always clipped."""
    run = json.loads(json.dumps(tiny_run))
    schedule = {"total_curriculum_step": 20, "difficulty_step": 2}
    run["curriculum_learning"] |= {"min_difficulty": 4, "schedule_config": schedule}
    run["gradient_clipping"] = 0.3
    # 32 would be the full length too, for which torch.compile makes a graph more
    run["model"] |= {"dropout": 0.0, "hidden_size": 48}
    run["training"] |= {"train_tokens": 3_800, "eval_interval": 12, "save_interval": MID_WARMUP, "keep_last": 9}
    path = tmp_path_factory.mktemp("tensor") / "run.json"
    path.write_text(json.dumps(run))
    return path


def launch_runs(folder, name, runs, ranks):
    (folder / f"{name}.json").write_text(json.dumps(runs))
    log, script = folder / f"{name}.log", "tests/launched_matrix.py"
    status, output = launch(log, script, folder / f"{name}.json", ranks=ranks)
    assert status == 0, output
    return output


@pytest.fixture(scope="module")
def one_rank(run_file):
    save = run_file.parent / "one-rank"
    launch_runs(run_file.parent, "one", [{"config": str(run_file), "sets": [], "save": str(save), "resume": "none"}], 1)
    return records(save)


@pytest.fixture(scope="module")
def two_ranks(run_file):
    """The folder of the runs ``NAME`` and ``NAME-resumed``."""
    folder = run_file.parent

    def run(name, kind="", resume="none"):
        # A continued run does without the preflight: if that left a trace, the two would differ.
        sets = ["tensor_parallel.autotp_size=2", *RUNS[name], f"training.preflight={json.dumps(not kind)}"]
        return {"config": str(run_file), "sets": sets, "save": f"{folder}/{name}{kind}", "resume": resume}

    resumed = [run(name, "-resumed", f"{folder}/{name}/global_step{MID_WARMUP}") for name in RESUMED]
    (folder / "two.out").write_text(launch_runs(folder, "two", [*map(run, RUNS), *resumed], 2))
    return folder


def values(run, name):
    return [record[name] for record in run]


@pytest.mark.parametrize("name", SAME_AS_ONE_RANK)
def test_trains_the_run_of_one_rank(two_ranks, one_rank, name):
    (ours, our_evaluations), (theirs, their_evaluations) = records(two_ranks / name), one_rank
    assert len(set(values(theirs, "seqlen"))) >= 9
    assert min(values(theirs, "grad_norm")) > 0.3
    for exact in ("step", "seqlen", "rows", "consumed_tokens", "lr"):
        assert values(ours, exact) == values(theirs, exact)
    for rounded in ("loss", "grad_norm"):
        assert values(ours, rounded) == pytest.approx(values(theirs, rounded), rel=1e-4)
    assert values(our_evaluations, "step") == values(their_evaluations, "step") == [12, 24]
    assert values(our_evaluations, "valid_loss") == pytest.approx(values(their_evaluations, "valid_loss"), rel=1e-4)


def test_bf16_differs_by_its_rounding(two_ranks, one_rank):
    (ours, our_evaluations), (theirs, their_evaluations) = records(two_ranks / "bf16"), one_rank
    assert values(ours, "loss") == pytest.approx(values(theirs, "loss"), rel=5e-3)
    assert values(our_evaluations, "valid_loss") == pytest.approx(values(their_evaluations, "valid_loss"), rel=5e-3)
    # Later on rounding drives norms apart, on one rank too.
    assert values(ours[:12], "grad_norm") == pytest.approx(values(theirs[:12], "grad_norm"), rel=1e-2)


def test_dropout_is_on(two_ranks, one_rank):
    losses, without = values(records(two_ranks / "dropout")[0], "loss"), values(one_rank[0], "loss")
    assert all(abs(ours - theirs) > 1e-6 for ours, theirs in zip(losses, without, strict=True))


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_amid_the_warmup_to_the_last_bit(two_ranks, name):
    for resumed, through in zip(records(two_ranks / f"{name}-resumed"), records(two_ranks / name), strict=True):
        assert resumed == [record for record in through if record["step"] > MID_WARMUP]


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero3", "bf16", "dropout"])
def test_leaves_hugging_face_folders(two_ranks, run_file, name):
    import torch
    from transformers import AutoModelForCausalLM

    evaluation = records(two_ranks / name)[1][-1]
    model = AutoModelForCausalLM.from_pretrained(two_ranks / name / f"global_step{evaluation['step']}").eval()
    _, valid = open_run_data(RunConfig.load(run_file))
    tokens = torch.from_numpy(valid.read(np.arange(5) * valid.num_samples // 5, 32))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(evaluation["valid_loss"], rel=1e-3 if name == "bf16" else 1e-6)


def test_compiles_three_graphs(two_ranks):
    lines = (two_ranks / "two.out").read_text().splitlines()
    graphs = {int(line.split("GRAPHS ")[1]) for line in lines if "GRAPHS " in line}
    assert 0 < max(graphs) <= 4  # one of them is the trial whether a compiler works


def test_another_degree_is_refused(two_ranks, run_file):
    from seqlen_curriculum.training.checkpoint import Checkpoints, read_checkpoint

    checkpoint = read_checkpoint(two_ranks / "zero0" / f"global_step{MID_WARMUP}")
    checkpoints = Checkpoints(two_ranks / "zero0", 9, RunConfig.load(run_file).settings())
    with pytest.raises(CheckpointError, match=r"cut over 2 ranks; set tensor_parallel\.autotp_size to 2, not 1"):
        checkpoints.load(None, checkpoint)  # told before the engine is touched
