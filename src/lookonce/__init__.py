"""Look at a picture once. Ask, search and reuse what was seen, for ever, on a CPU.

    >>> import lookonce
    >>> model = lookonce.load("model.gguf", mmproj="mmproj.gguf")  # doctest: +SKIP
    >>> look = model.look("cat.jpg")                               # doctest: +SKIP
    >>> model.ask("What colour is the cat?", images=[look]).text   # doctest: +SKIP
    'The cat is orange.'

The native library is loaded with the first use of a name that needs it, not by this import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lookonce import errors
from lookonce.errors import *  # noqa: F403  the exception tree, whose __all__ is pinned by a test
from lookonce.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from lookonce.ask_many import ReplyStreams
    from lookonce.chat import Chat, ReplyStream
    from lookonce.embedder import Embedder
    from lookonce.embedding import ImageEmbedding
    from lookonce.model import Model, load
    from lookonce.reply import Reply
    from lookonce.sampling import Sampling
    from lookonce.stages import extract
    from lookonce.store import Store

_HOMES = {
    "Chat": "chat",
    "Embedder": "embedder",
    "ImageEmbedding": "embedding",
    "Model": "model",
    "Reply": "reply",
    "ReplyStream": "chat",
    "ReplyStreams": "ask_many",
    "extract": "stages",
    "Sampling": "sampling",
    "Store": "store",
    "load": "model",
}

__all__ = [
    "Chat",
    "Embedder",
    "ImageEmbedding",
    "Model",
    "Reply",
    "ReplyStream",
    "ReplyStreams",
    "Sampling",
    "Store",
    "__version__",
    "extract",
    "load",
]
__all__ += errors.__all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lookonce' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lookonce.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
