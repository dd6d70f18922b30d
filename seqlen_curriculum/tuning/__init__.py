"""The paper's low-cost tuning (Section 4) of ``min_difficulty`` and T, at a small fraction of the training cost."""
