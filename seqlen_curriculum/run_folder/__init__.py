"""The files of a run folder, read and written without torch.

::

    SAVE/
    ├── runlog.jsonl        RUN_LOG     one record per step and per evaluation (run_log)
    ├── run.json            RUN_INFO    the configuration, and the times and machines of launches (run_info)
    ├── rollbacks.json      ROLLBACKS   the steps skipped by rollbacks, if any (rollbacks)
    ├── latest              LATEST      the name of the newest checkpoint, for DeepSpeed's own tools
    └── global_step<N>/     a checkpoint: DeepSpeed's files, and a model in Hugging Face's format (model_folder)
        └── complete.json   MANIFEST    the contents of the checkpoint, written last (checkpoint_manifest)
"""

__all__ = ["CHECKPOINT_PREFIX", "LATEST", "MANIFEST", "ROLLBACKS", "RUN_INFO", "RUN_LOG"]

RUN_LOG = "runlog.jsonl"
RUN_INFO = "run.json"
ROLLBACKS = "rollbacks.json"
LATEST = "latest"
CHECKPOINT_PREFIX = "global_step"
MANIFEST = "complete.json"
