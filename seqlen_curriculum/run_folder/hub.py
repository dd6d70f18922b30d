"""Models by their names on the Hugging Face Hub, such as ``gpt2``: from the cache, else downloaded into it."""

from __future__ import annotations

import re
from pathlib import Path

from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.run_folder.model_files import weight_files

__all__ = ["hub_folder", "is_hub_name"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DESCRIPTIONS = ["*.json", "*.txt", "*.bpe", "*.jinja"]
_SECONDS = 10


def is_hub_name(path: Path | str) -> bool:
    """Return whether ``path`` can be a name on the Hub, NAME or OWNER/NAME, and isn't a path on this machine."""
    name = str(path)
    is_name = len(name) <= 96 and _NAME.fullmatch(name) is not None and ".." not in name and "--" not in name
    return is_name and not name.endswith((".json", ".txt", ".bpe")) and not Path(name).exists()


def hub_folder(name: str, weights: bool = True) -> Path:
    """Return the folder of the model ``name`` in Hugging Face's cache, after downloading it if it isn't there.

    Without ``weights`` only the tokenizer and the configuration are needed. Raises CheckpointError.
    """
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: there is no such folder, and names on the Hub need huggingface_hub; run: pip install huggingface_hub"
        ) from None
    if cached := _cached(name, weights):
        return cached
    try:
        wanted = list(_DESCRIPTIONS)
        if weights:
            files = HfApi().model_info(name, timeout=_SECONDS).siblings or []
            wanted.append("*.safetensors" if any(_is_safetensors(file.rfilename) for file in files) else "*.bin")
        # Folders inside a repository hold the same model for other programs.
        folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*", etag_timeout=_SECONDS)
    except Exception as error:  # offline mode, no network, no such model, a private one, a full disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CheckpointError(
            f"{name}: there is no such folder, and no complete model of this name in the cache {constants.HF_HUB_CACHE}; it "
            f"can't be downloaded from the Hub ({reason}); give a folder that exists, or check the name and the network"
        ) from None
    return Path(folder)


def _is_safetensors(file: str) -> bool:
    return "/" not in file and file.endswith(".safetensors")


def _cached(name: str, weights: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if weights:
            weight_files(folder)  # an interrupted download has only some of them
    except (OSError, ValueError, SeqlenCurriculumError):  # huggingface_hub's error for what isn't cached is both
        return None
    return folder
