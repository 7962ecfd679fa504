"""A real Chroma collection on disk, written, closed and opened again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lookonce
from lookonce.principal import Principal
from lookonce.synthetic.pair import make_pair

chromadb = pytest.importorskip("chromadb", reason="install it with: pip install 'lookonce[chroma]'")

from lookonce.integrations.chroma import EmbeddingFunction  # noqa: E402  only with Chroma

DOCUMENTS = ["a red circle", "the blue square at the top", "two cats and a dog", "12345"]


@pytest.fixture(scope="module")
def embedder(tiny_pair: tuple[Path, Path]) -> Iterator[lookonce.Embedder]:
    with lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False, kv_type="f32", flash_attention=False) as model:
        yield lookonce.Embedder(model, dimension=64)


def test_a_collection_answers_queries_after_it_was_opened_again(embedder: lookonce.Embedder, tmp_path: Path) -> None:
    function: Any = EmbeddingFunction(embedder)
    client = chromadb.PersistentClient(tmp_path)
    collection = client.create_collection("things", embedding_function=function)
    collection.add(ids=[str(n) for n in range(4)], documents=DOCUMENTS, metadatas=[{"n": n} for n in range(4)])
    del client, collection
    chromadb.api.client.SharedSystemClient.clear_system_cache()
    opened = chromadb.PersistentClient(tmp_path).get_collection("things", embedding_function=function)
    assert opened.count() == 4
    for number, document in enumerate(DOCUMENTS):
        answer = opened.query(query_texts=[document], n_results=2)
        assert answer["ids"][0][0] == str(number)
        assert answer["documents"][0][0] == document
        assert answer["distances"][0][0] == pytest.approx(0, abs=1e-4)
    kept = opened.get(ids=["2"], include=["embeddings"])["embeddings"][0]
    assert kept == pytest.approx(embedder.embed_text(DOCUMENTS[2]), abs=1e-5)
    assert opened.configuration_json["hnsw"]["space"] == "cosine"


def test_a_picture_finds_its_own_vector(embedder: lookonce.Embedder, tmp_path: Path) -> None:
    function: Any = EmbeddingFunction(embedder)
    collection = chromadb.PersistentClient(tmp_path).create_collection("pictures", embedding_function=function)
    pictures = [np.full((64, 64, 3), shade, dtype=np.uint8) for shade in (0, 120, 255)]
    vectors = embedder.embed_batch([{"image": picture} for picture in pictures])
    collection.add(ids=["dark", "gray", "light"], embeddings=list(vectors))
    found = collection.query(query_embeddings=[embedder.embed_image(pictures[1])], n_results=1)
    assert found["ids"] == [["gray"]]


def test_a_query_has_its_own_instruction(embedder: lookonce.Embedder) -> None:
    function = EmbeddingFunction(embedder, query_instruction="Find a picture")
    assert function(["a cat"])[0] == pytest.approx(embedder.embed_text("a cat"), abs=1e-5)
    queried = function.embed_query(["a cat"])[0]
    assert queried == pytest.approx(embedder.embed_text("a cat", instruction="Find a picture"), abs=1e-5)
    assert np.abs(queried - embedder.embed_text("a cat")).max() > 1e-3


def test_a_collection_opened_without_the_function_says_what_to_give(
    embedder: lookonce.Embedder, tmp_path: Path
) -> None:
    function: Any = EmbeddingFunction(embedder)
    collection = chromadb.PersistentClient(tmp_path).create_collection("things", embedding_function=function)
    collection.add(ids=["0"], documents=["a cat"])
    opened = chromadb.PersistentClient(tmp_path).get_collection("things")
    assert opened.count() == 1
    with pytest.raises(lookonce.InputError, match=r"made with 'Qwen3-VL tiny seed 0': give get_collection the embed"):
        opened.query(query_texts=["a cat"])


def test_a_collection_refuses_another_model_or_setting(
    embedder: lookonce.Embedder, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    given: Any = EmbeddingFunction(embedder)
    kept = chromadb.PersistentClient(tmp_path).create_collection("things", embedding_function=given)
    kept.add(ids=["0"], documents=["a cat"])
    config = kept.configuration_json["embedding_function"]["config"]
    assert config == embedder.settings()
    assert set(config) == {
        *("model", "fingerprint", "pooling", "layer", "tokens", "normalize", "dimension", "prompt", "instruction"),
        "pca",
    }
    del kept
    chromadb.api.client.SharedSystemClient.clear_system_cache()
    client = chromadb.PersistentClient(tmp_path)
    other_seed = make_pair(tmp_path, family="qwen3vl", seed=1)[0]
    with (
        lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False) as model,
        lookonce.load(other_seed, threads=1, n_ctx=512, store=False) as other,
    ):
        for source, options in (
            (other, {}),
            (model, {"pooling": "mean"}),
            (model, {"layer": 0}),
            (model, {"tokens": "text"}),
            (model, {"prompt": "plain"}),
            (model, {"instruction": "Find it."}),
            (model, {"normalize": False}),
            (model, {"pca": Principal(np.zeros(256, np.float32), np.eye(64, 256, dtype=np.float32))}),
        ):
            changed: Any = EmbeddingFunction(lookonce.Embedder(source, **{"dimension": 64, **options}))
            for opening in (client.get_collection, client.get_or_create_collection):
                with pytest.raises(ValueError, match=r"conflict: new: lookonce \{.* vs persisted: lookonce \{"):
                    opening("things", embedding_function=changed)
        same: Any = EmbeddingFunction(lookonce.Embedder(model, dimension=64), query_instruction="Find it.")
        assert client.get_collection("things", embedding_function=same).count() == 1
