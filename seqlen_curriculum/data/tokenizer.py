"""The tokenizer of a corpus: GPT-2's files, a ``tokenizer.json``, or byte-level BPE trained on the corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.run_folder.hub import hub_folder, is_hub_name
from seqlen_curriculum.run_folder.model_files import check_files
from seqlen_curriculum.strict_json import shown

__all__ = [
    "END_OF_TEXT",
    "TokenizerChoice",
    "build_tokenizer",
    "file_facts",
    "located",
    "read_merges",
    "read_tokenizer",
    "read_vocab",
    "splits_at_spaces",
    "tokenizer_files",
    "train_tokenizer",
    "vocab_size",
]

END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCAB = 257  # 256 bytes and the end-of-text token
_LARGEST_VOCAB = 2**24
_ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_FILES = (("tokenizer.json",), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""Tokenizer files in a folder: a ``tokenizer.json``, or GPT-2's vocabulary and merges under either pair of names."""


@dataclass(frozen=True)
class TokenizerChoice:
    """The source of the tokenizer; exactly one of three is given."""

    vocab_file: Path | None = None
    """GPT-2's ``encoder.json`` (token to id); needs ``merge_file``."""
    merge_file: Path | None = None
    """GPT-2's ``vocab.bpe`` (one merge per line); needs ``vocab_file``."""
    tokenizer_file: Path | None = None
    """A ``tokenizer.json``, or a folder as in ``read_tokenizer``."""
    train_vocab: int | None = None
    """Vocabulary size of a byte-level BPE to train on the corpus, 257 or more."""

    def check(self) -> None:
        """Raise ``ConfigError`` unless exactly one complete source is given."""
        if (self.vocab_file is None) != (self.merge_file is None):
            raise ConfigError("tokenizer: --vocab-file and --merge-file belong together; give both")
        ways = [self.vocab_file, self.tokenizer_file, self.train_vocab]
        if sum(way is not None for way in ways) != 1:
            raise ConfigError(
                "tokenizer: give exactly one of --vocab-file with --merge-file, --tokenizer-file, or --train-vocab"
            )
        if self.train_vocab is not None and not _SMALLEST_VOCAB <= self.train_vocab <= _LARGEST_VOCAB:
            raise ConfigError(
                f"--train-vocab: {self.train_vocab} is not valid: 256 bytes and {END_OF_TEXT} need {_SMALLEST_VOCAB}, and "
                f"{_LARGEST_VOCAB} is the most"
            )

    def facts(self) -> dict[str, object]:
        """Return the facts that identify the choice, for the record of the corpus: files by path, size and time."""
        if self.train_vocab is not None:
            return {"train_vocab": self.train_vocab}
        files = {"vocab_file": self.vocab_file, "merge_file": self.merge_file, "tokenizer_file": self.tokenizer_file}
        if self.tokenizer_file is not None and (folder := located(self.tokenizer_file)).is_dir():
            files = {path.name: path for path in tokenizer_files(folder)}
        return {name: file_facts(path, ConfigError) for name, path in files.items() if path is not None}


def file_facts(path: Path, error: type[Exception]) -> dict[str, object]:
    """Return absolute path, size in bytes and modification time of a file. Raises ``error`` if it can't be read."""
    try:
        status = path.stat()
    except OSError as failure:
        raise error(f"{path}: can't be read ({failure.strerror}); check the path") from None
    return {"path": os.path.abspath(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def build_tokenizer(choice: TokenizerChoice, texts: Iterable[str], end: str = END_OF_TEXT) -> Tokenizer:
    """Return the chosen tokenizer; ``texts`` and ``end`` are used only to train it. Raises ``ConfigError``."""
    choice.check()
    if choice.train_vocab is not None:
        return train_tokenizer(choice.train_vocab, texts, end)
    if choice.tokenizer_file is not None:
        return _copied(read_tokenizer(choice.tokenizer_file), choice.tokenizer_file)
    assert choice.vocab_file is not None
    assert choice.merge_file is not None
    return _copied(_read_gpt2(choice.vocab_file, choice.merge_file), choice.vocab_file)


def _copied(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """Return ``tokenizer`` after a copy by its JSON, as processes and corpora get it. Raises ConfigError."""
    return _parsed(tokenizer.to_str(), path)


def train_tokenizer(vocab_size: int, texts: Iterable[str], end: str = END_OF_TEXT) -> Tokenizer:
    """Train byte-level BPE with ``vocab_size`` tokens, including ``end``. The result is deterministic."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that every text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of the tokenizer in ``folder``, or an empty result without one."""
    for names in _FILES:
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return []


def located(path: Path) -> Path:
    """Return ``path``, or the folder in Hugging Face's cache for the name of a model. Raises ``CheckpointError``."""
    return hub_folder(str(path), weights=False) if is_hub_name(path) else path


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``, or the tokenizer of a folder (see ``tokenizer_files``) or of a model on the Hub.

    Raises ``ConfigError``, and ``CheckpointError`` for a file that leads out of its folder and for an unknown name.
    """
    path = located(path)
    files = tokenizer_files(path) if path.is_dir() else [path]
    if path.is_dir():
        check_files(path)
    if not files:
        names = ", ".join(" with ".join(names) for names in _FILES)
        raise ConfigError(f"{path}: no tokenizer here; give a tokenizer.json, or a folder that has one of {names}")
    return _read_gpt2(*files) if len(files) == 2 else _read_saved(*files)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return the largest id plus 1; ids may have gaps."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether cutting a text before a space that follows a non-space leaves its tokens unchanged.

    True for GPT-2's pre-tokenizer, in which no word crosses such a place. False for any other.
    """
    parts = json.loads(tokenizer.to_str())
    if parts["normalizer"] or any(not token["special"] for token in parts["added_tokens"]):
        return False  # a normalizer may read both sides of a space, and an added token may contain one
    # "one two" is split into "one" and " two", so a cut between them changes nothing. With add_prefix_space each part
    # would get a leading space.
    words = parts["pre_tokenizer"] or {}
    return words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words["add_prefix_space"]


def _read_saved(path: Path) -> Tokenizer:
    tokenizer = _parsed(_read_text(path), path)
    # A saved tokenizer may truncate or pad. A corpus needs every token and no padding.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _checked(tokenizer, str(path))


def _parsed(content: str, path: Path) -> Tokenizer:
    try:
        with _panics_silently():
            return Tokenizer.from_str(content)
    except BaseException as error:  # the library raises nothing narrower; its PanicException is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not a tokenizer.json ({reason}); save it again with tokenizers") from None


@contextmanager
def _panics_silently() -> Iterator[None]:
    """Discard what is written to stderr: a library in Rust prints several lines before it raises its PanicException."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _checked(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """Return ``tokenizer``. Raises ConfigError for one without tokens, and for an id that is too large."""
    # The library allocates memory for every id up to the largest, 16 GB for a single one of 2**32.
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if number < 0:
        raise ConfigError(f"{where}: has no tokens; save it again with tokenizers")
    if number >= _LARGEST_VOCAB:
        raise ConfigError(
            f"{where}: {shown(token)} has the id {number:,}, above {_LARGEST_VOCAB - 1:,}; give it a smaller one"
        )
    return tokenizer


def _read_gpt2(vocab_file: Path, merge_file: Path) -> Tokenizer:
    vocab, merges = read_vocab(vocab_file), read_merges(merge_file)
    _check_match(vocab, merges, f"{vocab_file} and {merge_file}")
    try:
        model = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{vocab_file} and {merge_file}: don't work together ({error})") from None
    tokenizer = _byte_level(model)
    # OPT has the special tokens of RoBERTa. GPT-2's files without any get the end-of-text token as a further one.
    special = [token for token in (END_OF_TEXT, *_ROBERTA_TOKENS) if token in vocab]
    tokenizer.add_special_tokens(special or [END_OF_TEXT])
    return _checked(tokenizer, str(vocab_file))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait forever
            raise ConfigError(f"{path}: is not an ordinary file; give the file of a tokenizer")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; check that it is the right file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); check the path") from None


def read_vocab(path: Path) -> dict[str, int]:
    """Read GPT-2's ``encoder.json``, {token: id}. Raises ``ConfigError`` for other content."""
    try:
        vocab = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); download the file again"
        ) from None
    if not isinstance(vocab, dict) or not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise ConfigError(f"{path}: not an object of token to id; give GPT-2's encoder.json")
    token_of = {number: token for token, number in vocab.items()}
    if len(token_of) < len(vocab):
        token, number = next(item for item in vocab.items() if token_of[item[1]] != item[0])
        raise ConfigError(
            f"{path}: {shown(token)} and {shown(token_of[number])} have the id {number}; download the file again"
        )
    return vocab


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read GPT-2's ``vocab.bpe``: two tokens per line, the most frequent pair first. Raises ``ConfigError``."""
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        pair = line.rstrip("\r").split(" ")
        if not line.strip() or line.startswith("#version"):
            continue
        if len(pair) != 2 or not all(pair):
            raise ConfigError(f"{path}, line {number}: {line[:60]!r} is not two tokens with a space between them")
        merges.append((pair[0], pair[1]))
    return merges


def _check_match(vocab: dict[str, int], merges: list[tuple[str, str]], names: str) -> None:
    # GPT-2's 50,257 ids are 256 bytes, 50,000 merges and <|endoftext|>. A byte or merge without an id would lose text. A
    # token that no merge makes is never used. OPT has four, madeupword0000 to madeupword0003, which only fill the matrix. If
    # there are more such tokens than merges, the merges are of another vocabulary, or the file was truncated.
    made = {left + right for left, right in merges} | set(pre_tokenizers.ByteLevel.alphabet())
    missing = sorted(made - vocab.keys())
    if missing:
        raise ConfigError(f"{names}: don't belong together: {len(missing)} tokens without id, such as {missing[0]!r}")
    # Special tokens, written <...> or [...], are not produced by merges.
    unmade = sorted(token for token in vocab.keys() - made if not token.startswith(("<", "[")))
    if len(unmade) > len(merges):
        raise ConfigError(
            f"{names}: don't belong together: no merge makes {len(unmade)} tokens, such as {unmade[0]!r}; use one pair"
        )
