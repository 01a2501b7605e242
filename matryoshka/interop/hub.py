"""The Hugging Face hub: list, download, upload. The only file that imports huggingface_hub for transcoders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matryoshka.errors import UserError

_REPO = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+?))?/?")


def split_repo(text: str) -> tuple[str, str]:
    """("user/repo", "sub/folder" or "") of `user/repo/sub/folder`. Raises UserError for any other form."""
    match = _REPO.fullmatch(text)
    if match is None or text.startswith((".", "~")) or ".." in text.split("/"):
        raise UserError(
            f"{text} is not a folder here, nor the name of a repository; give an existing folder, or user/repo or "
            "user/repo/sub/folder of the Hugging Face hub"
        )
    return match[1], match[2] or ""


def list_files(repo: str, *, revision: str | None = None) -> list[str]:
    """Paths of all files of a model repository; those in the cache when there is no connection."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        with _explained(repo, revision):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    with _explained(repo, revision):
        # Not list_repo_files, which tries for 23 seconds before it says that there is no connection.
        return [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]


def download(repo: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """Fetch the files that match `patterns` into the hub's cache; the folder there that stands for the repository."""
    from huggingface_hub import snapshot_download

    with _explained(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def upload(folder: Path, repo: str, *, message: str, private: bool = False) -> str:
    """Put all files of `folder` into a model repository, made when it is not there, as one commit; gives its URL."""
    from huggingface_hub import HfApi

    split_repo(repo)
    if repo.count("/") != 1:
        raise UserError(f"--push takes user/repo, found {repo!r}")
    api = HfApi()
    with _explained(repo, None):
        api.create_repo(repo, exist_ok=True, private=private)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return str(commit.commit_url)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into one paragraph."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its parent is the HTTP library's own error (no connection, time out), and which library that is has changed.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (http_error, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"the repository {repo}{at} of the Hugging Face hub could not be used: {reason} Check the name (it is no "
            "folder here); for a gated or private one accept its licence and set HF_TOKEN; without a network give the "
            "path of a local folder"
        ) from error
