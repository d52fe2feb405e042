"""Adapter folders made to harm, each given to the registry, and what it says. `python file_attacks.py MODEL`.

A script of its own, so that it runs under `python -O` too; it uses no `assert`.
"""

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from raylign.cluster.errors import RaylignError
from raylign.cluster.weights import save_adapter
from raylign.serve.registry import Entry, Registry
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
WEIGHTS = "adapter_model.safetensors"
_NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def tensors(rank: int = 2, value: float = 1.0) -> dict[str, np.ndarray]:
    """A LoRA on one layer of the tiny model."""
    return {
        _NAME.format("A"): np.full((rank, 32), value, np.float32),
        _NAME.format("B"): np.full((32, rank), value, np.float32),
    }


def _header(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")


def _truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _link(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def _config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))


def _another_base(folder: Path) -> None:
    (folder / "provenance.json").write_text(json.dumps({"base_digest": "f" * 64}))


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "pickle beside it": lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"),
    "header of 2^63 bytes": lambda folder: _header(folder, 2**63),
    "truncated": _truncate,
    "NaN": lambda folder: save_file(tensors(value=float("nan")), folder / WEIGHTS),
    "rank 10^6 in the config": lambda folder: _config(folder, r=10**6),
    "rank 10^6 in a pattern": lambda folder: _config(folder, rank_pattern={"q_proj": 10**6}),
    "rank 10^6 in the weights": lambda folder: save_file(tensors(rank=10**6), folder / WEIGHTS),
    "another base": _another_base,
    "link out of the folder": _link,
    "other weights": lambda folder: save_file(tensors(value=2.0), folder / WEIGHTS),
    "other scale": lambda folder: _config(folder, lora_alpha=400),
    "nested config": lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
    "huge config": lambda folder: (folder / "adapter_config.json").write_bytes(b" " * (5 << 20)),
    "config that is no object": lambda folder: (folder / "adapter_config.json").write_text("[]"),
}


def _refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except RaylignError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _upload(root: Path, base: Entry, seed: float = 1.0) -> Path:
    return save_adapter(root, tensors(value=seed), CONFIG, {"base_digest": base.digest})[1]


def _swapped(registry: Registry, base: Entry, root: Path) -> str:
    """The folder is another's between its check and its use."""
    folder = _upload(root / "swapped", base)
    entry = registry.publish(folder, base)
    other = _upload(root / "other", base, seed=3.0)
    folder.rename(folder.with_name("gone"))
    other.rename(folder)
    return _refusal(lambda: registry.read_adapter(entry))


def _at_once(registry: Registry, base: Entry, root: Path) -> dict[str, Any]:
    """Eight uploads of one adapter and eight moves of one name, together."""
    found: list[str] = []

    def upload() -> None:
        entry = registry.publish(_upload(root / "at-once", base, seed=5.0), base)
        found.append(registry.promote("contested", entry.digest).digest)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = registry.alias("contested").moves
    return {
        "uploads": len(found),
        "digests": len(set(found)),
        "moves": len(moves),
        "left": len(list(root.rglob(".draft-*"))),
    }


def main() -> None:
    """Print what came of everything, as JSON."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        registry = Registry(root / "registry")
        base = registry.register_base(Path(sys.argv[1]))
        said: dict[str, Any] = {}
        for number, (name, harm) in enumerate(ATTACKS.items()):
            folder = _upload(root / str(number), base)
            harm(folder)
            said[name] = _refusal(lambda folder=folder: registry.publish(folder, base))
        said["registered"] = len(registry.entries()) - 1
        said["swapped after its check"] = _swapped(registry, base, root)
        said["at once"] = _at_once(registry, base, root)
        print(json.dumps(said))


if __name__ == "__main__":
    main()
