"""The package's face: its names, and that importing it costs nothing."""

import statistics
import subprocess
import sys

import lookonce


def test_importing_takes_under_a_tenth_of_a_second_and_loads_neither_llama_cpp_nor_numpy() -> None:
    times_s, modules = [], ""
    for _ in range(5):
        command = [sys.executable, "-X", "importtime", "-c", "import lookonce"]
        modules = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        last = modules.splitlines()[-1]
        assert last.split("|")[-1].strip() == "lookonce"
        times_s.append(int(last.split("|")[1]) / 1e6)
    assert statistics.median(times_s) < 0.1
    names = {line.split("|")[-1].strip().partition(".")[0] for line in modules.splitlines()}
    assert not names & {"llama_cpp", "numpy", "PIL", "jinja2"}


def test_the_public_names_are_these() -> None:
    assert sorted(lookonce.__all__) == sorted(
        [
            "Chat",
            "ClosedError",
            "ContextError",
            "DeviceError",
            "DownloadError",
            "Embedder",
            "ImageEmbedding",
            "InputError",
            "LookonceError",
            "MismatchError",
            "Model",
            "ModelFileError",
            "NativeError",
            "NotFiniteError",
            "PictureError",
            "PromptError",
            "Reply",
            "ReplyStream",
            "ReplyStreams",
            "Sampling",
            "SavedLookError",
            "Store",
            "StoreError",
            "__version__",
            "extract",
            "load",
        ]
    )


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in lookonce.__all__:
        assert getattr(lookonce, name) is not None
    assert set(lookonce.__all__) <= set(dir(lookonce))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(lookonce, "nothing")
