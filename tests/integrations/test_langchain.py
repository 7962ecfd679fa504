"""A real LangChain vector store over the embedder."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import lookonce

vectorstores = pytest.importorskip(
    "langchain_core.vectorstores", reason="install it with: pip install 'lookonce[langchain]'"
)

from lookonce.integrations.langchain import Embeddings  # noqa: E402  only with LangChain

DOCUMENTS = ["a red circle", "the blue square at the top", "two cats and a dog", "12345"]


@pytest.fixture(scope="module")
def embedder(tiny_pair: tuple[Path, Path]) -> Iterator[lookonce.Embedder]:
    with lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False, kv_type="f32", flash_attention=False) as model:
        yield lookonce.Embedder(model)


def test_a_vector_store_answers_queries(embedder: lookonce.Embedder) -> None:
    store = vectorstores.InMemoryVectorStore.from_texts(DOCUMENTS, Embeddings(embedder))
    for document in DOCUMENTS:
        ((found, score), *_) = store.similarity_search_with_score(document, k=2)
        assert found.page_content == document
        assert score == pytest.approx(1, abs=1e-4)


def test_a_vector_store_answers_without_blocking(embedder: lookonce.Embedder) -> None:
    async def ask() -> str:
        store = await vectorstores.InMemoryVectorStore.afrom_texts(DOCUMENTS, Embeddings(embedder))
        (found,) = await store.asimilarity_search(DOCUMENTS[2], k=1)
        return str(found.page_content)

    assert asyncio.run(ask()) == DOCUMENTS[2]


def test_vectors_are_lists_of_plain_floats(embedder: lookonce.Embedder) -> None:
    embeddings = Embeddings(embedder)
    documents = embeddings.embed_documents(DOCUMENTS)
    assert len(documents) == 4
    assert {type(value) for value in (*documents[0], *embeddings.embed_query("a cat"))} == {float}
    assert documents[1] == pytest.approx(embedder.embed_text(DOCUMENTS[1]).tolist(), abs=1e-5)
    assert embeddings.embed_documents([]) == []


def test_a_query_has_its_own_instruction(embedder: lookonce.Embedder) -> None:
    queried = Embeddings(embedder, query_instruction="Find a picture").embed_query("a cat")
    expected = embedder.embed_text("a cat", instruction="Find a picture").tolist()
    assert queried == pytest.approx(expected, abs=1e-5)
    assert queried != pytest.approx(embedder.embed_text("a cat").tolist(), abs=1e-3)
