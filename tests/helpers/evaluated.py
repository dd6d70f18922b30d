"""A small GPT-2 that has memorized half of its passages, the files in evaluate.py's examples, and reference loops."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.evaluation.lm_eval_tasks import GPT3_TASKS
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained_tokenizer import save_tokenizer

TEXT = "the a cat dog river house walked sang under over red blue moon garden letter window never always quiet stone"
WORDS = TEXT.split()
VOCAB = 300
POSITIONS = 48
ITEMS = 41  # prime, so that ranks don't divide it


def passages():
    """Return sentences of 6 to 12 words that end with one of two long words, some after a line break."""
    rng = random.Random(7)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(6, 12))) for _ in range(ITEMS - 1)]
    texts += [" ".join(rng.choices(WORDS, k=60))]
    return ["\n".join(text.rsplit(" ", 1)) if number % 10 == 3 else text for number, text in enumerate(texts)]


def make(folder):
    """Make ``runs/gpt3`` and ``runs/slw60k`` with a trained checkpoint, texts, and ``tasks`` with GPT-3's eleven."""
    texts = passages()
    tokenizer = build_tokenizer(TokenizerChoice(train_vocab=VOCAB), texts)
    checkpoint = folder / "runs" / "gpt3" / "global_step1"
    save_hf(trained(tokenizer, texts[::2]), checkpoint)
    save_tokenizer(tokenizer, checkpoint)
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    manifest = {
        "step": 1,
        "data_ranks": 1,
        "zero_stage": 0,
        "zero": {},
        "run": {"model.vocab_size": VOCAB},
        "files": sizes,
    }
    (checkpoint / "complete.json").write_text(json.dumps(manifest))
    (folder / "runs" / "slw60k").symlink_to(folder / "runs" / "gpt3")
    (folder / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "wiki.test.tokens").write_text(
        " \n".join(f" = Page = \n {text} @-@ {text} , {text} . " for text in texts)
    )
    _write_tasks(folder)
    return SimpleNamespace(folder=folder, checkpoint=checkpoint, texts=texts, tokenizer=tokenizer)


def trained(tokenizer, texts):
    """Train a GPT-2 of two layers for 120 steps on ``texts``, which takes a few seconds."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": POSITIONS}
    model = build_gpt2(ModelConfig(**sizes, vocab_size=VOCAB, dropout=0.0))
    rows = [tokenizer.encode(text).ids[: POSITIONS + 1] for text in texts]
    most = max(map(len, rows))
    inputs = torch.tensor([row[:-1] + [0] * (most - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [-100] * (most - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = F.cross_entropy(model.lm(inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _write_tasks(folder):
    """Write the eleven tasks with lm-eval's prompts on local records, and one simple task of each kind."""
    tasks = folder / "tasks"
    tasks.mkdir()
    questions = []
    for number, text in enumerate(passages()):
        context, word = text.rsplit(None, 1)
        others = [other for other in WORDS if other != word]
        questions.append({"text": text, "context": context, "word": word, "other": others[number % len(others)]})
    for name, kind in KINDS.items():
        _write_task(tasks, name, kind, questions)
    for name, path in lm_eval_files().items():
        _write_task(tasks, name, f"include: {path}\n{LOCAL}", [RECORDS[name](**question) for question in questions])


def lm_eval_files():
    """Return lm-eval's files of the eleven tasks, in folders such as ``arc`` for ``arc_easy``."""
    found = {}
    for name in GPT3_TASKS.values():
        paths = (LM_EVAL / name.split("_")[0]).glob("*.yaml")
        (found[name],) = [path for path in paths if f"task: {name}" in path.read_text().splitlines()]
    return found


def _write_task(tasks, name, kind, records):
    path = tasks / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"data_files": {"test": str(path)}, "cache_dir": str(tasks / "cache" / name)}
    (tasks / f"{name}.yaml").write_text(f"{kind}task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\n")


LM_EVAL = Path(lm_eval.tasks.__file__).parent
LOCAL = "dataset_name: null\ntraining_split: null\nvalidation_split: null\ntest_split: test\n"
KINDS = {
    "choice": """output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_target: 0
doc_to_choice: "{{[word, other]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "generate": """output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: " {{word}}"
generation_kwargs: {until: [" t", " s", "\\n"], do_sample: false, max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "pages": """output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}


def _hellaswag(context, word, other, **_):
    return {"ctx_a": context, "ctx_b": "", "activity_label": "a", "endings": [word, other], "label": "0"}


def _winogrande(context, word, other, **_):
    return {"sentence": f"the _ {context}", "option1": word, "option2": other, "answer": "1"}


def _arc(context, word, other, **_):
    return {"question": context, "choices": {"text": [other, word], "label": ["A", "B"]}, "answerKey": "B"}


def _anli(context, word, **_):
    return {"premise": context, "hypothesis": word, "label": 1}


RECORDS = {
    "hellaswag": _hellaswag,
    "lambada_openai": lambda text, **_: {"text": text},
    "triviaqa": lambda context, word, **_: {"question": context, "answer": {"aliases": [word, word.upper()]}},
    "webqs": lambda context, word, other, **_: {"question": context, "answers": [word, other]},
    "winogrande": _winogrande,
    "piqa": lambda context, word, other, **_: {"goal": context, "sol1": other, "sol2": word, "label": 1},
    **dict.fromkeys(["arc_challenge", "arc_easy"], _arc),
    **dict.fromkeys(["anli_r1", "anli_r2", "anli_r3"], _anli),
}


def logits_of(place, tokens):
    """Return logits (S, V) of one row by plain transformers, without the padding rows of the embedding."""
    if not hasattr(place, "plain"):
        place.plain = AutoModelForCausalLM.from_pretrained(place.checkpoint).eval()
    assert place.plain.config.vocab_size > VOCAB
    with torch.no_grad():
        return place.plain(torch.tensor([tokens])).logits[0, :, :VOCAB]


def tail(place, context, continuation):
    """Return (nll, all right) of the continuation's tokens; a context that is too long loses its beginning."""
    tokens = (context + continuation)[-POSITIONS - 1 :]
    logits = logits_of(place, tokens[:-1])[-len(continuation) :]
    targets = torch.tensor(continuation)
    return F.cross_entropy(logits, targets, reduction="sum").item(), bool((logits.argmax(-1) == targets).all())


def ids(place, text):
    return place.tokenizer.encode(text).ids
