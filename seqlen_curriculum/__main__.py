"""``python -m seqlen_curriculum`` is ``slw``."""

from seqlen_curriculum.cli import main

if __name__ == "__main__":
    main()
