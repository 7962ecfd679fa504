"""LangChain's `Embeddings` over an `Embedder`. Needs the `langchain` extra."""

import asyncio

from langchain_core.embeddings import Embeddings as LangChainEmbeddings

from lookonce.embedder import Embedder


class Embeddings(LangChainEmbeddings):
    """Embeds documents and queries for any LangChain vector store; a query may have an instruction of its own."""

    def __init__(self, embedder: Embedder, *, query_instruction: str | None = None) -> None:
        self._embedder = embedder
        self._query_instruction = query_instruction

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of documents."""
        return [[float(value) for value in vector] for vector in self._embedder.encode(texts)]

    def embed_query(self, text: str) -> list[float]:
        """Vector of a query, under the query's instruction."""
        return [float(value) for value in self._embedder.encode(text, prompt=self._query_instruction)]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_query, text)
