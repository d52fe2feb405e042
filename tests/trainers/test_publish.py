"""Which stages of a run become names that are served."""

from pathlib import Path

from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest, save_adapter
from raylign.serve.registry import Registry
from raylign.trainers.adapters import export_weights, open_model
from raylign.trainers.config import RunConfig
from raylign.trainers.pipeline import Finished
from raylign.trainers.publish import publish, registry_root
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
    assert Registry(registry_root(run)).resolve("best").digest == digest
