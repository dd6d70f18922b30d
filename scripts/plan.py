"""Run ``slw plan``."""

from seqlen_curriculum.cli import script

if __name__ == "__main__":
    script("plan")
