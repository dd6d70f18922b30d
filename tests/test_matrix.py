"""Every engine in every precision: trains along the plan, evaluates, resumes mid-warmup, changes the number of ranks.

Three launches: on two ranks each cell trains and continues from its own checkpoint; on one rank (on four, where two have
a model between them) each continues from there once more. Half precision on most engines is a soak test.
"""

import json
import re

import pytest
from helpers.runs import ENGINES, Runs, hugging_face_loss, records, run, samples_by_step

from seqlen_curriculum import CheckpointError, RunConfig

PRECISIONS = {
    "fp32": [],
    "bf16": ["bf16.enabled=true"],
    "fp16": ["fp16.enabled=true", "fp16.initial_scale_power=8"],  # from 2 ** 16 the first steps would be skipped
}
CELLS = [
    (engine, precision)
    for engine in ENGINES
    for precision in PRECISIONS
    # Refused without ZeRO-1; ZeRO-3 under tensor parallel is slow here, one precision must do.
    if precision == "fp32" or engine not in ("pipeline", "tensor_zero0", "tensor_zero3")
]
HALF_IN_SUITE = [
    *((engine, "bf16") for engine in ("zero1", "zero3", "tensor", "pipeline_zero1")),
    *((engine, "fp16") for engine in ("zero1", "pipeline_zero1")),
]
SOAK = [cell for cell in CELLS if cell[1] != "fp32" and cell not in HALF_IN_SUITE]
WITH_DROPOUT = ("ulysses", "tensor", "pipeline_zero1")
MID_WARMUP = 6
SIXTY_FOUR_LENGTHS = [
    "data.seq_length=128",
    "model.max_position_embeddings=128",
    "model.hidden_size=128",  # the full length too: torch must not take the one for the other
    "curriculum_learning.max_difficulty=128",
    "curriculum_learning.min_difficulty=2",
    'curriculum_learning.schedule_config={"total_curriculum_step": 64, "difficulty_step": 2}',
    "optimizer.params.lr=3e-4",  # higher rates amplify the rounding of other kernels
    "training.eval_interval=20",
    "training.save_interval=0",
]
ROWS_ON_RANKS = {
    1: ["train_batch_size=4", "training.train_tokens=20000"],
    2: ["train_batch_size=8", "training.train_tokens=40000"],
}
"""4 rows on each rank, and 71 steps."""
MUON = [
    'optimizer={"type": "Muon", "params": {"lr": 5e-3, "torch_adam": true}}',
    "zero_optimization.stage=1",
    "training.variance_interval=0",
]


def marked(*slow):
    """Return all cells as parameters of a test, of which these are soak tests."""
    return [pytest.param(*cell, marks=pytest.mark.slow if cell in slow else ()) for cell in CELLS]


def rounding(engine, precision):
    """Relative difference of losses from fp32's."""
    if engine == "zero0" and precision != "fp32":
        return 0.1  # DeepSpeed's half precision optimizer of stage 0 updates unlike fp32's
    return {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}[precision]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run):
    """The tiny run without dropout, whose length changes 9 times in 12 steps."""
    run = json.loads(json.dumps(tiny_run))
    run["curriculum_learning"] |= {
        "min_difficulty": 4,
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 2},
    }
    run["model"]["dropout"] = 0.0
    run["training"] |= {"train_tokens": 2_000, "eval_interval": 8, "save_interval": MID_WARMUP, "keep_last": 9}
    run["training"]["variance_interval"] = 3
    path = tmp_path_factory.mktemp("matrix") / "run.json"
    path.write_text(json.dumps(run))
    return path


@pytest.fixture(scope="module")
def matrix(run_file, request):
    """The runs: ``CELL`` trained, ``CELL-resumed`` and ``CELL-ranks`` continued mid-warmup."""
    runs = Runs(run_file.parent)
    folder = runs.folder
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {item.callspec.id for item in items}
    chosen = [cell for cell in CELLS if cell not in SOAK or "-".join(cell) in asked]
    on_other_ranks = {item.callspec.id for item in items if item.originalname == "test_changes_the_number_of_ranks"}
    changing = [cell for cell in chosen if "-".join(cell) in on_other_ranks]

    def in_cell(engine, precision, kind, resumes):
        # A continued run does without the preflight: if that left a trace, the two would differ.
        column = {**PRECISIONS, "dropout": ["model.dropout=0.1"]}[precision]
        sets = [*ENGINES[engine], *column, f"training.preflight={json.dumps(kind == '')}"]
        cell = f"{engine}-{precision}"
        resume = f"{folder}/{cell}/global_step{MID_WARMUP}" if resumes else "auto"
        needs = [precision] if precision in ("fp16", "bf16") else []
        return run(run_file, folder / f"{cell}{kind}", sets, resume, needs, after=cell if resumes else None)

    cells = sorted(
        [*chosen, *((engine, "dropout") for engine in WITH_DROPOUT)], key=lambda cell: list(ENGINES).index(cell[0])
    )
    both = [in_cell(*cell, kind, resumes) for cell in cells for kind, resumes in (("", False), ("-resumed", True))]

    def of_64_lengths(ranks):
        sets = [*SIXTY_FOUR_LENGTHS, *ROWS_ON_RANKS[ranks]]
        compiled = [*sets, "training.compile=true"]
        return [
            run(run_file, folder / f"plain-{ranks}", sets),
            run(run_file, folder / f"compiled-{ranks}", compiled, needs=["compiler"]),
        ]

    # Any other key of ZeRO may lay the shards out otherwise, so they are taken apart and put together again.
    saved = folder / "zero2-fp32" / f"global_step{MID_WARMUP}"
    other_keys = [*ENGINES["zero2"], "zero_optimization.reduce_bucket_size=1000", "training.preflight=true"]
    reordered = run(run_file, folder / "reordered", other_keys, saved, after="zero2-fp32")
    at = 1 + max(number for number, part in enumerate(both) if part.name.startswith("zero2-fp32"))
    muon = run(run_file, folder / "muon", MUON)
    muon_resumed = run(
        run_file, folder / "muon-resumed", MUON, folder / "muon" / f"global_step{MID_WARMUP}", after="muon"
    )
    uncompiled = run(run_file, folder / "uncompiled", ["training.compile=true"], no_compiler=True)
    on_two = of_64_lengths(2) if "2" in asked else []
    runs.launch("two", [muon, muon_resumed, *on_two, uncompiled, *both[:at], reordered, *both[at:]], ranks=2)
    cut = [cell for cell in changing if cell[0].startswith(("pipeline", "tensor"))]  # keep two ranks to a model
    others = [in_cell(*cell, "-ranks", True) for cell in changing if cell not in cut]
    for one_rank in others:
        one_rank.arguments["sets"] = [key for key in one_rank.arguments["sets"] if key != "sequence_parallel_size=2"]
    reference = run(run_file, folder / "one-rank", ["training.preflight=true"])
    resharded = run(run_file, folder / "zero2-to-zero3", ENGINES["zero3"], saved, after="zero2-fp32")
    deterministic = run(run_file, folder / "deterministic", ["training.deterministic=true"])
    muon_alone = run(run_file, folder / "muon-alone", MUON, no_compiler=True)
    on_one = [*of_64_lengths(1), reference, *others, resharded, deterministic, muon_alone]
    runs.launch("one", on_one, ranks=1)
    runs.launch("four", [in_cell(*cell, "-ranks", True) for cell in cut], ranks=4)
    return runs


def assert_same_losses(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            sizes = name.endswith(("_norm", "_max"))  # of gradients and of Adam's state
            rounded = 10 * tolerance if sizes else tolerance if "loss" in name or "ppl" in name else 0.0
            if not sizes or tolerance <= 1e-4:  # half precision drives them apart
                assert one[name] == pytest.approx(other[name], rel=rounded, abs=0.0), (one, other)


def after_resume(run):
    return [[record for record in part if record["step"] > MID_WARMUP] for part in records(run)]


@pytest.mark.parametrize(("engine", "precision"), marked(*SOAK))
def test_trains_along_the_plan_and_evaluates(matrix, run_file, engine, precision):
    timeline = RunConfig.load(run_file).timeline()
    steps, evaluations = records(matrix[f"{engine}-{precision}"])
    lengths = [record["seqlen"] for record in steps]
    assert lengths == [timeline.seqlen(step) for step in range(1, timeline.steps + 1)]
    assert len(set(lengths)) >= 9
    assert [record["step"] for record in evaluations] == [8, timeline.steps]
    reference = records(matrix["one-rank"])
    for ours, theirs in zip((steps, evaluations), reference, strict=True):
        if (engine, precision) == ("zero0", "fp16"):  # its Adam's state is no true one, and left out
            theirs = [{name: one[name] for name in one if name[:8] not in ("variance", "momentum")} for one in theirs]
        assert_same_losses(ours, theirs, rounding(engine, precision))


@pytest.mark.parametrize(("engine", "precision"), marked(*SOAK))
def test_resumes_during_the_warmup(matrix, engine, precision):
    resumed = records(matrix[f"{engine}-{precision}-resumed"])
    expected = after_resume(matrix[f"{engine}-{precision}"])
    for ours, theirs in zip(resumed, expected, strict=True):
        assert_same_losses(ours, theirs, tolerance=0.0)


def assert_continues(resumed, run, tolerance):
    for ours, theirs in zip(records(resumed), after_resume(run), strict=True):
        assert_same_losses(ours, theirs, tolerance)
    samples = samples_by_step(run)
    assert samples_by_step(resumed) == {step: samples[step] for step in samples if step > MID_WARMUP}


# Under tensor parallel and under ZeRO-3, but both together on four ranks only among the soak tests.
@pytest.mark.parametrize(("engine", "precision"), marked(*SOAK, ("tensor_zero3", "fp32")))
def test_changes_the_number_of_ranks(matrix, engine, precision):
    cell = f"{engine}-{precision}"
    assert_continues(matrix[f"{cell}-ranks"], matrix[cell], rounding(engine, precision))


def test_goes_on_under_other_keys_of_zero(matrix):
    assert_continues(matrix["reordered"], matrix["zero2-fp32"], 1e-4)
    line = "saved by 2 data-parallel ranks under ZeRO stage 2, resuming on 2 under stage 2"
    assert f"zero2-fp32/global_step{MID_WARMUP}: {line}" in matrix.outputs["two"]


def test_no_warning_of_torchs_fills_the_log(matrix):
    assert "FutureWarning" not in matrix.outputs["two"]


def test_goes_on_under_another_zero_stage_on_another_number_of_ranks(matrix):
    assert_continues(matrix["zero2-to-zero3"], matrix["zero2-fp32"], 1e-4)
    line = "saved by 2 data-parallel ranks under ZeRO stage 2, resuming on 1 under stage 3"
    assert f"zero2-fp32/global_step{MID_WARMUP}: {line}" in matrix.outputs["one"]


@pytest.mark.parametrize("engine", ["zero3", "pipeline", "pipeline_zero1", "tensor", "tensor_zero3", "ulysses"])
def test_leaves_a_hugging_face_folder(matrix, run_file, engine):
    run = matrix[f"{engine}-fp32"]
    evaluation = records(run)[1][-1]
    loss = hugging_face_loss(run / f"global_step{evaluation['step']}", RunConfig.load(run_file))
    assert loss == pytest.approx(evaluation["valid_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("engine", "key"), [("pipeline", "pipeline.stages"), ("tensor", "tensor_parallel.autotp_size")]
)
def test_a_model_in_parts_stays_in_as_many(matrix, run_file, engine, key):
    from seqlen_curriculum.run_folder.checkpoint_manifest import read_checkpoint
    from seqlen_curriculum.training.checkpoint import Checkpoints

    checkpoint = read_checkpoint(matrix[f"{engine}-fp32"] / f"global_step{MID_WARMUP}")
    checkpoints = Checkpoints(matrix.folder, 9, RunConfig.load(run_file).settings())
    with pytest.raises(CheckpointError, match=f"saved with {key} 2; set it to 2, not 1"):
        checkpoints.load(None, checkpoint)  # refused before the engine is touched


@pytest.mark.parametrize("engine", WITH_DROPOUT)
def test_dropout_draws_again_what_it_drew(matrix, engine):
    run = matrix[f"{engine}-dropout"]
    assert list(records(matrix[f"{engine}-dropout-resumed"])) == after_resume(run)
    assert records(run)[0][0]["loss"] != records(matrix[f"{engine}-fp32"])[0][0]["loss"]


def test_on_a_cpu_deterministic_algorithms_change_nothing(matrix):
    assert records(matrix["deterministic"]) == records(matrix["one-rank"])
    assert (matrix["deterministic"] / "deterministic").exists()  # they were on


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_ramp_over_64_lengths_compiles_three_graphs_at_most(matrix, ranks):
    compiled, plain = (matrix[f"{name}-{ranks}"] for name in ("compiled", "plain"))
    steps, evaluations = records(compiled)
    assert len({record["seqlen"] for record in steps}) == 64
    assert_same_losses(steps, records(plain)[0], 1e-4)
    assert_same_losses(evaluations, records(plain)[1], 1e-4)
    graphs = json.loads((compiled / "graphs.json").read_text())
    assert 1 <= graphs <= 3


def test_without_a_compiler_it_trains_uncompiled_and_says_so(matrix):
    assert records(matrix["uncompiled"]) == records(matrix["zero0-fp32"])
    log = matrix.outputs["two"]
    assert re.search("training.compile: .*; training without compilation", log)
    assert json.loads((matrix["uncompiled"] / "graphs.json").read_text()) <= 0


def test_muon_trains_uncompiled_on_a_cpu(matrix):
    steps, evaluations = records(matrix["muon"])
    assert evaluations[-1]["valid_loss"] < steps[0]["loss"] - 0.2
    assert_same_losses(steps, records(matrix["muon-alone"])[0], 1e-4)
    assert json.loads((matrix["muon"] / "graphs.json").read_text()) <= 0
    assert_continues(matrix["muon-resumed"], matrix["muon"], 1e-6)
