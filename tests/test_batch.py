"""Batches cut to a length: each container, each axis and each count by hand, and that no two rows ever mix.

Token ids say where they came from: row r, column c of the full batch is ``100 * r + c``.
"""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding
from transformers.modeling_outputs import TokenClassifierOutput

from seqlen_curriculum import ConfigError, DataError, set_batch_sequence_length

Pair = namedtuple("Pair", ["inputs", "targets"])


def ids(rows=2, full=8):
    return 100 * torch.arange(rows)[:, None] + torch.arange(full)


def cut(batch, *args, **kwargs):
    return set_batch_sequence_length(batch, *args, **kwargs)[0]


def shifted(rows=2, full=8):
    """A pre-shifted batch, as loaders of ``full + 1`` tokens give it."""
    return {"input_ids": ids(rows, full + 1)[:, :-1], "labels": ids(rows, full + 1)[:, 1:]}


def padded_left(*lengths, full=8):
    """Rows of ``lengths`` tokens 1, 2, ... behind zeros, with their mask and Hugging Face's position ids."""
    mask = torch.stack([torch.arange(full) >= full - length for length in lengths]).long()
    tokens = (mask.cumsum(1)) * mask
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (tokens - 1).clamp(min=0)}


class TestTruncation:
    def test_first_columns_of_each_row(self):
        new, targets = set_batch_sequence_length(shifted(), 3)
        assert new["input_ids"].tolist() == [[0, 1, 2], [100, 101, 102]]
        assert new["labels"].tolist() == [[1, 2, 3], [101, 102, 103]]
        assert targets == 6

    @pytest.mark.parametrize("seqlen", [1, 7, 8, 9, 1000, np.int64(7)])
    def test_bounds(self, seqlen):
        new, targets = set_batch_sequence_length(shifted(), seqlen)
        kept = min(int(seqlen), 8)
        assert new["input_ids"].shape == new["labels"].shape == (2, kept)
        assert targets == 2 * kept

    def test_columns_of_every_kind_are_cut_together(self):
        names = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "loss_mask", "anything")
        new = cut({name: ids() + 1 for name in names}, 5)
        assert all(tensor.equal(ids()[:, :5] + 1) for tensor in new.values())
        assert all(tensor.is_contiguous() for tensor in new.values())

    def test_what_has_no_sequence_stays(self):
        class_of_row, features, nothing = torch.tensor([3, 4]), torch.zeros(2, 5), None
        batch = {"input_ids": ids(), "labels": class_of_row, "features": features, "loss": torch.tensor(1.0)}
        new, targets = set_batch_sequence_length({**batch, "names": ["a", "b"], "other": nothing}, 4)
        assert new["labels"] is class_of_row
        assert new["features"] is features
        assert new["loss"] == 1.0
        assert new["names"] == ["a", "b"]
        assert new["other"] is None
        assert targets == 8


class TestLeftPadding:
    def test_the_first_real_tokens_are_kept(self):
        # 8, 5, 3 and 1 tokens; of 4 columns the padding fills what is missing
        new = cut(padded_left(8, 5, 3, 1), 4)
        assert new["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 0, 1]]
        assert new["attention_mask"].equal((new["input_ids"] > 0).long())
        assert new["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]]

    @given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(1, 14))
    def test_the_side_of_the_padding_makes_no_difference(self, lengths, seqlen):
        left = padded_left(*lengths, full=12)
        right = {name: tensor.clone() for name, tensor in left.items()}
        for name in ("input_ids", "attention_mask"):
            for row, length in enumerate(lengths):
                right[name][row] = left[name][row].roll(length)
        of_left, of_right = cut(left, seqlen), cut(right, seqlen)
        for row, length in enumerate(lengths):
            expected = list(range(1, min(length, seqlen) + 1))
            for new in (of_left, of_right):
                assert new["input_ids"][row][new["attention_mask"][row] > 0].tolist() == expected

    def test_masks_follow_each_rows_own_columns(self):
        causal = torch.ones(8, 8, dtype=torch.bool).tril()
        batch = padded_left(8, 5)
        batch["mask_4d"] = causal[None, None] & batch["attention_mask"][:, None, None].bool()
        batch["shared_mask"] = torch.arange(64).view(1, 8, 8)
        new = cut(batch, 4)
        assert new["mask_4d"].equal(causal[:4, :4].expand(2, 1, 4, 4))
        assert new["shared_mask"][0].equal(torch.arange(64).view(8, 8)[:4, :4])
        assert new["shared_mask"][1].equal(torch.arange(64).view(8, 8)[3:7, 3:7])


class TestEndOfSequence:
    def test_composers_example(self):
        batch = {"input_ids": torch.tensor([[10, 11, 12, 13, 14, 15]])}
        assert cut(batch, 3)["input_ids"].tolist() == [[10, 11, 12]]
        assert cut(batch, 3, preserve_end_of_sequence=True)["input_ids"].tolist() == [[10, 11, 15]]
        assert cut(batch, 1, preserve_end_of_sequence=True)["input_ids"].tolist() == [[15]]
        assert cut(batch, 6, preserve_end_of_sequence=True)["input_ids"].tolist() == [[10, 11, 12, 13, 14, 15]]

    def test_the_mask_marks_where_a_row_ends(self):
        mask = torch.tensor([[1] * 6 + [0, 0], [1] * 4 + [0] * 4, [1] * 3 + [0] * 5])
        batch = {"input_ids": ids(3), "labels": ids(3) + 1, "attention_mask": mask, "position_ids": ids(1)}
        new = cut(batch, 4, preserve_end_of_sequence=True)
        assert (new["input_ids"] % 100).tolist() == [[0, 1, 2, 5], [0, 1, 2, 3], [0, 1, 2, 3]]
        assert new["labels"].equal(new["input_ids"] + 1)
        assert new["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 1, 0]]
        assert new["position_ids"].tolist() == [[0, 1, 2, 3]]  # the kept token stands right behind the others

    def test_padded_left(self):
        new = cut(padded_left(8, 6, 4, 3), 4, preserve_end_of_sequence=True)
        assert new["input_ids"].tolist() == [[1, 2, 3, 8], [1, 2, 3, 6], [1, 2, 3, 4], [0, 1, 2, 3]]
        assert new["position_ids"].tolist() == [[0, 1, 2, 3]] * 3 + [[0, 0, 1, 2]]

    def test_a_mask_of_both_axes_loses_the_same_columns(self):
        batch = {"input_ids": ids(1, 6), "attention_mask": torch.arange(36).view(1, 1, 6, 6)}
        new = cut(batch, 3, preserve_end_of_sequence=True)
        assert new["attention_mask"][0, 0].tolist() == [[0, 1, 5], [6, 7, 11], [30, 31, 35]]


class TestSegments:
    def test_rows_stay_apart_and_in_order(self):
        new, targets = set_batch_sequence_length(shifted(), 3, truncate=False)
        assert new["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [100, 101, 102], [103, 104, 105]]
        assert new["labels"].tolist() == [[1, 2, 3], [4, 5, 6], [101, 102, 103], [104, 105, 106]]
        assert targets == 12

    @given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 30))
    def test_no_target_is_lost_and_none_joined(self, rows, full, seqlen):
        batch = shifted(rows, full)
        new, targets = set_batch_sequence_length(batch, seqlen, truncate=False)
        kept = full // min(seqlen, full) * min(seqlen, full)
        assert new["input_ids"].view(rows, kept).equal(batch["input_ids"][:, :kept])
        assert new["labels"].view(rows, kept).equal(batch["labels"][:, :kept])
        assert new["labels"].equal(new["input_ids"] + 1)
        assert targets == rows * kept

    def test_masks_keep_the_block_of_their_segment(self):
        marks = torch.arange(2 * 36).view(2, 1, 6, 6)
        batch = {"input_ids": ids(2, 6), "m4_mask": marks, "m3_mask": marks[:, 0], "key_mask": marks[:, :, :1]}
        new = cut({**batch, "one_mask": marks[:1], "query_mask": marks[..., :1]}, 3, truncate=False)
        blocks = torch.stack([marks[0, :, :3, :3], marks[0, :, 3:, 3:], marks[1, :, :3, :3], marks[1, :, 3:, 3:]])
        assert new["m4_mask"].equal(blocks)
        assert new["m3_mask"].equal(blocks[:, 0])
        assert new["one_mask"].equal(torch.cat([blocks[:2], blocks[:2]]))
        assert new["key_mask"][:, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [36, 37, 38], [39, 40, 41]]
        assert new["query_mask"].shape == (4, 1, 3, 1)

    @pytest.mark.parametrize(
        ("positions", "expected"),
        [
            ([0, 1, 2, 3, 4, 5, 6, 7], [[0, 1, 2], [0, 1, 2]]),
            ([0, 1, 2, 3, 0, 1, 2, 3], [[0, 1, 2], [0, 0, 1]]),  # a document ends in the second segment
            ([1, 1, 1, 1, 0, 1, 2, 3], [[0, 0, 0], [0, 0, 1]]),  # padded on the left by Hugging Face's ones
        ],
    )
    def test_position_ids_restart(self, positions, expected):
        for rows in (1, 2):
            batch = {"input_ids": ids(2), "position_ids": torch.tensor([positions] * rows)}
            assert cut(batch, 3, truncate=False)["position_ids"].tolist() == expected * 2

    def test_segments_of_one_token_have_position_0(self):
        batch = {"input_ids": ids(2, 4), "position_ids": torch.arange(4).repeat(2, 1)}
        new, targets = set_batch_sequence_length(batch, 1, truncate=False)
        assert new["input_ids"].tolist() == [[0], [1], [2], [3], [100], [101], [102], [103]]
        assert (new["position_ids"].tolist(), targets) == ([[0]] * 8, 8)

    def test_padding_is_dropped_before_tokens(self):
        # 8 columns give 2 segments of 3: of the 2 over, padding goes first
        new = cut(padded_left(8, 7, 5), 3, truncate=False)
        assert new["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6], [0, 1, 2], [3, 4, 5]]
        assert new["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 0, 1], [0, 1, 2]]

    def test_what_belongs_to_a_row_follows_its_segments(self):
        batch = {"input_ids": ids(), "ids": torch.tensor([7, 9]), "features": torch.eye(2), "weights": torch.ones(5)}
        new = cut(batch, 4, truncate=False)
        assert new["ids"].tolist() == [7, 7, 9, 9]
        assert new["features"].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
        assert new["weights"].shape == (5,)
        # of one number per row, position ids are a value of the row too
        assert cut({"input_ids": ids(), "position_ids": torch.tensor([7, 9])}, 4, truncate=False)[
            "position_ids"
        ].shape == (4,)

    def test_the_full_length_divides_itself_once(self):
        assert cut({"input_ids": ids()}, 5, truncate=False)["input_ids"].equal(ids()[:, :5])
        assert cut({"input_ids": ids()}, 8, truncate=False)["input_ids"].equal(ids())


class TestAxes:
    @pytest.mark.parametrize(
        ("name", "shape", "expected"),
        [
            ("hidden", (2, 8, 5), (2, 3, 5)),
            ("codes", (2, 4, 8), (2, 4, 3)),
            ("inputs_embeds", (2, 8, 8), (2, 3, 8)),
            ("attention_mask", (2, 8, 8), (2, 3, 3)),
            ("attention_bias", (1, 8, 8), (1, 3, 3)),
            ("attention_mask", (2, 1, 8), (2, 1, 3)),
            ("x", (2, 1, 8, 8), (2, 1, 3, 3)),
            ("x", (1, 1, 8, 8), (1, 1, 3, 3)),
            ("x", (2, 1, 1, 8), (2, 1, 1, 3)),
            ("attention_mask", (2, 8, 8, 8), (2, 8, 3, 3)),  # 8 heads
            ("attention_mask", (2, 8, 1, 8), (2, 8, 1, 3)),
            ("position_ids", (3, 2, 8), (3, 2, 3)),
            ("position_ids", (1, 8), (1, 3)),
            ("x", (5, 2, 4, 7, 6), (5, 2, 4, 7, 6)),
        ],
    )
    def test_by_hand(self, name, shape, expected):
        tensor = torch.rand(shape)
        new = cut({"input_ids": ids(), name: tensor}, 3)[name]
        assert new.equal(tensor[tuple(slice(size) for size in expected)])

    def test_as_many_rows_as_tokens(self):
        square = {"input_ids": ids(8, 8), "labels": ids(8, 8), "mask_3d": torch.rand(8, 8, 8)}
        new = cut({**square, "mask_4d": torch.rand(8, 8, 8, 8), "hidden": torch.rand(8, 8, 5)}, 3)
        assert new["labels"].equal(ids(8, 8)[:, :3])
        assert new["mask_3d"].equal(square["mask_3d"][:, :3, :3])
        assert new["mask_4d"].shape == (8, 8, 3, 3)
        assert new["hidden"].shape == (8, 3, 5)
        positions = torch.arange(27).view(3, 3, 3)
        assert cut({"input_ids": ids(3, 3), "position_ids": positions}, 2)["position_ids"].equal(positions[..., :2])

    def test_an_unnamed_mask_is_known_by_its_bools(self):
        tokens, mask = ids(), torch.ones(2, 8, 8, dtype=torch.bool)
        assert cut((tokens, mask), 3)[1].shape == (2, 3, 3)

    @pytest.mark.parametrize(
        ("name", "shape"), [("x", (2, 8, 8)), ("x", (2, 8, 4, 8)), ("x", (2, 8, 4, 4)), ("a_mask", (2, 1, 1, 8, 8))]
    )
    def test_what_can_not_be_known_is_an_error(self, name, shape):
        with pytest.raises(
            DataError, match=rf"^{name}: shape \(.*doesn't show which axes are the sequence of 8 tokens"
        ):
            cut({"input_ids": ids(), name: torch.zeros(shape)}, 3)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("labels", (2, 7)),
            ("attention_mask", (2, 6)),
            ("attention_mask", (3, 8)),
            ("src_mask", (8, 8)),
            ("x", (4, 8)),
        ],
    )
    def test_what_does_not_fit_is_an_error(self, name, shape):
        with pytest.raises(DataError, match=rf"^{name}: shape \(.*doesn't fit a batch of 2 rows of 8 tokens"):
            cut({"input_ids": ids(), name: torch.zeros(shape)}, 3)

    def test_positions_in_three_sections_do_not_restart(self):
        with pytest.raises(DataError, match=r"^position_ids: .*can't restart; use truncate=True"):
            cut({"input_ids": ids(), "position_ids": torch.zeros(3, 2, 8)}, 4, truncate=False)

    def test_no_tokens(self):
        with pytest.raises(DataError, match=r"batch: no tensor \(rows, seqlen\) in this dict; give its token ids"):
            cut({"pixels": torch.zeros(2, 3, 8, 8)}, 4)
        with pytest.raises(DataError, match="in this str"):
            cut("tokens", 4)


class TestTargets:
    def test_labels_the_model_shifts_itself(self):
        # Hugging Face's causal models drop the first label of each row: of segments too
        batch = {"input_ids": ids(), "labels": ids()}
        assert set_batch_sequence_length(batch, 4, labels_shifted=False)[1] == 2 * 3
        assert set_batch_sequence_length(batch, 4, truncate=False, labels_shifted=False)[1] == 4 * 3
        assert set_batch_sequence_length(batch, 8, labels_shifted=False)[1] == 2 * 7
        assert set_batch_sequence_length(batch, 1, labels_shifted=False)[1] == 0

    def test_ignored_labels_are_no_targets(self):
        labels = torch.tensor([[-100, 5, -100, 6, 7, 8, 9, 9], [5, -100, -100, -100, 7, 8, 9, 9]])
        batch = {"input_ids": ids(), "labels": labels}
        assert set_batch_sequence_length(batch, 4)[1] == 3
        assert set_batch_sequence_length(batch, 4, labels_shifted=False)[1] == 2
        assert set_batch_sequence_length(batch, 99)[1] == 11
        assert set_batch_sequence_length(batch, 4, truncate=False)[1] == 11

    def test_without_labels_every_column_counts(self):
        assert set_batch_sequence_length((ids(), ids() + 1), 3)[1] == 6
        assert set_batch_sequence_length(ids(), 3, labels_shifted=False)[1] == 4


@dataclass(frozen=True)
class Sample:
    input_ids: torch.Tensor
    name: str = "x"


@dataclass
class Counted:
    input_ids: torch.Tensor
    made = 0

    def __post_init__(self):
        type(self).made += 1


class TestContainers:
    @pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, BatchEncoding])
    def test_mappings_keep_their_kind_and_their_callers_values(self, kind):
        batch = kind({"input_ids": ids(), "attention_mask": torch.ones(2, 8)})
        for seqlen in (3, 8):
            new = cut(batch, seqlen)
            assert type(new) is kind
            assert new is not batch
            assert new["input_ids"].equal(ids()[:, :seqlen])
            new["input_ids"] = None
            assert batch["input_ids"].equal(ids())

    def test_other_mappings(self):
        assert cut(MappingProxyType({"input_ids": ids()}), 3)["input_ids"].shape == (2, 3)
        new = cut(defaultdict(list, input_ids=ids()), 3)
        assert new["missing"] == []

    def test_model_output(self):
        batch = TokenClassifierOutput(loss=torch.tensor(1.0), logits=torch.rand(2, 8))
        new = cut(batch, 3)
        assert new.logits.equal(batch.logits[:, :3])
        assert new["logits"] is new.logits
        assert batch["logits"].shape == batch.logits.shape == (2, 8)

    def test_dataclasses(self):
        batch = Sample(ids())
        assert cut(batch, 3).input_ids.equal(ids()[:, :3])
        assert cut(batch, 3).name == "x"
        assert batch.input_ids.equal(ids())
        counted = Counted(ids())
        assert cut(counted, 3).input_ids.shape == (2, 3)
        assert Counted.made == 1

    def test_sequences(self):
        pair = cut(Pair(ids(), ids() + 1), 3)
        assert pair.targets.equal(pair.inputs + 1)
        assert isinstance(cut((ids(), ids()), 3), tuple)
        assert isinstance(cut([ids(), ids()], 3), list)

    def test_nested(self):
        # Megatron-DeepSpeed's batch for a pipeline
        inputs, labels = cut(((ids(), ids(1), torch.ones(1, 1, 8, 8)), ids() + 1), 3)
        assert [tuple(tensor.shape) for tensor in inputs] == [(2, 3), (1, 3), (1, 1, 3, 3)]
        assert labels.equal(inputs[0] + 1)
        with pytest.raises(DataError, match=r"^1\.labels: shape"):
            cut(({"input_ids": ids()}, {"labels": torch.zeros(2, 7)}), 3)

    def test_input_ids_tell_the_length_wherever_they_stand(self):
        new = cut({"features": torch.rand(2, 5), "input_ids": ids()}, 6)
        assert new["input_ids"].shape == (2, 6)
        assert new["features"].shape == (2, 5)

    def test_nothing_is_written_to_the_callers_tensors(self):
        batch = {**padded_left(8, 5), "labels": ids(), "mask": torch.rand(2, 1, 8, 8)}
        before = {name: tensor.clone() for name, tensor in batch.items()}
        for keyword in ({}, {"truncate": False}, {"preserve_end_of_sequence": True}):
            for tensor in cut(batch, 3, **keyword).values():
                tensor.zero_()
        assert all(batch[name].equal(before[name]) for name in batch)


@pytest.mark.parametrize("seqlen", [0, -3, 2.0, True, "8", None])
def test_lengths_that_are_none(seqlen):
    with pytest.raises(
        ConfigError, match=rf"seqlen: {seqlen!r} is not valid: give a whole number of tokens, 1 or more"
    ):
        set_batch_sequence_length({"input_ids": ids()}, seqlen)


def test_segments_keep_no_end():
    with pytest.raises(ConfigError, match="preserve_end_of_sequence: segments can't keep"):
        set_batch_sequence_length({"input_ids": ids()}, 4, truncate=False, preserve_end_of_sequence=True)


class TestWhatTellsTheLength:
    def test_tokens_do_whatever_comes_first(self):
        batch = {"meta": torch.zeros(2, 3), "tokens": ids(), "labels": ids()}
        new, targets = set_batch_sequence_length(batch, 4)
        assert (new["tokens"].shape, new["labels"].shape, targets) == ((2, 4), (2, 4), 8)
        assert torch.equal(new["meta"], batch["meta"])

    @pytest.mark.parametrize("labels", [[[1] * 8] * 2, np.ones((2, 8))], ids=["list", "array"])
    def test_labels_that_are_no_tensor_are_not_passed_over(self, labels):
        with pytest.raises(DataError, match=r"labels.*: a \w+ can't be shortened; give a tensor"):
            cut({"input_ids": ids(), "labels": labels}, 4)

    def test_images_are_not_taken_for_masks(self):
        with pytest.raises(DataError, match="pixel_values"):
            cut({"input_ids": ids(), "pixel_values": torch.ones(2, 3, 8, 8)}, 4)
