"""Manifests of Ray Train's checkpoints: what counts as whole, and what a resume takes instead."""

from pathlib import Path

import pytest
from raylign.trainers.offline.manifests import free_name, newest_valid, step_of, write_manifest


def write(root: Path, name: str, ranks: int = 2) -> Path:
    """A checkpoint as its ranks write it: each its own folder, laid together."""
    folder = root / name
    for rank in range(ranks):
        part = root / f"part-{rank}-{name}"
        part.mkdir(parents=True)
        (part / f"rng-{rank}").write_bytes(bytes(100))
        write_manifest(part, rank, ranks)
        folder.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.rename(folder / file.name)
    return folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "a rank's part is missing", "no manifest", "torn manifest"])
def test_a_damaged_checkpoint_is_refused_for_the_one_before(tmp_path: Path, damage: str) -> None:
    older, newest = write(tmp_path, "step-000004"), write(tmp_path, "step-000008")
    assert newest_valid(newest) == (newest, [])
    match damage:
        case "truncated":
            (newest / "rng-1").write_bytes(bytes(50))
        case "missing":
            (newest / "rng-0").unlink()
        case "a rank's part is missing":
            (newest / "rng-1").unlink()
            (newest / "manifest-1.json").unlink()
        case "no manifest":
            (newest / "manifest-0.json").unlink()
        case _:
            (newest / "manifest-0.json").write_text('{"ranks": 2, "fi')
    assert newest_valid(newest) == (older, ["step-000008"])


def test_none_is_left(tmp_path: Path) -> None:
    newest = write(tmp_path, "step-000008")
    (newest / "rng-0").unlink()
    assert newest_valid(newest) == (None, ["step-000008"])


def test_a_refused_one_keeps_its_name(tmp_path: Path) -> None:
    assert free_name(tmp_path, 8) == "step-000008"
    write(tmp_path, "step-000008")
    again = free_name(tmp_path, 8)
    assert (again, step_of(tmp_path / again)) == ("step-000008-2", 8)
    newest = write(tmp_path, again)
    assert newest_valid(newest) == (newest, [])
