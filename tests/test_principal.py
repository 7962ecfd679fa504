"""A fitted PCA gives what scikit-learn's own `transform` gives, and survives a file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lookonce.errors import InputError
from lookonce.principal import Principal

WIDTH = 6
VECTORS = np.random.default_rng(0).standard_normal((40, WIDTH)).astype(np.float32) * [5, 4, 3, 2, 1, 1e-9]


def fit(dimension: int, *, whiten: bool = False) -> Any:
    """What a fitted scikit-learn PCA holds, by the singular value decomposition that it is made with."""
    mean = VECTORS.mean(axis=0)
    _, scales, components = np.linalg.svd(VECTORS - mean, full_matrices=False)
    variance = scales**2 / (len(VECTORS) - 1)
    return SimpleNamespace(
        mean_=mean, components_=components[:dimension], explained_variance_=variance[:dimension], whiten=whiten
    )


def test_a_fitted_pca_projects_on_its_components() -> None:
    fitted = fit(3)
    made = Principal.of(fitted, WIDTH)
    assert made.dimension == 3
    projected = made.apply(VECTORS.astype(np.float32))
    assert projected.dtype == np.float32
    assert projected == pytest.approx((VECTORS - fitted.mean_) @ fitted.components_.T, abs=1e-5)


def test_whitening_gives_every_component_the_same_variance() -> None:
    projected = Principal.of(fit(4, whiten=True), WIDTH).apply(VECTORS.astype(np.float32))
    assert projected.var(axis=0, ddof=1) == pytest.approx(np.ones(4), rel=1e-4)


def test_it_is_what_scikit_learn_gives() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="install it with: pip install 'lookonce[pca]'")
    for whiten in (False, True):
        fitted = decomposition.PCA(4, whiten=whiten).fit(VECTORS)
        projected = Principal.of(fitted, WIDTH).apply(VECTORS.astype(np.float32))
        assert projected == pytest.approx(fitted.transform(VECTORS), abs=1e-4)


def test_a_saved_pca_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    made = Principal.of(fit(3, whiten=True), WIDTH)
    path = tmp_path / "pca.npz"
    made.save(path)
    for source in (path, str(path)):
        loaded = Principal.of(source, WIDTH)
        assert np.array_equal(loaded.mean, made.mean)
        assert np.array_equal(loaded.components, made.components)
    assert Principal.of(made, WIDTH) is made


def test_a_pca_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Principal.of(fit(3), WIDTH).save(tmp_path / "missing" / "pca.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_pca_that_was_not_fitted_is_refused_as_such() -> None:
    with pytest.raises(InputError, match=r"^the SimpleNamespace is not fitted: fit it on this embedder's vec"):
        Principal.of(SimpleNamespace(fit=None), WIDTH)


@pytest.mark.parametrize("pca", [object(), 3, {"mean": 1}, SimpleNamespace(n_components=3)])
def test_what_is_no_fitted_pca_is_refused(pca: object) -> None:
    with pytest.raises(InputError, match=r"^pca is an? \w+: give a fitted scikit-learn PCA or a saved one's file$"):
        Principal.of(pca, WIDTH)


def test_a_pca_of_another_width_is_refused_with_both() -> None:
    with pytest.raises(InputError, match=r"a mean of shape \(6,\) .* vectors have 7 values: fit it anew"):
        Principal.of(fit(3), WIDTH + 1)
    for mean, components in [(np.zeros(()), np.zeros((2, 6))), (np.zeros(6), np.zeros(6))]:
        with pytest.raises(InputError, match="fit it anew"):
            Principal.of(SimpleNamespace(mean_=mean, components_=components), WIDTH)


def test_a_pca_with_values_that_are_not_finite_is_refused() -> None:
    fitted = fit(3)
    fitted.components_[1, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        Principal.of(fitted, WIDTH)


def broken_files(folder: Path) -> list[Path]:
    good = folder / "good.npz"
    Principal.of(fit(3), WIDTH).save(good)
    data = good.read_bytes()
    files = {
        "empty.npz": b"",
        "text.npz": b"not an archive",
        "cut.npz": data[: len(data) // 2],
        "damaged.npz": data.replace(b"\x00\x00", b"\x07\x07", 40),
        "pickle.npz": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    np.save(folder / "plain.npy", VECTORS)
    np.savez(folder / "other.npz", mean=VECTORS)
    np.savez(folder / "words.npz", mean=np.array(["a"]), components=np.array([["b"]]))
    return [folder / name for name in (*files, "plain.npy", "other.npz", "words.npz")]


def test_a_file_that_holds_no_pca_is_refused(tmp_path: Path) -> None:
    for path in broken_files(tmp_path):
        with pytest.raises(InputError, match=r"^'.*' is no saved PCA: save one with save_pca$"):
            Principal.of(path, WIDTH)
    for path, message in ((tmp_path / "missing", "does not exist: check the path"), (tmp_path, "cannot be read")):
        with pytest.raises(InputError, match=rf"^the PCA '.*' {message}"):
            Principal.of(path, WIDTH)
    narrow = tmp_path / "narrow.npz"
    Principal.of(fit(3), WIDTH).save(narrow)
    with pytest.raises(InputError, match=r"but the model's vectors have 8 values: fit it anew on them$"):
        Principal.of(narrow, 8)
