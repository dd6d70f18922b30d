"""Rows of a user's own, as the trainers' tests read them."""

import torch
from torch.utils.data import Dataset


class FullRows(Dataset):
    """Rows of 32 tokens, of which the first says which row it is."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        tokens = torch.cat([torch.tensor([index % 257]), torch.randint(257, (31,), generator=torch.manual_seed(index))])
        return {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones(32, dtype=torch.int64)}
