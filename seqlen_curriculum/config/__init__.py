"""The sections of a run's JSON file and their checks."""

from seqlen_curriculum.config.data import DataConfig
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.config.training import TrainingConfig

__all__ = ["DataConfig", "ModelConfig", "RunConfig", "RunPlan", "TrainingConfig"]
