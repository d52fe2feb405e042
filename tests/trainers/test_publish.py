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
from raylign.trainers.publish import promote, publish, registry_root
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
