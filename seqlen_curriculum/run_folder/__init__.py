"""What a run leaves on disk, read and written without torch.

::

    SAVE/
    ├── runlog.jsonl        RUN_LOG     a record per step and per evaluation (run_log)
    ├── run.json            RUN_INFO    the configuration, and when and where it was launched (run_info)
    ├── rollbacks.json      ROLLBACKS   the steps that rollbacks skip, once there was one (rollbacks)
    ├── latest              LATEST      the name of the newest checkpoint, for DeepSpeed's own tools
    └── global_step<N>/     a checkpoint: DeepSpeed's files, and a model in Hugging Face's format (model_folder)
        └── complete.json   MANIFEST    what the checkpoint holds, written last (checkpoint_manifest)
"""

__all__ = ["CHECKPOINT_PREFIX", "LATEST", "MANIFEST", "ROLLBACKS", "RUN_INFO", "RUN_LOG"]

RUN_LOG = "runlog.jsonl"
RUN_INFO = "run.json"
ROLLBACKS = "rollbacks.json"
LATEST = "latest"
CHECKPOINT_PREFIX = "global_step"
MANIFEST = "complete.json"
