"""Tokenizers and models in folders with random faults: each command reads what the files say, or raises an error of ours.

``bash scripts/test.sh -m slow tests/test_fuzz_model_folders.py`` tries 5,000 folders.
"""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.bounds import Bounds, check_message
from helpers.command import slw
from helpers.mutated_models import TEXT, make_bases, mutated_folder
from helpers.settings import block
from safetensors.torch import load_file

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.preparation.pieces import Rules
from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.tokenizer import TokenizerChoice, read_tokenizer, vocab_size
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.generation import Sampling, generate
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.models.pretrained_tokenizer import load_tokenizer
from seqlen_curriculum.run_folder.model_files import weight_files
from seqlen_curriculum.run_folder.model_folder import vocabulary

pytestmark = pytest.mark.filterwarnings("ignore")  # a folder's odd values may print warnings

FILE = {
    "train_batch_size": 1,
    "curriculum_learning": block(max_difficulty=16),
    "data": {"train": ["-"], "seq_length": 16},
    "training": {"train_tokens": 100},
}


def prepared(folder, out):
    """Prepare a text; every id is one of the tokenizer's."""
    (out / "text.txt").write_text(TEXT)
    choice, rules = TokenizerChoice(tokenizer_file=folder), Rules(append_eod=False)
    prepare(Request(str(out / "corpus"), choice, [out / "text.txt"], rules=rules, workers=1))
    tokenizer, tokens = read_tokenizer(folder), IndexedCorpus(out / "corpus").tokens
    assert int(tokens.max()) < vocab_size(tokenizer)
    tokenizer.encode_special_tokens = True
    if not tokenizer.normalizer:
        assert tokens.tolist() == tokenizer.encode(TEXT, add_special_tokens=False).ids


def prepared_with_end(folder, out):
    """Prepare a text whose documents end with the tokenizer's own end."""
    (out / "text.txt").write_text("a")
    done = prepare(Request(str(out / "ended"), TokenizerChoice(tokenizer_file=folder), [out / "text.txt"], workers=1))
    assert IndexedCorpus(done.prefix).tokens[-1] == done.record["end_of_text_id"]


def tokens_of(folder, _out):
    assert vocab_size(load_tokenizer(folder)) <= (vocabulary(folder) or 300)


def trained(folder, _out):
    """Describe and build the model as training does, with its weights and with new ones."""
    config = RunConfig.from_dict({**FILE, "model": {"hf_checkpoint": str(folder)}})
    assert config.model.parameter_count() > 0
    assert config.model.flops_per_token(16) > 0
    json.dumps(config.settings(), allow_nan=False)
    tokens = torch.zeros((1, 4), dtype=torch.int64)
    for read_weights in (True, False):
        assert build_model(config.model, read_weights)(tokens, tokens).ndim == 0


def weights_in(folder):
    weights = {}
    for path in weight_files(folder):
        is_torchs = path.suffix == ".bin"
        weights |= torch.load(path, weights_only=True) if is_torchs else load_file(path)
    return weights


def same(one, other):
    return torch.allclose(one.float(), other.float()[: len(one)], rtol=0, atol=0, equal_nan=True)


def exported(folder, out):
    """The model and its export have the values in the folder's files, and the export has its tokenizer."""
    loaded, weights = load_model(folder).state_dict(), weights_in(folder)
    assert all(same(loaded[name], weights[name]) for name in loaded.keys() & weights.keys())
    export(folder, out / "exported")
    again = load_model(out / "exported", dtype=None).state_dict()
    kinds = [weight.dtype for weight in again.values()]
    assert all(same(again[name], loaded[name].to(kind)) for name, kind in zip(again, kinds, strict=True))
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "encoder.json")):
        ids = [read_tokenizer(path).encode("it was").ids for path in (folder, out / "exported")]
        assert ids[0] == ids[1]


def generated(folder, _out):
    for prompt in ("it", ""):
        (sample,) = next(generate(folder, [prompt], Sampling(max_new_tokens=2, temperature=0)))
        sample.text.encode()


def evaluated(folder, out):
    (out / "lambada.jsonl").write_text(json.dumps({"text": "it was the best"}))
    result = slw("evaluate", folder, "--task", f"lambada={out / 'lambada.jsonl'}", "--json")
    if result.returncode:
        raise SeqlenCurriculumError(result.stderr.removeprefix("error: ").rstrip("\n"))
    assert np.isfinite(json.loads(result.stdout)["tasks"]["lambada"]["loss"])


WAYS = (prepared, prepared_with_end, tokens_of, trained, exported, generated, evaluated)


def try_folder(number, bases, work, bounds):
    """Read the folder with this number in every way; return the outcome of each."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    yield from mutated_folder(number, bases, work / "model")
    for way in WAYS:
        try:
            with bounds.applied():
                way(work / "model", work / "out")
            yield f"{way.__name__}: read"
        except SeqlenCurriculumError as error:
            check_message(str(error))
            yield f"{way.__name__}: {type(error).__name__}"


def try_folders(numbers, bases, work):
    bounds, outcomes = Bounds(), Counter()
    for number in numbers:
        done = []
        try:
            for outcome in try_folder(number, bases, work, bounds):
                done.append(outcome)
        except BaseException as error:
            error.add_note(f"folder {number}: {done}")
            raise
        outcomes.update(outcome for outcome in done if ": " in outcome)
    bounds.report(outcomes)
    return outcomes


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def test_the_folders_without_faults_are_read(bases, tmp_path):
    for folder in sorted(bases.iterdir()):
        out = tmp_path / folder.name
        out.mkdir()
        has_tokenizer = folder.name not in ("sharded", "zip", "legacy")
        for way in WAYS if has_tokenizer else (trained, exported):
            way(folder, out)


def test_a_few(bases, tmp_path):
    outcomes = try_folders(range(20), bases, tmp_path / "work")
    assert all(outcomes[f"{way.__name__}: read"] for way in WAYS)  # files that are all refused early test little


@pytest.mark.slow
@pytest.mark.parametrize("share", range(10))
def test_5000(share, bases, tmp_path):
    try_folders(range(500 * share, 500 * (share + 1)), bases, tmp_path / "work")
