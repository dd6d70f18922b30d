"""Corpora put together equal the corpus of all their texts."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.command import slw

from seqlen_curriculum.data.preparation.merge import merge
from seqlen_curriculum.data.preparation.pieces import Rules
from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import DataError

ROOT = Path(__file__).parents[1]
SUFFIXES = (".bin", ".idx", ".json", ".tokenizer.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers, three texts, and a corpus of each text by the first tokenizer."""
    root = tmp_path_factory.mktemp("merge")
    for name, size in (("one", 262), ("other", 261)):
        tokenizer = build_tokenizer(TokenizerChoice(train_vocab=size), ["some words to train on, some more words"])
        tokenizer.save(str(root / f"tokenizer_{name}.json"))
    (root / "a.txt").write_text("the first text")
    (root / "b.jsonl").write_text('{"text": "two"}\n{"text": ""}\n{"text": "documents"}\n{"text": "of words"}')
    (root / "c.txt").write_text("some more words")
    for name in ("a.txt", "b.jsonl", "c.txt"):
        made(root, name[0], name)
    return root


def made(root: Path, prefix: str, *names: str, tokenizer: str = "one", **rules: Any) -> str:
    choice = TokenizerChoice(tokenizer_file=root / f"tokenizer_{tokenizer}.json")
    inputs = [root / name for name in names]
    return prepare(Request(str(root / prefix), choice, inputs, rules=Rules(**rules), workers=1)).prefix


def test_merged_is_what_one_preparation_gives(folder: Path) -> None:
    together = made(folder, "together", "c.txt", "a.txt", "b.jsonl")
    merged = folder / "merged"
    done = slw("merge", folder / "c", folder / "a.bin", folder / "b", "--output-prefix", merged)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"prepared: {merged} (5 documents, ")
    for suffix in SUFFIXES:
        assert Path(f"{merged}{suffix}").read_bytes() == Path(together + suffix).read_bytes()
    assert merge([folder / "c", folder / "a", folder / "b"], str(merged)).already
    # It is a corpus like any other: to be prepared, and to be merged again.
    choice = TokenizerChoice(tokenizer_file=folder / "tokenizer_one.json")
    inputs = [folder / name for name in ("c.txt", "a.txt", "b.jsonl")]
    assert prepare(Request(str(merged), choice, inputs, workers=1)).already


def test_merged_of_merged(folder: Path) -> None:
    merge([folder / "a", folder / "b"], str(folder / "ab"))
    merge([folder / "ab", folder / "c"], str(folder / "ab_c"))
    merge([folder / "a", folder / "b", folder / "c"], str(folder / "abc"))
    for suffix in SUFFIXES:
        assert (folder / f"ab_c{suffix}").read_bytes() == (folder / f"abc{suffix}").read_bytes()


def test_the_same_bytes_as_megatron(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        megatron = pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
        )
    builder = megatron.IndexedDatasetBuilder(str(folder / "megatron.bin"), megatron.DType.optimal_dtype(262))
    for name in "abc":
        builder.add_index(str(folder / name))
    builder.finalize(str(folder / "megatron.idx"))
    merge([folder / name for name in "abc"], str(folder / "merged_abc"))
    for suffix in (".bin", ".idx"):
        assert (folder / f"merged_abc{suffix}").read_bytes() == (folder / f"megatron{suffix}").read_bytes()


def test_settings_that_may_differ_are_recorded(folder: Path) -> None:
    (folder / "d.jsonl").write_text('{"body": "a text"}')
    made(folder, "d", "d.jsonl", json_keys=["body"])
    record = merge([folder / "a", folder / "d"], str(folder / "ad")).record
    assert record["settings"]["json_keys"] == [["text"], ["body"]]
    assert record["settings"]["append_eod"] is True


def test_what_does_not_belong_together(folder: Path, tmp_path: Path) -> None:
    made(folder, "other", "a.txt", tokenizer="other")
    made(folder, "open", "a.txt", append_eod=False)
    with pytest.raises(DataError, match=r"a and .*other: .*vocab_size \(262 and 261\), tokenizer \("):
        merge([folder / "a", folder / "other"], str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"a and .*open: .*append_eod \(True and False\)"):
        merge([folder / "a", folder / "b", folder / "open"], str(tmp_path / "x"))
    with pytest.raises(DataError, match="given twice"):
        merge([folder / "a", folder / "a.idx"], str(tmp_path / "x"))
    with pytest.raises(DataError, match="given twice"):
        merge([folder / "a", folder / "b"], str(folder / "b"), overwrite=True)
    with pytest.raises(DataError, match="absent: "):
        merge([folder / "a", folder / "absent"], str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_its_record(folder: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((folder / f"a{suffix}").read_bytes())
    with pytest.raises(DataError, match=r"a: no .*a\.json and \.tokenizer\.json"):
        merge([tmp_path / "a", folder / "b"], str(tmp_path / "x"))


def test_other_outputs_are_not_overwritten_unasked(folder: Path) -> None:
    merge([folder / "a", folder / "b"], str(folder / "kept"))
    with pytest.raises(DataError, match=r"kept\.bin: exists"):
        merge([folder / "b", folder / "a"], str(folder / "kept"))
    record = merge([folder / "b", folder / "a"], str(folder / "kept"), overwrite=True).record
    assert json.loads((folder / "kept.json").read_bytes()) == record
