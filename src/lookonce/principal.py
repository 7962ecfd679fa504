"""A fitted principal component analysis as two arrays: applied with numpy, kept in a file without pickle."""

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lookonce.durable import write_durably
from lookonce.errors import InputError
from lookonce.item import kind_of


@dataclass(frozen=True, slots=True, eq=False)
class Principal:
    """`mean` (width,) and `components` (dimension, width), float32; whitening is part of the components."""

    mean: NDArray[np.float32]
    components: NDArray[np.float32]

    @classmethod
    def of(cls, pca: object, width: int) -> "Principal":
        """From a fitted scikit-learn PCA, or a file that `save` wrote. Raises InputError for another width."""
        if isinstance(pca, Principal):
            found = pca
        elif isinstance(pca, str | PathLike):
            found = cls.load(pca)
        else:
            found = cls._of_estimator(pca)
        if found.mean.shape != (width,) or found.components.shape[1:] != (width,) or not len(found.components):
            raise InputError(
                f"the PCA has a mean of shape {found.mean.shape} and components of {found.components.shape}, but the "
                f"model's vectors have {width} values: fit it anew on them"
            )
        if not (np.isfinite(found.mean).all() and np.isfinite(found.components).all()):
            raise InputError("the PCA holds values that are not finite: fit it anew")
        return found

    @classmethod
    def _of_estimator(cls, pca: object) -> "Principal":
        mean, components = getattr(pca, "mean_", None), getattr(pca, "components_", None)
        if mean is None or components is None:
            if hasattr(pca, "fit"):
                raise InputError(f"the {type(pca).__name__} is not fitted: fit it on this embedder's vectors first")
            raise InputError(f"pca is {kind_of(pca)}: give a fitted scikit-learn PCA or a saved one's file")
        try:
            mean, components = np.asarray(mean, dtype=np.float32), np.asarray(components, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError("the PCA's mean or components are no numbers: fit it anew") from error
        if getattr(pca, "whiten", False):
            # As scikit-learn divides: a variance of nearly nothing must not blow its component up.
            scale = np.sqrt(np.asarray(getattr(pca, "explained_variance_", 1.0), dtype=np.float64))
            components = components / np.maximum(scale, np.finfo(np.float64).eps).reshape(-1, 1)
        return cls(mean, components.astype(np.float32))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Principal":
        """Read what `save` wrote. Raises InputError for anything else."""
        damage = (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)
        try:
            data = Path(path).read_bytes()  # whole: numpy leaves a broken archive's file open
        except FileNotFoundError as error:
            raise InputError(f"the PCA {fspath(path)!r} does not exist: check the path") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the PCA {fspath(path)!r} cannot be read ({reason}): check the path") from error
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(arrays["mean"].astype(np.float32), arrays["components"].astype(np.float32))
        except damage as error:
            raise InputError(f"{fspath(path)!r} is no saved PCA: save one with save_pca") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write an `.npz` file with the two arrays, whole or not at all. Raises InputError where it cannot be."""
        data = io.BytesIO()
        np.savez(data, mean=self.mean, components=self.components)
        try:
            write_durably(Path(path), data.getvalue())
        except OSError as error:
            raise InputError(f"{fspath(path)!r} cannot be written: {error.strerror or error}") from error

    def digest(self) -> str:
        """SHA-256 over both arrays."""
        shape = json.dumps(self.components.shape).encode()
        return hashlib.sha256(shape + self.mean.tobytes() + self.components.tobytes()).hexdigest()

    @property
    def dimension(self) -> int:
        """Values in a vector that comes out."""
        return int(self.components.shape[0])

    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project vectors, (n, width) -> (n, dimension)."""
        return np.asarray((vectors - self.mean) @ self.components.T, dtype=np.float32)
