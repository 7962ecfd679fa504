"""From hidden states to one vector: pure numpy, knows nothing of models.

Sources: mean, last, cls and max pooling as sentence-transformers' `Pooling` defines them; cutting as in Matryoshka
Representation Learning (Kusupati et al., 2022).
"""

from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lookonce.errors import InputError, NotFiniteError

Pooling = Literal["mean", "last", "cls", "max"]
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)

_DAMAGE: Final = "the model file may be damaged, check it with `lookonce models verify`"


def pool(states: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float32]:
    """Pool hidden states, (n, width) in prompt order, into one vector (width,): `cls` is the first, `last` the last."""
    if pooling == "mean":
        return np.asarray(states.mean(axis=0, dtype=np.float64), dtype=np.float32)
    if pooling == "max":
        return np.asarray(states.max(axis=0))
    return np.asarray(states[0] if pooling == "cls" else states[-1])


def cut(vectors: NDArray[np.float32], dimension: int | None) -> NDArray[np.float32]:
    """Keep the first `dimension` values of each vector, (..., width) -> (..., dimension)."""
    return np.asarray(vectors[..., :dimension])


def normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide each vector, (..., width), by its L2 norm; a zero vector stays as it is."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms == 0, 1.0, norms), dtype=np.float32)


def check_pooling(pooling: str) -> Pooling:
    """Give `pooling` back. Raises InputError where it is unknown."""
    for known in POOLINGS:
        if isinstance(pooling, str) and pooling == known:
            return known
    raise InputError(f"pooling is {pooling!r}: choose one of {', '.join(POOLINGS)}")


def check_finite(vectors: NDArray[np.float32], model_name: str) -> NDArray[np.float32]:
    """Give `vectors` back. Raises NotFiniteError for values that are not finite, as a damaged file gives."""
    if not np.isfinite(vectors).all():
        raise NotFiniteError(f"{model_name} gave values that are not finite: {_DAMAGE}")
    return vectors
