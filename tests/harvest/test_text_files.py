"""Which files of a folder are text: links are followed, and what is no text is left out."""

from __future__ import annotations

from pathlib import Path

from harvest.text_files import describe_files, local_files


def test_linked_folders_are_read_and_loops_end(tmp_path: Path) -> None:
    text, far = tmp_path / "text", tmp_path / "far"
    for folder in (text / "own", far / "deep"):
        folder.mkdir(parents=True)
    (text / "own" / "a.txt").write_text("a")
    (far / "deep" / "b.txt").write_text("b")
    (far / "c.txt").write_text("c")
    (text / "linked").symlink_to(far)
    (text / "d.txt").symlink_to(far / "c.txt")
    (text / "gone.txt").symlink_to(far / "nothing.txt")
    # a link to a folder above, and a second way to a folder
    (far / "deep" / "up").symlink_to(text)
    (text / "own" / "again").symlink_to(far / "deep")
    files = local_files(str(text))
    assert files is not None
    names = [str(file.relative_to(text)) for file in files]
    assert names == ["d.txt", "linked/c.txt", "linked/deep/b.txt", "own/a.txt"]


def test_checksums_and_hidden_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    kept = ["a.txt", "b.jsonl.gz", "c.parquet", "checksummed.txt", "z/summary.txt"]
    left = ["SHA256SUMS.txt", "md5sum.txt", "z/checksums.txt", "._a.txt", ".cache/x.txt", "notes.md", "x.csv"]
    (tmp_path / "z").mkdir()
    for name in kept + left:
        (tmp_path / name).write_text("x")
    files = local_files(str(tmp_path))
    assert files is not None
    assert sorted(str(file.relative_to(tmp_path)) for file in files) == sorted(kept)
    assert describe_files("text", files) == "text: 5 files of text (1 .jsonl, 1 .parquet, 3 .txt)"
    # by its own name any of them is read
    assert local_files(str(tmp_path / "SHA256SUMS.txt")) == [tmp_path / "SHA256SUMS.txt"]
