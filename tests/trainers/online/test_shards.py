"""Shards: any number of ranks reads what any number of them wrote, and what is written is the state as it was."""

import hashlib
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from raylign.cluster.errors import RunFailed
from raylign.trainers.online.learner import Learner
from raylign.trainers.online.ranks import Ranks
from raylign.trainers.online.shards import Shards
from raylign.trainers.stages import OnlineStage
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

STAGE = OnlineStage.model_validate(
    {"data": {"path": "prompts.jsonl"}, "rewards": [{"type": "format", "pattern": "4"}], "steps": 4}
)


def network(ranks: int, *, seed: int = 0) -> nn.Module:
    """Two layers; of 3 rows and of 1 row, so that two ranks hold unlike parts, and one of them none."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    if ranks > 1:
        fully_shard(made, mesh=init_device_mesh("cpu", (ranks,)))
    return made


def learner(model: nn.Module, *, rank: int = 0, updates: int = 0) -> Learner:
    ranks = Ranks("cpu")
    ranks.rank = rank
    made = Learner("policy", dict(model.named_parameters()), STAGE, 0, peak=0.1, ranks=ranks)
    for _ in range(updates):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) * parameter.detach()
        made._optimizer.step()
    return made


def whole(learned: Learner) -> dict[str, torch.Tensor]:
    state = learned._state()
    return {k: t.full_tensor() if isinstance(t, DTensor) else t.clone() for k, t in state.items()}


def be_a_rank(rank: int, folder: Path) -> None:
    """One of two: writes what it learned, and reads what one rank wrote."""
    torch.set_num_threads(1)
    where, limit = f"file://{folder}/meeting", timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=limit)
    learned = learner(network(2), rank=rank, updates=2)
    learned.save(folder / "two")
    assert learned.written(wait=True)
    other = learner(network(2, seed=1), rank=rank)
    other.load(folder / "one")
    found = whole(other)
    if not rank:
        save_file(found, folder / "found")
    torch.distributed.destroy_process_group()


def test_two_ranks_read_what_one_wrote_and_one_what_two_wrote(tmp_path: Path) -> None:
    learned = learner(network(1), updates=2)
    expected = whole(learned)
    learned.save(tmp_path / "one")
    assert learned.written(wait=True)
    rank_1 = torch.multiprocessing.get_context("spawn").Process(target=be_a_rank, args=(1, tmp_path))
    rank_1.start()
    be_a_rank(0, tmp_path)
    rank_1.join()
    assert rank_1.exitcode == 0
    other = learner(network(1, seed=1))
    other.load(tmp_path / "two")
    for found in (whole(other), load_file(tmp_path / "found")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert len(expected) == 4 * 4  # weights, two moments and the number of updates
    other.save(tmp_path / "again")
    again, once = other.written(wait=True), learned.written(wait=True)
    assert again
    assert once
    assert again.digests == once.digests  # equal states are equal files
    first, second = sorted((tmp_path / "two/policy").iterdir())
    assert load_file(first)["weights/0.weight"].shape == (2, 5)
    assert load_file(second)["weights/0.weight"].shape == (1, 5)
    assert not any(key.endswith("/step") for key in load_file(second))


def test_what_is_written_is_the_state_at_the_time_of_saving_with_its_digest(tmp_path: Path) -> None:
    state = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        "t": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
        "n": torch.tensor(3.0),
    }
    before = {key: value.clone() for key, value in state.items()}
    shards = Shards("policy", "cpu")
    assert shards.written(wait=True) is None
    shards.begin(state, tmp_path)
    for value in state.values():
        value.zero_()
    written = shards.written(wait=True)
    assert written is not None
    file = tmp_path / "policy/shard-00000.safetensors"
    assert written.folder == tmp_path
    assert written.bytes == file.stat().st_size
    assert written.digests == {"policy/shard-00000.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()}
    found = load_file(file)
    assert {k: (v.dtype, v.tolist()) for k, v in found.items()} == {k: (v.dtype, v.tolist()) for k, v in before.items()}
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    assert [key for key in header if key != "__metadata__"] == ["t", "a", "n", "b"]  # each stands aligned


def test_the_copy_in_memory_is_made_in_the_same_place_each_time(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(4))
    shards = Shards("policy", "cpu")
    places = []
    for _ in range(2):
        shards.begin({"w": parameter.detach()}, tmp_path)
        assert shards.written(wait=True)
        places.append(next(iter(shards._stager._state_dict_stager._cached_storage_mapping.values())).data_ptr())
    assert places[0] == places[1] != parameter.data_ptr()


def test_a_checkpoint_before_the_first_update_has_no_moments(tmp_path: Path) -> None:
    new = learner(network(1))
    new.save(tmp_path)
    assert new.written(wait=True)
    other = learner(network(1, seed=1), updates=1)
    other.load(tmp_path)
    assert all(torch.equal(value, whole(new)[key]) for key, value in whole(other).items())
    assert len(whole(other)) == 4


def test_another_model_and_another_layout_are_refused(tmp_path: Path) -> None:
    one = learner(network(1))
    one.save(tmp_path / "new")
    assert one.written(wait=True)
    with pytest.raises(RunFailed, match="of another adapter or model: its tensors have other names or shapes"):
        learner(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))).load(tmp_path / "new")
    (tmp_path / "old").mkdir()
    save_file({"0.weight": torch.zeros(3, 5)}, tmp_path / "old/policy.safetensors")
    with pytest.raises(
        RunFailed, match="old has no shards of the policy: an older raylign wrote it; begin another run"
    ):
        one.load(tmp_path / "old")


def test_a_full_disk_is_told_by_who_asks_for_what_was_written(small_disk: Path) -> None:
    shards = Shards("policy", "cpu")
    shards.begin({"w": torch.zeros(200_000)}, small_disk / ".step-000005")
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"the policy cannot write its checkpoint .*step-000005: No space left"):
            shards.written(wait=True)
