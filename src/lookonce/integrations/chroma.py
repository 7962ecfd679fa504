"""A Chroma embedding function over an `Embedder`. Needs the `chroma` extra."""

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from chromadb.api.types import Documents, Embeddings
from chromadb.api.types import EmbeddingFunction as ChromaFunction
from chromadb.utils.embedding_functions import known_embedding_functions, register_embedding_function

from lookonce.embedder import Embedder
from lookonce.errors import InputError

_NAME: Final = "lookonce"


@register_embedding_function
class EmbeddingFunction(ChromaFunction[Documents]):
    """Embeds a collection's documents and queries; a query may have an instruction of its own.

    A persistent collection remembers the embedder's settings, not the model: import this module and give the function
    again when the collection is opened. Chroma then refuses, with a ValueError that shows both, one of another model
    or another setting. The query's instruction may change: it is no part of what is kept.
    """

    def __init__(self, embedder: Embedder, *, query_instruction: str | None = None) -> None:
        self._embedder = embedder
        self._query_instruction = query_instruction
        self._config = embedder.settings()
        # A function's name is all that Chroma compares when a collection is opened, so an instance's says everything.
        self.__dict__["name"] = lambda: _full_name(self._config)
        known_embedding_functions[_full_name(self._config)] = type(self)

    def __call__(self, input: Documents) -> Embeddings:
        """Vectors of documents."""
        return self._embed(input, None)

    def embed_query(self, input: Documents) -> Embeddings:
        """Vectors of queries, under the query's instruction."""
        return self._embed(input, self._query_instruction)

    def _embed(self, texts: Documents, instruction: str | None) -> Embeddings:
        vectors = self._embedder.encode(list(texts), prompt=instruction)
        return [np.asarray(vector) for vector in vectors]

    @staticmethod
    def name() -> str:
        """Chroma's name for this class; an instance's own has its settings too."""
        return _NAME

    def default_space(self) -> Any:
        """The distance for normalised vectors."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """What a collection remembers."""
        return self._config

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "EmbeddingFunction":
        """Give what stands for the function in a collection that was opened without it: every use is an InputError."""
        return _Forgotten(config)


class _Forgotten(EmbeddingFunction):
    """Remembers which model a collection was made with. Chroma makes one to look at, so it must not raise."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._query_instruction = None
        self.__dict__["name"] = lambda: _full_name(config)

    def _embed(self, texts: Documents, instruction: str | None) -> Embeddings:
        raise InputError(
            f"the collection was made with {self._config.get('model')!r}: give get_collection the embedding_function "
            "again"
        )

    def get_config(self) -> dict[str, Any]:
        return self._config


def _full_name(config: Mapping[str, Any]) -> str:
    return f"{_NAME} {json.dumps(config, ensure_ascii=False)}"
