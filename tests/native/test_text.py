"""The text model and its context: however a prompt is cut, the logits are the same."""

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from look_maker import make_picture
from lookonce import images
from lookonce.embedding import RowSegment, TextSegment
from lookonce.errors import ClosedError, ContextError, InputError, NativeError
from lookonce.native.text import Context, ContextOptions, TextModel
from lookonce.native.vision import EncodedPicture, VisionTower

Pair = tuple[Path, Path]
Logits = NDArray[np.float32]
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}


@pytest.fixture(scope="module", params=["qwen3vl", "qwen2.5vl"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue("tiny_pair" if request.param == "qwen3vl" else "tiny_pair_25")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(pair: Pair) -> Iterator[TextModel]:
    with TextModel(pair[0]) as model:
        yield model


@pytest.fixture(scope="module")
def tower(pair: Pair, model: TextModel) -> Iterator[VisionTower]:
    with VisionTower(pair[1], model, threads=1) as tower:
        yield tower


def make_context(model: TextModel, n_ctx: int = 2048, **options: Any) -> Context:
    return Context(model, ContextOptions(n_ctx=n_ctx, threads=1, **{**EXACT, **options}))


def difference(one: Logits, other: Logits) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("cuts", [[60], [20, 40], [59, 1], [1] * 60, [7] * 8 + [4]])
def test_one_batch_many_batches_and_single_tokens_give_the_same_logits(model: TextModel, cuts: list[int]) -> None:
    tokens = np.random.default_rng(0).integers(0, 400, 60).tolist()
    with make_context(model) as whole, make_context(model) as cut:
        whole.decode_tokens(tokens, position=0)
        position = 0
        for length in cuts:
            cut.decode_tokens(tokens[position : position + length], position=position)
            position += length
        assert difference(cut.logits(), whole.logits()) < 1e-5


def test_all_outputs_are_the_last_ones_of_every_beginning(model: TextModel) -> None:
    tokens = [5, 6, 7, 8, 9]
    with make_context(model, n_outputs=5) as whole, make_context(model) as single:
        whole.decode_tokens(tokens, position=0, outputs="all")
        for index, token in enumerate(tokens):
            single.decode_tokens([token], position=index)
            assert difference(single.logits(), whole.logits(index)) < 1e-5


# --- rows, against libmtmd's own way from pixels to the cache


def decode_natively(
    context: Context, tower: VisionTower, pictures: list[NDArray[np.uint8]], texts: list[list[int]]
) -> Logits:
    """Texts and pictures in turn through mtmd_helper_decode_image_chunk, which knows nothing of ours."""
    position = llama.llama_pos(0)
    for number, text in enumerate(texts):
        if number:
            _decode_picture_natively(context, tower, pictures[number - 1], position)
        _decode_text_natively(context, text, position)
    row = llama.llama_get_logits_ith(context.handle, -1)
    return np.ctypeslib.as_array(row, shape=(512,)).copy()


def _decode_text_natively(context: Context, tokens: list[int], position: Any) -> None:
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, position.value + index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = index == len(tokens) - 1
    assert llama.llama_decode(context.handle, batch) == 0
    llama.llama_batch_free(batch)
    position.value += len(tokens)


def _decode_picture_natively(context: Context, tower: VisionTower, pixels: NDArray[np.uint8], position: Any) -> None:
    height, width, _ = pixels.shape
    bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    chunks = mtmd.mtmd_input_chunks_init()
    marker = mtmd.mtmd_default_marker()
    text = mtmd.mtmd_input_text(marker, len(marker), False, True)
    assert mtmd.mtmd_tokenize(tower.handle, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1) == 0
    for index in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, index)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            _decode_text_natively(context, tokens[: count.value], position)
            continue
        assert mtmd.mtmd_encode_chunk(tower.handle, chunk) == 0
        rows = mtmd.mtmd_get_output_embd(tower.handle)
        after = llama.llama_pos(0)
        status = mtmd.mtmd_helper_decode_image_chunk(
            *(tower.handle, context.handle, chunk, rows, position.value, 0, context.batch_size),
            *(ctypes.byref(after), mtmd.mtmd_helper_post_decode_callback(0), None),
        )
        assert status == 0
        position.value = after.value
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)


def decode_by_hand(context: Context, pictures: list[EncodedPicture], texts: list[list[int]]) -> Logits:
    """The same through decode_tokens and decode_rows, with the positions that the look keeps."""
    position = 0
    for number, text in enumerate(texts):
        if number:
            position = _decode_encoded(context, pictures[number - 1], position)
        context.decode_tokens(text, position=position)
        position += len(text)
    return context.logits()


def _decode_encoded(context: Context, picture: EncodedPicture, position: int) -> int:
    start = 0
    for segment in picture.segments:
        if isinstance(segment, TextSegment):
            context.decode_tokens(segment.tokens, position=position)
            position += len(segment.tokens)
            continue
        assert isinstance(segment, RowSegment)
        end = start + segment.n_rows
        for first in range(start, end, context.batch_size):
            part = slice(first, min(first + context.batch_size, end))
            context.decode_rows(picture.rows[part], picture.positions[part] + position, causal=segment.causal)
        start, position = end, position + segment.n_positions
    return position


@pytest.mark.parametrize(
    "sizes",
    [[(96, 64)], [(64, 160)], [(832, 672)], [(64, 96), (128, 64)], [(64, 64), (96, 224), (160, 96)]],
    ids=["one", "wide", "split over two batches", "two", "three"],
)
def test_rows_give_the_logits_of_libmtmds_own_decoding(
    model: TextModel, tower: VisionTower, sizes: list[tuple[int, int]]
) -> None:
    rule = images.QWEN3_VL if "3VL" in model.path.name else images.QWEN2_VL
    fitted = [
        images.fit(images.open_picture(make_picture(seed, *size)), rule.limited(1, None)).pixels
        for seed, size in enumerate(sizes)
    ]
    texts = [[10 + number, 20, 30] for number in range(len(sizes) + 1)]
    with make_context(model, flash_attention=None) as ours, make_context(model, flash_attention=None) as theirs:
        encoded = [tower.encode(pixels) for pixels in fitted]
        if len(sizes) == 1 and max(sizes[0]) > 800:
            assert len(encoded[0].rows) > ours.batch_size
        expected = decode_natively(theirs, tower, fitted, texts)
        assert difference(decode_by_hand(ours, encoded, texts), expected) < 1e-6
        moved = [EncodedPicture(one.rows, one.positions[:, [0, 2, 1]], one.segments) for one in encoded]
        ours.forget(0)
        assert difference(decode_by_hand(ours, moved, texts), expected) > 1e-4


# --- what native code would abort at


def test_wrong_tokens_positions_sequences_and_rows_are_refused(model: TextModel) -> None:
    width = model.input_width
    rows, places = np.zeros((2, width), np.float32), np.zeros((2, 3), np.int32)
    with make_context(model, n_ctx=256, n_sequences=2) as context:
        for tokens in ([-1], [512], [2**40], [1, 512], [1.5]):
            with pytest.raises(InputError, match="token ids"):
                context.decode_tokens(tokens, position=0)  # type: ignore[arg-type]
        for tokens in ([], [1] * 257):
            with pytest.raises(InputError, match="a batch of"):
                context.decode_tokens(tokens, position=0)
        for position in (-1, 2**31 - 1):
            with pytest.raises(InputError, match="positions go"):
                context.decode_tokens([1, 2], position=position)
        for sequence in (-1, 2, 300):
            with pytest.raises(InputError, match="sequences go"):
                context.decode_tokens([1], position=0, sequence=sequence)
            with pytest.raises(InputError, match="sequences go"):
                context.forget(sequence)
            with pytest.raises(InputError, match="sequences go"):
                context.copy(0, sequence)
        wrong_rows = [
            (rows[:, :-1], places),
            (rows, places[:1]),
            (rows, places[:, :2]),
            (rows[0], places),
            (rows, places - 1),
            (rows, places.astype(np.float32)),
        ]
        for some_rows, some_places in wrong_rows:
            with pytest.raises(InputError):
                context.decode_rows(some_rows, some_places)
        with pytest.raises(InputError, match="keeps 2 at a time"):
            context.decode_tokens([1, 2, 3], position=0, outputs="all")
        with pytest.raises(InputError):
            context.decode_many(np.array([1, 2]), np.array([0]), np.array([0, 0]), "last")
        context.decode_tokens([1, 2], position=0)
        assert np.isfinite(context.logits()).all()


def test_logits_that_were_not_kept_are_refused(model: TextModel) -> None:
    with make_context(model, n_ctx=256) as context:
        with pytest.raises(NativeError, match="no logits"):
            context.logits()
        context.decode_tokens([1, 2], position=0, outputs="none")
        with pytest.raises(NativeError, match="no logits"):
            context.logits()


def test_a_full_context_is_a_context_error(model: TextModel) -> None:
    with make_context(model, n_ctx=256) as context:
        context.decode_tokens([1] * 256, position=0)
        with pytest.raises(ContextError, match="do not fit the context of 256"):
            context.decode_tokens([1], position=256)


@pytest.mark.parametrize(
    "options",
    [
        *[{"n_ctx": 0}, {"n_ctx": 1.5}, {"threads": 0}, {"threads": True}, {"threads": 513}, {"threads": 2**40}],
        *[{"kv_type": "f8"}, {"kv_type": ["f16"]}, {"kv_type": "q8_0", "flash_attention": False}],
        {"n_sequences": 0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ContextOptions(**{"n_ctx": 256, "threads": 1, **options})


def test_a_context_longer_than_the_model_was_trained_for_is_refused(model: TextModel) -> None:
    for n_ctx in (model.context_length + 1, 2**40):
        with pytest.raises(ContextError, match=f"n_ctx is {n_ctx}, but .* was trained for {model.context_length}"):
            make_context(model, n_ctx=n_ctx)


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
def test_every_kv_type_works(model: TextModel, kv_type: str) -> None:
    with make_context(model) as exact, make_context(model, kv_type=kv_type, flash_attention=None) as context:
        for one in (exact, context):
            one.decode_tokens([1, 2, 3, 4], position=0)
        assert difference(context.logits(), exact.logits()) < 0.05


# --- tokens


def test_special_tokens_are_read_unless_they_are_not_to_be(model: TextModel) -> None:
    (end,) = model.tokenize("<|im_end|>")
    assert model.piece(end) == b""
    assert model.piece(end, special=True) == b"<|im_end|>"
    assert model.ends_generation(end)
    apart = model.tokenize("<|im_end|>", special=False)
    assert len(apart) > 1
    assert b"".join(map(model.piece, apart)) == b"<|im_end|>"


@pytest.mark.parametrize("text", ["", "plain", "é日本\0\n\t ", "\ud800", "x" * 5000])
def test_tokens_spell_their_text(model: TextModel, text: str) -> None:
    spelt = b"".join(map(model.piece, model.tokenize(text)))
    assert spelt == text.encode("utf-8", errors="replace")


# --- the end of things


def test_closed_models_and_contexts_say_so_and_close_twice(pair: Pair) -> None:
    model = TextModel(pair[0])
    context, other = make_context(model, n_ctx=256), make_context(model, n_ctx=256)
    context.decode_tokens([1], position=0)
    context.close()
    context.close()
    for use in (lambda: context.decode_tokens([1], position=1), context.logits, lambda: context.forget(0)):
        with pytest.raises(ClosedError, match=r"the context of .* is closed"):
            use()
    model.close()
    model.close()
    with pytest.raises(ClosedError, match="the context of"):
        other.decode_tokens([1], position=0)
    for use in (lambda: model.tokenize("a"), lambda: model.piece(1), lambda: model.ends_generation(1)):
        with pytest.raises(ClosedError, match=r"the text model .* is closed"):
            use()
    with pytest.raises(ClosedError, match="the text model"):
        make_context(model, n_ctx=256)
    other.close()


def test_what_is_forgotten_gives_its_memory_back(model: TextModel) -> None:
    def use_one() -> None:
        context = make_context(model, n_ctx=8192)  # 34 MB of keys and values
        context.decode_tokens([1], position=0)

    use_one()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(12):
        use_one()
    assert psutil.Process().memory_info().rss - before < 50e6
