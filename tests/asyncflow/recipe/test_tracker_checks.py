"""Trackers are checked before a run starts: their names, options and packages, and that no recipe has a credential."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from asyncflow.observe.settings import Observe
from asyncflow.recipe.tracker_checks import check_trackers
from protocols.control.errors import BadInput
from workers.user_code import search_in

OWN = """
class Mine:
    def __init__(self, colour="red"): pass
    def start(self, run): pass
    def log(self, step, metrics): pass
    def texts(self, step, rows): pass
    def close(self): pass

class Half:
    def start(self, run): pass
    def log(self, step, metrics): pass
"""


@pytest.fixture
def own(tmp_path: Path) -> None:
    (tmp_path / "my_tracker.py").write_text(OWN)
    search_in([str(tmp_path)])


def test_all_trackers_and_a_class_of_ones_own_pass(own: None):
    names = ["tensorboard", "wandb", "mlflow", "trackio", "my_tracker.py:Mine"]
    check_trackers(
        Observe(trackers=names, options={"my_tracker.py:Mine": {"colour": "blue"}, "wandb": {"entity": "us"}})
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trackers": ["tensorbord"]}, r"tracker 'tensorbord' is none of tensorboard, wandb, mlflow, trackio"),
        ({"trackers": ["wandb", "wandb"]}, r"'wandb' stands there twice"),
        ({"trackers": ["my_tracker.py:Yours"]}, r"has no function 'Yours'"),
        ({"trackers": ["my_tracker.py:Half"]}, r"my_tracker.py:Half has no method texts, close"),
        ({"trackers": ["wandb"], "options": {"wandb": {"team": "us"}}}, r"observe\.options\.wandb: .*'team'"),
        ({"trackers": ["wandb"], "options": {"wandb": {"mode": "of"}}}, r"want 'online' or 'offline'"),
        ({"options": {"wandb": {"mode": "offline"}}}, r"observe\.trackers has no such tracker; it names none"),
        ({"trackers": ["mlflow"], "options": {"mlflw": {}}}, r"did you mean 'mlflow'\?"),
        ({"trackers": ["wandb"], "options": {"wandb": {"api_key": "a"}}}, r"wandb\.api_key holds a credential"),
        ({"trackers": ["mlflow"], "options": {"mlflow": {"uri": "http://me:pw@host"}}}, r"uri holds a credential"),
        ({"trackers": ["trackio"], "options": {"trackio": {"server_url": "http://h/?write_token=a"}}}, r"credential"),
    ],
)
def test_what_can_not_work_is_refused(own: None, settings: dict[str, Any], message: str):
    with pytest.raises(BadInput, match=message):
        check_trackers(Observe(**settings))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"'trackio': its package is not installed"):
        check_trackers(Observe(trackers=["trackio"]))
