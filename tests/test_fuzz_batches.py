"""Random batches: the tensors and the number of targets of a slow reference of Python loops, or an error of ours."""

import random
from collections import Counter, UserDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from helpers import slow_batches
from helpers.bounds import Bounds

from seqlen_curriculum import set_batch_sequence_length
from seqlen_curriculum.batch import IGNORED
from seqlen_curriculum.errors import SeqlenCurriculumError

FLOATS, WHOLE = [torch.float32, torch.float16, torch.bfloat16, torch.float64], [torch.int64, torch.int64, torch.int32]
CONTAINERS = [dict, dict, UserDict, MappingProxyType, lambda batch: {"inner": [dict(batch), 7], "name": "x"}]


def numbered(draw, shape, dtypes):
    """Return a tensor with different values as far as its dtype has them, at times as a view of a larger or smaller one."""
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(draw.choice(dtypes))
    if tensor.ndim > 1 and draw.random() < 0.1:
        tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    elif tensor.ndim > 1 and draw.random() < 0.05:
        tensor = tensor[:1].expand(shape)
    return tensor


def padding_mask(draw, rows, full):
    sides = [draw.choice(["left", "right", "both", "none"]) for _ in range(rows)] if draw.random() < 0.8 else ["none"]
    mask = torch.ones(len(sides), full, dtype=draw.choice([*WHOLE, torch.bool, torch.float32]))
    for row, side in zip(mask, sides, strict=True):
        row[: draw.randint(0, full) if side in ("left", "both") else 0] = 0
        row[full - (draw.randint(0, full) if side in ("right", "both") else 0) :] = 0
        if draw.random() < 0.05:
            row[draw.randrange(full)] = 0
    return mask


def labels(draw, shape):
    new = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    new[
        torch.rand(shape, generator=torch.Generator().manual_seed(draw.randrange(2**31))) < draw.choice([0, 0.3, 1])
    ] = IGNORED
    return new


def rows_batch(draw, rows, full):
    """Return a batch of rows with some of the tensors that loaders and collators give."""
    one, other = draw.choice([1, rows]), draw.choice([1, 2, full, 3])
    mask = [torch.bool, torch.float32, torch.int64]
    several = {
        "labels": lambda: labels(draw, (rows, full)),
        "shift_labels": lambda: labels(draw, (rows, full)),
        "attention_mask": lambda: padding_mask(draw, rows, full),
        "position_ids": lambda: (
            numbered(draw, (one, full), WHOLE) if draw.random() < 0.5 else positions(draw, one, full)
        ),
        "token_type_ids": lambda: numbered(draw, (rows, full), [torch.int8]),
        "loss_mask": lambda: numbered(draw, (rows, full), mask),
        "inputs_embeds": lambda: numbered(draw, (rows, full, other), FLOATS),
        "mask_3d": lambda: numbered(draw, (one, draw.choice([1, full]), full), mask),
        "mask_4d": lambda: numbered(draw, (one, other, draw.choice([1, full]), draw.choice([1, full])), mask),
        "hidden": lambda: numbered(draw, (rows, full, other), FLOATS),
        "codes": lambda: numbered(draw, (rows, other, full), WHOLE),
        "ids": lambda: numbered(draw, (rows,), WHOLE),
        "features": lambda: numbered(draw, (draw.choice([rows, 5]), 5), FLOATS),
        "loss": lambda: torch.tensor(1.5),
        "weights": lambda: None,
    }
    names = draw.sample(sorted(several), draw.choice([0, 1, 2, 2, 3, 5]))
    batch = {"input_ids": numbered(draw, (rows, full), WHOLE), **{name: several[name]() for name in names}}
    if "mask_4d" in batch and "attention_mask" not in batch and draw.random() < 0.5:
        batch["attention_mask"] = batch.pop("mask_4d")
    if draw.random() < 0.05:
        batch["position_ids"] = numbered(draw, (3, rows, full), WHOLE)
    if draw.random() < 0.1:
        batch.pop("input_ids")
    return batch


def positions(draw, rows, full, smallest=0):
    """Return the position ids of random documents in each row."""
    lines = []
    for _ in range(rows):
        line = []
        while len(line) < full:
            line += range(smallest, smallest + min(draw.randint(1, full + 2), full - len(line)))
        lines.append(line)
    return torch.tensor(lines, dtype=draw.choice(WHOLE))


def flattened_batch(draw, rows, full):
    """Return documents side by side, with the boundaries that collators give."""
    ids = positions(draw, draw.choice([1, rows]), full, draw.choice([0, 0, 2]))
    starts = (ids - ids.min() == 0).expand(rows, full)
    edges = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([rows * full])]).int()
    longest = int(edges.diff().max())
    several = {
        "labels": labels(draw, (rows, full)),
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges.long(),
        "max_length_q": longest,
        "max_length_k": torch.tensor(longest),
        "seq_idx": (starts.cumsum(1) - 1).int(),
        "ids": numbered(draw, (rows,), WHOLE),
    }
    if draw.random() < 0.1:
        several |= {"cu_seqlens": edges, "attention_mask": torch.ones(rows, full)}
    names = draw.sample(sorted(several), draw.choice([0, 1, 2, 4, 6]))
    batch = {
        "input_ids": numbered(draw, (rows, full), WHOLE),
        "position_ids": ids,
        **{key: several[key] for key in names},
    }
    if draw.random() < 0.2:  # a boundary inside a document
        batch["cu_seq_lens_q"] = torch.cat([edges[:1], torch.randint(1, rows * full, (1,)).int(), edges[-1:]])
    if draw.random() < 0.1:
        del batch["position_ids"]
    if draw.random() < 0.2 and rows == 1 and "position_ids" in batch:  # flat, as in torchtitan
        batch = {
            key: value[0] if isinstance(value, torch.Tensor) and value.ndim == 2 else value
            for key, value in batch.items()
        }
        batch["positions"] = batch.pop("position_ids")
        batch.pop("cu_seqlens", None)
    return batch


def odd_batch(draw, rows, full):
    """Return a batch of which one tensor has a random shape and dtype."""
    batch = draw.choice([rows_batch, flattened_batch])(draw, rows, full)
    name = draw.choice(
        [*batch, "x", "a_mask", "tokens", "labels", "attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q"]
    )
    sizes = [0, 0, 0, 1, rows, full, full, full, full - 1, full + 1, 2]
    shape = [draw.choice(sizes) for _ in range(draw.choice([0, 1, 2, 2, 3, 4, 5]))]
    batch[name] = numbered(draw, shape, [*WHOLE, *FLOATS, torch.bool, torch.int16])
    if draw.random() < 0.1:
        batch[draw.choice(list(batch))] = draw.choice([None, 3, "x", [1, 2], {}])
    return batch


def options_of(draw, full):
    shifted, seqlen = (
        draw.random() < 0.5,
        draw.choice([1, 2, 3, full - 1, full, full + 1, draw.randint(1, full), 2**70]),
    )
    if draw.random() < 0.05:
        seqlen = draw.choice([0, -1, -(2**64), True, 2.0, float("nan"), "2", None, [2], torch.tensor(2), np.int64(2)])
    return seqlen, {
        "truncate": draw.random() < 0.5,
        "preserve_end_of_sequence": draw.random() < 0.2,
        "labels_shifted": shifted,
        "emit_shift_labels": draw.random() < (0.02 if shifted else 0.4),
        "padding_free": draw.choice([None, None, True, False]),
    }


def expected(batch, seqlen, options):
    """Return the new values and targets by the slow reference."""
    if isinstance(seqlen, bool) or not isinstance(seqlen, (int, np.int64)) or seqlen < 1:
        raise slow_batches.RefusedError
    if options["preserve_end_of_sequence"] and not options["truncate"]:
        raise slow_batches.RefusedError
    if options["emit_shift_labels"]:
        given = batch.get("labels")
        if options["labels_shifted"] or ("shift_labels" not in batch and not slow_batches.is_tensor(given, 2)):
            raise slow_batches.RefusedError
        if "shift_labels" not in batch:
            rows = [[*row, IGNORED][1:] if row else [] for row in given.tolist()]
            batch = {**batch, "shift_labels": torch.tensor(rows, dtype=given.dtype).view(given.shape)}
    return slow_batches.shorten(
        batch,
        seqlen,
        options["truncate"],
        options["preserve_end_of_sequence"],
        options["labels_shifted"],
        options["padding_free"],
    )


def random_case(number):
    draw = random.Random(f"batch {number}")
    rows, full = draw.choice([1, 1, 2, 3, 4]), draw.randint(2, 9)
    batch = draw.choice([rows_batch, rows_batch, flattened_batch, odd_batch])(draw, rows, full)
    return draw, batch, *options_of(draw, full)


def try_batch(number, bounds):
    """Compare one batch with the reference; return ``shortened``, ``refused`` or ``without rows``."""
    draw, batch, seqlen, options = random_case(number)
    wrap = draw.choice(CONTAINERS) if not options["emit_shift_labels"] else draw.choice(CONTAINERS[:4])
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    try:
        reference = expected(batch, seqlen, options)
    except slow_batches.RefusedError:
        reference = None
    except slow_batches.NoRowsError:
        reference = ()
    try:
        with bounds.applied():
            new, targets = set_batch_sequence_length(wrap(batch), seqlen, **options)
    except SeqlenCurriculumError:
        if not reference:
            return "refused"
        raise
    assert reference is not None, "not refused"
    if not reference:
        return "without rows"
    values, counted = reference
    new = new["inner"][0] if "inner" in new else new
    assert set(new) == set(values)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert (new[name].dtype, new[name].shape) == (value.dtype, value.shape), name
            assert new[name].equal(value), (name, new[name], value)
        else:
            assert new[name] == value, name
    assert targets == counted
    assert all(batch[name].equal(value) for name, value in before.items())
    return "shortened"


def try_batches(numbers):
    bounds, outcomes = Bounds(), Counter()
    for number in numbers:
        try:
            outcomes[try_batch(number, bounds)] += 1
        except BaseException as error:
            error.add_note(f"batch {number}: {random_case(number)[1:]}")
            raise
    bounds.report(outcomes)
    return outcomes


def test_a_few():
    outcomes = try_batches(range(400))
    assert outcomes["shortened"] > 150
    assert outcomes["refused"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("share", range(4))
def test_20_000(share):
    try_batches(range(5_000 * share, 5_000 * (share + 1)))
