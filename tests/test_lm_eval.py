"""lm-evaluation-harness on our scoring: its numbers are plain loops' over transformers, and LAMBADA's are our own."""

import functools
import json
import math
import sys
from types import SimpleNamespace

import lm_eval.tasks
import pytest
from helpers.evaluated import ITEMS, LM_EVAL, POSITIONS, WORDS, ids, logits_of, tail
from transformers import AutoModelForCausalLM

from seqlen_curriculum.cli import evaluate
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.lm_eval_model import HarnessModel
from seqlen_curriculum.evaluation.lm_eval_tasks import GPT3_TASKS, read_harness_tasks, task_names

OWN = ["--include-path", "tasks"]


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def harness(evaluated_place, evaluated_model):
    return HarnessModel(evaluated_model, evaluated_place.tokenizer, POSITIONS, Ranks(), 512)


def greedy(place, prompt, new):
    """The text that a plain loop adds to a prompt."""
    tokens = ids(place, prompt)
    for _ in range(new):
        tokens.append(int(logits_of(place, tokens)[-1].argmax()))
    return place.tokenizer.decode(tokens[len(ids(place, prompt)) :])


def test_lambada_is_our_own_where_the_last_space_splits_alike(
    evaluated_place, evaluated_model, evaluate_command, tmp_path
):
    alike = [text for text in evaluated_place.texts if text.split(" ")[-1] == text.split()[-1]]
    assert 20 < len(alike) < ITEMS
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in alike))
    task = (evaluated_place.folder / "tasks" / "lambada_openai.yaml").read_text()
    questions = str(evaluated_place.folder / "tasks" / "lambada_openai.jsonl")
    (tmp_path / "lambada.yaml").write_text(task.replace(questions, str(tmp_path / "alike.jsonl")))
    flags = [
        "--harness",
        "lambada",
        "--include-path",
        tmp_path,
        "--task",
        f"lambada={tmp_path / 'alike.jsonl'}",
        "--json",
    ]
    results = json.loads(evaluate_command("runs/gpt3", *flags))
    ours, theirs = results["tasks"]["lambada"], results["harness"]["lambada"]
    assert 0 < ours["accuracy"] < 1
    assert theirs["accuracy"] == theirs["acc"] == ours["accuracy"]
    assert theirs["perplexity"] == pytest.approx(ours["adjusted_perplexity"], rel=1e-6)
    assert theirs["items"] == ours["items"] == len(alike)
    assert theirs["requests_cut"] == ours["items_cut"] == 1


def test_each_kind_of_task_is_as_in_a_plain_loop(evaluated_place, evaluate_command):
    flags = ["--harness", "choice", "generate", "pages", *OWN, "--limit", "12", "--json"]
    found = json.loads(evaluate_command("runs/gpt3", *flags))["harness"]
    lines = (evaluated_place.folder / "tasks" / "choice.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines[:12]]

    def nll(question, word):
        return tail(evaluated_place, ids(evaluated_place, question["context"]), ids(evaluated_place, " " + word))[0]

    better = [nll(one, one["word"]) < nll(one, one["other"]) for one in questions]
    assert sum(better) > 0
    assert found["choice"]["accuracy"] == pytest.approx(sum(better) / 12)
    texts = [greedy(evaluated_place, one["context"], 4) for one in questions]
    cut = [min([text.find(stop) % 99 for stop in (" t", " s", "\n")]) for text in texts]
    right = [text[:end].strip() == one["word"] for text, end, one in zip(texts, cut, questions, strict=True)]
    assert found["generate"]["accuracy"] == pytest.approx(sum(right) / 12)
    end = evaluated_place.tokenizer.token_to_id("<|endoftext|>")
    pages = sum(tail(evaluated_place, [end], ids(evaluated_place, one["text"]))[0] for one in questions)
    words = sum(len(one["text"].split()) for one in questions)
    assert found["pages"]["word_perplexity"] == pytest.approx(math.exp(pages / words), rel=1e-5)
    assert all(
        numbers["partial"] and numbers["items"] == 12 and numbers["items_in_all"] == ITEMS for numbers in found.values()
    )


def test_shots_stand_before_the_question_and_a_table_shows_it(evaluate_command):
    output = evaluate_command("runs/gpt3", "--harness", "piqa", "anli_r3", *OWN, "--shots", "1", "--limit", "5")
    assert [line.split()[0] for line in output.splitlines()[2:6]] == [
        "lm-eval,",
        "piqa",
        "anli_r3",
        "mean",
    ]
    assert "lm-eval, 1 shots" in output
    assert "PARTIAL: not all items were read" in output


def test_a_text_longer_than_a_window_is_read_in_windows_that_share_no_target(evaluated_place, harness):
    text = " ".join(WORDS * 4)
    tokens = ids(evaluated_place, text)
    assert len(tokens) > 2 * POSITIONS
    end = evaluated_place.tokenizer.token_to_id("<|endoftext|>")
    whole = [end, *tokens]
    # The first window predicts 48 tokens from <|endoftext|>, each next one 48 more; the last is as full as it can be.
    total = 0.0
    for first in range(0, len(tokens), POSITIONS):
        new = min(POSITIONS, len(tokens) - first)
        context = whole[max(first + new - POSITIONS, 0) : first + 1]
        total += tail(evaluated_place, context, whole[first + 1 : first + 1 + new])[0]
    assert harness.loglikelihood_rolling(requests((text,), ("",))) == [pytest.approx(-total, rel=1e-5), 0.0]


def test_generation_stops_where_it_is_asked_to_and_keeps_the_order(evaluated_place, harness):
    prompts = [text.rsplit(None, 3)[0] for text in evaluated_place.texts[:9]]
    plain = [greedy(evaluated_place, prompt, 6) for prompt in prompts]
    settings = [
        {"until": [], "max_gen_toks": 6},
        {"until": "e", "max_gen_toks": 6},
        {"until": ["zzz"], "max_gen_toks": 2},
    ]
    found = harness.generate_until(requests(*((prompt, settings[n % 3]) for n, prompt in enumerate(prompts))))
    for number, (text, whole) in enumerate(zip(found, plain, strict=True)):
        wanted = [whole, whole.split("e")[0], greedy(evaluated_place, prompts[number], 2)][number % 3]
        assert text == wanted.split("<|endoftext|>")[0]


def test_a_long_prompt_leaves_room_for_its_answer(evaluated_place, harness):
    prompt = " ".join(WORDS * 4)
    harness.truncated_requests = 0
    (found,) = harness.generate_until(requests((prompt, {"until": ["\n"], "max_gen_toks": 4})))
    kept = evaluated_place.tokenizer.decode(ids(evaluated_place, prompt)[4 - POSITIONS :])
    assert ids(evaluated_place, kept) == ids(evaluated_place, prompt)[4 - POSITIONS :]
    assert found == greedy(evaluated_place, kept, 4)
    assert harness.truncated_requests == 1
    with pytest.raises(ConfigError, match="requires random samples"):
        harness.generate_until(requests((prompt, {"do_sample": True})))


def test_a_text_without_context_follows_the_end_of_text(evaluated_place, harness):
    end = evaluated_place.tokenizer.token_to_id("<|endoftext|>")
    nll, right = tail(evaluated_place, [end], ids(evaluated_place, "the river"))
    assert harness.loglikelihood(requests(("", "the river"))) == [(pytest.approx(-nll, rel=1e-5), right)]


def test_the_papers_names():
    assert len(task_names(["gpt3"])) == 11
    assert task_names(["lambada", "copa"]) == {"lambada": "lambada_openai", "copa": "copa"}
    with pytest.raises(ConfigError, match="piqa: is given twice"):
        task_names(["gpt3", "piqa"])


def test_the_example_of_the_eleven(evaluate_command):
    output = evaluate_command("runs/gpt3", "--harness", "gpt3", *OWN)
    assert "  slw evaluate runs/gpt3 --harness gpt3 --include-path tasks\n" in evaluate.__doc__
    table = output.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table[1:-1]] == list(GPT3_TASKS)
    shares = [float(line.split()[1].rstrip("%")) for line in table[1:-1]]
    assert table[-1].split()[:3] == ["mean", "of", "11"]
    assert float(table[-1].split()[3].rstrip("%")) == pytest.approx(sum(shares) / 11, abs=0.01)


def few_tasks(manager, include_path, include_defaults=True):
    """Return a manager of the given tasks and, by default, of one of lm-eval's: listing all 10,000 takes seconds."""
    folders = [LM_EVAL / "piqa", include_path] if include_defaults else [include_path]
    return manager(include_path=folders, include_defaults=False)


def test_mistakes_in_tasks_are_reported(evaluate_error, evaluated_place, tmp_path, monkeypatch):
    task = (evaluated_place.folder / "tasks" / "piqa.yaml").read_text()
    (tmp_path / "piqa.yaml").write_text(task.replace("piqa.jsonl", "nothing.jsonl"))
    (tmp_path / "group.yaml").write_text("group: quizzes\ntask: [piqa]\n")
    (tmp_path / "arc_easy.yaml").write_text(task.replace("task: piqa", "task: arc_easy\ntag: [exams]"))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(few_tasks, lm_eval.tasks.TaskManager))
    flags = ["runs/gpt3", "--include-path", tmp_path, "--harness"]
    message = evaluate_error(*flags, "piqa")
    assert "--harness piqa: its data can't be read (FileNotFoundError" in message
    assert "a task file 'piqa' for local files" in message
    assert "--harness piqua: there is no such task; did you mean 'piqa'? gpt3 is" in evaluate_error(*flags, "piqua")
    assert "--harness xyzzy: there is no such task; gpt3 is the paper's eleven" in evaluate_error(*flags, "xyzzy")
    for group in ("quizzes", "exams"):
        message = evaluate_error(*flags, group)
        assert f"--harness {group}: is a group of lm-eval" in message


@pytest.mark.slow
def test_a_task_is_looked_up_among_all_of_lm_eval(evaluate_error):
    message = evaluate_error("runs/gpt3", "--harness", "arc_chalenge")
    assert "--harness arc_chalenge: there is no such task; did you mean 'arc_challenge'?" in message


def test_what_a_task_cannot_do_is_reported_before_the_weights_are_read(
    evaluate_error, evaluate_command, evaluated_place, tmp_path, monkeypatch
):
    task = (evaluated_place.folder / "tasks" / "generate.yaml").read_text()
    (tmp_path / "generate.yaml").write_text(task.replace("do_sample: false", "do_sample: true"))
    piqa = ["runs/gpt3", "--harness", "piqa", *OWN, "--limit", "1", "--shots"]
    evaluate_command(*piqa, ITEMS)  # without examples of its own, lm-eval draws from the questions
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    message = evaluate_error("runs/gpt3", "--harness", "generate", "--include-path", tmp_path)
    assert "--harness generate: its generation_kwargs require random samples" in message
    assert f"--shots {ITEMS + 1}: piqa has fewer examples" in evaluate_error(*piqa, ITEMS + 1)


def test_without_lm_eval_the_way_to_install_it_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'seqlen-curriculum\[eval\]'"):
        read_harness_tasks(["piqa"])
