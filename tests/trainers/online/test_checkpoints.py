"""A checkpoint is whole or it does not exist."""

from pathlib import Path

import pytest
from raylign.trainers.online.checkpoints import latest_checkpoint, write_checkpoint


def fill(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, {"digest": f"d{step}"}, fill(str(step)))
    found, broken = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["digest"], broken) == (15, "d15", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]


@pytest.mark.parametrize("damage", ["truncate", "missing", "manifest", "extra"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    write_checkpoint(tmp_path, 5, {}, fill("five"))
    bad = write_checkpoint(tmp_path, 10, {}, fill("ten")).path
    match damage:
        case "truncate":
            (bad / "weights").write_text("te")
        case "missing":
            (bad / "weights").unlink()
        case "manifest":
            (bad / "manifest.json").write_text("{")
        case "extra":
            (bad / "more").write_text("x")
    found, broken = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, broken) == (5, ["step-000010"])


def test_a_write_that_fails_leaves_what_was(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, {}, fill("five"))

    def no_space(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 10, {}, no_space)
    found, broken = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, broken) == (5, [])


def test_without_any(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") == (None, [])


def test_torn_newer_ones_do_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    for step in (110, 120):
        write_checkpoint(tmp_path, step, {}, fill(str(step)))
    write_checkpoint(tmp_path, 130, {}, fill("130"))
    for step in (120, 130):
        (tmp_path / f"step-{step:06d}" / "manifest.json").write_bytes(b"\xff\xfe\x00")
    write_checkpoint(tmp_path, 115, {}, fill("115"))
    found, broken = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, broken) == (115, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000115", "torn-step-000120", "torn-step-000130"]


def test_a_write_that_fails_gives_its_space_back(tmp_path: Path) -> None:
    def no_space(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 10, {}, no_space)
    assert list(tmp_path.iterdir()) == []
