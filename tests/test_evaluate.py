"""evaluate.py as its examples have it, on one rank and on two, against plain loops over transformers."""

import contextlib
import json
import math
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.evaluated import ITEMS, POSITIONS, ids, logits_of, tail
from helpers.launching import ROOT, forked, launch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.evaluate import evaluate, evaluation_seqlen, read_tasks
from seqlen_curriculum.evaluation.lambada import split_last_word
from seqlen_curriculum.evaluation.scoring import batches, score
from seqlen_curriculum.evaluation.task import Limits, Row
from seqlen_curriculum.evaluation.wikitext import detokenize
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.run_folder.model_folder import sizes_in

SCRIPT = ROOT / "scripts" / "evaluate.py"


def examples():
    help_text = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    ).stdout
    lines = help_text.split("Example:")[1].split("\n\n")[0].replace("\\\n", "").strip().splitlines()
    return [shlex.split(line) for line in lines]


# --- the arithmetic of batches


def rows_of(*shapes):
    return [Row(np.zeros(tokens, dtype=np.int64), targets) for tokens, targets in shapes]


def test_batches_by_hand():
    rows = rows_of((5, 1), (9, 2), (5, 4), (5, 0), (5, 1), (5, 1), (9, 8))
    # 8 tokens read: one row in 12; 4: three rows. Those with most targets come first, one without is left out.
    assert batches(rows, 12) == [[6], [1], [2, 0, 4], [5]]
    assert batches(rows, 1) == [[number] for batch in batches(rows, 12) for number in batch]
    assert sorted(map(len, batches(rows, 10**9))) == [2, 4]


def test_few_logits_are_held_at_once():
    rows = rows_of(*[(1025, 1024)] * 5, *[(1025, 32)] * 100)
    lengths = [len(batch) for batch in batches(rows, 2**20)]
    assert lengths == [2, 2, 2, *[64, 35]]  # 2048 / 1024 = 2, 2048 / 32 = 64


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 3)), max_size=60), st.integers(1, 50), st.integers(1, 5))
def test_every_row_is_in_one_batch_of_one_rank(shapes, batch_tokens, ranks):
    rows = rows_of(*[(tokens, min(targets, tokens - 1)) for tokens, targets in shapes])
    cut = batches(rows, batch_tokens)
    shares = [cut[rank::ranks] for rank in range(ranks)]
    taken = sorted(number for share in shares for batch in share for number in batch)
    assert taken == [number for number, row in enumerate(rows) if row.targets]
    for batch in cut:
        lengths = {len(rows[number].tokens) for number in batch}
        assert len(lengths) == 1
        assert len(batch) == 1 or len(batch) * (lengths.pop() - 1) <= batch_tokens


# --- scores against plain loops


def test_lambada_is_as_in_a_plain_loop(evaluated_place, evaluated_model):
    task = read_tasks([f"lambada={evaluated_place.folder / 'lambada_test.jsonl'}"])["lambada"]
    ((_, found),) = evaluate(
        evaluated_model, {"lambada": task(evaluated_place.tokenizer, Limits(seqlen=POSITIONS))}, Ranks()
    )
    split = [split_last_word(text) for text in evaluated_place.texts]
    loop = [
        tail(evaluated_place, ids(evaluated_place, context), ids(evaluated_place, target)) for context, target in split
    ]
    assert 0 < found["right"] < found["items"] == ITEMS
    assert found["right"] == sum(right for _, right in loop)
    assert found["accuracy"] == found["right"] / ITEMS
    assert found["loss"] == pytest.approx(sum(nll for nll, _ in loop) / found["targets"], rel=1e-5)
    assert found["items_cut"] == 1
    assert found["targets"] > ITEMS  # words of several tokens


@pytest.mark.parametrize(("seqlen", "overlap"), [(POSITIONS, 32), (32, 5), (16, 16)])
def test_wikitext_is_as_in_a_plain_loop(evaluated_place, evaluated_model, seqlen, overlap):
    path = evaluated_place.folder / "wiki.test.tokens"
    task = read_tasks([f"wikitext103={path}"])["wikitext103"]
    ready = task(evaluated_place.tokenizer, Limits(seqlen=seqlen, overlap=overlap))
    ((_, found),) = evaluate(evaluated_model, {"wikitext103": ready}, Ranks(), batch_tokens=300)
    tokens, total, done = ids(evaluated_place, detokenize(path.read_text())), 0.0, 0
    for start in range(0, len(tokens) - 1, overlap):
        row = tokens[start : start + seqlen + 1]
        new = max(start + len(row) - 1 - done, 0)
        total += (
            F.cross_entropy(
                logits_of(evaluated_place, row[:-1])[-new:], torch.tensor(row[-new:]), reduction="sum"
            ).item()
            if new
            else 0
        )
        done += new
    assert done == found["targets"] == len(tokens) - 1
    assert found["loss"] == pytest.approx(total / done, rel=1e-5)
    words = len(path.read_text().strip().split(" "))
    assert found["adjusted_perplexity"] == pytest.approx(math.exp(min(20, total / (words - 1))), rel=1e-4)


def test_the_batch_changes_nothing(evaluated_place, evaluated_model):
    rows = [Row(np.array(ids(evaluated_place, text)[:POSITIONS]), 3) for text in evaluated_place.texts]
    alone, together = score(evaluated_model, rows, Ranks(), 1), score(evaluated_model, rows, Ranks(), 10**6)
    assert np.allclose(alone.nll, together.nll, rtol=1e-5)
    assert alone.right.tolist() == together.right.tolist()


def test_models_that_give_all_logits_do_too(evaluated_place, evaluated_model):
    class AllLogits(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, inputs, use_cache):
            return evaluated_model(inputs, use_cache=use_cache)

    rows = [Row(np.array(ids(evaluated_place, text)[:POSITIONS]), 3) for text in evaluated_place.texts]
    assert np.allclose(score(AllLogits(), rows, Ranks()).nll, score(evaluated_model, rows, Ranks()).nll, rtol=1e-5)


def test_weights_that_diverged_are_reported(evaluated_place):
    broken = load_model(evaluated_place.checkpoint)
    with torch.no_grad():
        broken.transformer.wte.weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"lambada: the loss of 1 of 1 rows is not finite"):
        score(broken, [Row(np.array([3, 4, 5]), 1)], Ranks(), name="lambada")


# --- the command


def test_the_first_example(evaluated_place, evaluate_command):
    (program, command, *arguments) = examples()[0]
    assert [program, command] == ["slw", "evaluate"]
    output = evaluate_command(*arguments)
    assert "slw60k/global_step1: float32, 48 tokens per window\n" in output
    assert re.search(r"accuracy +\d+\.\d\d% \(\d+ of 41 last words\)", output)
    assert re.search(r"adjusted perplexity +\d+\.\d{4} per word", output)
    assert "cut                  1 items were longer" in output
    assert "PARTIAL" not in output


def test_two_ranks_come_to_the_numbers_of_one(evaluated_place, evaluate_command, tmp_path):
    words = examples()[2]
    assert words[:4] == ["deepspeed", "--module", "seqlen_curriculum", "evaluate"]
    arguments = words[4:]
    arguments += ["--task", "wikitext103=wiki.test.tokens", "--json"]
    out = tmp_path / "new" / "two.json"
    folder = evaluated_place.folder
    status, output = launch(tmp_path / "log", SCRIPT, *arguments, "--out", out, ranks=2, launcher=forked, cwd=folder)
    assert status == 0, output
    (printed,) = re.findall(r"^\{\n.*?^\}$", output, re.DOTALL | re.MULTILINE)
    two, one = json.loads(printed), json.loads(evaluate_command(*arguments))
    assert json.loads(out.read_text()) == two
    assert list(out.parent.iterdir()) == [out]
    assert (two.pop("ranks"), one.pop("ranks")) == (2, 1)
    assert list(one["harness"]) == ["lambada", "triviaqa"]
    for results in (one, two):
        for numbers in [*results["tasks"].values(), *results["harness"].values()]:
            assert numbers.pop("seconds") > 0
    for name in ("lambada", "wikitext103"):
        assert two["tasks"][name].pop("loss") == pytest.approx(one["tasks"][name].pop("loss"), rel=1e-9)
        for key in ("perplexity", "adjusted_perplexity"):
            assert two["tasks"][name].pop(key) == pytest.approx(one["tasks"][name].pop(key), rel=1e-8)
    perplexities = [results["harness"]["lambada"].pop("perplexity") for results in (one, two)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-8)
    assert two == one


def test_a_part_says_so(evaluate_command):
    tasks = ["--task", "lambada=lambada_test.jsonl", "--task", "wikitext103=wiki.test.tokens"]
    output = evaluate_command("runs/gpt3", *tasks, "--limit", 3, "--seq-length", 16, "--overlap", 8)
    assert "PARTIAL              only the first 3 of 41 items: not comparable" in output
    assert re.search(r"PARTIAL +only the first 3 of \d+ windows", output)
    assert "16 tokens per window" in output
    assert "31 tokens per window" in evaluate_command(
        "runs/gpt3", *tasks[2:], "--seq-length", 31
    )  # below the default overlap


def test_what_was_measured_is_reported_before_a_later_task_fails(evaluated_place, evaluate_error, tmp_path):
    model = load_model(evaluated_place.checkpoint)
    with torch.no_grad():
        model.transformer.wpe.weight[POSITIONS - 1] = float("nan")  # which the first items don't come to
    model.save_pretrained(tmp_path / "hf")
    tasks = ["--task", "lambada=lambada_test.jsonl", "--task", "wikitext103=wiki.test.tokens", "--limit", 3]
    log = tmp_path / "log"
    with log.open("w") as file, contextlib.redirect_stdout(file):
        message = evaluate_error(tmp_path / "hf", "--tokenizer", evaluated_place.checkpoint, *tasks)
    assert "error: wikitext103: the loss of" in message
    assert re.search(r"^lambada\n  accuracy +\d", log.read_text(), re.MULTILINE)


def test_a_bare_hugging_face_folder_with_a_tokenizer_of_choice(evaluated_place, evaluate_command, tmp_path):
    load_model(evaluated_place.checkpoint).save_pretrained(tmp_path / "hf")
    arguments = ["--task", "lambada=lambada_test.jsonl", "--json"]
    tokenizer = evaluated_place.checkpoint / "tokenizer.json"
    theirs = json.loads(evaluate_command(tmp_path / "hf", "--tokenizer", tokenizer, *arguments))["tasks"]["lambada"]
    ours = json.loads(evaluate_command("runs/gpt3", *arguments))["tasks"]["lambada"]
    assert theirs["right"] == ours["right"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/gpt3"], "--task, --harness: neither is given"),
        (["runs/gpt3", "--task", "lambda=x"], "there is no task 'lambda'; did you mean 'lambada'?"),
        (["runs/gpt3", "--task", "lambada"], "no file given; write --task lambada=PATH"),
        (["runs/gpt3", "--task", "lambada=no.jsonl"], "--task lambada=no.jsonl: can't be read"),
        (["runs/gpt3", "--task", "lambada=a", "--task", "lambada=b"], "lambada is given twice"),
        (["runs/none", "--task", "lambada=lambada_test.jsonl"], "runs/none"),
        (["runs/gpt3", "--task", "wikitext103=wiki.test.tokens", "--overlap", "49"], "--overlap: 49 is above the 48"),
        (["runs/gpt3", "--task", "wikitext103=wiki.test.tokens", "--overlap", "0"], "--overlap: 0 is not valid"),
        (["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--seq-length", "49"], "--seq-length 49: give 1 to 48"),
        (["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--limit", "0"], "--limit: 0 is not valid"),
        (
            ["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--batch-tokens", "0"],
            "--batch-tokens: 0 is not valid",
        ),
        (["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--include-path", "tasks"], "only used with --harness"),
        (
            ["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--overlap", "8"],
            "only used with --task wikitext103=PATH",
        ),
        (["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--shots", "2"], "only used with --harness"),
        (["runs/gpt3", "--harness", "piqa", "--shots", "-1"], "--shots: -1 is not valid"),
        (
            ["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--device", "cuda"],
            "--device cuda: no GPU is visible; leave",
        ),
        (
            ["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--out", "runs"],
            "--out runs: is a folder; give a file in it",
        ),
        (
            ["runs/gpt3", "--task", "lambada=lambada_test.jsonl", "--out", "/proc/a.json"],
            "--out /proc: can't be written",
        ),
        (["runs/gpt3", "--harness", "gpt3", "piqa"], "--harness piqa: is given twice"),
        (
            ["runs/gpt3", "--harness", "piqa", "--include-path", "none"],
            "--include-path none: not a folder with task files",
        ),
    ],
)
def test_mistakes_are_reported_before_the_weights_are_read(evaluate_error, monkeypatch, arguments, message):
    def never(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert message in evaluate_error(*arguments)


def test_positions_by_the_names_of_families():
    for name in ("n_positions", "max_position_embeddings", "max_seq_len", "max_sequence_length"):
        assert evaluation_seqlen({name: 1024}) == sizes_in({name: 1024})["max_position_embeddings"] == 1024
    assert evaluation_seqlen({"n_positions": 1024}, 1) == 1
    assert evaluation_seqlen({"n_positions": 1024}, 1024) == 1024
    with pytest.raises(ConfigError, match="--seq-length 0: give 1 to 8, the model's positions"):
        evaluation_seqlen({"n_positions": 8}, 0)
    assert evaluation_seqlen({}, 9) == 9
    with pytest.raises(ConfigError, match="--seq-length: "):
        evaluation_seqlen({})
    with pytest.raises(ConfigError, match="--seq-length 0: give 1 or more"):
        evaluation_seqlen({}, 0)
