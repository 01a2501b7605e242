"""Tiny random language models on disk, loadable like models of the hub, and a folder of text in their vocabulary."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm_processes import WarmProcess, WarmPython, warm_python_in

# Before torch is imported anywhere: threads cost more than they bring on tensors of a few rows, up to 20 times as much
# when the cores are busy. The commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ("durations", "s3_server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what opens the browser and what starts processes by the fixtures it asks for."""
    for item in items:
        for fixture, mark in (("driver", "browser"), ("warm_python", "process")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


N_WORDS = 93

# Sizes and special tokens of all but GPT-2, and the further sizes of both Gemmas.
_TINY: dict[str, Any] = {
    "vocab_size": N_WORDS + 4,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_TINY_GEMMA: dict[str, Any] = {
    **_TINY,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
    "sliding_window": 16,
}


def _tokenizer(specials: list[str], **roles: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*specials, *(f"w{i}" for i in range(N_WORDS))]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=specials[-1]))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=table, **roles)


def _save(folder: Path, model_class: Any, config: Any) -> Path:
    """Save a random model and its tokenizer; weights are wide enough for every site to differ from every other."""
    import torch

    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    if config.model_type == "gpt2":
        # Like the real one: a single special token, which is both BOS and EOS (and the token of unknown words).
        tokenizer = _tokenizer(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    else:
        tokenizer = _tokenizer(
            ["<pad>", "<eos>", "<bos>", "<unk>"],
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
        )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Any], Path]:
    """A function (model class, config) -> a new folder with a random model of any other architecture."""
    return lambda model_class, config: _save(tmp_path_factory.mktemp("tiny") / "model", model_class, config)


@pytest.fixture(scope="session")
def tiny_olmo2(save_tiny_model: Callable[[Any, Any], Path]) -> Path:
    """A model whose norms come after the attention and the MLP, before none of them."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(**_TINY, intermediate_size=40, num_hidden_layers=2, num_key_value_heads=3)
    return save_tiny_model(Olmo2ForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma-2: offset RMSNorm before and after each sublayer, soft-capped attention, sliding window. d=24, 3 layers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return _save(tmp_path_factory.mktemp("tiny") / "gemma2", Gemma2ForCausalLM, Gemma2Config(**_TINY_GEMMA))


@pytest.fixture(scope="session")
def tiny_gemma3(save_tiny_model: Callable[[Any, Any], Path]) -> Path:
    """Gemma-3: offset RMSNorm before and after each sublayer, norms of queries and keys, local and global layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return save_tiny_model(Gemma3ForCausalLM, Gemma3TextConfig(**_TINY_GEMMA))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama: plain RMSNorm, no post-norms. d=24, 4 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_TINY, intermediate_size=44, num_hidden_layers=4, num_key_value_heads=1)
    return _save(tmp_path_factory.mktemp("tiny") / "llama", LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2: LayerNorm with bias, learned positions, one special token. d=20, 3 layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=N_WORDS + 1,
        n_embd=20,
        n_layer=3,
        n_head=2,
        n_inner=36,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(tmp_path_factory.mktemp("tiny") / "gpt2", GPT2LMHeadModel, config)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 text files of random words w0..w92, 8 to 4431 words each, 29978 words in all."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    lengths = np.geomspace(5, 2500, 40).astype(int)
    lengths = np.maximum(lengths * 30_000 // lengths.sum(), 5)
    for i, length in enumerate(rng.permutation(lengths)):
        words = [f"w{w}" for w in rng.integers(0, N_WORDS, length)]
        lines = [" ".join(words[j : j + 17]) for j in range(0, len(words), 17)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _fast_disk() -> Iterator[None]:
    """No test cuts the power, and a real fsync of thousands of small files takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Starts `python ...` without the cold start of an interpreter."""
    with warm_python_in(tmp_path_factory.mktemp("warm")) as python:
        yield python


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function: the words of a command line, typed in `tmp_path` at 120 columns and run in this process."""
    from matryoshka import launch

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        line = list(map(str, words))
        monkeypatch.setattr(sys, "argv", line)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            getattr(launch, line[0])()
        code, shown = ended.value.code, capsys.readouterr()
        assert isinstance(code, int | None)
        return subprocess.CompletedProcess(line, code or 0, shown.out, shown.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return run


class Shown:
    """What a command left on a terminal: its exit code, and what came on each of its two streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def drawn(self) -> list[str]:
        """Every line that stood on the terminal at some time, without colours; one that is drawn again counts anew."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", _plain(self.out + self.err))]


def _in_terminal(start: Callable[[int, int, dict[str, str]], Any], columns: int, **variables: str) -> Shown:
    """Start a process with (stdin and stdout, stderr, environment) on pseudo-terminals of this width."""
    dropped = {"COLUMNS", "LINES", "NO_COLOR", "JPY_PARENT_PID"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"TERM": "xterm-256color", **variables}
    ends = [pty.openpty() for _ in range(2)]
    for _, theirs in ends:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    (out, their_out), (err, their_err) = ends
    process = start(their_out, their_err, environment)
    os.close(their_out)
    os.close(their_err)
    said = {out: b"", err: b""}
    left = set(said)
    while left:
        for end in select.select(left, [], [])[0]:
            try:
                part = os.read(end, 65536)
            except OSError:  # what Linux says of a terminal whose other end is closed
                part = b""
            said[end] += part
            if not part:
                left.discard(end)
    os.close(out)
    os.close(err)
    return Shown(process.wait(), said[out].decode(), said[err].decode())


@pytest.fixture(scope="session")
def in_terminal() -> Callable[..., Shown]:
    """A function (command, columns) -> what it shows there."""

    def run(command: list[str], columns: int, **variables: str) -> Shown:
        def start(out: int, err: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, stdin=out, stdout=out, stderr=err, env=environment)

        return _in_terminal(start, columns, **variables)

    return run


_ONE_AFTER_THE_OTHER = """
import json, sys
from matryoshka import launch
for words in json.loads(sys.argv[1]):
    sys.argv = words
    print("#", *words[:2], flush=True)
    try:
        getattr(launch, words[0])()
    except SystemExit as ended:
        assert ended.code in (None, 0), (words, ended.code)
"""


def _check_readable(commands: list[list[str]], cwd: Path, python: WarmPython) -> None:
    """Run commands (in one process) on terminals of 60, 80 and 400 columns: the same words on all, none broken.

    On a narrow one columns may be left out and intervals be said as +-; what is longer than the terminal stays whole.
    """
    program = ["-c", _ONE_AFTER_THE_OTHER, json.dumps(commands)]

    def start(out: int, err: int, environment: dict[str, str]) -> WarmProcess:
        return python.start(program, cwd, streams=(out, out, err), environment=environment)

    wide = _in_terminal(start, 400)
    assert wide.code == 0, wide.err
    known = _words(wide.out) | set(["Left", "out", "at", "this", "width"])
    assert wide.out.count("# ") >= len(commands)
    for columns in (60, 80):
        narrow = _in_terminal(start, columns)
        assert narrow.code == 0, narrow.err
        new = {word for word in _words(narrow.out) - known if not word.startswith("+-")}
        assert new == set(), f"broken at {columns} columns: {new}"
        bars = [line for line in narrow.drawn if " rows" in line or "/s" in line]
        for line in [*_plain(narrow.out).splitlines(), *bars]:
            assert len(line.rstrip()) <= columns or len(line.split()) <= 2, line


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _words(text: str) -> set[str]:
    """What stands between spaces, less the signs that end a part of a sentence, and rules."""
    return {word.strip(",;:.[]") for word in _plain(text).split() if set(word) != {"\u2500"}} - {""}


@pytest.fixture(scope="session")
def check_readable(warm_python: WarmPython) -> Callable[[list[list[str]], Path], None]:
    """A function (commands, folder): runs them on terminals of 60 and 80 columns and reads what they print."""
    return lambda commands, cwd: _check_readable(commands, cwd, warm_python)


def _wandb_records(path: Path) -> Iterator[Any]:
    """The protobuf records of an offline file: after 7 bytes of header a LevelDB log of 32 KiB blocks, in which each
    fragment is crc (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last) and payload."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, held = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue] -- made at import
            record.ParseFromString(held)
            yield record
            held = b""


def _whole_wandb_file(path: Path) -> list[Any]:
    """All records of a finished run; wandb's own process may still be writing the last of them."""
    for _ in range(300):
        found = list(_wandb_records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


@pytest.fixture
def wandb_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], list[Any]]:
    """A function: offline file -> its records. What W&B copies on the way to a server stays in the test's folder."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    return _whole_wandb_file
