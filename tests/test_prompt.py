"""Aliases, chat templates and runs: everything between a question and what is evaluated."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from look_maker import END, VISION_END, VISION_START, make_look, written
from lookonce.embedding import ImageEmbedding, RowSegment
from lookonce.errors import ContextError, PromptError
from lookonce.prompt import (
    ChatTemplate,
    Message,
    Part,
    Prompt,
    RowRun,
    TokenRun,
    Verbatim,
    assemble,
    count,
    name_looks,
    place_looks,
)
from lookonce.synthetic.template import CHAT_TEMPLATES

A, B, C = (make_look(seed) for seed in range(3))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ask(text: str, *looks: ImageEmbedding) -> tuple[Part, ...]:
    return place_looks(text, name_looks(looks, {}), {})


def user(*parts: Part) -> Message:
    return Message("user", parts)


def spell(text: str, /, *, special: bool = True) -> list[int]:
    """A tokenizer for the tests: one token a character, beyond 10,000 where special tokens are not read."""
    return [ord(character) + (0 if special else 10_000) for character in text]


# --- aliases


def test_pictures_without_an_alias_in_the_text_come_before_it_in_order() -> None:
    assert ask("What?", A, B) == (A, B, "What?")


def test_an_automatic_alias_puts_the_picture_where_it_stands() -> None:
    assert ask("Is <image_2> like <image_1>?", A, B) == ("Is ", B, " like ", A, "?")


def test_an_automatic_alias_that_stands_nowhere_leaves_its_picture_before_the_text() -> None:
    assert ask("Is it like <image_1>?", A, B) == (B, "Is it like ", A, "?")


def test_a_given_alias_puts_the_picture_where_it_stands() -> None:
    cat = A.with_alias("<cat>")
    assert ask("The <cat> and this", cat, B) == (B, "The ", cat, " and this")


def test_an_alias_that_stands_twice_gives_the_picture_twice() -> None:
    assert ask("<image_1><image_1>", A) == (A, A)


def test_an_alias_that_no_picture_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(PromptError, match=r"names <image_3>, but .*: <image_1>, <image_2>"):
        ask("<image_1> <image_3>", A, B)
    with pytest.raises(PromptError, match="no picture was given"):
        ask("<image_1>")


def test_a_chosen_alias_that_does_not_stand_in_the_text_is_refused() -> None:
    with pytest.raises(PromptError, match="'<cat>' does not stand in the prompt"):
        ask("What?", A.with_alias("<cat>"))


def test_a_chosen_alias_of_the_automatic_form_may_stand_nowhere() -> None:
    look = A.with_alias("<image_7>")
    assert ask("What?", look) == (look, "What?")


def test_two_pictures_of_one_alias_are_refused() -> None:
    with pytest.raises(PromptError, match="two pictures have the alias '<cat>'"):
        name_looks([A.with_alias("<cat>"), B.with_alias("<cat>")], {})
    with pytest.raises(PromptError, match="two pictures have the alias '<image_2>'"):
        name_looks([A.with_alias("<image_2>"), B], {})
    with pytest.raises(PromptError, match="two pictures have the alias '<cat>'"):
        name_looks([B.with_alias("<cat>")], {"<cat>": A})


def test_of_two_aliases_the_longer_is_read_where_both_could_stand() -> None:
    short, long = A.with_alias("cat"), B.with_alias("cats")
    assert ask("a cat, two cats", short, long) == ("a ", short, ", two ", long)
    assert ask("<image_1>, <image_11>", A, B.with_alias("<image_11>"))[2].alias == "<image_11>"  # type: ignore[union-attr]


def test_an_alias_is_a_text_and_no_pattern() -> None:
    look = A.with_alias("[a-z]+(.*)$")
    assert ask("abc [a-z]+(.*)$", look) == ("abc ", look)


def test_numbers_go_on_in_later_turns_and_earlier_pictures_keep_their_aliases() -> None:
    first = name_looks([A, B], {})
    second = name_looks([C], first)
    assert list(second) == ["<image_3>"]
    assert place_looks("<image_1> or <image_3>", second, first) == (A, " or ", C)
    assert place_looks("Well?", {}, first) == ("Well?",)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_question_needs_a_picture(text: str) -> None:
    with pytest.raises(PromptError, match="prompt is empty"):
        ask(text)
    assert ask(text, A)[0] is A


def test_a_question_that_is_no_text_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt is a int"):
        place_looks(5, {}, {})  # type: ignore[arg-type]


# --- templates

# What transformers 5.23's render_jinja_template gives for this conversation and these templates.
CONVERSATION = [
    Message("system", ("Be brief.",)),
    user(A, "What is ", "this?"),
    Message("assistant", ("A cat.",)),
    user("And ", B, " or ", C, "?\n"),
]
MARK = "<|vision_start|><|image_pad|><|vision_end|>"
REFERENCE = (
    f"<|im_start|>user\n{MARK}What is this?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    f"<|im_start|>user\nAnd {MARK} or {MARK}?\n<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("family", "default_system"),
    [("qwen3vl", ""), ("qwen2.5vl", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")],
)
def test_the_official_templates_are_rendered_as_transformers_renders_them(family: str, default_system: str) -> None:
    template = ChatTemplate(CHAT_TEMPLATES[family])
    with_system = "<|im_start|>system\nBe brief.<|im_end|>\n" + REFERENCE
    rendered = template.render(CONVERSATION)
    assert written(rendered) == with_system
    assert [part for part in rendered if not isinstance(part, str)] == [A, B, C]
    assert written(template.render(CONVERSATION[1:])) == default_system + REFERENCE


PARTS = st.one_of(st.sampled_from([A, B, C]), st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1))
TURNS = st.lists(st.tuples(st.lists(PARTS, min_size=1, max_size=4), st.text(max_size=8)), min_size=1, max_size=3)


@pytest.mark.parametrize("family", list(CHAT_TEMPLATES))
@settings(max_examples=40, deadline=None)
@given(turns=TURNS, system=st.none() | st.text(max_size=8))
def test_any_conversation_is_what_jinja_makes_of_its_content_parts(family: str, turns: Any, system: str | None) -> None:
    messages = [] if system is None else [Message("system", (system,))]
    for asked, answered in turns:
        messages += [user(*asked), Message("assistant", (answered,))]
    contents = [
        {
            "role": message.role,
            "content": [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image"} for one in parts]
            if (parts := message.parts) and message.role == "user"
            else message.parts[0],
        }
        for message in messages
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(CHAT_TEMPLATES[family]).render(messages=contents, add_generation_prompt=True)
    rendered = ChatTemplate(CHAT_TEMPLATES[family]).render(messages)
    assert written(rendered) == expected
    pictures = [part for message in messages for part in message.parts if not isinstance(part, str)]
    assert [part for part in rendered if not isinstance(part, str)] == pictures


def test_a_template_that_knows_only_texts_places_pictures_too() -> None:
    rendered = ChatTemplate(CHATML).render([user("a ", A, " b"), Message("assistant", ("c",)), user(B)])
    assert rendered == (
        "<|im_start|>user\na ",
        A,
        f" b{END}c<|im_end|>\n<|im_start|>user\n",
        B,
        END,
    )


def test_a_template_that_knows_only_texts_refuses_a_text_with_its_own_mark() -> None:
    with pytest.raises(PromptError, match="which only a picture may place"):
        ChatTemplate(CHATML).render([user("\ue002picture\ue003", A)])


def test_a_mark_that_is_no_tag_is_refused_in_a_text_too() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}[IMG]{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    assert template.render([user("a", A)]) == ("a", A)
    with pytest.raises(PromptError, match=r"holds '\[IMG\]'"):
        template.render([user("[IMG]", A)])


@pytest.mark.parametrize("mark", ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
@pytest.mark.parametrize("role", ["system", "user"])
def test_a_text_of_the_users_with_a_part_of_the_pictures_mark_is_refused(role: Any, mark: str) -> None:
    template = ChatTemplate(CHAT_TEMPLATES["qwen3vl"])
    with pytest.raises(PromptError, match="which only a picture may place"):
        template.render([Message(role, (f"a {mark}",)), user("b")])


@pytest.mark.parametrize("source", [CHAT_TEMPLATES["qwen3vl"], CHATML], ids=["qwen3vl", "chatml"])
def test_a_mark_that_the_model_wrote_itself_is_given_back_letter_by_letter(source: str) -> None:
    answer = "x<|image_pad|>y\ue002picture\ue003<|vision_start|>"
    rendered = ChatTemplate(source).render([user(A, "a"), Message("assistant", (answer,)), user("b")])
    assert [part for part in rendered if not isinstance(part, str)] == [A]
    assert answer in "".join(part for part in rendered if isinstance(part, str))
    tokens = [
        token
        for run in assemble(rendered, spell, bos=None, batch_size=512).runs
        if isinstance(run, TokenRun)
        for token in run.tokens
    ]
    marked = "".join(chr(token - 10_000) for token in tokens if token >= 10_000 and token not in (0xE002, 0xE003))
    assert ("<|image_pad|><|vision_start|>" in marked) == (source is not CHATML)


def test_a_template_that_raises_is_a_prompt_error_with_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('only one turn, please') }}")
    with pytest.raises(PromptError, match="only one turn, please"):
        template.render([user("a")])


@pytest.mark.parametrize(
    "expression",
    ["1 / 0", "range(10 ** 7) | list", "messages[5].role", "'a' + 1", "{}['x'].y", "'%d' % 'a'", "nothing.here"],
)
def test_a_template_that_fails_is_a_prompt_error(expression: str) -> None:
    with pytest.raises(PromptError, match="refuses this conversation"):
        ChatTemplate("{{ " + expression + " }}").render([user("a")])


@pytest.mark.parametrize(
    "expression",
    [
        "messages.__class__.__mro__",
        "''.__class__.__base__.__subclasses__()",
        "raise_exception.__globals__['jinja2']",
        "strftime_now.__globals__.keys()",
        "messages.append(1)",
    ],
)
def test_the_sandbox_keeps_a_template_from_python_itself(expression: str) -> None:
    with pytest.raises(PromptError, match="refuses this conversation"):
        ChatTemplate("{{ " + expression + " }}").render([user("a")])


@pytest.mark.parametrize("source", [None, "{% for %}", "{{ ", "{% for a in b %}" * 30 + "{% endfor %}" * 30])
def test_a_template_that_is_missing_or_no_jinja_is_refused(source: str | None) -> None:
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(source)


def test_a_template_is_told_what_transformers_tells_it() -> None:
    template = ChatTemplate(
        "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ bos_token }}{{ eos_token }} "
        "{{ {'b': 'é<', 'a': 1} | tojson(sort_keys=true, separators=(',', ':')) }}",
        bos="<s>",
        eos="</s>",
    )
    assert template.render([user("a")]) == ('True True True <s></s> {"a":1,"b":"é<"}',)


def test_a_template_that_drops_a_picture_is_refused() -> None:
    with pytest.raises(PromptError, match="placed 0 of 1 pictures"):
        ChatTemplate("{{ messages[0].role }}").render([user(A, "a")])


# --- runs


def make_prompt(*parts: Part, bos: int | None = None, batch_size: int = 512) -> Prompt:
    return assemble(parts, spell, bos=bos, batch_size=batch_size)


def tokens_of(prompt: Prompt) -> list[int]:
    return [token for run in prompt.runs if isinstance(run, TokenRun) for token in run.tokens]


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.integers(1, 9))
def test_assembling_texts_loses_nothing(texts: list[str], batch_size: int) -> None:
    whole = "".join(texts)
    if not whole:
        with pytest.raises(PromptError, match="prompt is empty"):
            make_prompt(*texts, batch_size=batch_size)
        return
    prompt = make_prompt(*texts, batch_size=batch_size)
    assert prompt.runs == (TokenRun(tuple(map(ord, whole))),)
    assert (prompt.n_tokens, prompt.n_rows) == (len(whole), 0)
    assert list(prompt.units()) == list(map(ord, whole))
    assert count(texts, spell) == (len(whole), 0)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_a_look_is_cut_into_runs_that_hold_every_row_once(rows: int, columns: int, batch_size: int) -> None:
    look = make_look(1, (rows, columns))
    prompt = make_prompt("ab", look, "c", batch_size=batch_size)
    runs = [run for run in prompt.runs if isinstance(run, RowRun)]
    assert tokens_of(prompt) == [*spell("ab"), VISION_START, VISION_END, *spell("c")]
    assert np.array_equal(np.concatenate([run.rows for run in runs]), look.rows.astype(np.float32))
    assert np.array_equal(np.concatenate([run.positions for run in runs]), look.positions)
    assert [run.advance for run in runs] == [0] * (len(runs) - 1) + [max(rows, columns)]
    assert all(len(run.rows) <= batch_size for run in runs)
    assert all(before.stop == after.start for before, after in pairwise(runs))
    assert (prompt.n_tokens, prompt.n_rows) == (5, rows * columns)
    assert count(["ab", look, "c"], spell) == (3, rows * columns)


def test_the_beginning_token_is_put_before_everything_once() -> None:
    assert tokens_of(make_prompt("ab", bos=7)) == [7, *spell("ab")]
    assert tokens_of(make_prompt("\x07ab", bos=7)) == [7, *spell("ab")]
    bare = make_look(framed=False)
    assert [type(run) for run in make_prompt(bare, "a", bos=7).runs] == [TokenRun, RowRun, TokenRun]
    assert tokens_of(make_prompt(bare, "a", bos=7)) == [7, *spell("a")]
    assert tokens_of(make_prompt(A, bos=7)) == [7, VISION_START, VISION_END]


def test_rows_that_must_be_evaluated_together_are_refused_where_no_batch_holds_them() -> None:
    look = make_look(1, (3, 3), framed=False)
    object.__setattr__(look, "segments", (RowSegment(9, 3, causal=False),))
    assert make_prompt(look, batch_size=9).n_rows == 9
    with pytest.raises(ContextError, match="9 rows that must be evaluated together"):
        make_prompt(look, batch_size=8)


def units(prompt: Prompt) -> Sequence[object]:
    return list(prompt.units())


def test_units_and_digests_tell_looks_apart_by_their_rows_whatever_their_key_says() -> None:
    forged = make_look(5)
    object.__setattr__(forged, "key", A.key)
    moved = make_look(0)
    object.__setattr__(moved, "positions", moved.positions[::-1].copy())
    for name in (units, Prompt.digest):
        assert name(make_prompt(A)) == name(make_prompt(make_look(0)))
        for other in (B, forged, moved):
            assert name(make_prompt(A)) != name(make_prompt(other))


def test_prompts_have_one_digest_where_their_runs_are_the_same() -> None:
    parts: list[tuple[Part, ...]] = [("a",), ("b",), ("ab",), ("a" * 40,), (A,), (A, "a"), ("a", A), (A, A), (A, B)]
    for one in parts:
        for other in parts:
            assert (make_prompt(*one).digest() == make_prompt(*other).digest()) == (one is other)
        assert make_prompt(*one).digest() == make_prompt(*one).digest()
    assert Prompt((TokenRun((1,)), TokenRun((2,)))).digest() != Prompt((TokenRun((1, 2)),)).digest()


def test_a_verbatim_text_is_a_text() -> None:
    assert Verbatim("a") == "a"
    assert tokens_of(make_prompt("a", Verbatim("b"))) == [97, 10_098]
