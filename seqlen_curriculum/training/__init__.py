"""The only package that imports DeepSpeed: the engine, the trainer, checkpoints and telemetry."""
