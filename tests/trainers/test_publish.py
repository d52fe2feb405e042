"""Which stages of a run become names that are served, and when a run's model takes over the recipe's alias."""

import json
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest, save_adapter
from raylign.serve.registry import Registry
from raylign.trainers.adapters import export_weights, open_model
from raylign.trainers.config import RunConfig
from raylign.trainers.pipeline import Finished
from raylign.trainers.publish import measure_forgetting, promote, publish, registry_root
from raylign.trainers.stages import LoraConfig


def test_a_reward_model_gets_no_name_and_hides_no_policy(tiny_model: Path, tmp_path: Path) -> None:
    tensors, peft = export_weights(open_model(tiny_model, None, LoraConfig(r=4), seed=1))
    digest, adapter = save_adapter(tmp_path / "adapters", tensors, peft, {"base_digest": base_digest(tiny_model)})

    def stage(name: str, reward_model: str | None = None) -> Finished:
        return Finished(name, name, 1, 1.0, {}, str(tiny_model), str(adapter), digest=digest, reward_model=reward_model)

    pairs = {"type": "reward_model", "data": {"path": "pairs.jsonl"}}
    config = RunConfig.model_validate(
        {"name": "rlhf", "model": {"path": str(tiny_model)}, "stages": [pairs], "serve": {"alias": "best"}}
    )
    run = RunDir(tmp_path / "rlhf")
    run.path.mkdir()
    assert publish(config, run, [stage("sft"), stage("reward_model", str(tiny_model))]) == ["rlhf-base", "rlhf-sft"]
    assert promote(config, run, "rlhf-sft", {}, [])["promoted"], "without an evaluation nothing speaks against it"
    entry = Registry(registry_root(run)).resolve("best")
    assert (entry.digest, entry.provenance["run"], entry.provenance["parent"]) == (digest, "rlhf", entry.base)


@pytest.fixture
def published(tiny_model: Path, tmp_path: Path) -> tuple[RunConfig, Path, Registry]:
    """A recipe with an evaluation, and three bases in its registry by the names `old`, `new` and `other`."""
    registry = Registry(tmp_path / "registry")
    for number, name in enumerate(("old", "new", "other")):
        copy = tmp_path / name
        copy.mkdir()
        for path in tiny_model.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"number": number}))
        registry.promote(name, registry.register_base(copy).digest)
    recipe: dict[str, Any] = {
        "name": "gate",
        "model": {"path": str(tiny_model)},
        "stages": [{"type": "sft", "data": {"path": "rows.jsonl"}}],
        "evaluation": {"data": {"path": "held.jsonl"}, "rewards": [{"type": "format", "pattern": "x"}]},
        "serve": {"alias": "best"},
    }
    return RunConfig.model_validate(recipe), tmp_path, registry


def _scores(accuracy: float) -> dict[str, Any]:
    return {"n": 10, "greedy": accuracy, "t1": accuracy}


def _end(config: RunConfig, storage: Path, model: str, before: float, after: float, rows: str = "a") -> dict[str, Any]:
    run = RunDir(storage / f"run-{model}")
    run.path.mkdir(exist_ok=True)
    return promote(config, run, model, {"before": _scores(before), "after": _scores(after)}, [{"prompt": rows}])


def test_a_worse_model_does_not_pass_and_the_old_one_answers_on(published: tuple[RunConfig, Path, Registry]) -> None:
    config, storage, registry = published
    assert _end(config, storage, "old", before=0.1, after=0.6)["promoted"]
    said = _end(config, storage, "new", before=0.1, after=0.5)
    assert not said["promoted"]
    assert "worse: 50.0% of 10 held-out questions right, what the name points at 60.0%" in said["why"]
    assert registry.resolve("best") == registry.resolve("old")
    event = json.loads((storage / "run-new" / "events.jsonl").read_text().splitlines()[-1])
    assert event["kind"] == "not_promoted"
    assert _end(config, storage, "new", before=0.1, after=0.6)["promoted"], "as good is good enough"
    assert registry.resolve("best") == registry.resolve("new")
    assert registry.rollback("best").digest == registry.resolve("old").digest


def test_a_tolerance_lets_a_little_pass(published: tuple[RunConfig, Path, Registry]) -> None:
    config, storage, _ = published
    assert config.serve
    lenient = config.model_copy(update={"serve": config.serve.model_copy(update={"tolerance": 0.1})})
    assert _end(lenient, storage, "old", before=0.1, after=0.6)["promoted"]
    assert _end(lenient, storage, "new", before=0.1, after=0.51)["promoted"]
    assert not _end(lenient, storage, "other", before=0.1, after=0.4)["promoted"]


def test_other_questions_are_compared_with_where_the_stage_began(published: tuple[RunConfig, Path, Registry]) -> None:
    config, storage, registry = published
    assert _end(config, storage, "old", before=0.1, after=0.9)["promoted"]
    assert not _end(config, storage, "new", before=0.3, after=0.2, rows="b")["promoted"]
    assert registry.resolve("best") == registry.resolve("old")
    assert _end(config, storage, "new", before=0.2, after=0.3, rows="b")["promoted"]


def test_a_model_that_forgot_too_much_does_not_pass(published: tuple[RunConfig, Path, Registry]) -> None:
    config, storage, registry = published
    assert config.serve
    strict = config.model_copy(update={"serve": config.serve.model_copy(update={"max_forgetting": 0.2})})
    run = RunDir(storage / "run-forgetful")
    run.path.mkdir()
    better = {"before": _scores(0.1), "after": _scores(0.6)}
    said = promote(strict, run, "old", better | {"forgetting": 0.25}, [])
    assert (said["promoted"], said["why"]) == (
        False,
        "forgetful: the loss on general text rose by 0.250 nats a token, and serve.max_forgetting is 0.2",
    )
    assert "not shown to keep what it knew" in promote(strict, run, "old", better, [])["why"]
    assert registry.aliases().get("best") is None
    assert promote(strict, run, "old", better | {"forgetting": 0.2}, [])["promoted"]
    assert promote(config, run, "new", better | {"forgetting": 9.0}, [])["promoted"], "without a bound it is an alarm"


def test_what_an_adapter_forgot_is_measured_at_the_end_of_a_run(
    tiny_model: Path, tmp_path: Path, ray_session: str
) -> None:
    """An adapter of ten times its random weights ruins what the base knew; none at all changes nothing."""
    model = open_model(tiny_model, None, LoraConfig(r=4), seed=1)
    tensors, peft = export_weights(model)
    ruined = {name: weight + 10.0 if "lora_B" in name else weight for name, weight in tensors.items()}
    config = RunConfig.model_validate(
        {
            "name": "forgets",
            "model": {"path": str(tiny_model)},
            "stages": [{"type": "sft", "data": {"path": "rows.jsonl"}}],
            "serve": {"alias": "best", "resources": {"cpus": 0.5}},
        }
    )

    def ended(name: str, weights: Any) -> tuple[RunDir, dict[str, Any]]:
        digest, adapter = save_adapter(tmp_path / "adapters", weights, peft, {"base_digest": base_digest(tiny_model)})
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        last = Finished("sft", "sft", 7, 1.0, {}, str(tiny_model), str(adapter), digest=digest)
        return run, measure_forgetting(config, run, last)

    run, found = ended("fresh", tensors)
    assert found == {"forgetting": pytest.approx(0.0, abs=1e-6)}
    assert not run.events("alarm")
    run, found = ended("ruined", ruined)
    assert found["forgetting"] > 0.1
    (alarm,) = run.events("alarm")
    assert (alarm["stage"], alarm["step"], alarm["alarm"]) == ("sft", 7, "forgetting")
    whole = Finished("cpt", "cpt", 7, 1.0, {}, str(tiny_model), None)
    assert measure_forgetting(config, run, whole) == {}
