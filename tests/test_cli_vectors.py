import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lookonce
from lookonce import cli, doctor, images, model
from lookonce.embedder import Embedder

FAST = ("--threads", "1", "--n-ctx", "512")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with two photos, a store of its own beside it, and the model in the environment."""
    for name in ("LOOKONCE_MMPROJ", "LOOKONCE_MODELS_DIR", "LOOKONCE_STORE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOOKONCE_MODEL", str(tiny_pair[0]))
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, seed in (("cat.png", 7), ("dog.png", 8)):
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run what must be refused: status 2, one line on stderr, nothing printed and nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    status, out, err = run_here(capsys, *arguments, *FAST)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("lookonce: ")
    assert "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


def embed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, object]]:
    """The JSON lines of a run that goes well."""
    status, out, err = run_here(capsys, "embed", *arguments, *FAST)
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def vectors_of(lines: list[dict[str, object]]) -> np.ndarray:
    return np.array([line["vector"] for line in lines], dtype=np.float32)


def write_lines(name: str, *items: object) -> None:
    Path(name).write_text("".join(json.dumps(item) + "\n" for item in items))


ITEMS = (
    {"id": "first", "text": "a cat"},
    {"text": "a cat and a dog", "images": ["cat.png", "dog.png"]},
    {"id": 3, "image": "dog.png", "instruction": "Find the dog."},
    {"text": "what a long text this is, longer than the others"},
)


def test_texts_come_first_and_pictures_after_and_all_equal_the_librarys_vectors(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path]
) -> None:
    lines = embed(capsys, "-i", "cat.png", "a cat", "a dog", "-i", "dog.png")
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    with lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False) as loaded:
        expected = Embedder(loaded).embed_batch(["a cat", "a dog", {"image": "cat.png"}, {"image": "dog.png"}])
    assert np.array_equal(vectors_of(lines), expected)


def test_json_lines_keep_their_order_and_ids_whatever_their_destination(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path]
) -> None:
    write_lines("in.jsonl", *ITEMS)
    lines = embed(capsys, "--input", "in.jsonl")
    assert [(line.get("id"), line.get("index")) for line in lines] == [
        ("first", None),
        (None, 1),
        (3, None),
        (None, 3),
    ]
    for output in ("v.npy", "v.jsonl"):
        status, out, err = run_here(capsys, "embed", "--input", "in.jsonl", "-o", output, *FAST)
        assert (status, out, err) == (0, f"{output}: 4 vectors of 256 values\n", "")
    saved = np.load("v.npy")
    assert (saved.dtype, saved.shape) == (np.float32, (4, 256))
    assert np.array_equal(saved, vectors_of(lines))
    assert [json.loads(line) for line in Path("v.jsonl").read_text().splitlines()] == lines
    with lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False) as loaded:
        items = [{key: value for key, value in item.items() if key != "id"} for item in ITEMS]
        assert np.array_equal(saved, Embedder(loaded).embed_batch(items))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--pooling", "mean"), {"pooling": "mean"}),
        (("--layer", "-2"), {"layer": -2}),
        (("--pooling", "max", "--tokens", "image"), {"pooling": "max", "tokens": "image"}),
        (("--dimension", "5"), {"dimension": 5}),
        (("--no-normalize",), {"normalize": False}),
        (("--instruction", "Find it."), {"instruction": "Find it."}),
        (("--prompt", "plain"), {"prompt": "plain"}),
        (("--max-pixels", "1024", "--min-pixels", "1024"), {"max_pixels": 1024, "min_pixels": 1024}),
        (("--pca", "pca.npz"), {"pca": "pca.npz"}),
    ],
)
def test_each_option_reaches_the_embedder(
    capsys: pytest.CaptureFixture[str],
    tiny_pair: tuple[Path, Path],
    arguments: tuple[str, ...],
    options: dict[str, object],
) -> None:
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(256, 4)))[0].T
    np.savez("pca.npz", mean=np.zeros(256, dtype=np.float32), components=axes.astype(np.float32))
    plain, found = (vectors_of(embed(capsys, "-i", "cat.png", *given)) for given in ((), arguments))
    with lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False) as loaded:
        expected = Embedder(loaded, **options).embed_batch([{"image": "cat.png"}])  # type: ignore[arg-type]
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, plain)


def test_a_text_beyond_the_context_is_cut_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert "512" in refused(capsys, "embed", "word " * 2000)
    status, out, err = run_here(capsys, "embed", "word " * 2000, "--truncate", *FAST)
    assert (status, len(json.loads(out)["vector"]), err.count("\n")) == (0, 256, 1)
    assert "the text that begins with 'word word" in err


def test_stdin_is_read_as_a_file_is() -> None:
    write_lines("in.jsonl", *ITEMS)
    command = [sys.executable, "-m", "lookonce", "embed", *FAST, "--input"]
    piped, named = (
        subprocess.run([*command, name], input=data, capture_output=True, check=False, timeout=60)
        for name, data in (("-", Path("in.jsonl").read_bytes()), ("in.jsonl", b""))
    )
    assert (piped.returncode, piped.stderr, piped.stdout.count(b"\n")) == (0, b"", 4)
    assert piped.stdout == named.stdout


def test_a_bad_line_of_a_file_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    write_lines("in.jsonl", *ITEMS, {"txt": "wrong"})
    assert "line 5 cannot be embedded: it has the key 'txt'" in refused(
        capsys, "embed", "--input", "in.jsonl", "-o", "v.npy"
    )
    assert "text 2 cannot be embedded" in refused(capsys, "embed", "good", " ", "-o", "v.npy")
    assert "none.png" in refused(capsys, "embed", "good", "-i", "none.png", "-o", "v.npy")
    Path("empty.jsonl").write_text("\n")
    assert "'empty.jsonl' has no rows, there is nothing to embed" in refused(capsys, "embed", "--input", "empty.jsonl")


def test_each_picture_is_decoded_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    real = images.open_picture

    def counting(source: images.PictureSource, name: str | None = None) -> images.Picture:
        decoded.append(name)
        return real(source, name)

    monkeypatch.setattr(images, "open_picture", counting)
    embed(capsys, "-i", "cat.png", "-i", "dog.png", "--no-store")
    assert decoded == ["cat.png", "dog.png"]
    write_lines("in.jsonl", {"image": "cat.png"}, {"text": "both", "images": ["dog.png"]})
    embed(capsys, "--input", "in.jsonl", "--no-store")
    assert decoded == ["cat.png", "dog.png"] * 2


def test_bad_rows_are_passed_over_on_request_and_told_by_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("torn.png").write_bytes(Path("cat.png").read_bytes()[:200])
    bad = ({"image": "none.png"}, {"text": 5}, {"text": "word " * 2000}, {"image": "torn.png"}, {"text": "end"})
    write_lines("in.jsonl", *ITEMS, *bad)
    status, out, err = run_here(capsys, "embed", "--input", "in.jsonl", "-o", "v.npy", "--skip-errors", *FAST)
    assert (status, out) == (0, "v.npy: 5 vectors of 256 values, 4 rows passed over (v.npy.skipped.jsonl)\n")
    told = [line.split(" was passed over: ") for line in err.splitlines()]
    assert sorted(line for line, _ in told) == [f"lookonce: warning: line {number}" for number in (5, 6, 7, 8)]
    listed = [json.loads(line) for line in Path("v.npy.skipped.jsonl").read_text().splitlines()]
    assert [one["index"] for one in listed] == [4, 5, 6, 7]
    write_lines("good.jsonl", *ITEMS, {"text": "end"})
    # The cosine: bad rows change which good ones share a batch, and with it the last bits.
    cosines = (np.load("v.npy") * vectors_of(embed(capsys, "--input", "good.jsonl"))).sum(axis=1)
    assert cosines.min() > 0.9999
    status, out, _ = run_here(capsys, "embed", "--input", "in.jsonl", "--skip-errors", *FAST)
    assert (status, [json.loads(line).get("index") for line in out.splitlines()]) == (0, [None, 1, None, 3, 8])


def test_a_bad_picture_in_a_file_ends_the_run_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_lines("in.jsonl", *ITEMS, {"image": "none.png"})
    assert "line 5 cannot be embedded: 'none.png'" in refused(capsys, "embed", "--input", "in.jsonl", "-o", "v.npy")
    options = ("embed", "--input", "in.jsonl", "-o", "v.npy", "--batch-size", "2", *FAST)
    assert run_here(capsys, *options)[0] == 2
    assert sorted(path.name for path in Path().glob("v.*")) == ["v.npy.part", "v.npy.part.jsonl"]
    assert "another pooling: delete" in refused(capsys, *options, "--pooling", "mean")
    assert "another n_ctx: delete" in run_here(capsys, *options, "--n-ctx", "600")[2]
    status, out, _ = run_here(capsys, *options, "--skip-errors")
    assert (status, out) == (
        0,
        "v.npy: 4 vectors of 256 values, 4 rows done before, 1 row passed over (v.npy.skipped.jsonl)\n",
    )
    assert run_here(capsys, *options, "--skip-errors", "--restart")[0] == 0


def test_a_part_made_with_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_pair_25: tuple[Path, Path]
) -> None:
    write_lines("in.jsonl", {"text": "good"}, {"image": "none.png"})
    options = ("embed", "--input", "in.jsonl", "-o", "v.npy", "--batch-size", "1")
    assert run_here(capsys, *options, *FAST)[0] == 2
    assert "another model, mmproj" in refused(capsys, *options, "--model", tiny_pair_25[0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to embed"),
        (("-",), "--input -"),
        (("a", "--input", "in.jsonl"), "one or the other"),
        (("--input", "none.jsonl"), "none.jsonl"),
        (("--input", "empty.jsonl"), "nothing to embed"),
        (("--input", "empty.jsonl", "-o", "v.npy"), "nothing to embed"),
        (("--input", "."), "directory"),
        (("--input", "in.jsonl", "-o", "in.jsonl"), "the input itself"),
        (("a", "-o", "v.bin"), ".npy or .jsonl"),
        (("a", "-o", "nowhere/v.npy"), "folder"),
        (("a", "--restart"), "--output"),
        (("a", "--pooling", "most"), "most"),
        (("a", "--tokens", "some"), "some"),
        (("a", "--tokens", "image"), "text 1 cannot be embedded"),
        (("a", "--prompt", "bare"), "bare"),
        (("a", "--layer", "99"), "99"),
        (("a", "--dimension", "257"), "257"),
        (("a", "--dimension", "0"), "dimension"),
        (("a", "--batch-size", "0"), "batch_size"),
        (("a", "--instruction", " "), "instruction"),
        (("a", "--pca", "in.jsonl"), "in.jsonl"),
        (("a", "--pca", "none.npz", "-o", "v.npy"), "none.npz"),
        (("-i", "cat.png", "--max-pixels", "5"), "max_pixels"),
        (("-i", "cat.png", "--max-pixels", "5", "--skip-errors"), "max_pixels"),
        (("a", "--model", "none.gguf", "-o", "v.npy"), "none.gguf"),
    ],
)
def test_a_wrong_embed_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    Path("empty.jsonl").write_text("\n\n")
    write_lines("in.jsonl", {"text": "a"})
    if "--skip-errors" in arguments:
        status, out, err = run_here(capsys, "embed", *arguments, *FAST)
        assert (status, out) == (2, "")
        assert told in err.splitlines()[-1]
    else:
        assert told in refused(capsys, "embed", *arguments)


def test_progress_is_shown_on_a_terminal_and_the_vectors_still_go_to_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lookonce", "embed", "a", "b", "c", *FAST]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16)
    os.close(ours)
    assert (run.returncode, run.stdout.count(b"\n")) == (0, 3)
    assert b"Embedding" in shown
    assert b"3/3" in shown


def test_extract_saves_each_pictures_stages_in_a_folder_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys, "extract", "cat.png", "dog.png", "--outdir", "out", "--json", *FAST)
    told = [json.loads(line) for line in out.splitlines()]
    assert (status, err, [one["images"] for one in told]) == (0, "", [["cat.png"], ["dog.png"]])
    means = ["lm_pooled_mean.npy", "manifest.json", "projected_pooled_mean.npy", "vision_pooled_mean.npy"]
    for name in ("cat", "dog"):
        assert sorted(path.name for path in Path("out", name).iterdir()) == means
    shapes = {"vision_pooled_mean": [1, 128], "projected_pooled_mean": [1, 256], "lm_pooled_mean": [1, 256]}
    assert [one["shapes"] for one in told] == [shapes, shapes]
    assert not np.array_equal(np.load("out/cat/lm_pooled_mean.npy"), np.load("out/dog/lm_pooled_mean.npy"))


def test_extract_keeps_looks_where_the_store_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    for options, count in ((("--no-store",), 0), (("--store", "mine"), 1)):
        status, _, err = run_here(capsys, "extract", "cat.png", "--outdir", "out", *options, *FAST)
        assert (status, err) == (0, "")
        assert len(list(Path("mine").rglob("*.look"))) == count
        assert not list(Path(os.environ["LOOKONCE_STORE"]).rglob("*.look"))


def test_extract_saves_the_tensors_on_request_and_takes_pictures_together(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path]
) -> None:
    options = ("--together", "--save-tokens", "--prompt", "Which?", "--layer", "0", "--vision-layer", "1")
    status, out, err = run_here(capsys, "extract", "cat.png", "dog.png", "--outdir", "out", *options, *FAST)
    assert (status, err) == (0, "")
    told = out.removeprefix("cat.png, dog.png: ").split(", saved in ")[0].split(", ")
    assert {one.split()[0] for one in told} == {path.stem for path in Path("out/cat").glob("*.npy")}
    assert any(one.startswith("vision_layer_1 ") for one in told)
    assert out.endswith(f"saved in {Path('out', 'cat')}\n")
    assert [path.name for path in Path("out").iterdir()] == ["cat"]
    manifest = json.loads(Path("out/cat/manifest.json").read_text())
    assert (manifest["pictures"], manifest["prompt"], manifest["layer"]) == (["cat.png", "dog.png"], "Which?", 0)
    with lookonce.load(tiny_pair[0], threads=1, n_ctx=512, store=False) as loaded:
        stages = lookonce.extract(loaded, ["cat.png", "dog.png"], prompt="Which?", layer=0, vision_layers=[1])
    for name in ("vision_tokens", "projected_tokens", "deepstack_features", "lm_last_hidden"):
        assert np.array_equal(np.load(f"out/cat/{name}.npy"), getattr(stages, name))
    assert np.array_equal(np.load("out/cat/vision_layer_1.npy"), stages.vision_layers[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("cat.png", "sub/cat.jpg"), "would both be saved as"),
        (("cat.png", "CAT.png"), "would both be saved as"),
        (("cat.png", "none.png"), "none.png"),
        (("cat.png", "torn.png"), "torn.png"),
        (("look.safetensors",), "a saved look or chat, which holds no stages"),
        (("cat.png", "--outdir", "nowhere/out"), "the folder around it"),
        (("cat.png", "--outdir", "torn.png"), "is a file"),
        (("taken.png", "--outdir", "sub"), "is a file"),
        (("cat.png", "--vision-layer", "0"), "--save-tokens"),
        (("cat.png", "--vision-layer", "9", "--save-tokens"), "9"),
        (("cat.png", "--layer", "-9"), "-9"),
        (("cat.png", "--prompt", " "), "prompt"),
        (("cat.png", "--max-pixels", "3"), "max_pixels"),
        (("cat.png", "--prompt", "word " * 600), "512"),
        ((), "IMAGE"),
    ],
)
def test_a_wrong_extract_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    Path("sub").mkdir()
    for name in ("sub/cat.jpg", "CAT.png", "taken.png"):
        Image.open("dog.png").save(name)
    Path("torn.png").write_bytes(Path("cat.png").read_bytes()[:200])
    Path("sub/taken").write_text("a file where the folder would be")
    given = arguments if "--outdir" in arguments else (*arguments, "--outdir", "out")
    assert told in refused(capsys, "extract", *given)


def test_extract_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--outdir" in refused(capsys, "extract", "cat.png")


def test_the_help_of_both_is_complete_and_loads_no_native_library() -> None:
    code = """
import sys
from lookonce.cli import main
for command in ("embed", "extract"):
    assert main([command, "--help"]) == 0
assert not {"llama_cpp", "numpy"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    for told in ("--skip-errors", "--restart", "--pca", "--together", "--save-tokens", "the texts first"):
        assert told in run.stdout


def test_the_doctor_compares_vectors_too(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_here(capsys, "doctor", *FAST, "--json")
    check = json.loads(out)["check"]
    assert (status, check["vectors_differ"], check["answers_differ"], check["passed"]) == (0, True, True, True)
    assert len(check["cosines"]) == 3
    assert max(check["cosines"]) < 0.99


def test_the_doctor_fails_where_a_picture_does_not_change_the_vector(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.SelfCheck("deaf", "a", "b", "c", (0.5, 0.999999, 0.5))
    monkeypatch.setattr(doctor, "check_model", lambda _: found)
    status, out, _ = run_here(capsys, "doctor")
    assert status == 1
    assert "Check of 'deaf': FAILED" in out
    assert "vectors of circle and none" in out
    assert "cosine 0.999999: alike" in out
    assert "does not change the vector:" in out
