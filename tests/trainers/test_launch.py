"""How a run ends on an exception that nobody foresaw: not at all, where its supervisor begins it again."""

import logging
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import RunFailed
from raylign.cluster.rundir import RunDir
from raylign.cluster.supervisor import Attempt
from raylign.trainers import launch
from raylign.trainers.opening import open_run
from raylign.trainers.recipe import load_recipe


@pytest.fixture
def begin(
    tmp_path: Path, tiny_grpo: Callable[..., Path], ray_session: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[BaseException, bool], RunDir]:
    """Launch a run whose pipeline raises that, under a supervisor, as its first controller or `again`."""

    def begin(error: BaseException, again: bool) -> RunDir:
        def pipeline(*_: Any) -> None:
            raise error

        monkeypatch.setattr(launch, "run_recipe", pipeline)
        config = load_recipe(tiny_grpo("defect", cluster__cpus=8))
        run = open_run(config, tmp_path / "runs", named=True, resume=True)
        with pytest.raises(RunFailed, match=re.escape(str(error))):
            launch.launch(config, run, lambda _: None, attempt=Attempt(again, run))
        return run

    return begin


def test_it_is_tried_once_more(begin: Callable[[BaseException, bool], RunDir]) -> None:
    defect = ZeroDivisionError("nobody foresaw it")
    run = begin(defect, False)
    assert (run.status()["status"], run.summary()) == ("running", {})
    assert "nobody foresaw it" in (run / "run.log").read_text()
    run = begin(defect, True)
    assert run.status()["status"] == run.summary()["status"] == "failed"
    assert run.summary()["reason"].startswith("ZeroDivisionError: nobody foresaw it; no checkpoint had been written")


def test_what_the_machine_refuses_is_the_end_at_once(begin: Callable[[BaseException, bool], RunDir]) -> None:
    assert begin(OSError(28, "No space left on device"), False).summary()["status"] == "failed"


def test_an_end_that_cannot_be_written_down_is_told_to_the_supervisor(
    tiny_grpo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    config = load_recipe(tiny_grpo("full"))
    run = open_run(config, tmp_path / "runs", named=True, resume=False)
    word = mmap.mmap(-1, 1)
    monkeypatch.setattr(launch, "conclude", refuse)
    with pytest.raises(RunFailed, match=r"No space left on device; no checkpoint had been written: `raylign resume"):
        launch._conclude_failures(config, run, Attempt(run=run, word=word), {}, refuse)
    assert word[0] == 1


def test_a_log_on_a_full_disk_does_not_hide_why_the_run_ended(tmp_path: Path) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")

    def fail() -> None:
        with launch._log_to(RunDir(tmp_path)):
            logging.getLogger("raylign").info("nobody reads this")
            raise RunFailed("the reason")

    with pytest.raises(RunFailed, match="the reason"):
        fail()
