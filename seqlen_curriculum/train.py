"""``slw train`` for launchers: ``deepspeed --module seqlen_curriculum.train FILE --save FOLDER``."""

import sys
from pathlib import Path

if Path(sys.path[0]) == Path(__file__).resolve().parent:
    # `slw tune` runs this file by its path. The folder of the package has modules of common names, such as data and config.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from seqlen_curriculum.cli import script

if __name__ == "__main__":
    script("train")
