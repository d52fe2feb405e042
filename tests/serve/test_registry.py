"""The registry registers only what proves itself, and every reader sees whole entries."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.errors import InputError, NotFound
from raylign.cluster.weights import save_adapter
from raylign.serve.registry import Entry, Registry

from .conftest import CONFIG
from .conftest import tensors as _tensors


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def base(registry: Registry, tiny_model: Path) -> Entry:
    return registry.register_base(tiny_model)


def _adapter(tmp_path: Path, base: str, seed: int = 0, tensors: dict[str, np.ndarray] | None = None) -> Path:
    provenance = {"base_digest": base, "run": "test"}
    return save_adapter(tmp_path / "adapters", tensors or _tensors(seed), CONFIG, provenance)[1]


def test_a_published_adapter_is_found_by_digest_prefix_and_alias(
    registry: Registry, base: Entry, tmp_path: Path
) -> None:
    folder = _adapter(tmp_path, base.digest)
    entry = registry.publish(folder, base, {"run": "test"})
    registry.promote("mine", entry.digest)
    assert (entry.digest, entry.kind, entry.base) == (folder.name, "adapter", base.digest)
    assert registry.state(entry.digest) == "verified"
    assert registry.resolve("mine") == registry.resolve(entry.digest) == registry.resolve(entry.digest[:12]) == entry
    assert registry.entries() == [base, entry]
    assert registry.publish(folder, base) == entry, "a second registration is the first"


def test_an_alias_moves_and_remembers(registry: Registry, base: Entry, tmp_path: Path) -> None:
    first, second = (registry.publish(_adapter(tmp_path, base.digest, seed), base) for seed in (1, 2))
    for entry in (first, second, second):
        registry.promote("best", entry.digest)
    assert registry.aliases() == {"best": second.digest}
    assert [move.weights for move in registry.alias("best").moves] == [{first.digest: 1.0}, {second.digest: 1.0}]


def test_unknown_names_say_what_there_is(registry: Registry, base: Entry) -> None:
    registry.promote("start", base.digest)
    with pytest.raises(NotFound, match=f"no model 'other'.*start, {base.digest[:12]}"):
        registry.resolve("other")
    for name in ("../start", "a/b", "0" * 64, "", "x\0", "0" * 10):
        with pytest.raises(NotFound):
            registry.resolve(name)
    with pytest.raises(NotFound):
        registry.promote("start", "0" * 64)
    assert registry.aliases() == {"start": base.digest}


@pytest.mark.parametrize("name", ["../up", "", "a b", ".hidden", "x" * 65, "a\n", "0" * 64])
def test_bad_aliases_are_refused(registry: Registry, base: Entry, name: str) -> None:
    with pytest.raises(InputError, match="alias"):
        registry.promote(name, base.digest)


def test_an_adapter_for_another_base_is_refused(registry: Registry, base: Entry, tmp_path: Path) -> None:
    folder = _adapter(tmp_path, "f" * 64)
    with pytest.raises(InputError, match=f"made for base ffffffffffff, not for {base.digest[:12]}"):
        registry.publish(folder, base)
    (folder / "provenance.json").unlink()
    with pytest.raises(InputError, match="made for another base"):
        registry.publish(folder, base)


def test_changed_weights_are_refused(registry: Registry, base: Entry, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = _adapter(tmp_path, base.digest)
    entry = registry.publish(folder, base)
    save_file(_tensors(9), folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not what its name says"):
        registry.read_adapter(entry)


def test_values_that_are_not_finite_are_refused(registry: Registry, base: Entry, tmp_path: Path) -> None:
    tensors = _tensors(0)
    next(iter(tensors.values()))[0, 0] = np.nan
    with pytest.raises(InputError, match=r"lora_A\.weight has values that are not finite"):
        registry.publish(_adapter(tmp_path, base.digest, tensors=tensors), base)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "broken"), (b"\xff" * 8 + b"{}", "broken"), ((2**63).to_bytes(8, "little") + b"{}", "broken")],
    ids=["empty", "endless header", "header of 2^63"],
)
def test_broken_safetensors_are_refused(
    registry: Registry, base: Entry, tmp_path: Path, content: bytes, message: str
) -> None:
    folder = _adapter(tmp_path, base.digest)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        registry.publish(folder, base)
    assert registry.entries() == [base]


def test_files_that_can_run_code_and_links_are_refused(registry: Registry, base: Entry, tmp_path: Path) -> None:
    folder = _adapter(tmp_path, base.digest)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"adapter_model\.bin can run code"):
        registry.publish(folder, base)
    (folder / "adapter_model.bin").unlink()
    (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        registry.publish(folder, base)


def test_a_folder_that_is_no_model_is_no_base(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        registry.register_base(tmp_path)


def test_writers_at_once_lose_nothing_and_readers_see_whole_files(
    registry: Registry, base: Entry, tmp_path: Path
) -> None:
    entries = [registry.publish(_adapter(tmp_path, base.digest, seed), base) for seed in range(2)]
    registry.promote("moving", base.digest)
    writing = threading.Event()

    def write(digest: str) -> None:
        for _ in range(20):
            registry.promote("moving", digest)

    def read() -> None:
        while not writing.is_set():
            json.loads((registry.root / "aliases" / "moving.json").read_text())
            registry.resolve("moving")

    writers = [threading.Thread(target=write, args=(entry.digest,)) for entry in entries]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    writing.set()
    reader.join()
    steps = [digest for move in registry.alias("moving").moves for digest in move.weights]
    assert steps[0] == base.digest
    assert set(steps) == {base.digest, *(entry.digest for entry in entries)}
    assert steps[-1] == registry.aliases()["moving"]
    assert not list(registry.root.rglob(".*.json.*")), "no draft is left behind"
