"""Padding-free batches: documents side by side in a row are cut into pieces, and a model sees each piece by itself."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from seqlen_curriculum import ConfigError, DataError, set_batch_sequence_length


def flattened(*lengths, start=0, first_token=1, **options):
    """Documents of these lengths, with tokens that count up over the batch, as transformers' collator flattens them."""
    tokens = iter(range(first_token, first_token + sum(lengths)))
    documents = [{"input_ids": [next(tokens) for _ in range(length)]} for length in lengths]
    return DataCollatorWithFlattening(position_ids_start=start, **options)(documents)


def every_key(*lengths, **options):
    return flattened(*lengths, return_flash_attn_kwargs=True, return_seq_idx=True, **options)


def packed_by_trl(*packs, pad_to=None):
    """Packs of document lengths, as TRL's ``DataCollatorForLanguageModeling(padding_free=True)`` returns them."""
    positions = torch.cat([torch.arange(length) for pack in packs for length in pack])
    tokens = 1 + torch.arange(len(positions))
    padding = (0, -len(tokens) % (pad_to or 1))
    positions = torch.nn.functional.pad(positions, padding)
    labels = torch.nn.functional.pad(tokens, padding, value=-100).masked_fill(positions == 0, -100)
    tokens = torch.nn.functional.pad(tokens, padding)
    starts = (positions == 0).nonzero()[:, 0]
    edges = torch.cat([starts, torch.tensor([len(positions)])]).int()
    return {
        "input_ids": tokens[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": int(edges.diff().max()),
        "max_length_k": int(edges.diff().max()),
        "seq_idx": (positions == 0).cumsum(0).int()[None] - 1,
    }


def by_torchtitan(*lengths, mapping=True):
    """Inputs and labels of torchtitan's loader: flat, labels already shifted, -100 at the end of each document."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = 1 + torch.arange(len(positions))
    labels = (tokens + 1).masked_fill(torch.cat([positions[1:], torch.zeros(1)]) == 0, -100)
    return {"input": tokens, "positions": positions}, labels


def cut(batch, *args, **kwargs):
    return set_batch_sequence_length(batch, *args, **kwargs)[0]


def pieces(batch):
    """The columns (first, end) of each piece, by the position ids of the first row."""
    positions = batch["position_ids"][0]
    firsts = [0, *(1 + (positions.diff() != 1).nonzero()[:, 0]).tolist(), len(positions)]
    return list(pairwise(firsts))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


class TestByHand:
    def test_documents_are_cut_into_pieces(self):
        # documents of 5, 2 and 6 tokens become pieces of 4 1, 2 and 4 2
        full = every_key(5, 2, 6)
        new, targets = set_batch_sequence_length(full, 4, labels_shifted=False)
        assert new["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 0, 1, 2, 3, 0, 1]]
        assert new["cu_seq_lens_q"].tolist() == new["cu_seq_lens_k"].tolist() == [0, 4, 5, 7, 11, 13]
        assert new["seq_idx"].tolist() == [[0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 4]]
        assert (new["max_length_q"], new["max_length_k"]) == (4, 4)
        assert new["input_ids"] is full["input_ids"]
        assert new["labels"] is full["labels"]
        assert targets == 4 + 1 + 5  # no document's first token, but the first token of its other pieces

    def test_dtypes_are_kept_and_the_callers_batch_too(self):
        full = every_key(5, 2, 6)
        full["max_length_k"] = torch.tensor(6, dtype=torch.int32)
        before = {name: value.clone() if torch.is_tensor(value) else value for name, value in full.items()}
        new = cut(full, 4)
        assert {name: getattr(value, "dtype", type(value)) for name, value in new.items()} == {
            name: getattr(value, "dtype", type(value)) for name, value in full.items()
        }
        assert all(torch.equal(torch.as_tensor(full[name]), torch.as_tensor(value)) for name, value in before.items())

    def test_models_that_start_positions_at_2(self):
        new = cut(flattened(5, 2, start=2), 4)
        assert new["position_ids"].tolist() == [[2, 3, 4, 5, 2, 2, 3]]

    def test_a_row_that_starts_inside_a_document(self):
        positions = torch.tensor([[5, 6, 7, 8, 9, 0, 1, 2]])
        new = cut({"input_ids": torch.ones(1, 8).long(), "position_ids": positions}, 3)
        assert new["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]

    def test_padding_behind_the_documents(self):
        new, targets = set_batch_sequence_length(packed_by_trl([3, 2], [4], pad_to=8), 3, labels_shifted=False)
        assert new["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]]
        assert new["cu_seq_lens_k"].tolist() == [0, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16]
        assert new["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
        assert targets == 2 + 1 + 3

    def test_several_rows(self):
        positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
        batch = {"input_ids": torch.ones(2, 6).long(), "position_ids": positions}
        batch["cu_seq_lens_q"] = torch.tensor([0, 4, 6, 8, 12], dtype=torch.int32)
        batch["seq_idx"] = torch.tensor([[0] * 4 + [1] * 2, [0] * 2 + [1] * 4], dtype=torch.int32)
        new = cut(batch, 3)
        assert new["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 0]]
        assert new["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 8, 11, 12]
        assert new["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 2]]

    def test_flat_tokens(self):
        (inputs, labels), targets = set_batch_sequence_length(by_torchtitan(5, 3), 4)
        assert inputs["positions"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
        assert labels.tolist() == [2, 3, 4, 5, -100, 7, 8, -100]
        assert targets == 6
        one_document = cut(by_torchtitan(6), 4)
        assert one_document[0]["positions"].tolist() == [0, 1, 2, 3, 0, 1]

    def test_a_batch_as_short_as_seqlen_stays(self):
        full = every_key(5, 2, 6)
        new, targets = set_batch_sequence_length(full, 13, labels_shifted=False)
        assert all(new[name] is full[name] for name in full)
        assert targets == 10


class TestDetection:
    def test_one_document_is_a_plain_row_unless_it_is_said(self):
        plain = flattened(8)
        assert cut(plain, 3)["position_ids"].tolist() == [[0, 1, 2]]
        assert cut(plain, 3, padding_free=True)["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
        marked = every_key(8)
        assert cut(marked, 3)["cu_seq_lens_q"].tolist() == [0, 3, 6, 8]

    def test_one_packed_row_is_enough(self):
        positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]])
        new = cut({"input_ids": torch.ones(2, 6).long(), "position_ids": positions}, 3)
        assert new["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 1]]

    def test_rows_are_truncated_if_that_is_said(self):
        assert cut(flattened(5, 3), 6, padding_free=False)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0]]

    @pytest.mark.parametrize(
        "positions",
        [
            [[0, 1, 2, 3, 4, 5]],
            [[1, 1, 1, 0, 1, 2]],  # padded on the left by Hugging Face's ones
            [[0, 1, 2, 7, 8, 9]],  # skips, restarts nowhere
            [[0, 1, 2, 0, 1, 2]],
        ],
    )
    def test_a_plain_batch_is_truncated(self, positions):
        batch = {"input_ids": torch.arange(6)[None], "position_ids": torch.tensor(positions)}
        if positions == [[0, 1, 2, 0, 1, 2]]:
            batch["attention_mask"] = torch.ones(1, 6).long()  # positions separate no documents beside a mask
        new = cut(batch, 4)
        assert new["input_ids"].tolist() == [[0, 1, 2, 3]]
        assert new["position_ids"].tolist() == [positions[0][:4]]

    def test_a_mask_of_both_axes_is_cut_with_its_rows(self):
        batch = {"input_ids": torch.arange(6)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
        new = cut({**batch, "block_mask": torch.ones(1, 1, 6, 6)}, 4)
        assert new["block_mask"].shape == (1, 1, 4, 4)

    def test_segments_of_a_row_are_as_ever_unless_it_is_marked(self):
        assert cut(flattened(5, 3), 4, truncate=False)["input_ids"].shape == (2, 4)
        assert cut(every_key(5, 3), 4, truncate=False)["cu_seq_lens_q"].tolist() == [0, 4, 5, 8]


class TestRefusals:
    @pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
    def test_without_positions(self, options):
        batch = flattened(5, 3, return_position_ids=False, **options)
        name = "cu_seq_lens_q" if "return_flash_attn_kwargs" in options else "seq_idx"
        with pytest.raises(
            DataError, match=f"^{name}: this padding-free batch has no position_ids.*return_position_ids"
        ):
            cut(batch, 4)

    def test_padding_free_without_positions(self):
        with pytest.raises(DataError, match=r"^padding_free: this padding-free batch has no position_ids"):
            cut({"input_ids": torch.ones(1, 8)}, 4, padding_free=True)

    def test_beside_a_mask(self):
        batch = {**every_key(5, 3), "attention_mask": torch.ones(1, 8)}
        with pytest.raises(DataError, match=r"^attention_mask: .*leave the mask out"):
            cut(batch, 4)

    def test_said_to_be_plain(self):
        with pytest.raises(ConfigError, match=r"^padding_free: False, but seq_idx marks a padding-free batch"):
            cut(every_key(5, 3), 4, padding_free=False)
        with pytest.raises(ConfigError, match=r"^padding_free: False, but 0\.positions marks a padding-free batch"):
            cut(by_torchtitan(5, 3), 4, padding_free=False)

    def test_names_that_are_not_known(self):
        with pytest.raises(DataError, match=r"^cu_seqlens: not a known name"):
            cut({**flattened(5, 3), "cu_seqlens": torch.tensor([0, 5, 8])}, 4)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("cu_seq_lens_q", torch.tensor([0, 4, 8])),
            ("cu_seq_lens_k", torch.tensor([0, 5, 7])),
            ("cu_seq_lens_k", torch.tensor([[0, 5, 8]])),
            ("seq_idx", torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])),
            ("seq_idx", torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])),
        ],
    )
    def test_boundaries_that_contradict_the_positions(self, name, value):
        with pytest.raises(DataError, match=f"^{name}: its boundaries differ from those of position_ids.* 2 places"):
            cut({**every_key(5, 3), name: value}, 4)

    def test_lists(self):
        with pytest.raises(DataError, match=r"^input_ids: shape \(0, 8\) holds no tokens"):
            cut(
                {
                    "input_ids": torch.ones(0, 8),
                    "position_ids": torch.ones(0, 8).long(),
                    "cu_seq_lens_q": torch.zeros(1),
                },
                4,
            )
        with pytest.raises(DataError, match=r"^position_ids: shape \(1, 0\) doesn't fit"):
            cut({"input_ids": torch.ones(1, 8), "position_ids": torch.ones(1, 0).long()}, 4)
        nothing = cut({**flattened(5, 3), "cu_seq_lens_q": None, "seq_idx": None}, 4)
        assert (nothing["cu_seq_lens_q"], nothing["seq_idx"], nothing["position_ids"][0, 4]) == (None, None, 0)
        with pytest.raises(DataError, match=r"^cu_seq_lens_q: a list can't be shortened; give a tensor"):
            cut({**every_key(5, 3), "cu_seq_lens_q": [0, 5, 8]}, 4)

    def test_positions_of_another_shape(self):
        with pytest.raises(DataError, match=r"^position_ids: shape \(1, 7\) doesn't fit"):
            cut({**every_key(5, 3), "position_ids": torch.arange(7)[None]}, 4)


class TestProperties:
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 14), st.booleans())
    def test_every_token_is_in_one_piece_of_one_document(self, lengths, seqlen, truncate):
        full = every_key(*lengths)
        new, targets = set_batch_sequence_length(full, seqlen, truncate, labels_shifted=False)
        if seqlen < sum(lengths):
            expected = [min(seqlen, length - first) for length in lengths for first in range(0, length, seqlen)]
            assert [end - first for first, end in pieces(new)] == expected  # each document's own, in its order
            assert new["cu_seq_lens_q"].diff().tolist() == expected
            assert new["max_length_q"] == max(expected)
            assert new["seq_idx"][0].bincount().tolist() == expected
        assert new["input_ids"].equal(full["input_ids"])
        assert new["labels"].equal(full["labels"])
        assert targets == sum(length - 1 for length in lengths)

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
    def test_labels_of_all_conventions_count_the_same_targets(self, lengths, seqlen):
        inside = cut(flattened(*lengths), seqlen, labels_shifted=False, emit_shift_labels=True, padding_free=True)
        (_, shifted), targets = set_batch_sequence_length(by_torchtitan(*lengths), seqlen)
        assert inside["shift_labels"][0].equal(shifted)
        assert int((inside["shift_labels"] != -100).sum()) == targets


class TestModel:
    @pytest.mark.parametrize("seqlen", [1, 4, 7, 30])
    def test_each_piece_is_seen_by_itself(self, llama, seqlen):
        new, targets = set_batch_sequence_length(
            flattened(13, 1, 9, 7), seqlen, labels_shifted=False, padding_free=True
        )
        with torch.no_grad():
            output = llama(**new)
            alone = [llama(input_ids=new["input_ids"][:, first:end]).logits for first, end in pieces(new)]
        assert max(end - first for first, end in pieces(new)) <= seqlen
        alone = torch.cat(alone, 1)
        torch.testing.assert_close(output.logits, alone, rtol=0, atol=1e-6)
        # the loss is a mean over as many targets as are counted: the next token of the same document
        loss_sum = torch.nn.functional.cross_entropy(
            alone[0, :-1], new["labels"][0, 1:], reduction="sum", ignore_index=-100
        )
        assert output.loss.item() == pytest.approx(loss_sum.item() / targets, rel=1e-5)
        assert targets == 12 + 0 + 8 + 6

    def test_a_full_batch_is_seen_by_document(self, llama):
        full = flattened(13, 9)
        with torch.no_grad():
            second = llama(**full).logits[:, 13:]
            torch.testing.assert_close(second, llama(input_ids=full["input_ids"][:, 13:]).logits, rtol=0, atol=1e-6)
