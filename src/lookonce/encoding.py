"""The options of `Embedder.encode`, by the names that sentence-transformers gives them. Knows nothing of models."""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from lookonce.errors import InputError


class ArrayOptions(TypedDict, total=False):
    """What `Embedder.encode` takes beside the sentences, whatever form the vectors have."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int
    show_progress_bar: bool | None
    output_value: str
    precision: str
    convert_to_numpy: bool
    device: object
    normalize_embeddings: bool | None
    truncate_dim: int | None


class EncodeOptions(ArrayOptions, total=False):
    """The same with the form."""

    convert_to_tensor: bool


@dataclass(frozen=True, slots=True)
class Encoding:
    """The options of one call. Raises InputError for what sentence-transformers can do and an embedder cannot.

    Source: sentence-transformers, `SentenceTransformer.encode`.
    """

    prompt_name: str | None = None
    prompt: str | None = None
    batch_size: int = 256
    show_progress_bar: bool | None = None
    output_value: str = "sentence_embedding"
    precision: str = "float32"
    convert_to_numpy: bool = True
    convert_to_tensor: bool = False
    device: object = None
    normalize_embeddings: bool | None = None
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_name is not None:
            raise InputError(f"prompt_name is {self.prompt_name!r}: no prompt has a name here, give its text as prompt")
        if self.output_value != "sentence_embedding":
            raise InputError(f"output_value is {self.output_value!r}: leave it out, or give sentence_embedding")
        if self.precision != "float32":
            raise InputError(f"precision is {self.precision!r}: leave it out, or give float32")
        if self.normalize_embeddings is not None:
            check_flag("normalize_embeddings", self.normalize_embeddings)
        check_flag("convert_to_tensor", self.convert_to_tensor)
        check_flag("convert_to_numpy", self.convert_to_numpy)
        if not (self.convert_to_numpy or self.convert_to_tensor):
            raise InputError("convert_to_numpy is False: there are arrays, or one tensor with convert_to_tensor=True")
        if self.convert_to_tensor and importlib.util.find_spec("torch") is None:
            raise InputError("convert_to_tensor needs torch, which is not installed: install it, or take the arrays")

    def check_device(self, own: Collection[str]) -> None:
        """Refuse another device than the model's, which has several names. Raises InputError."""
        if self.device is not None and str(self.device) not in own:
            raise InputError(
                f"device is {str(self.device)!r}, but the model is on {max(own)}: leave it out, or give lookonce.load "
                "the device"
            )

    def converted(self, vectors: Any) -> Any:
        """Vectors in the form that is wanted, an array or a tensor."""
        if not self.convert_to_tensor:
            return vectors
        import torch

        return torch.from_numpy(vectors)


def check_flag(name: str, value: object) -> bool:
    """Give True or False back. Raises InputError for anything else."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: give True or False")
    return value
