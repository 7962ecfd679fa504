"""What is said to do where a model is not on this disk, or damaged."""

from dataclasses import replace
from pathlib import Path

import pytest

from lookonce.cards import CardFile, ModelCard, find_card
from lookonce.remedy import none_here, one_missing, pull_command, replace_damaged, type_of

CARD = ModelCard(
    "tiny",
    "qwen3vl",
    "MIT",
    {"Q4_K_M": CardFile("t4.gguf", 4_000), "Q8_0": CardFile("t8.gguf")},
    {"Q8_0": CardFile("p8.gguf", 2_000), "F16": CardFile("pf.gguf")},
    "me/Tiny",
)


def test_the_sizes_that_are_known_are_told() -> None:
    told = {
        name: none_here(found)
        for name in ("qwen3-vl-2b-instruct", "qwen3-vl-embedding-8b")
        if (found := find_card(name))
    }
    assert told["qwen3-vl-2b-instruct"].endswith("`lookonce pull qwen3-vl-2b-instruct` fetches them, 1.55 GB")
    assert told["qwen3-vl-embedding-8b"].endswith("fetches them, more than 1.16 GB")
    card = find_card("qwen3-vl-embedding-8b")
    assert card is not None
    assert none_here(card, "Q8_0") == (
        "the files of qwen3-vl-embedding-8b:Q8_0 are not on this disk: "
        "`lookonce pull qwen3-vl-embedding-8b --quant Q8_0` fetches them, 9.21 GB"
    )


def test_the_command_names_the_types_that_are_not_the_cards_first() -> None:
    assert pull_command(CARD) == pull_command(CARD, "q4_k_m", "Q8_0") == "`lookonce pull tiny`"
    assert pull_command(CARD, "Q8_0", "F16") == "`lookonce pull tiny --quant Q8_0 --mmproj-type F16`"
    assert pull_command(CARD, folder=Path("my models")) == "`lookonce pull tiny --to 'my models'`"


def test_the_missing_one_of_two_files_is_named_with_the_command_that_leaves_the_other() -> None:
    assert one_missing(CARD, "projector", Path("t8.gguf")) == (
        "p8.gguf, the projector of tiny, is not on this disk: `lookonce pull tiny --quant Q8_0` fetches it, 2 KB"
    )
    assert one_missing(CARD, "text", Path("pf.gguf"), quantization="Q8_0") == (
        "t8.gguf, the text model of tiny, is not on this disk: "
        "`lookonce pull tiny --quant Q8_0 --mmproj-type F16` fetches it"
    )
    own = replace(CARD, huggingface=None, folder=Path("/here"))
    assert one_missing(own, "text", Path("/here/p8.gguf")) == (
        "t4.gguf, the text model of tiny, is not in /here: put it back, or install again"
    )


def test_a_damaged_file_is_replaced_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain" / "t8.gguf"
    assert replace_damaged(CARD, plain) == (
        f"delete {plain}, then `lookonce pull tiny --quant Q8_0 --to {plain.parent}` fetches it again"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    cache = tmp_path / "hf" / "hub" / "models--me--Tiny"
    link = cache / "snapshots" / "abc" / "pf.gguf"
    for folder in (link.parent, cache / "blobs"):
        folder.mkdir(parents=True)
    (cache / "blobs" / "0123").write_bytes(b"GGUF")
    link.symlink_to("../../blobs/0123")
    assert replace_damaged(CARD, link) == (
        f"delete {cache / 'blobs' / '0123'}, which it links to, then `lookonce pull tiny --mmproj-type F16` "
        "fetches it again"
    )
    own = replace(CARD, huggingface=None, folder=Path("/here"))
    assert replace_damaged(own, Path("/here/t4.gguf")) == "install again"


def test_a_file_has_its_type_by_its_published_name() -> None:
    assert type_of(CARD, "text", Path("a/me_Tiny_t8.gguf")) == "Q8_0"
    assert type_of(CARD, "projector", Path("t8.gguf")) is None
