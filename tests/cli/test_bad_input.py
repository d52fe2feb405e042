"""What a user can get wrong: one line with the place and the mend, the right exit code, no Ray and nothing left behind.

Every case is a small recipe folder that works, with one thing spoilt, given to `raylign run` and `raylign check`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raylign.cluster.weights import save_adapter

from .conftest import Command

RECIPE = """\
name: small
model: {path: ./model}
stages:
  - type: sft
    adapter: {r: 2}
    data: {path: train.jsonl}
    batch_size: 4
    steps: 2
  - type: grpo
    data: {path: prompts.jsonl}
    batch_size: 16
    steps: 2
    rollout: {workers: 2}
    rewards:
      - {type: function, path: "rewards.py:exact"}
cluster: {cpus: 8}
"""

PREPARE = "def prepare(out, seed):\n    (out / 'made.txt').write_text('made')\n"
REWARDS = "def exact(completion, row):\n    return float(completion == row['answer'])\n"
CONVERSATION = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}
QUESTION = {"prompt": "1+1", "answer": "2"}


@dataclass(frozen=True, slots=True)
class Bench:
    """A recipe folder that works until a test spoils it."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "small.yaml"

    def edit(self, old: str, new: str) -> None:
        text = self.recipe.read_text()
        assert old in text
        self.recipe.write_text(text.replace(old, new, 1))

    def rows(self, name: str, rows: list[Any]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def adapter(self, inputs: int, **provenance: str) -> None:
        """An adapter of rank 2 for a query projection with that many inputs, and the recipe that starts from it."""
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {f"{layer}.lora_A.weight": np.zeros((2, inputs)), f"{layer}.lora_B.weight": np.zeros((32, 2))}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        _, made = save_adapter(self.folder / "adapters", tensors, config, {"base_digest": "0" * 64})
        (made / "provenance.json").unlink()
        if provenance:
            (made / "provenance.json").write_text(json.dumps(provenance))
        made.rename(self.folder / "adapter")
        self.edit("adapter: {r: 2}", "adapter: {r: 2, path: adapter}")


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    folder = tmp_path / "recipes"
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "model")
    made = Bench(folder)
    made.recipe.write_text(RECIPE)
    made.rows("train.jsonl", [CONVERSATION] * 4)
    made.rows("prompts.jsonl", [QUESTION] * 4)
    (folder / "rewards.py").write_text(REWARDS)
    return made


Spoil = Callable[[Bench], None]


def _write(name: str, text: str | bytes) -> Spoil:
    def spoil(bench: Bench) -> None:
        (bench.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def _rows(name: str, rows: list[Any]) -> Spoil:
    return lambda bench: bench.rows(name, rows)


def _edit(old: str, new: str) -> Spoil:
    return lambda bench: bench.edit(old, new)


def _remove(name: str) -> Spoil:
    return lambda bench: (bench.folder / name).unlink()


def _adapter_without_config(bench: Bench) -> None:
    bench.adapter(32)
    (bench.folder / "adapter" / "adapter_config.json").unlink()


def _prepare(path: str, text: str = PREPARE) -> Spoil:
    """A `prepare` section that means that path, and a `make.py` of that text."""

    def spoil(bench: Bench) -> None:
        bench.edit("name: small\n", f"name: small\nprepare: {{path: {path!r}}}\n")
        (bench.folder / "make.py").write_text(text)

    return spoil


def _nothing_prepared(bench: Bench) -> None:
    _prepare("make.py:prepare")(bench)
    bench.edit("train.jsonl", "prepared://made.txtt")


def _no_template(bench: Bench) -> None:
    (bench.folder / "model" / "chat_template.jinja").unlink()


def _no_tokenizer(bench: Bench) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bench.folder / "model" / name).unlink()


SILENT = {"messages": [{"role": "user", "content": "2+2"}]}
LONG = {"messages": [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "4"}]}
RAISES = "def prepare(out, seed):\n    raise ValueError('no\\nrows')\n"
SPOILT: dict[str, tuple[Spoil, list[str]]] = {
    # the recipe
    "unknown key": (_edit("steps: 2", "stps: 2"), ["small.yaml:8: stages.0.stps", "did you mean 'steps'?"]),
    "wrong type": (_edit("steps: 2", "steps: many"), ["small.yaml:8: stages.0.steps", "integer", "not 'many'"]),
    "below the bound": (_edit("steps: 2", "steps: 0"), ["small.yaml:8: stages.0.steps", "not 0"]),
    "unknown stage": (_edit("type: grpo", "type: grop"), ["small.yaml:9: stages.1", "did you mean 'grpo'?"]),
    "a number for a type": (_edit("type: grpo", "type: 3"), ["small.yaml:9: stages.1", "unknown type"]),
    "a stage that is text": (_edit("stages:\n", "stages:\n  - sft\n"), ["small.yaml:4: stages.0", "not 'sft'"]),
    "no model": (_edit("model: {path: ./model}\n", ""), ["small.yaml:1", "'model' is missing: add it"]),
    "key twice": (_edit("name: small", "name: a\nname: b"), ["small.yaml:2: key 'name' stands twice"]),
    "a list as key": (_edit("name: small", "? [a]\n: b\nname: small"), ["small.yaml", "not valid YAML"]),
    "broken yaml": (_edit("{cpus: 8}", "{cpus: 8"), ["small.yaml", "not valid YAML", "line"]),
    "not a mapping": (_write("small.yaml", "- name\n"), ["small.yaml is not a recipe"]),
    "empty recipe": (_write("small.yaml", ""), ["small.yaml is not a recipe"]),
    "not text": (_write("small.yaml", b"\xff\xfe\x00"), ["small.yaml is not a text file"]),
    "name": (_edit("name: small", "name: ../small"), ["small.yaml:1: name", "'../small'", "letters, digits"]),
    "group size": (
        _edit("batch_size: 16", "batch_size: 15"),
        ["small.yaml:9: stages.1", "15", "group_size 8: take 8"],
    ),
    "late adapter folder": (
        _edit("type: grpo", "type: grpo\n    adapter: {path: adapter}"),
        ["small.yaml", "stages.1.adapter.path", "first stage"],
    ),
    "a role that is not there": (
        _edit("rollout: {workers: 2}", "rollout: {workers: 2, resources: {colocate_with: critic}}"),
        ["small.yaml:9: stages.1: rollout.resources.colocate_with 'critic'", "it has policy, reward, rollout"],
    ),
    # data
    "no data file": (_edit("train.jsonl", "trian.jsonl"), ["no data file", "trian.jsonl", "did you mean train.jsonl?"]),
    "a folder as data": (
        _edit("train.jsonl", "model"),
        ["model/config.json holds one dict", "a data file is a list of objects"],
    ),
    "missing column": (_rows("train.jsonl", [{"question": 1}]), ["train.jsonl, row 1", "there are question", "map"]),
    "missing column later": (_rows("train.jsonl", [CONVERSATION, {}]), ["train.jsonl, row 2", "no column 'messages'"]),
    "mapped column": (
        _edit("{path: prompts.jsonl}", "{path: prompts.jsonl, columns: {prompt: promt}}"),
        ["prompts.jsonl, row 1", "no column 'promt'", "did you mean prompt?"],
    ),
    "empty data": (_rows("train.jsonl", []), ["train.jsonl has no rows"]),
    "not JSON": (_write("train.jsonl", '{"messages": 1}\n{"mess\n'), ["train.jsonl:2 is not JSON"]),
    "not text data": (
        _write("train.jsonl", b"\xff\xfe\x00\n"),
        ["train.jsonl is not UTF-8 text"],
    ),
    "nothing supervised": (
        _rows("train.jsonl", [CONVERSATION, SILENT]),
        ["train.jsonl, row 2: stage sft", "no supervised tokens", "no assistant message"],
    ),
    "too long": (
        _rows("train.jsonl", [LONG]),
        ["train.jsonl, row 1: stage sft", "more than max_length 1024", "truncate"],
    ),
    # the model
    "no model folder": (_edit("./model", "./modle"), ["no model folder at", "modle", "did you mean model?"]),
    "no config": (_remove("model/config.json"), ["model is not a model folder", "no config.json"]),
    "no weights": (_remove("model/model.safetensors"), ["model has no *.safetensors", "save the model there"]),
    "no tokenizer": (_no_tokenizer, ["model has no tokenizer", "save_pretrained"]),
    "broken tokenizer": (_write("model/tokenizer.json", "{"), ["model: the tokenizer cannot be read"]),
    "no template": (_no_template, ["model has no chat template", "chat_template.jinja"]),
    "a hub id nobody has": (_edit("./model", "nobody-org/nothing"), ["'nobody-org/nothing' is no folder here"]),
    # the adapter to start from
    "adapter of other shape": (lambda b: b.adapter(48), ["stages.0", "adapter is for another base", "48"]),
    "adapter of another digest": (
        lambda b: b.adapter(32, base_digest="f" * 64),
        ["adapter was trained on another base", "ffffffffffff", "give the base it was trained on"],
    ),
    "no adapter folder": (_edit("{r: 2}", "{r: 2, path: nowhere}"), ["stages.0", "no adapter folder", "nowhere"]),
    "adapter without config": (
        _adapter_without_config,
        ["adapter has no adapter_config.json"],
    ),
    # code of the user's
    "reward file": (_edit("rewards.py", "reward.py"), ["reward.py:exact", "there is no file"]),
    "reward module": (_edit("rewards.py:", "no_such.module:"), ["does not import", "No module named 'no_such'"]),
    "reward import": (
        _write("rewards.py", "import nothing_here\n"),
        ["does not import", "nothing_here", "rewards.py:1"],
    ),
    "reward syntax": (_write("rewards.py", "def exact(:\n"), ["does not import: SyntaxError", "rewards.py, line 1"]),
    "reward function": (
        _edit("rewards.py:exact", "rewards.py:exakt"),
        ["no function 'exakt'", "did you mean 'exact'?"],
    ),
    "reward signature": (_write("rewards.py", "def exact(a, b, c): ...\n"), ["takes (a, b, c)", "f(completion, row)"]),
    "prepare file": (_prepare("mak.py:prepare"), ["prepare", "there is no file", "mak.py"]),
    "prepare function": (_prepare("make.py:prepar"), ["'prepar'", "did you mean 'prepare'?"]),
    "prepare without function": (_prepare("make.py"), ["prepare.path", "file.py:function"]),
    "prepare raises": (
        _prepare("make.py:prepare", RAISES),
        ["make.py:prepare failed: ValueError: no rows", "make.py:2"],
    ),
    "nothing prepared": (_nothing_prepared, ["no data file", "made.txtt", "did you mean made.txt?"]),
}


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize("case", SPOILT)
def test_one_line_says_what_is_wrong(raylign: Command, bench: Bench, case: str, verb: str) -> None:
    spoil, words = SPOILT[case]
    spoil(bench)
    ended = raylign(verb, bench.recipe)
    assert ended.code == 2
    for word in words:
        assert word in ended.said
    assert not list(Path.cwd().glob("runs/*"))
    if verb == "run":
        assert not ended.out


def test_the_recipe_that_is_spoilt_here_is_sound(raylign: Command, bench: Bench) -> None:
    ended = raylign("check", bench.recipe, "--json")
    assert (ended.code, [s["refused"] for s in json.loads(ended.out)["data"]]) == (0, [0, 0])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["--set 'seed'", "key.path=value"]),
        ("=3", ["--set '=3'", "key.path=value"]),
        ("stages.7.steps=1", ["nothing at stages.7.steps"]),
        ("name.first=1", ["nothing at name.first"]),
        ("stages.0.stps=1", ["small.yaml with stages.0.stps=1: stages.0.stps", "did you mean 'steps'?"]),
        ("stages.0.steps=many", ["small.yaml with stages.0.steps=many", "not 'many'"]),
        ("name=a/b", ["small.yaml with name=a/b", "'a/b'", "letters, digits"]),
        ("seed=[", ["--set 'seed=['", "not a YAML value"]),
    ],
)
def test_an_override_is_named_where_it_is_wrong(
    raylign: Command, bench: Bench, override: str, words: list[str]
) -> None:
    ended = raylign("run", bench.recipe, "--set", override)
    assert ended.code == 2
    for word in words:
        assert word in ended.said


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_missing_recipe_names_the_nearest(raylign: Command, bench: Bench, verb: str) -> None:
    ended = raylign(verb, bench.folder / "smal.yaml")
    assert ended.code == 2
    assert "did you mean small.yaml?" in ended.said


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.workers=9", ["train worker 9 of 9 does not fit"]),
        ("stages.1.rollout.workers=20", ["rollout 8 of 20 does not fit", "asked: policy 1 × 1 CPU"]),
        ("stages.1.rollout.resources={split_from: policy}", ["rollout 1 of 2", "one node only", "several nodes"]),
        ("stages.1.scoring.resources={cpus: 8, colocate_with: policy}", ["policy with reward", "a node with 9 CPU"]),
        ("stages.0.resources={gpus: 99}", ["train worker 1 of 1", "1 CPU + 99 GPU", "no node is large enough"]),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(
    raylign: Command, bench: Bench, verb: str, override: str, words: list[str]
) -> None:
    ended = raylign(verb, bench.recipe, "--set", "stages.0.batch_size=36", "--set", override)
    assert ended.code == 3
    for word in [*words, "this machine has 8 CPU"]:
        assert word in ended.said
    assert not list(Path.cwd().glob("runs/*"))


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("127.0.0.1:1", 5, "no Ray cluster answers at 127.0.0.1:1"),
        ("http://127.0.0.1:1", 2, "is a jobs URL"),
        ("somewhere", 2, "needs the form host:port"),
    ],
)
def test_a_cluster_that_is_not_there(
    raylign: Command, bench: Bench, verb: str, address: str, code: int, says: str
) -> None:
    bench.rows("train.jsonl", [])  # the address is looked at first
    ended = raylign(verb, bench.recipe, "--address", address)
    assert ended.code == code
    assert says in ended.said
    assert not list(Path.cwd().glob("runs/*"))


def test_all_refused_rows_are_listed_and_json_stays_json(raylign: Command, bench: Bench) -> None:
    bench.rows("train.jsonl", [SILENT, CONVERSATION, SILENT])
    ended = raylign("check", bench.recipe, "--json")
    assert ended.code == 2
    assert "row 1: no supervised tokens" in ended.said
    assert [r["row"] for r in json.loads(ended.out)["data"][0]["refusals"]] == [1, 3]


def test_debug_shows_the_traceback_and_keeps_the_code(raylign: Command, bench: Bench) -> None:
    for arguments in (("--debug", "check", "none.yaml"), ("check", "none.yaml", "--debug")):
        ended = raylign(*arguments)
        assert ended.code == 2
        assert "Traceback" in ended.err
        assert ended.err.splitlines()[-1].startswith("error: InputError: no recipe at none.yaml")


def test_what_nobody_foresaw_is_one_line_too(raylign: Command, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from raylign.trainers.data import inputs

    def defect(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(inputs, "load_tokenizer", defect)
    ended = raylign("run", bench.recipe, "--json")
    assert (ended.code, ended.out) == (1, "")
    assert "KeyError: 'lost' (not foreseen: --debug shows the traceback)" in ended.said
    assert not list(Path.cwd().glob("runs/*"))
