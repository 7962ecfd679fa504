import re
import subprocess
import sys
from pathlib import Path

import pytest

from lookonce.cards import CardFile, choose_card, find_card, read_cards, readable_cards, user_file
from lookonce.errors import InputError, ModelFileError

GOOD = """\
[mine]
family = "qwen3vl"
licence = "MIT"
huggingface = "me/mine-GGUF"
text.Q4_K_M = { file = "mine.gguf" }

[mine.projector]
F16 = { file = "mmproj-mine.gguf", size_bytes = 5 }
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own file of cards, not yet written."""
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    return tmp_path / "own.toml"


def test_the_promised_models_have_cards() -> None:
    sizes = [f"qwen3-vl-{size}-instruct" for size in ("2b", "4b", "8b", "32b")]
    sizes += ["qwen2.5-vl-3b-instruct", "qwen2.5-vl-7b-instruct", "qwen3-vl-embedding-2b", "qwen3-vl-embedding-8b"]
    cards = read_cards()
    assert cards.keys() >= set(sizes)
    for name in sizes:
        assert cards[name].name == name
        assert next(iter(cards[name].text)) == "Q4_K_M"
        assert cards[name].revision == "main"


def test_a_card_says_what_the_hub_publishes() -> None:
    card = find_card("Qwen3-VL-2B-Instruct")
    assert card is not None
    assert card.huggingface == card.modelscope == "Qwen/Qwen3-VL-2B-Instruct-GGUF"
    assert card.text_file() == CardFile(
        "Qwen3VL-2B-Instruct-Q4_K_M.gguf",
        1_107_409_952,
        "089d75c52f4b7ffc56ba998ffc50aae89fcafc755f9e7208aacca281dca6c2ae",
    )
    assert card.projector_file("q8_0").size_bytes == 445_053_216
    with pytest.raises(InputError, match=r"has no quantization 'Q2_K': choose one of Q4_K_M, Q8_0, F16"):
        card.text_file("Q2_K")


def test_no_two_cards_share_a_file_and_every_hash_is_known_with_its_file() -> None:
    files = [file for card in read_cards().values() for file in (*card.text.values(), *card.projector.values())]
    hashes = [file.sha256 for file in files if file.sha256]
    assert len(hashes) == len(set(hashes)) == 12
    assert len({file.name for file in files}) == len(files)


def test_an_embedding_card_carries_the_models_own_options() -> None:
    for size in ("2b", "8b"):
        card = find_card(f"qwen3-vl-embedding-{size}")
        assert card is not None
        assert (card.pooling, card.instruction, card.prompt) == ("last", "Represent the user's input.", "chat")
        assert (card.min_pixels, card.max_pixels, card.n_ctx) == (4_096, 1_843_200, 8_192)


def test_what_has_no_card_is_none() -> None:
    for name in ("nothing", "", "a/b", "../models", "x" * 10_000):
        assert find_card(name) is None


def test_the_users_cards_are_added_and_replace_the_shipped_ones_of_their_name(own: Path) -> None:
    own.write_text(GOOD + GOOD.replace("[mine", "[qwen3-vl-2b-instruct"))
    mine, replaced = find_card("mine"), find_card("qwen3-vl-2b-instruct")
    assert mine is not None
    assert replaced is not None
    assert replaced.huggingface == mine.huggingface == "me/mine-GGUF"
    assert mine.projector_file() == CardFile("mmproj-mine.gguf", 5)
    assert mine.modelscope is mine.pooling is mine.folder is None
    assert find_card("qwen3-vl-4b-instruct") is not None


@pytest.mark.parametrize("revision", ["v2.0", "refs/pr/12", "0123456789abcdef0123456789abcdef01234567"])
def test_a_card_may_name_a_branch_a_tag_or_a_commit(own: Path, revision: str) -> None:
    own.write_text(GOOD.replace('"MIT"', f'"MIT"\nrevision = "{revision}"'))
    card = find_card("mine")
    assert card is not None
    assert card.revision == revision


def test_a_card_may_name_a_folder_seen_from_its_file(own: Path) -> None:
    own.write_text(GOOD.replace('huggingface = "me/mine-GGUF"', 'folder = "here/mine"'))
    card = find_card("mine")
    assert card is not None
    assert card.folder == own.parent / "here" / "mine"


def test_the_users_file_lies_in_the_configuration_folder_unless_one_is_named(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user_file() == own
    monkeypatch.delenv("LOOKONCE_MODELS")
    assert user_file().name == "models.toml"
    assert "lookonce" in user_file().parts


def test_a_named_file_that_does_not_exist_is_an_error(own: Path) -> None:
    with pytest.raises(ModelFileError, match=rf"LOOKONCE_MODELS is '{own}', which does not exist"):
        read_cards()


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('"qwen3vl"', '"llava"', 2, "mine.family is 'llava': choose one of qwen3vl, qwen2.5vl, qwen2vl"),
        ('family = "qwen3vl"', "", 1, "mine.family is absent, but every card has one"),
        ('"MIT"', "5", 3, "mine.licence is 5, but a text was expected"),
        ('"me/mine-GGUF"', '"mine"', 4, "mine.huggingface is 'mine', but a repository, owner/name was expected"),
        ('"me/mine-GGUF"', '"../.."', 4, "mine.huggingface is '../..', but a repository, owner/name was expected"),
        (
            '"MIT"',
            '"MIT"\nrevision = "/etc/x"',
            4,
            "mine.revision is '/etc/x', but a branch, tag or commit was expected",
        ),
        (
            '"MIT"',
            '"MIT"\nrevision = "a/../b"',
            4,
            "mine.revision is 'a/../b', but a branch, tag or commit was expected",
        ),
        ('"MIT"', '"MIT"\nfolder = "here"', 4, "mine.folder stands beside a repository: a card's files lie in one or"),
        ('"mine.gguf"', '"m-00001-of-00002.gguf"', 5, "mine.text.Q4_K_M.file is 'm-00001-of-00002.gguf', a part of a"),
        ("huggingface", "hugingface", 4, "mine.hugingface is not known: expected one of family, "),
        ("licence", "license", 3, "mine.license is not known: expected one of family, "),
        ("text.Q4_K_M", "texts.Q4_K_M", 1, "mine holds another table: "),
        ('"MIT"', f"{list(range(1000))}", 3, "mine.licence is [0, 1, "),
        ('huggingface = "me/mine-GGUF"', "", 1, "mine has neither huggingface, modelscope nor folder"),
        ('"mine.gguf"', '"../mine.gguf"', 5, "mine.text.Q4_K_M.file is '../mine.gguf', but the name of a .gguf file"),
        ('"mine.gguf"', '"mine.bin"', 5, "mine.text.Q4_K_M.file is 'mine.bin', but"),
        ('{ file = "mine.gguf" }', '"mine.gguf"', 5, "mine.text.Q4_K_M is 'mine.gguf', but { file, size_bytes,"),
        ("text.Q4_K_M", "#", 1, "mine.text is absent, but a table of files was expected"),
        ("= 5", "= -5", 8, "mine.projector.F16.size_bytes is -5, but a whole number from 1 was expected"),
        ("= 5", "= true", 8, "mine.projector.F16.size_bytes is True, but a whole number from 1 was expected"),
        ("size_bytes = 5", 'sha256 = "AB"', 8, "mine.projector.F16.sha256 is 'AB', but 64 small hexadecimal digits"),
        ("size_bytes", "bytes", 8, "mine.projector.F16 is {"),
        ('"MIT"', '"MIT"\npooling = "first"', 4, "mine.pooling is 'first': choose one of mean, last, cls, max"),
        ('"MIT"', '"MIT"\nmin_pixels = 9\nmax_pixels = 8', 4, "mine.min_pixels is 9, more than max_pixels, 8"),
        ('"MIT"', '"MIT"\nn_ctx = "8192"', 4, "mine.n_ctx is '8192', but a whole number from 1 was expected"),
        ("[mine]", "[mine.2]", 1, "mine holds another table: a card whose name has a dot is written in quotes"),
        ("[mine]", "stray = 1\n[mine]", 1, "stray is 1, but a table was expected: write [stray] above its fields"),
        ("[mine]", '[sound]\nfamily = "qwen3vl"\n[mine]', 1, "sound.licence is absent"),
    ],
)
def test_a_malformed_card_names_its_file_line_and_field(own: Path, old: str, new: str, line: int, message: str) -> None:
    own.write_text(GOOD.replace(old, new))
    with pytest.raises(ModelFileError, match=re.escape(f"{own}, line {line}: {message}")) as caught:
        read_cards()
    assert "\n" not in str(caught.value)


def test_what_is_no_toml_names_the_line(own: Path) -> None:
    own.write_text("[mine]\nfamily = qwen3vl\n")
    with pytest.raises(ModelFileError, match=rf"{own} is not TOML: .*line 2"):
        read_cards()
    own.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match="is not UTF-8"):
        read_cards()
    own.unlink()
    own.mkdir()
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_cards()


def test_the_mark_that_some_editors_put_first_is_passed_over(own: Path) -> None:
    own.write_text(GOOD, "utf-8-sig")
    assert find_card("mine") is not None


@pytest.mark.parametrize(
    "deep",
    [
        f"licence = {'[' * 5000}{']' * 5000}",
        "licence = " + "[\n" * 5000,
        f"licence = 'MIT'\nhuggingface = 'a/b'\ntext.F16{'.a' * 5000} = 1",
        f"licence = {'{a = ' * 5000}",
    ],
    ids=["brackets", "lines", "dots", "braces"],
)
def test_what_is_nested_too_deep_is_one_sentence_with_the_line(own: Path, deep: str) -> None:
    own.write_text(f'[mine]\nfamily = "qwen3vl"\n{deep}\n')
    with pytest.raises(ModelFileError, match=rf"{own}, line \d+: what stands here is nested deeper") as caught:
        read_cards()
    line = int(re.findall(r"line (\d+)", str(caught.value))[0])
    assert 3 <= line <= 60
    assert len(str(caught.value)) < 300


def test_a_number_of_thousands_of_digits_is_one_sentence(own: Path) -> None:
    own.write_text(f"[mine]\nn_ctx = {'9' * 5000}\n")
    with pytest.raises(ModelFileError, match=rf"{own} is not TOML: "):
        read_cards()


def test_a_name_may_have_a_quantization_after_it(own: Path) -> None:
    own.write_text(GOOD)
    card = find_card("mine")
    assert choose_card("Mine") == choose_card("mine:") == (card, None)
    assert choose_card("mine:q4_k_m") == (card, "Q4_K_M")
    with pytest.raises(InputError, match=r"mine has no quantization 'Q1': choose one of Q4_K_M"):
        choose_card("mine:Q1")


@pytest.mark.parametrize(
    ("typo", "told"),
    [
        ("qwen3-vl-2b-instuct:Q8_0", "perhaps qwen3-vl-2b-instruct or "),
        ("qwen3-vl-embed", "perhaps qwen3-vl-embedding-"),
        ("Qwen3-VL", "perhaps qwen3-vl-2b-instruct or qwen3-vl-4b-instruct or "),
    ],
)
def test_a_name_that_is_misspelt_is_told_with_those_near_it_and_not_all(typo: str, told: str) -> None:
    with pytest.raises(InputError, match=rf"'{typo}' is no model's name: {told}.* `lookonce models list` shows all$"):
        choose_card(typo)
    with pytest.raises(InputError, match=r"'zzzz' is no model's name: `lookonce models list` shows all$"):
        choose_card("zzzz")


def test_cards_that_cannot_be_used_leave_those_of_the_package(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    own.write_text("[mine]\nfamily = 5\n")
    assert "qwen3-vl-2b-instruct" in readable_cards()
    (said,) = [record.message for record in caplog.records]
    assert said == f"your own cards are left out: {own}, line 2: mine.family is 5, but a text was expected"


def test_the_readmes_card_can_be_read(own: Path) -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    (example,) = re.findall(r"```toml\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)
    own.write_text(example)
    card = find_card("my-model")
    assert card is not None
    assert (card.text_file().name, card.pooling) == ("my-model-Q4_K_M.gguf", "last")


def test_reading_cards_loads_no_native_library() -> None:
    code = "import sys, lookonce.cards; lookonce.cards.read_cards(); sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_home_folder_that_nobody_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", "~nosuchuser/x.toml")
    for ask in (user_file, read_cards):
        with pytest.raises(
            ModelFileError, match=r"LOOKONCE_MODELS is '~nosuchuser/x.toml' \(.*\): set LOOKONCE_MODELS"
        ):
            ask()
