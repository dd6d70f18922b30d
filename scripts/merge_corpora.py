"""Run ``slw merge``."""

from seqlen_curriculum.cli import script

if __name__ == "__main__":
    script("merge")
