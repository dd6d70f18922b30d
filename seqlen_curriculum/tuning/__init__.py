"""The paper's low-cost tuning (Section 4): ``min_difficulty`` and T for a small part of the training's cost."""
