"""Run ``slw`` as ``python -m seqlen_curriculum``."""

from seqlen_curriculum.cli import main

if __name__ == "__main__":
    main()
