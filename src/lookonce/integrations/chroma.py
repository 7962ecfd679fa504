"""A Chroma embedding function over an `Embedder`. Needs the `chroma` extra."""

from typing import Any

import numpy as np
from chromadb.api.types import Documents, Embeddings
from chromadb.api.types import EmbeddingFunction as ChromaFunction
from chromadb.utils.embedding_functions import register_embedding_function

from lookonce.embedder import Embedder
from lookonce.errors import InputError


@register_embedding_function
class EmbeddingFunction(ChromaFunction[Documents]):
    """Embeds a collection's documents and queries; a query may have an instruction of its own.

    A persistent collection remembers the model's name and the dimension, not the model: give the function again when
    the collection is opened.
    """

    def __init__(self, embedder: Embedder, *, query_instruction: str | None = None) -> None:
        self._embedder = embedder
        self._query_instruction = query_instruction

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
        """Chroma's name for this function."""
        return "lookonce"

    def default_space(self) -> Any:
        """The distance for normalised vectors."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """What a collection remembers."""
        return {"model": self._embedder.model_name, "dimension": self._embedder.dimension}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "EmbeddingFunction":
        """Give what stands for the function in a collection that was opened without it: every use is an InputError."""
        return _Forgotten(config)


class _Forgotten(EmbeddingFunction):
    """Remembers which model a collection was made with. Chroma makes one to look at, so it must not raise."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._query_instruction = None

    def _embed(self, texts: Documents, instruction: str | None) -> Embeddings:
        raise InputError(
            f"the collection was made with {self._config.get('model')!r}: give get_collection the embedding_function "
            "again"
        )

    def get_config(self) -> dict[str, Any]:
        return self._config
