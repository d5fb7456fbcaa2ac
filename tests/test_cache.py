"""What was measured is found again, and a cache that is broken costs time and nothing else."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fxtemporal
from fxtemporal.tuning.cache import Cache, default_folder, environment

ENVIRONMENT = {"torch": "2", "device": "a", "threads": "2"}


def test_figures_are_found_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, ENVIRONMENT)
    assert cache.get("layer") == {}
    cache.put("layer", {"conv3d": 2.0})
    cache.put("layer", {"taps": 1.0})
    assert cache.get("layer") == {"conv3d": 2.0, "taps": 1.0}
    cache.save()
    assert Cache(tmp_path, ENVIRONMENT).get("layer") == {"conv3d": 2.0, "taps": 1.0}


def test_another_environment_has_figures_of_its_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path, ENVIRONMENT)
    cache.put("layer", {"conv3d": 2.0})
    cache.save()
    for name in ENVIRONMENT:
        assert Cache(tmp_path, ENVIRONMENT | {name: "other"}).get("layer") == {}


def test_what_others_wrote_meanwhile_stays(tmp_path: Path) -> None:
    one, other = Cache(tmp_path, ENVIRONMENT), Cache(tmp_path, ENVIRONMENT)
    one.put("first", {"conv3d": 1.0})
    other.put("second", {"conv3d": 2.0})
    one.save()
    other.save()
    found = Cache(tmp_path, ENVIRONMENT)
    assert (found.get("first"), found.get("second")) == ({"conv3d": 1.0}, {"conv3d": 2.0})


def test_the_file_says_what_it_was_measured_on(tmp_path: Path) -> None:
    cache = Cache(tmp_path, ENVIRONMENT)
    cache.put("layer", {"conv3d": 2.0})
    cache.save()
    (path,) = tmp_path.iterdir()  # and nothing half-written beside it
    assert json.loads(path.read_text())["environment"] == ENVIRONMENT


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"milliseconds": 1}', '{"milliseconds": {"layer": {"a": "x"}}}']
)
def test_a_broken_file_counts_as_empty(tmp_path: Path, content: str) -> None:
    cache = Cache(tmp_path, ENVIRONMENT)
    cache.put("layer", {"conv3d": 2.0})
    cache.save()
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    again = Cache(tmp_path, ENVIRONMENT)
    assert again.get("layer") == {}
    again.put("layer", {"conv3d": 3.0})
    again.save()
    assert Cache(tmp_path, ENVIRONMENT).get("layer") == {"conv3d": 3.0}


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file", ENVIRONMENT)
    cache.put("layer", {"conv3d": 2.0})
    cache.save()
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_folder_keeps_nothing_on_disk(tmp_path: Path) -> None:
    cache = Cache(None, ENVIRONMENT)
    cache.put("layer", {"conv3d": 2.0})
    cache.save()
    assert cache.get("layer") == {"conv3d": 2.0}
    assert list(tmp_path.iterdir()) == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXTEMPORAL_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("FXTEMPORAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "fxtemporal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "fxtemporal"


def test_the_environment_has_all_that_figures_depend_on() -> None:
    found = environment(torch.device("cpu"), "openvino")
    assert found["fxtemporal"] == fxtemporal.__version__
    assert found["openvino"] == version("openvino")
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert torch.backends.cpu.get_cpu_capability() in found["device"]
