"""Damaged corpora in every view of inspect: the right numbers or one error line, never a traceback."""

import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.bounds import Bounds
from helpers.command import slw
from helpers.settings import block

from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.data.writer import CorpusWriter

HEADER = 34  # magic, version, dtype, N and M; then lengths (i32), offsets (i64) and documents (i64)
DOCUMENTS = (40, 0, 70, 90)


@pytest.fixture
def prefix(tmp_path):
    path = tmp_path / "corpus"
    with CorpusWriter(path, 257) as writer:
        for length in DOCUMENTS:
            writer.add_document(np.arange(length))
        writer.add_file(".tokenizer.json", build_tokenizer(TokenizerChoice(train_vocab=257), []).to_str().encode())
    run = {
        "train_batch_size": 4,
        "curriculum_learning": {**block(max_difficulty=16), "method": "segment"},
        "data": {"train": [str(path)], "seq_length": 16, "split": "8,1,1", "leftovers": "recycle"},
        "training": {"train_tokens": 1_000},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    return path


def views(prefix):
    run = prefix.with_name("run.json")
    return [
        (prefix,),
        (prefix, "--seq-length", 16, "--json"),
        (run,),
        (run, "--json"),
        (run, "--step", 3),
        (run, "--step", 16, "--ranks", 2, "--full", "--json"),
    ]


def pack(index, at, kind, *values):
    """Replace values of the .idx from byte ``at``; a negative one counts from the end."""
    content = bytearray(index.read_bytes())
    struct.pack_into(f"<{len(values)}{kind}", content, at % len(content), *values)
    index.write_bytes(content)


LENGTHS, OFFSETS, ENDS = HEADER, HEADER + 16, HEADER + 48
INDEX = {
    "documents_out_of_order": (ENDS, "q", (0, 2, 1, 3, 4)),
    "documents_beyond_the_end": (ENDS, "q", (0, 1, 9, 3, 4)),
    "negative_document": (ENDS, "q", (0, -1, 2, 3, 4)),
    "first_document": (ENDS, "q", (1, 1, 2, 3, 4)),
    "last_document": (ENDS, "q", (0, 1, 2, 3, 2**62)),
    "negative_length": (LENGTHS, "i", (40, 0, -70, 90)),
    "lengths_swapped": (LENGTHS, "i", (40, 70, 0, 90)),
    "offsets_swapped": (OFFSETS, "q", (0, 80, 220, 80)),
    "offset_far_away": (OFFSETS, "q", (0, 80, 2**62, 220)),
    "repeated_sequence": (OFFSETS, "q", (0, 80, 80, 80)),
    "other_magic": (0, "B", b"TNTIDX\0\0\0"),
    "other_version": (9, "Q", (2,)),
    "float_dtype": (17, "B", (6,)),
    "wider_dtype": (17, "B", (4,)),
    "narrower_dtype": (17, "B", (1,)),
    "unknown_dtype": (17, "B", (77,)),
    "no_sequences": (18, "Q", (0,)),
    "huge_counts": (18, "Q", (2**63, 2**63)),
}
CONTENTS = {
    ".idx": [b"", b"MMIDIDX\0\0", bytes(34), bytes(1000)],
    ".bin": [b"", b"a", bytes(398), bytes(402)],
    ".json": [b"", b"[", b"[]", b'{"vocab_size": "a"}', b'{"vocab_size": -1}', b"\xff\xfe", b"[" * 100_000],
    ".tokenizer.json": [b"", b"{}", b"\xff", b"[" * 100_000, b'{"model": 3}', b"\xef\xbb\xbf{}"],
}
CONTENTS[".json"] += [b'{"vocab_size": 1e999}', b'{"vocab_size": %s}' % (b"9" * 5_000), b'{"vocab_size": true}']


def check_views(prefix, bounds, refused=None, more=()):
    """Check that each view prints numbers or one error line; ``refused``: whether it must be the error, None for either."""
    for view in (*views(prefix), *more):
        with bounds.applied():
            result = slw("inspect", *view)
        if result.returncode == 0:
            assert refused is not True, view
            assert "--json" not in view or json.loads(result.stdout)
        else:
            assert refused is not False, (view, result.stderr)
            assert result.returncode == 1
            assert result.stderr.startswith("error: ")
            assert result.stderr.count("\n") == 1, result.stderr
            assert result.stdout == ""


def test_the_corpus_without_damage_is_shown(prefix):
    check_views(prefix, Bounds(), refused=False)


@pytest.mark.parametrize("name", INDEX)
def test_a_damaged_index_is_refused_in_every_view(prefix, name):
    at, kind, values = INDEX[name]
    pack(prefix.with_suffix(".idx"), at, kind, *values)
    picture = (prefix.with_name("run.json"), "--png", prefix.with_name("use.png"))
    check_views(prefix, Bounds(), refused=True, more=[picture])
    assert not prefix.with_name("use.png").exists()


@pytest.mark.parametrize("suffix", CONTENTS)
def test_other_content_beside_the_corpus(prefix, suffix):
    path = Path(f"{prefix}{suffix}")
    for content in CONTENTS[suffix]:
        path.write_bytes(content)
        check_views(prefix, Bounds(), refused=True if suffix in (".idx", ".bin") else None)


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nowhere", "absent"])
def test_what_is_no_file(prefix, suffix, kind):
    path = Path(f"{prefix}{suffix}")
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "absent":
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    check_views(prefix, Bounds(), refused=suffix in (".idx", ".bin"))


def test_random_damage(prefix):
    names = [Path(f"{prefix}{suffix}") for suffix in CONTENTS if suffix != ".json"]
    contents, bounds = {path: path.read_bytes() for path in names}, Bounds()
    for number in range(30):
        draw = random.Random(f"corpus {number}")
        path = draw.choice(names)
        content = bytearray(contents[path])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content[: draw.choice([len(content), len(content), draw.randrange(len(content))])])
        check_views(prefix, bounds)
        path.write_bytes(contents[path])
