"""A checkpoint is whole or it does not exist."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import InputError, RunFailed
from raylign.trainers.online.checkpoints import Checkpoint, Checkpoints, Draft, Keep, latest_checkpoint
from raylign.trainers.stages import OnlineStage

Fill = Callable[[Path], object]


def fill(text: str) -> Fill:
    return lambda folder: (folder / "weights").write_text(text)


def write_checkpoint(root: Path, step: int, state: dict[str, Any], fill: Fill, keep: Keep | None = None) -> Checkpoint:
    return Draft.begin(root, step, state, fill).finish({}, keep or Keep())


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, {"digest": f"d{step}"}, fill(str(step)))
    found, broken = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["digest"], broken) == (15, "d15", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]


def test_the_best_stay_beside_the_last_and_of_equals_the_later(tmp_path: Path) -> None:
    scores = {5: 0.1, 10: 0.9, 15: 0.9, 20: 0.3, 25: 0.2, 30: None}
    for step, score in scores.items():
        write_checkpoint(tmp_path, step, {"score": score} if score else {}, fill("x"), Keep(last=2, best=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000015", "step-000025", "step-000030"]


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_torn(small_disk: Path) -> None:
    def save(elements: int) -> Fill:
        return lambda folder: (folder / "weights").write_bytes(b"x" * elements)

    write_checkpoint(small_disk, 5, {}, save(400))
    with pytest.raises(RunFailed, match=r"checkpoint of step 10 cannot be written to .*: No space left on device"):
        write_checkpoint(small_disk, 10, {}, save(800_000))
    draft = Draft.begin(small_disk, 10, {}, save(400))
    (small_disk / "ballast").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(RunFailed, match="checkpoint of step 10 cannot be written"):
        draft.finish({})
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "step-000005"]
    found, broken = latest_checkpoint(small_disk)
    assert found is not None
    assert (found.step, broken) == (5, [])
    (small_disk / "ballast").unlink()
    assert write_checkpoint(small_disk, 10, {}, save(400)).step == 10


@pytest.mark.parametrize("damage", ["truncate", "byte", "missing", "manifest", "extra"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    write_checkpoint(tmp_path, 5, {}, fill("five"))

    def fill_shard(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy/shard-00001.safetensors").write_text("ten")

    bad = write_checkpoint(tmp_path, 10, {}, fill_shard).path
    shard = bad / "policy/shard-00001.safetensors"
    match damage:
        case "truncate":
            shard.write_text("te")
        case "byte":
            shard.write_text("tin")
        case "missing":
            shard.unlink()
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

    with pytest.raises(RunFailed, match=r"checkpoint of step 10 cannot be written to .*: No space left"):
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

    with pytest.raises(RunFailed, match=r"checkpoint of step 10 cannot be written to .*: No space left"):
        write_checkpoint(tmp_path, 10, {}, no_space)
    assert list(tmp_path.iterdir()) == []


def stage_of(**more: object) -> OnlineStage:
    rewards = [{"type": "format", "pattern": "4"}]
    return OnlineStage.model_validate({"data": {"path": "prompts.jsonl"}, "rewards": rewards, "steps": 40, **more})


def test_a_stage_keeps_the_checkpoint_of_its_best_steps_and_goes_on_from_the_last(tmp_path: Path) -> None:
    stage = stage_of(keep_last=1, keep_best={"metric": "kl", "mode": "min"}, checkpoint_every=2)
    kept = Checkpoints(tmp_path, stage, {"seed": 5})
    for step, kl in enumerate([0.9, 0.7, 0.1, 0.3, 0.5, 0.5], 1):  # means of two: 0.8, 0.2, 0.5
        kept.note({"reward/mean": 1.0, "kl": kl})
        if kept.due(step):
            kept.begin(step, {}, fill("x"))
            kept.finish({})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000006"]
    found, _ = Checkpoints(tmp_path, stage, {"seed": 5}).latest()
    assert found is not None
    assert found.state == {"seed": 5, "score": -0.5, "step": 6}
    with pytest.raises(RunFailed, match="was made with seed 5, and this run has 6"):
        Checkpoints(tmp_path, stage, {"seed": 6}).latest()


def test_a_metric_that_no_step_has_is_refused_at_the_first(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, stage_of(keep_best={"metric": "rewards/mean"}), {})
    with pytest.raises(InputError, match=r"keep_best.metric 'rewards/mean' is no metric of a step: there are kl, rew"):
        kept.note({"reward/mean": 1.0, "kl": 0.1})


def test_one_that_is_under_way_does_not_count_and_goes_when_it_is_given_up_or_left(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, stage_of(), {})
    kept.begin(5, {}, fill("five"))
    kept.finish({})
    kept.begin(10, {}, fill("ten"))
    assert (kept.saved, kept.newest) == (5, 10)
    assert latest_checkpoint(tmp_path)[0] == Checkpoint(tmp_path / "step-000005", 5, {"step": 5})
    again = Checkpoints(tmp_path, stage_of(), {})
    assert again.latest() == (Checkpoint(tmp_path / "step-000005", 5, {"step": 5}), [])
    again.begin(7, {}, fill("seven"))  # of a run that goes on from another place than the one that was killed
    again.drop()
    assert again.newest == 5
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_the_manifest_has_the_digests_of_those_who_wrote_and_those_of_all_other_files(tmp_path: Path) -> None:
    def parts(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy/shard-00000.safetensors").write_bytes(b"abc")
        (folder / "weights-7").write_bytes(b"")

    abc = hashlib.sha256(b"abc").hexdigest()
    made = Draft.begin(tmp_path, 5, {}, parts).finish({"policy/shard-00000.safetensors": abc})
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert set(manifest) == {"policy/shard-00000.safetensors", "state.json", "weights-7"}
    assert manifest["weights-7"] == hashlib.sha256(b"").hexdigest()
    assert latest_checkpoint(tmp_path) == (Checkpoint(made.path, 5, {"step": 5}), [])
    lying = Draft.begin(tmp_path, 10, {}, parts).finish({"policy/shard-00000.safetensors": "0" * 64})
    assert latest_checkpoint(tmp_path) == (Checkpoint(made.path, 5, {"step": 5}), [lying.path.name])
    gone = Draft.begin(tmp_path, 15, {}, fill("x")).finish({"policy/shard-00000.safetensors": abc})
    assert latest_checkpoint(tmp_path)[1] == [gone.path.name, lying.path.name]
