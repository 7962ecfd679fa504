"""libllama's quantizer: a smaller file, or an error with its reason."""

from pathlib import Path

import pytest

from lookonce import gguf_file
from lookonce.errors import NativeError
from lookonce.native.quantizer import quantize

Pair = tuple[Path, Path]


def test_a_text_model_becomes_smaller(tiny_pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    quantize(tiny_pair[0], target)
    assert target.stat().st_size < tiny_pair[0].stat().st_size / 4
    assert "Q4_K" in {info.type for info in gguf_file.read(target).tensors.values()}


def test_what_cannot_be_quantized_is_an_error_with_the_native_reason(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match=r"none\.gguf could not be quantized .*failed to open"):
        quantize(tmp_path / "none.gguf", tmp_path / "small.gguf")
