"""Publishing an export, finding a transcoder among files, and the hub, played by a small HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.interop import hub
from matryoshka.interop.card import model_card
from matryoshka.interop.export import FORMATS, export
from matryoshka.interop.pretrained import Found, find
from matryoshka.interop.provenance import Provenance
from matryoshka.runs import publish_json
from matryoshka.transcoder import Transcoder

Make = Callable[..., Transcoder]


@pytest.fixture
def make(make_transcoder: Make) -> Make:
    """As wide at its end as at its start, which circuit-tracer wants."""
    return partial(make_transcoder, d_out=12)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- publishing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["saelens", "circuit-tracer", "gemma-scope", "native"])
def test_again_is_nothing_to_do_and_gives_equal_bytes(make: Make, tmp_path: Path, form: str) -> None:
    provenance = Provenance(n_layers=4, run="l3", step=7)
    first = export([make()], form, tmp_path / "out", provenance)
    before = contents(tmp_path / "out")
    assert {"README.md", "export.json"} < before.keys()
    assert not first.already_there
    assert export([make()], form, tmp_path / "out", provenance).already_there
    export([make()], form, tmp_path / "other", provenance)
    assert contents(tmp_path / "out") == contents(tmp_path / "other") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert Transcoder.from_pretrained(tmp_path / "out").config.source_hook == "blocks.3.hook_resid_mid"


def test_what_an_export_dropped_is_part_of_it(make: Make, tmp_path: Path) -> None:
    export([make()], "gemma-scope", tmp_path / "out")
    file = tmp_path / "out" / "export.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "dropped": []}))
    with pytest.raises(UserError, match="another export .*dropped"):
        export([make()], "gemma-scope", tmp_path / "out")
    del record["dropped"]  # as exports of before it was recorded
    file.write_text(json.dumps(record))
    assert export([make()], "gemma-scope", tmp_path / "out").already_there


def test_other_contents_are_never_replaced(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export([make()], "saelens", out)
    before = contents(out)
    with pytest.raises(UserError, match="another export .*weights_sha256"):
        export([make(seed=1)], "saelens", out)
    with pytest.raises(UserError, match='format: "saelens" -> "native"'):
        export([make()], "native", out)
    assert contents(out) == before
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not made by `train export`"):
        export([make()], "saelens", strange)
    assert contents(strange) == {"thesis.tex": b"x"}
    with pytest.raises(UserError, match="is a file"):
        export([make()], "saelens", strange / "thesis.tex")


def test_an_empty_folder_is_used_and_a_killed_export_is_forgotten(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("x")
    export([make()], "native", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["README.md", "config.json", "export.json", "transcoder.safetensors"]
    assert not (tmp_path / "out.partial").exists()


def test_a_failure_leaves_nothing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say where it belongs"):
        export([make(source_hook="")], "saelens", tmp_path / "out")
    with pytest.raises(UserError, match="the formats are saelens"):
        export([make()], "onnx", tmp_path / "out")
    with pytest.raises(UserError, match="holds one transcoder, and 2 were given"):
        export([make(), make(seed=1)], "saelens", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_says_what_it_is(make: Make, form: str) -> None:
    provenance = Provenance(run="l3-k4", step=400, dataset="monology/pile-uncopyrighted", ctx_len=1024)
    text = model_card([make()], form, "some/place", provenance)
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert "base_model: google/gemma-2-2b\n" in head
    for fact in ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out", "16 latents", "the first 5, 16", "1,024"):
        assert fact in body, fact
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "user/repo" in code or "some/place" in code
    local = model_card([make(model="/home/me/models/gemma")], form, ".", Provenance())
    assert "base_model" not in local
    assert "/home/me" not in local
    layer_norm = model_card([make()], form, ".", Provenance(norm_kind="layer"))
    assert "after gain and bias" in " ".join(layer_norm.split())


# --- finding ----------------------------------------------------------------------------------------------------


def test_find_looks_at_files_only_by_their_names() -> None:
    files = [
        "README.md",
        "layer_1/width_16k/average_l0_9/params.npz",
        "a/sae_weights.safetensors",
        "a/cfg.json",
        "b/params.safetensors",
        "b/config.json",
        "c/transcoder.safetensors",
        "c/config.json",
        "d/config.yaml",
        "d/layer_0.safetensors",
        "no/config.yaml",
        "no/either/params.safetensors",
    ]
    assert find(files) == [
        Found("a", "saelens"),
        Found("b", "gemma-scope-2"),
        Found("c", "ours"),
        Found("d", "circuit-tracer"),
        Found("layer_1/width_16k/average_l0_9", "gemma-scope"),
    ]
    assert find(["transcoder.safetensors", "config.json", "eval/params.npz"]) == [Found(".", "ours")]
    assert find(["a/cfg.json", "a/sae_weights.safetensors", "a/b/params.npz"]) == [Found("a", "saelens")]


def test_folders_without_one_or_with_several_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no transcoder of a known format"):
        Transcoder.from_pretrained(tmp_path)
    for name in ("a", "b"):
        make().save(tmp_path / name)
    with pytest.raises(UserError, match="holds 2 transcoders; name one of them: .*<one of a, b>"):
        Transcoder.from_pretrained(tmp_path)
    assert Transcoder.from_pretrained(tmp_path / "b").config == make().config
    for text in ("not/a/../folder here", "/nowhere/at/all", "./x", "x"):
        with pytest.raises(UserError, match="not a folder here, nor the name of a repository"):
            Transcoder.from_pretrained(text)


def test_a_run_stands_for_its_newest_checkpoint(make: Make, tmp_path: Path) -> None:
    publish_json(tmp_path / "run.json", {"format_version": 1})
    with pytest.raises(UserError, match="no checkpoint yet"):
        Transcoder.from_pretrained(tmp_path)
    for step in (900, 1000):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        make(seed=step).save(folder)
        publish_json(folder / "state.json", {"format_version": 1, "step": step, "finished": False})
    make(seed=5).save(tmp_path / "checkpoints" / "step-002000.partial")
    assert torch.equal(Transcoder.from_pretrained(tmp_path).W_enc, make(seed=1000).W_enc)


# --- the hub ----------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as listing, downloading and committing small files takes."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[tuple[str, str]]
    commits: list[list[dict[str, Any]]]
    sha = "a" * 40

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the name of the base class
        pass

    def _answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        type(self).asked.append((self.command, path))
        if "/resolve/" in path:
            return self._file(path.split("/resolve/")[1].partition("/")[2])
        if not path.startswith("/api/models/user/repo"):
            return self._answer(401, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        files = [p for p in sorted(self.root.rglob("*")) if p.is_file()]
        names = [p.relative_to(self.root).as_posix() for p in files]
        if "/tree/" in path:
            return self._json(
                [
                    {"type": "file", "path": name, "size": p.stat().st_size, "oid": f"{i:040x}"}
                    for i, (name, p) in enumerate(zip(names, files, strict=True))
                ]
            )
        self._json({"id": "user/repo", "sha": self.sha, "siblings": [{"rfilename": name} for name in names]})
        return None

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        file = self.root / name
        if not file.is_file():
            return self._answer(404, b"", X_Error_Code="EntryNotFound")
        self._answer(200, file.read_bytes(), ETag=f'"{name}"', X_Repo_Commit=self.sha)
        return None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlparse(self.path).path
        type(self).asked.append((self.command, path))
        if path.endswith("/repos/create"):
            self._json({"url": "https://huggingface.co/user/repo", "id": "user/repo", "name": "user/repo"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in path:
            type(self).commits.append([json.loads(line) for line in body.splitlines()])
            self._json(
                {"commitUrl": "https://huggingface.co/user/repo/commit/abc", "commitOid": "abc", "success": True}
            )
        else:
            self._json({})


@pytest.fixture
def stub_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    root = tmp_path / "repo"
    root.mkdir()

    class Server(Hub):
        asked: list[tuple[str, str]] = []  # noqa: RUF012
        commits: list[list[dict[str, Any]]] = []  # noqa: RUF012

    Server.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    try:
        yield Server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_only_the_wanted_transcoder_is_downloaded(make: Make, stub_hub: type[Hub]) -> None:
    for name in ("one", "two"):
        export([make(seed=len(name))], "saelens", stub_hub.root / name)
    with pytest.raises(UserError, match="user/repo holds 2 transcoders; name one of them: user/repo/<one of one, two>"):
        Transcoder.from_pretrained("user/repo")
    assert not [path for _, path in stub_hub.asked if "/resolve/" in path]
    again = Transcoder.from_pretrained("user/repo/two")
    assert torch.equal(again.W_enc, make(seed=3).W_enc)
    fetched = {path.rpartition("/")[2] for _, path in stub_hub.asked if "/resolve/" in path}
    assert fetched == {"cfg.json", "sae_weights.safetensors"}
    assert not [path for _, path in stub_hub.asked if "/one/" in path]


def test_one_layer_of_a_set_is_downloaded(make: Make, stub_hub: type[Hub]) -> None:
    export([make()], "circuit-tracer", stub_hub.root / "set", Provenance(n_layers=5))
    assert Transcoder.from_pretrained("user/repo", layer=3).config == make().config
    fetched = {path.rpartition("/")[2] for _, path in stub_hub.asked if "/resolve/" in path}
    assert fetched == {"config.yaml", "layer_3.safetensors"}


@pytest.mark.usefixtures("stub_hub")
def test_an_unknown_repository_says_what_to_do() -> None:
    with pytest.raises(UserError, match="nobody/nothing at revision v2 .* could not be used.*set HF_TOKEN"):
        Transcoder.from_pretrained("nobody/nothing", revision="v2")


def test_no_connection_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="without a network give the path"):
        hub.list_files("user/repo")


def test_push_makes_one_commit_of_all_files(make: Make, stub_hub: type[Hub], tmp_path: Path) -> None:
    import base64

    export([make()], "saelens", tmp_path / "out")
    url = hub.upload(tmp_path / "out", "user/repo", message="Matryoshka transcoder")
    assert url == "https://huggingface.co/user/repo/commit/abc"
    assert ("POST", "/api/repos/create") in stub_hub.asked
    (lines,) = stub_hub.commits
    assert lines[0]["value"]["summary"] == "Matryoshka transcoder"
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
    assert sent == contents(tmp_path / "out")
    with pytest.raises(UserError, match="takes user/repo"):
        hub.upload(tmp_path / "out", "user/repo/deeper", message="x")
