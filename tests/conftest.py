"""Fixtures shared by all tests: tiny random models made on the spot, and one Ray session."""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # the benchmarks are no part of the wheel: they are found here, behind what is installed

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs vLLM where it is not installed: it has an environment of its own."""
    if find_spec("vllm"):
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm runs it"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (byte-level tokenizer, ChatML template)."""
    from benchmarks.models import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def tiny_grpo(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes a GRPO recipe on the tiny model: `tiny_grpo(name, **overrides)` gives its path.

    The reward counts vowels, so a random model has something to learn from the first step on. An override is a key of
    the recipe with `__` for a dot: `stages__0__steps=4`. While the file `hold` stands beside the recipe, the reward
    `held` waits: a test keeps the run in a step until it has seen or done what it wants.
    """
    (tmp_path / "rewards.py").write_text(TINY_REWARDS.format(hold=str(tmp_path / "hold")))
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "word {n}"}}\n' for n in range(10)))

    def write(name: str, **overrides: Any) -> Path:
        from raylign.trainers.recipe import dump_recipe, load_recipe

        path = tmp_path / f"{name}.yaml"
        path.write_text(TINY_GRPO.format(name=name, model=tiny_model))
        changed = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        path.write_text(dump_recipe(load_recipe(path, changed)))
        return path

    return write


TINY_REWARDS = """\
import os
import time


def vowels(completion, row):
    return float(sum(c in "aeiou" for c in completion))


def rare(completion, row):
    return float(any(c in "ab" for c in completion.lower()))


def held(completion, row):
    while os.path.exists({hold!r}):
        time.sleep(0.01)
    return vowels(completion, row)
"""

TINY_GRPO = """\
name: {name}
seed: 5
model: {{path: {model}}}
stages:
  - type: grpo
    adapter: {{type: lora, r: 4}}
    data: {{path: prompts.jsonl}}
    steps: 4
    batch_size: 32
    learning_rate: 1e-2
    checkpoint_every: 1
    rollout:
      workers: {{min: 1, max: 3, start: 1}}
      group_size: 8
      sampling: {{max_tokens: 12}}
      max_prompt_tokens: 40
      slots: 16
    rewards: [{{type: function, path: "rewards.py:vowels"}}]
    kl: {{coefficient: 0.01}}
"""


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """One local Ray for the whole test session; gives its address."""
    import ray
    from raylign.cluster.session import loopback_host

    here = {"_node_ip_address": host} if (host := loopback_host()) else {}
    context = ray.init(
        address="local", num_cpus=8, include_dashboard=False, namespace="raylign", log_to_driver=False, **here
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def shared_data() -> Path:
    """The folder of real rows beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real rows are not here: {SHARED_DATA} is absent")
    return SHARED_DATA
