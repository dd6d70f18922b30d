"""Run a script of an unmodified Megatron-DeepSpeed tree whose DeepSpeed file has a ``curriculum_learning`` block.

Run:  deepspeed examples/megatron_deepspeed.py Megatron-DeepSpeed/pretrain_gpt.py --deepspeed_config ds.json ...
"""

import runpy
import sys
from pathlib import Path

import seqlen_curriculum.integrations.deepspeed_legacy  # noqa: F401 - before the script imports DeepSpeed


def main() -> None:
    """Run the script that is the first argument ending with .py, with all other arguments."""
    script = next((argument for argument in sys.argv[1:] if argument.endswith(".py")), None)
    if script is None:
        sys.exit("no script given; write its path, such as Megatron-DeepSpeed/pretrain_gpt.py, as the first argument")
    sys.argv.remove(script)  # the launcher puts --local_rank before it
    sys.argv[0] = script
    sys.path.insert(0, str(Path(script).resolve().parent))  # as if Python had started it
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
