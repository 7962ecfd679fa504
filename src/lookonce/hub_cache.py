"""Where the two hubs' own caches are, by the rules of their clients, which need not be imported for it.

What a pull puts there, a search finds, whatever the client that is installed was told since.
"""

import os
from pathlib import Path

__all__ = ["huggingface_folder", "modelscope_cache"]


def huggingface_folder(repository: str) -> Path:
    """The folder of a repository in Hugging Face's cache (huggingface_hub, constants.py and file_download.py)."""
    environment = os.environ
    home = environment.get("HF_HOME") or os.path.join(  # noqa: PTH118  as huggingface_hub has it
        environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return _expanded(os.path.expandvars(cache)) / f"models--{repository.replace('/', '--')}"


def modelscope_cache() -> Path:
    """ModelScope's cache (modelscope_hub, config.py)."""
    return _expanded(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope")


def _expanded(path: str) -> Path:
    # Not Path.expanduser, which raises for a home folder that nobody has.
    return Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111
