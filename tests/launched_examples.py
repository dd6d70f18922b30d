"""Run on two ranks by test_examples.py: every example in one launch. Rank 0 writes what they returned as JSON.

usage: launched_examples.py OUT_FILE
"""

import json
import runpy
import sys
from pathlib import Path

from deepspeed import comm as dist

EXAMPLES = Path(__file__).parent.parent / "examples"


def main():
    huggingface = runpy.run_path(str(EXAMPLES / "huggingface.py"))["main"]
    seen = {architecture: huggingface(architecture) for architecture in ("llama", "bloom", "bert")}
    seen["megatron_style"] = runpy.run_path(str(EXAMPLES / "megatron_style.py"))["main"]()
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
