"""OLMo-core's Trainer with a warmup: lengths, rows, tokens, rates, evaluation, resume and two ranks.

OLMo-core has an environment of its own: bash scripts/test_trainers.sh olmo_core. This module is also the launched script.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import limit
from helpers.settings import changed

from seqlen_curriculum.data.from_config import open_training_data
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan

pytestmark = pytest.mark.trainers


def build(folder, run, own_rows=False, duration=None, scheduler=None, callbacks=(), sequence_length=32, **loading):
    """Return OLMo-core's Trainer over the tokens of ``folder``, or over the run's rows: 8 rows of 32 tokens per step."""
    import torch
    from olmo_core.data import DataCollator, NumpyFSLDataLoader, NumpyFSLDataset, NumpyPaddedFSLDataset
    from olmo_core.distributed.utils import get_rank, get_world_size, is_distributed
    from olmo_core.eval import LMEvaluator
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train import Duration, LoadStrategy, Trainer
    from olmo_core.train.callbacks import CheckpointerCallback, EvaluatorCallback
    from olmo_core.train.checkpoint import CheckpointerConfig
    from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModule

    from seqlen_curriculum.integrations.olmo_core import RunDataLoader, SequenceLengthWarmup
    from seqlen_curriculum.integrations.torch_data import RunRows

    torch.manual_seed(0)
    ranks = {"dp_world_size": get_world_size(), "dp_rank": get_rank()}
    tokens = {"pad_token_id": 256, "eos_token_id": 256, "vocab_size": 257, "dtype": np.uint16}
    folder = Path(folder)
    path = str(folder.parent / "tokens.npy")
    module = TransformerTrainModule(
        TransformerConfig.llama_like(d_model=16, vocab_size=257, n_layers=1, n_heads=2).build(init_device="cpu"),
        AdamWConfig(lr=5e-3),
        rank_microbatch_size=2 * sequence_length,
        max_sequence_length=sequence_length,
        scheduler=scheduler,
        dp_config=TransformerDataParallelConfig(name="ddp") if is_distributed() else None,
        device=torch.device("cpu"),
    )
    if own_rows:
        rows = RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3))
        loader = RunDataLoader(rows, work_dir=folder, **ranks, **loading)
    else:
        loader = NumpyFSLDataLoader(
            NumpyFSLDataset(path, sequence_length=sequence_length, **tokens),
            collator=DataCollator(pad_token_id=256),
            global_batch_size=8 * 32,
            work_dir=folder,
            **ranks,
            **loading,
        )
    valid = NumpyPaddedFSLDataset(path, sequence_length=32, metadata=[{"label": "valid"}], **tokens)
    valid.work_dir = folder
    evaluator = LMEvaluator.from_numpy_dataset(
        valid,
        name="lm",
        global_batch_size=8 * 32,
        collator=DataCollator(pad_token_id=256),
        device=torch.device("cpu"),
    )
    given = {
        "warmup": SequenceLengthWarmup(run),
        "checkpointer": CheckpointerCallback(save_interval=10, save_async=False),
        "evaluator": EvaluatorCallback(
            evaluators=[evaluator], eval_interval=9, eval_duration=Duration.steps(1), log_interval=100
        ),
        **dict(callbacks),
    }
    return Trainer(
        work_dir=folder,
        save_folder=str(folder / "saved"),
        train_module=module,
        data_loader=loader,
        device=torch.device("cpu"),
        checkpointer=CheckpointerConfig(work_dir=folder, save_overwrite=True).build(),
        callbacks={name: callback for name, callback in given.items() if callback is not None},
        max_duration=duration or Duration.tokens(4000),
        save_overwrite=True,
        load_strategy=LoadStrategy.if_available,
        metrics_collect_interval=1,
        async_bookkeeping=False,
    )


def train(folder, run, load_path=None, **settings):
    """Train; return the trainer, and per step: the batches, the trainer's tokens, its rate, and evaluated shapes."""
    trainer = build(folder, run, **settings)
    trainer.load_path = load_path
    module = trainer.train_module
    seen = {"batches": [], "tokens": [], "rates": [], "evaluated": [], "calls": []}
    forward, optim_step, eval_batch = module.model_forward, module.optim_step, module.eval_batch

    def recorded_forward(input_ids, labels=None, **options):
        seen["calls"].append((trainer.global_step, input_ids.clone(), None if labels is None else labels.clone()))
        return forward(input_ids, labels=labels, **options)

    def recorded_step():
        optim_step()
        seen["tokens"].append(trainer.global_train_tokens_seen)
        seen["rates"].append(float(module.optim.param_groups[0]["lr"]))

    def recorded_evaluation(batch, labels=None):
        seen["evaluated"].append((trainer.global_step, tuple(batch["input_ids"].shape)))
        before = len(seen["calls"])
        output = eval_batch(batch, labels=labels)
        del seen["calls"][before:]
        return output

    module.model_forward, module.optim_step = recorded_forward, recorded_step
    module.eval_batch = recorded_evaluation
    trainer.fit()
    return trainer, seen


def rows_by_step(seen):
    """The rows that each step trained on this rank, in order."""
    steps = {}
    for step, input_ids, _ in seen["calls"]:
        if step:  # step 0 is the trial batch of the trainer
            steps.setdefault(step, []).extend(input_ids.tolist())
    return steps


def plan_of(run):
    return TrainerPlan.of(run, global_batch=8, max_lr=5e-3)


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("olmo_core")


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000)


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder with a corpus of OLMo-core: one array of the tokens of the training data."""
    place = tmp_path_factory.mktemp("olmo")
    data = open_training_data(run_config(run))
    tokens = np.concatenate([data.read(step)[0].ravel() for step in range(1, 18)]).astype(np.uint16)
    tokens[::40] = 256  # documents
    np.tile(tokens, 6).tofile(place / "tokens.npy")
    return place


def run_config(run):
    return plan_of(run).config


@pytest.fixture(scope="module")
def own_tokens(run, place):
    """A run over OLMo-core's own data set, with two workers, which leaves step10."""
    run = changed(run, data=None, model=None)
    return train(place / "own", run, num_workers=2)


@pytest.fixture(scope="module")
def run_rows(run, place):
    """A run over the rows of slw train."""
    return train(place / "rows", run, own_rows=True)


def test_each_step_has_the_length_of_the_plan(own_tokens, run):
    _, seen = own_tokens
    plan = plan_of(run)
    lengths = {step: {len(row) for row in rows} for step, rows in rows_by_step(seen).items()}
    assert lengths == {step: {plan.seqlen(step)} for step in range(1, plan.steps + 1)}
    assert {len(rows) for rows in rows_by_step(seen).values()} == {8}


def test_its_rows_are_those_of_a_run_without_warmup_cut(own_tokens, place, run):
    trainer, seen = own_tokens
    loader = trainer.data_loader
    loader.reset()
    loader.reshuffle(1)
    plan = plan_of(run)
    for step, batch in zip(range(1, plan.steps + 1), loader, strict=False):
        assert rows_by_step(seen)[step] == batch["input_ids"][:, : plan.seqlen(step)].tolist()


@pytest.mark.parametrize("kind", ["own_tokens", "run_rows"])
def test_tokens_and_rates_are_those_of_the_plan(kind, run, request):
    trainer, seen = request.getfixturevalue(kind)
    plan = plan_of(run)
    assert trainer.global_step == plan.steps
    assert seen["tokens"] == [plan.consumed_tokens(step) for step in range(1, plan.steps + 1)]
    assert seen["rates"] == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


@pytest.mark.parametrize("kind", ["own_tokens", "run_rows"])
def test_flops_are_those_of_the_short_batches(kind, run, request):
    trainer, _ = request.getfixturevalue(kind)
    plan = plan_of(run)
    tokens = [plan.consumed_tokens(step) - plan.consumed_tokens(step - 1) for step in range(1, plan.steps + 1)]
    per_token = [trainer.train_module.num_flops_per_token(plan.seqlen(step)) for step in range(1, plan.steps + 1)]
    expected = sum(count * flops for count, flops in zip(tokens, per_token, strict=True)) / 1e15
    assert trainer.global_train_petaflops == pytest.approx(expected, rel=1e-9)


def test_run_rows_are_the_rows_of_slw_train(run_rows, run):
    data = open_training_data(run_config(run))
    for step, rows in rows_by_step(run_rows[1]).items():
        assert rows == data.read(step)[0].tolist()
    targets = [labels for step, _, labels in run_rows[1]["calls"] if step == 1]
    assert np.concatenate(targets).tolist() == data.read(1)[1].tolist()


def test_every_column_of_a_short_row_has_a_target(own_tokens):
    _, seen = own_tokens
    assert all((labels != -100).all() for step, _, labels in seen["calls"] if step == 1)


def test_micro_batches_of_short_steps_have_more_rows(own_tokens, run):
    _, seen = own_tokens
    plan = plan_of(run)
    calls = {step: sum(at == step for at, _, _ in seen["calls"]) for step in (1, plan.steps)}
    assert calls == {1: 1, plan.steps: 4}  # 8 rows of 8 tokens in one of 64 tokens; 8 of 32 in four


def test_evaluation_is_at_full_length(own_tokens, run):
    steps = dict(own_tokens[1]["evaluated"])
    assert plan_of(run).seqlen(min(step for step in steps if step)) < 32
    assert {shape[1] for shape in steps.values()} == {32}


@pytest.mark.parametrize("own_rows", [False, True])
def test_resume_mid_warmup_is_bit_identical(own_rows, place, run, request):
    import torch

    whole, seen = request.getfixturevalue("run_rows" if own_rows else "own_tokens")
    run = run if own_rows else changed(run, data=None, model=None)
    saved = place / ("rows" if own_rows else "own") / "saved" / "step10"
    resumed, again = train(place / f"resumed-{own_rows}", run, load_path=str(saved), own_rows=own_rows)
    assert plan_of(run).seqlen(10) < 32
    later = {step: rows for step, rows in rows_by_step(seen).items() if step > 10}
    assert {step: rows for step, rows in rows_by_step(again).items() if step > 10} == later
    assert again["tokens"] == seen["tokens"][10:]
    assert again["rates"] == seen["rates"][10:]
    for name, weight in whole.train_module.model.state_dict().items():
        assert torch.equal(resumed.train_module.model.state_dict()[name], weight), name


def test_a_checkpoint_of_another_schedule_is_refused(own_tokens, place, run):
    run = changed(run, data=None, model=None)
    other = changed(run, curriculum_learning__schedule_config__total_curriculum_step=9)
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        train(place / "other", other, load_path=str(place / "own" / "saved" / "step10"))


def test_a_checkpoint_without_a_warmup_is_refused(place, run):
    from olmo_core.train import Duration

    plain = build(place / "plain", run, duration=Duration.steps(10), callbacks={"warmup": None})
    plain.fit()
    with pytest.raises(CheckpointError, match="without a sequence length warmup"):
        train(place / "after", changed(run, data=None, model=None), load_path=str(place / "plain" / "saved" / "step10"))


def test_segments_are_rows_of_their_own(place, run):
    run = changed(run, data=None, model=None, curriculum_learning__method="segment")
    trainer, seen = train(place / "segment", run)
    plan = plan_of(run)
    rows = {step: len(rows) for step, rows in rows_by_step(seen).items()}
    assert rows == {step: 8 * (32 // plan.seqlen(step)) for step in range(1, plan.steps + 1)}
    assert seen["tokens"] == [plan.consumed_tokens(step) for step in range(1, plan.steps + 1)]
    assert trainer.global_step == plan.steps
    # Of 4 segments of 8 tokens, the last one's last token has no next one in its row.
    targets = np.concatenate([labels for step, _, labels in seen["calls"] if step == 1])
    assert (targets != -100).sum(1).tolist() == [8, 8, 8, 7] * 8


def test_documents_end_with_their_segment():
    import torch

    from seqlen_curriculum.integrations.olmo_core import _cut_documents, _shorten

    doc_lens = torch.tensor([[5, 3, 0], [2, 2, 4]])
    assert _cut_documents(doc_lens, 3, 1).tolist() == [[3, 0, 0], [2, 1, 0]]
    assert _cut_documents(doc_lens, 4, 2).tolist() == [[4, 0, 0], [1, 3, 0], [2, 2, 0], [0, 0, 4]]
    batch = {
        "input_ids": torch.arange(16).view(2, 8),
        "doc_lens": doc_lens,
        "max_doc_lens": [5, 4],
        "index": torch.arange(2),
    }
    short = _shorten(batch, 4, True, -100)
    assert short["max_doc_lens"] == [4, 3, 2, 4]
    assert short["index"].tolist() == [0, 0, 1, 1]
    assert short["labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, -100], [9, 10, 11, 12], [13, 14, 15, -100]]


def wrong(name):
    """Return settings of a trainer that contradict the plan."""
    from olmo_core.optim import ConstantScheduler, SchedulerUnits
    from olmo_core.train import Duration
    from olmo_core.train.callbacks import SequenceLengthSchedulerCallback

    return {
        "duration": ({}, {"duration": Duration.epochs(1)}),
        "scheduler": ({}, {"scheduler": ConstantScheduler()}),
        "step units": ({"scheduler": None}, {"scheduler": ConstantScheduler()}),
        "token units": (
            {"scheduler": None},
            {"scheduler": ConstantScheduler(units=SchedulerUnits.tokens), "duration": Duration.steps(17)},
        ),
        "length": ({"train_batch_size": 16}, {"sequence_length": 16}),
        "batch": ({"train_batch_size": 4}, {}),
        "rate": ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, {}),
        "other callback": ({}, {"callbacks": {"its own": SequenceLengthSchedulerCallback()}}),
    }[name]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("duration", r"max_duration: .*epochs.* set Duration.tokens\(4000\) or Duration.steps\(\d+\)"),
        ("scheduler", "scheduler: ConstantScheduler contradicts the file's scheduler"),
        ("step units", r"max_duration: .*tokens.* set Duration.steps"),
        ("token units", r"max_duration: .*steps.* set Duration.tokens\(4000\)"),
        ("length", "sequence_length: 16 in the data loader, but the warmup ends at 32"),
        ("batch", "train_batch_size: 4 in the file, but the trainer has 8"),
        ("rate", "optimizer.params.lr: 0.001 in the file, but the trainer has 0.005"),
        ("other callback", r"callbacks: 'its own' \(SequenceLengthSchedulerCallback\)"),
    ],
)
def test_contradictions_are_errors_before_the_first_step(place, run, name, named):
    changes, settings = wrong(name)
    with pytest.raises(ConfigError, match=named):
        train(place / "wrong", changed(run, data=None, model=None, **changes), **settings)


def test_batches_of_another_length_are_refused(own_tokens):
    import torch

    callback = own_tokens[0].callbacks["warmup"]
    with pytest.raises(DataError, match="a batch of 16 tokens per row"):
        callback.pre_step({"input_ids": torch.zeros(2, 16, dtype=torch.int64)})


def test_two_ranks_share_the_rows_of_a_step(own_tokens, run_rows, place, run):
    (place / "two.json").write_text(json.dumps(run))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    subprocess.run([*command, str(place)], check=True, timeout=limit(300))
    ranks = [json.loads((place / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for part, (_, one) in {"own": own_tokens, "rows": run_rows, "resumed": run_rows}.items():
        assert ranks[0][part]["rates"] == one["rates"][-len(ranks[0][part]["rates"]) :]
        assert ranks[1][part]["tokens"] == one["tokens"][-len(ranks[1][part]["tokens"]) :]
        for step, rows in rows_by_step(one).items():
            if part == "resumed" and step <= 10:  # it has the trial batch of a resumed trainer in step 10
                continue
            two = [row for rank in ranks for row in rank[part]["rows"][str(step)]]
            assert sorted(two) == sorted(rows)


def run_rank(place):
    """Train on this rank: OLMo-core's data, the run's rows, and the latter from one rank's checkpoint of step 10."""
    from olmo_core.distributed import parallel
    from olmo_core.train import prepare_training_environment

    prepare_training_environment(backend="gloo")
    run = json.loads((place / "two.json").read_text())
    parts = {
        "own": (changed(run, data=None, model=None), {}),
        "rows": (run, {"own_rows": True}),
        "resumed": (run, {"own_rows": True, "load_path": str(place / "rows" / "saved" / "step10")}),
    }
    results = {}
    for name, (settings, options) in parts.items():
        parallel._WORLD_MESH = None  # otherwise a process builds one model only
        _, seen = train(place / f"two-{name}", settings, **options)
        results[name] = {"rows": rows_by_step(seen), "tokens": seen["tokens"], "rates": seen["rates"]}
    (place / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
