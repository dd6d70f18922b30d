"""The targets of a shortened batch: shift_labels, the loss of a transformers model, and a call that does not count."""

from collections import UserDict
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from seqlen_curriculum import ConfigError, DataError, set_batch_sequence_length


def ids(rows=2, full=8):
    return 1 + 10 * torch.arange(rows)[:, None] + torch.arange(full)


def inside(rows=2, full=8, **more):
    """A batch for a model that shifts its labels inside."""
    return {"input_ids": ids(rows, full), "labels": ids(rows, full), **more}


def emit(batch, seqlen, **options):
    return set_batch_sequence_length(batch, seqlen, labels_shifted=False, emit_shift_labels=True, **options)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


class TestShiftLabels:
    @pytest.mark.parametrize("labels_shifted", [True, False])
    def test_given_ones_are_cut_and_are_the_targets(self, labels_shifted):
        targets = ids() + 1
        targets[0, 1] = -100
        new, counted = set_batch_sequence_length(inside(shift_labels=targets), 4, labels_shifted=labels_shifted)
        assert new["shift_labels"].tolist() == [[2, -100, 4, 5], [12, 13, 14, 15]]
        assert counted == 7
        assert set_batch_sequence_length(inside(shift_labels=targets), 8, labels_shifted=labels_shifted)[1] == 15
        with pytest.raises(DataError, match="shift_labels: a list can't be shortened"):
            set_batch_sequence_length(inside(shift_labels=targets.tolist()), 4)

    def test_emitted_ones_know_the_token_behind_the_cut(self):
        full = inside()
        new, targets = emit(full, 4)
        assert new["shift_labels"].tolist() == [[2, 3, 4, 5], [12, 13, 14, 15]]
        assert new["labels"].equal(ids()[:, :4])
        assert targets == 2 * 4
        assert "shift_labels" not in full

    def test_a_full_row_has_none_for_its_last_column(self):
        new, targets = emit(inside(), 8)
        assert new["shift_labels"].tolist() == [[2, 3, 4, 5, 6, 7, 8, -100], [12, 13, 14, 15, 16, 17, 18, -100]]
        assert targets == 2 * 7
        assert emit(inside(2, 0), 8)[0]["shift_labels"].shape == (2, 0)

    def test_given_ones_are_not_replaced(self):
        new, _ = emit(inside(shift_labels=ids() + 50), 2)
        assert new["shift_labels"].tolist() == [[51, 52], [61, 62]]
        assert emit({"input_ids": ids(), "shift_labels": ids() + 50}, 2)[1] == 4

    def test_rows_keep_their_own_columns(self):
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
        full = inside(attention_mask=mask)
        full["labels"] = full["labels"].masked_fill(mask == 0, -100)
        assert emit(full, 3)[0]["shift_labels"].tolist() == [[5, 6, 7], [12, 13, 14]]
        assert emit(full, 4, truncate=False)[0]["shift_labels"].tolist() == [
            [-100, -100, 4, 5],
            [6, 7, 8, -100],
            [12, 13, 14, 15],
            [16, 17, 18, -100],
        ]
        # behind a preserved end there is no token, and what stood in the gap is still the third column's target
        kept = emit(full, 4, preserve_end_of_sequence=True)[0]
        assert kept["input_ids"][1].tolist() == [11, 12, 13, 18]
        assert kept["shift_labels"][1].tolist() == [12, 13, 14, -100]

    @pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding, MappingProxyType])
    def test_mappings(self, kind):
        full = kind(inside())
        new, targets = emit(full, 4)
        assert type(new) is (dict if kind is MappingProxyType else kind)
        assert new["shift_labels"].equal(ids()[:, 1:5])
        assert "shift_labels" not in full
        assert targets == 8

    @given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 12), st.booleans())
    def test_each_column_predicts_the_token_behind_it(self, rows, full, seqlen, truncate):
        new, targets = emit(inside(rows, full), seqlen, truncate=truncate)
        is_target = new["shift_labels"] != -100
        assert new["shift_labels"][is_target].equal(new["input_ids"][is_target] + 1)
        is_row_end = (new["input_ids"] - 1) % 10 == full - 1 if full <= 10 else ~is_target
        assert torch.equal(~is_target, is_row_end)
        assert targets == int(is_target.sum())

    def test_labels_that_are_shifted_already(self):
        with pytest.raises(ConfigError, match="emit_shift_labels: the labels are shifted already"):
            set_batch_sequence_length(inside(), 4, emit_shift_labels=True)

    @pytest.mark.parametrize("batch", [(ids(), ids()), {"input_ids": ids()}, {"labels": torch.ones(2)}, [inside()]])
    def test_without_labels_in_a_mapping(self, batch):
        with pytest.raises(DataError, match=r"emit_shift_labels: this (tuple|dict|list) is not a mapping with labels"):
            emit(batch, 4)


class TestModel:
    def nll(self, model, full, seqlen):
        """The losses (B, s) of all columns of rows cut to seqlen, computed from the full rows by hand."""
        logits = model(input_ids=full["input_ids"][:, :seqlen]).logits
        return cross_entropy(logits.transpose(1, 2), full["labels"][:, 1 : seqlen + 1], reduction="none")

    def test_all_columns_are_trained_with_shift_labels(self, llama):
        full = inside(3, 16)
        new, targets = emit(full, 8)
        with torch.no_grad():
            by_hand = self.nll(llama, full, 8)
            assert llama(**new).loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-6)
            # the sum over a step's targets divided by their number, as Hugging Face's Trainer asks for it
            divided = llama(**new, num_items_in_batch=targets).loss
            assert divided.item() == pytest.approx(by_hand.mean().item(), rel=1e-6)
        assert targets == by_hand.numel() == 3 * 8

    def test_an_eighth_is_not_trained_without_them(self, llama):
        full = inside(3, 16)
        new, targets = set_batch_sequence_length(full, 8, labels_shifted=False)
        with torch.no_grad():
            by_hand = self.nll(llama, full, 8)[:, :-1]
            assert llama(**new).loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-6)
        assert targets == by_hand.numel() == 3 * 7


class TestPairs:
    def test_the_second_of_two_are_the_labels(self):
        labels = (ids() + 1).masked_fill(ids() == 2, -100)
        assert set_batch_sequence_length((ids(), labels), 4)[1] == 7
        assert set_batch_sequence_length(({"tokens": ids()}, labels), 4)[1] == 7
        assert set_batch_sequence_length(((ids(), torch.ones(2, 1, 8, 8)), labels), 8)[1] == 15
        assert set_batch_sequence_length([ids(), labels, labels], 4)[1] == 8
        assert set_batch_sequence_length((ids(), torch.full((2,), -100)), 4)[1] == 8


class TestWithoutCounting:
    def test_the_count_is_none(self):
        new, targets = set_batch_sequence_length(inside(), 4, count_targets=False)
        assert targets is None
        assert new["labels"].equal(ids()[:, :4])

    def test_no_value_is_read(self):
        # reading a value of a tensor on the device meta is an error, as reading one on a GPU waits for it
        full = {name: tensor.to("meta") for name, tensor in inside(positions=ids(), hidden=torch.rand(2, 8, 3)).items()}
        for truncate in (True, False):
            new, _ = emit(full, 4, truncate=truncate, count_targets=False, padding_free=False)
            assert {tensor.shape[1] for tensor in new.values()} == {4}
        with pytest.raises((RuntimeError, NotImplementedError)):
            emit(full, 4, padding_free=False)


class TestCopies:
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("truncate", [True, False])
    def test_rows_that_keep_the_same_columns_are_copied(self, rows, truncate):
        full = inside(rows, 8, attention_mask=torch.ones(1, 8), mask_4d=torch.rand(rows, 1, 8, 8), x=ids(1, 8))
        before = {name: tensor.clone() for name, tensor in full.items()}
        for seqlen in (1, 3, 4, 7):
            new, _ = set_batch_sequence_length(full, seqlen, truncate)
            for tensor in new.values():
                assert tensor.is_contiguous()
                tensor.zero_()
        assert all(full[name].equal(before[name]) for name in full)

    def test_one_row_behind_its_padding(self):
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
        new, _ = set_batch_sequence_length(inside(1, attention_mask=mask, mask_4d=torch.rand(1, 1, 8, 8)), 4)
        assert new["input_ids"].tolist() == [[4, 5, 6, 7]]
        assert new["attention_mask"].all()
