import gc
import importlib
import os
from pathlib import Path

import pytest
from raylign.cluster.imports import importing


def test_the_collector_rests_while_libraries_come_and_never_looks_at_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_library.py").write_text("THINGS = [{'of': n} for n in range(1_000)]")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    with importing():
        assert not gc.isenabled()
        brought = importlib.import_module("some_library").THINGS
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(brought)
    tracked = {id(thing) for thing in gc.get_objects()}
    assert not tracked & {id(thing) for thing in brought}
    gc.unfreeze()
    with importing():
        importlib.import_module("some_library")
    assert gc.get_freeze_count() == 0  # nothing new came


def test_nothing_is_compiled_as_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with importing():
        plain = torch.compile(lambda x: x + 1)
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert "_torchdynamo_orig_callable" not in vars(plain)
    assert plain(1) == 2
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with importing():
        pass
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
