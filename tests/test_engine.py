"""One loaded model: its options, its lock and its end."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import lookonce
from look_maker import make_look
from lookonce import gguf_file
from lookonce.engine import LoadOptions, physical_cores
from lookonce.errors import ClosedError, ContextError, DeviceError, InputError, NativeError, PromptError
from lookonce.looker import LookOptions
from lookonce.model import Model
from lookonce.prompt import Message
from lookonce.sampling import Sampling

Pair = tuple[Path, Path]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=512) as model:
        yield model


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        *[("device", None, DeviceError), ("device", 5, DeviceError), ("n_gpu_layers", -1, InputError)],
        *[("n_gpu_layers", 1.5, InputError), ("flash_attention", "on", InputError), ("threads", 0, InputError)],
        *[("threads", 100_000, InputError), ("n_ctx", 0, InputError), ("n_ctx", "8", InputError)],
        *[("kv_type", "f8", InputError), ("kv_type", None, InputError)],
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(option: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{option} is {value!r}"):
        LoadOptions(**{option: value})


def test_an_unknown_device_and_a_context_too_long_are_refused_at_load(tiny_pair: Pair) -> None:
    with pytest.raises(DeviceError, match="'quantum' is not in this build"):
        lookonce.load(tiny_pair[0], store=False, device="quantum")
    with pytest.raises(ContextError, match=r"n_ctx is 40000, but .* was trained for 32768"):
        lookonce.load(tiny_pair[0], store=False, n_ctx=40_000)


def test_threads_default_to_the_physical_cores_this_process_may_use() -> None:
    cores = physical_cores()
    assert 1 <= cores <= (psutil.cpu_count(logical=False) or 1)
    code = (
        "from lookonce.engine import physical_cores; import os; os.sched_setaffinity(0, {0}); print(physical_cores())"
    )
    if hasattr(os, "sched_setaffinity"):
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"


@pytest.mark.parametrize(
    "options",
    [{"kv_type": "f32", "flash_attention": False}, {"kv_type": "q8_0"}, {"flash_attention": True}, {"device": "cpu"}],
    ids=str,
)
def test_every_setting_answers(tiny_pair: Pair, options: dict[str, Any]) -> None:
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=256, **options) as model:
        assert model.ask("What?", [make_look()], **GREEDY).usage.generated == 8


def test_a_prompt_is_what_the_template_and_the_tokenizer_make_of_it(model: Model) -> None:
    look = make_look()
    prompt = model.engine.prompt([Message("user", (look, "What?"))])
    text = model.engine.text
    spelt = "".join(
        text.piece(token, special=True).decode() if isinstance(token, int) else "*" for token in prompt.units()
    )
    assert spelt == "<|im_start|>user\n<|vision_start|>*<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.n_rows == 6


def test_the_lock_is_not_held_while_a_template_runs_or_a_reply_waits(model: Model) -> None:
    stream = model.ask("What?", stream=True, **GREEDY)
    next(stream)
    assert model.engine.lock.acquire(timeout=5)
    model.engine.lock.release()
    stream.close()


def test_the_grammar_of_a_bad_sampling_is_refused_and_the_lock_given_back(model: Model) -> None:
    prompt = model.engine.prompt([Message("user", ("a",))])
    with pytest.raises(PromptError):
        model.engine.sampler(Sampling(grammar="root ::= ("), prompt)
    assert model.engine.lock.acquire(timeout=1)
    model.engine.lock.release()


def spoil(source: Path, target: Path, name: str) -> None:
    tensor = gguf_file.read(source).tensors[name]
    data = bytearray(source.read_bytes())
    np.frombuffer(data, np.float32, tensor.size_bytes // 4, tensor.offset)[:] = np.nan
    target.write_bytes(data)


@pytest.mark.parametrize("name", ["output.weight", "blk.1.ffn_up.weight"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"grammar": 'root ::= "a"'}])
def test_a_text_model_of_damaged_weights_is_a_native_error_that_says_so(
    tiny_pair: Pair, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    spoil(tiny_pair[0], tmp_path / "text.gguf", name)
    with (
        lookonce.load(tmp_path, store=False, threads=1, n_ctx=256) as model,
        pytest.raises(NativeError, match=r"text\.gguf gave logits that are not numbers: the file is damaged"),
    ):
        model.ask("What?", **options)


def rewrite_template(source: Path, target: Path, template: str | None) -> None:
    """Copy a GGUF with another chat template of at most the same length, or with its key renamed."""
    data = source.read_bytes()
    key = b"tokenizer.chat_template"
    start = data.index(key) + len(key) + 4
    length = int.from_bytes(data[start : start + 8], "little")
    if template is None:
        data = data.replace(key, b"tokenizer.chat_templatx")
    else:
        filled = template.encode().ljust(length, b" ")
        data = data[: start + 8] + filled + data[start + 8 + length :]
    target.write_bytes(data)


def test_a_model_without_a_template_loads_and_refuses_to_chat(tiny_pair: Pair, tmp_path: Path) -> None:
    rewrite_template(tiny_pair[0], tmp_path / "text.gguf", None)
    with (
        lookonce.load(tmp_path, store=False, threads=1) as model,
        pytest.raises(PromptError, match="has no chat template"),
    ):
        model.ask("What?")


@pytest.mark.parametrize("template", ["{{ '' }}", "{{ raise_exception('no') }}", "{% for %}", "{{ 1 / 0 }}"])
def test_a_template_that_gives_nothing_or_fails_is_a_prompt_error(
    tiny_pair: Pair, tmp_path: Path, template: str
) -> None:
    rewrite_template(tiny_pair[0], tmp_path / "text.gguf", "{%- if true -%}" + template + "{%- endif -%}")
    with lookonce.load(tmp_path, store=False, threads=1) as model, pytest.raises(PromptError):
        model.ask("What?")


def test_closing_twice_and_using_after_is_no_crash(tiny_pair: Pair) -> None:
    model = lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=256)
    model.ask("What?", **GREEDY)
    engine = model.engine
    model.close()
    model.close()
    for use in (
        lambda: engine.prompt([]),
        lambda: engine.template,
        lambda: engine.plain_prompt(["a"]),
        lambda: engine.prepare([], LookOptions()),
        lambda: model.look(make_look()),
    ):
        with pytest.raises(ClosedError, match="is closed"):
            use()


def test_closing_while_other_threads_split_text_is_no_crash(tiny_pair: Pair) -> None:
    for _ in range(5):
        model = lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=256)
        begun, ends = threading.Event(), []

        def split(model: Model = model, begun: threading.Event = begun, ends: list[Any] = ends) -> None:
            try:
                while True:
                    model.engine.text.tokenize("What is it? " * 200)
                    begun.set()
            except ClosedError as error:
                ends.append(error)

        threads = [threading.Thread(target=split) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert begun.wait(30)
        model.close()
        for thread in threads:
            thread.join(30)
        assert len(ends) == 3


ENDINGS = {
    "nothing closed": "",
    "a stream under way": "stream = model.ask('a', stream=True); next(stream)",
    "a stream forgotten with its model": "stream = model.ask('a', stream=True); next(stream); del model, stream",
    "a cycle of garbage": (
        "stream = model.ask('a', stream=True); next(stream); model.me = [model, stream]; del model, stream"
    ),
    "a daemon thread": (
        "import threading\n"
        "def run():\n"
        "    while True: model.ask('What is it?', temperature=0, max_tokens=50)\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "import time; time.sleep(0.3)"
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_may_end_without_closing_anything(tiny_pair: Pair, ending: str) -> None:
    code = f"import lookonce\nmodel = lookonce.load({str(tiny_pair[0])!r}, store=False, threads=1, n_ctx=256)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + ENDINGS[ending]], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Fatal" not in done.stderr
    if ending != "a daemon thread":
        assert done.stderr == ""


def test_a_model_that_is_forgotten_gives_its_memory_back(tiny_pair: Pair, tmp_path: Path) -> None:
    shutil.copy(tiny_pair[0], tmp_path / "text.gguf")

    def use() -> None:
        model = lookonce.load(tmp_path, store=False, threads=1, n_ctx=8192)
        model.ask("What?", max_tokens=1)

    use()
    before = psutil.Process().memory_info().rss
    for _ in range(8):
        use()
    assert psutil.Process().memory_info().rss - before < 40e6
