"""Where a name points: parts that hold, users who stay, and the way back."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError, NotFound
from raylign.cluster.weights import save_adapter
from raylign.serve.aliases import Alias, Move, parse_split
from raylign.serve.registry import Registry

from .conftest import CONFIG, Shelf, tensors


def _alias(*weights: dict[str, float]) -> Alias:
    return Alias(name="best", moves=tuple(Move(weights=w, since=i) for i, w in enumerate(weights)))


def test_a_split_holds_its_parts_and_every_user_stays() -> None:
    alias = _alias({"a": 0.9, "b": 0.1})
    users = [f"user-{i}" for i in range(5000)]
    first = {user: alias.pick(user) for user in users}
    assert first == {user: alias.pick(user) for user in users}
    share = Counter(first.values())["b"] / len(users)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(users)) ** 0.5
    assert alias.pick(None) == "a", "who has no name gets what most get"


def test_who_is_in_a_canary_stays_there_while_it_grows() -> None:
    users = [f"user-{i}" for i in range(2000)]
    small, large = _alias({"a": 0.9, "b": 0.1}), _alias({"a": 0.6, "b": 0.4})
    assert all(large.pick(user) == "b" for user in users if small.pick(user) == "b")


def test_rollback_goes_back_step_by_step_and_forgets_nothing() -> None:
    alias = _alias({"a": 1.0}, {"b": 1.0}, {"c": 1.0})
    back = alias.rolled_back(9, "slow")
    assert (back.digest, back.now.why, len(back.moves)) == ("b", "slow", 4)
    assert back.rolled_back(10, "").digest == "a"
    with pytest.raises(InputError, match="nothing to go back to"):
        back.rolled_back(10, "").rolled_back(11, "")
    after = back.moved(Move(weights={"d": 1.0}, since=12))
    assert after.rolled_back(13, "").digest == "b", "what was rolled back is not where it pointed before"


@pytest.mark.parametrize("text", ["", "a:1", "best=", "best=a", "best=a:0", "best=a:-1", "best=a:x", "best=a:1,a:2"])
def test_a_split_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="split"):
        parse_split(text)
    assert parse_split("best=x:9,y:1") == ("best", {"x": 0.9, "y": 0.1})


@pytest.fixture
def two(tmp_path: Path, tiny_model: Path) -> tuple[Registry, str, str]:
    registry = Registry(tmp_path / "registry")
    base = registry.register_base(tiny_model)
    folders = [save_adapter(tmp_path / "adapters", tensors(s), CONFIG, {"base_digest": base.digest})[1] for s in (1, 2)]
    first, second = (registry.publish(folder, base).digest for folder in folders)
    registry.promote("best", first)
    return registry, first, second


def test_a_retired_model_is_not_served_and_what_is_pointed_at_is_not_retired(two: tuple[Registry, str, str]) -> None:
    registry, first, second = two
    with pytest.raises(InputError, match="is what best points at"):
        registry.retire(first)
    registry.split("best", {first: 0.9, second: 0.1})
    with pytest.raises(InputError, match="is what best points at"):
        registry.retire(second)
    registry.promote("best", first)
    registry.retire(second)
    assert (registry.state(second), registry.find(second).digest) == ("retired", second)
    for refused in (lambda: registry.resolve(second), lambda: registry.promote("best", second)):
        with pytest.raises(NotFound, match="retired"):
            refused()
    with pytest.raises(NotFound, match="retired"):
        registry.rollback("best")  # where it pointed before is in part what was retired
    assert registry.resolve("best").digest == first


def test_a_rollback_of_a_model_that_is_gone_already_moves_nothing(two: tuple[Registry, str, str]) -> None:
    registry, first, second = two
    registry.promote("best", second)
    assert registry.rollback("best", only_from=first).digest == second
    assert registry.rollback("best", only_from=second).digest == first
    assert registry.rollback("best", only_from=second).digest == first, "a second replica that saw the same"


@pytest.mark.parametrize("name", ["../up", "a\0b", "%2e%2e", "x" * 10_240, "b\u0435st", "BEST", "best\n", "-best"])
def test_names_that_lead_elsewhere_or_look_like_another_are_refused(two: tuple[Registry, str, str], name: str) -> None:
    registry, first, _ = two
    with pytest.raises(InputError, match="alias"):
        registry.promote(name, first)
    with pytest.raises(NotFound) as error:
        registry.resolve(name)
    assert len(str(error.value)) < 1000
    assert list(registry.aliases()) == ["best"]


def test_the_command_line_moves_names(two: tuple[Registry, str, str]) -> None:
    registry, first, second = two

    def raylign(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "raylign.cli", "models", *arguments, "--storage", str(registry.root.parent)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    split = json.loads(raylign("split", f"best={first[:12]}:90,{second[:12]}:10", "--json", "--why", "try").stdout)
    assert split["moves"][-1]["weights"] == {first: 0.9, second: 0.1}
    assert raylign("promote", "best", second[:8]).stdout == f"best is {second[:12]} 100%\n"
    assert raylign("rollback", "best").stdout == f"best is {first[:12]} 90%, {second[:12]} 10%\n"
    shown = json.loads(raylign("show", second[:8], "--json").stdout)
    assert (shown["names"], shown["state"]) == (["best"], "verified")
    refused = raylign("retire", second[:8])
    assert (refused.returncode, "best points at" in refused.stderr) == (2, True)
    assert raylign("promote", "best").returncode == 2
    assert raylign("show", "nobody").returncode == 4


def test_a_service_answers_by_the_split_of_the_user(shelf: Shelf, served: object) -> None:
    from .live import Live

    assert isinstance(served, Live)
    shelf.registry.split("canary", {shelf.first.digest: 0.5, shelf.second.digest: 0.5})
    client = served.client()
    for user in ("u1", "u2", "u3", "u4", "u5", "u6"):
        answer = client.completions.create(model="canary", prompt="Hi", max_tokens=1, user=user)
        assert answer.system_fingerprint == shelf.registry.resolve("canary", user).digest
    seen = {shelf.registry.resolve("canary", f"u{i}").digest for i in range(1, 7)}
    assert seen == {shelf.first.digest, shelf.second.digest}
