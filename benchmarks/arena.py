"""What the cases of one model share: its folder, engines and servers, each made when it is first asked for."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .contestants import ContinuousBatching, Generate, Native
from .models import Dtype, load_model, save_model
from .vllm_peer import Vllm


class Arena:
    """A context manager; leaving it closes and frees everything."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}
        self._exits = ExitStack()

    def __enter__(self) -> "Arena":
        self.root = Path(self._exits.enter_context(TemporaryDirectory(prefix="raylign-bench-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._made.clear()
        self._exits.close()

    def get(self, make: Any, *key: Any, **settings: Any) -> Any:
        """What `make(*key, **settings)` gives, made once."""
        name = (make, *key, *settings.items())
        if name not in self._made:
            self._made[name] = make(*key, **settings)
        return self._made[name]

    def entered(self, make: Any, *key: Any, **settings: Any) -> Any:
        """What the context manager `make(*key, **settings)` gives, entered once; it is left with the arena."""
        name = (make, *key, *settings.items())
        if name not in self._made:
            self._made[name] = self._exits.enter_context(make(*key, **settings))
        return self._made[name]

    def folder(self, size: str, dtype: Dtype) -> Path:
        """The saved model."""
        return self.get(save_model, size, dtype, self.root / f"{size}-{dtype}")

    def native(self, size: str, dtype: Dtype, *, slots: int, max_length: int, threads: int = 1) -> Native:
        """Our engine."""
        return self.get(Native, self.folder(size, dtype), dtype, slots=slots, max_length=max_length, threads=threads)

    def generate(self, size: str, dtype: Dtype) -> Generate:
        """TRL's generation path."""
        return self.get(_generate, self.folder(size, dtype), dtype)

    def continuous_batching(self, size: str, dtype: Dtype, *, slots: int, max_length: int) -> ContinuousBatching:
        """transformers' continuous batching."""
        return self.get(ContinuousBatching, self.folder(size, dtype), dtype, slots=slots, max_length=max_length)

    def vllm(self, size: str, dtype: Dtype) -> Vllm:
        """vLLM in a process of its own. Raises `Skipped`."""
        return self.get(Vllm, self.folder(size, dtype), dtype, self._exits)


def _generate(folder: Path, dtype: Dtype) -> Generate:
    return Generate(load_model(folder, dtype))
