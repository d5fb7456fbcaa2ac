"""Nothing in a ``.pt2`` becomes code: names that are none, and damaged archives, are refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxtemporal.cli.main import main
from fxtemporal.lowering.pt2 import load_exported
from fxtemporal.support.errors import CaptureError

Change = Callable[[str], str]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, clip: Tensor, *, scale: Tensor) -> Tensor:
        return self.layer(clip) * scale + self.offset


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    x = torch.ones(2, 4)
    torch.export.save(torch.export.export(Model(), (x,), {"scale": x}), path)
    return path


def rewritten(archive: Path, target: Path, change: Change) -> Path:
    """A copy of ``archive`` whose program is changed, and whose checksums are right."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.filelist:
            content = source.read(entry.filename)
            if entry.filename.endswith("models/model.json"):
                content = change(content.decode()).encode()
            copy.writestr(entry.filename, content)
    return target


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why ``path`` is refused, by the function and by the command."""
    with pytest.raises(CaptureError) as error:
        load_exported(path)
    assert main(["audit", str(path)]) == 3
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return str(error.value)


def in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


PLACES = {
    "an input": '"name": "clip"',
    "a keyword input": '"name": "scale"',
    "a parameter's input": '"name": "p_layer_weight"',
    "a buffer's input": '"name": "b_offset"',
    "a value": '"name": "linear"',
    "a parameter": '"parameter_name": "layer.weight"',
    "a buffer": '"buffer_name": "offset"',
    "an argument of an op": '"name": "input"',
    "a module": '"fqn": "layer"',
}
EXPRESSIONS = (
    "y=__import__('pathlib').Path({marker!r}).touch()",
    "y: __import__('pathlib').Path({marker!r}).touch()",
    "y):\n    __import__('pathlib').Path({marker!r}).touch()\n    return (0",
    "y, z=open({marker!r}, 'w')",
)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("expression", EXPRESSIONS, ids=["default", "annotation", "lines", "two"])
def test_a_name_is_never_run(
    place: str, expression: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    key, name = place.split(": ")
    bad = in_json(expression.format(marker=str(marker)))

    def change(text: str) -> str:
        assert place in text
        # Every mention of the value, so that the program stays consistent.
        return text.replace(place, f'{key}: "{bad}"').replace(f"{name}:", f'"{bad}":')

    assert "refused" in refused(rewritten(archive, tmp_path / "evil.pt2", change), capsys)
    assert not marker.exists()


@pytest.mark.parametrize("names", ["forward_arg_names", "in_spec"])
@pytest.mark.parametrize("expression", EXPRESSIONS[:2])
def test_a_name_in_the_layout_of_the_arguments_is_never_run(
    names: str, expression: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    bad = expression.format(marker=str(marker))

    def change(text: str) -> str:
        program: Any = json.loads(text)
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        if names == "in_spec":
            signature["forward_arg_names"] = None
            layout = json.loads(signature["in_spec"])
            layout[1]["children_spec"][1]["context"] = json.dumps([bad])
            signature["in_spec"] = json.dumps(layout)
        else:
            signature["forward_arg_names"] = ["clip", bad]
        return json.dumps(program)

    assert "refused" in refused(rewritten(archive, tmp_path / "evil.pt2", change), capsys)
    assert not marker.exists()


@pytest.mark.parametrize(
    "guard",
    [
        "__import__('pathlib').Path({marker!r}).touch() is None",
        "L['clip'].size()[0] == 2, '')\n  open({marker!r}, 'w')\n  torch._assert(True",
        "L['clip'].size()[0] == 2, '')\nopen({marker!r}, 'w')\ndef f(): (0",
        "[open({marker!r}, 'w') for x in (1,)]",
        "math.__loader__.load_module('os').system('touch ' + {marker!r}) == 0",
    ],
    ids=["call", "lines", "outside", "list", "attribute"],
)
def test_a_guard_is_never_run(
    guard: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"

    def change(text: str) -> str:
        program: Any = json.loads(text)
        assert program["guards_code"] == []
        return json.dumps(program | {"guards_code": [guard.format(marker=str(marker))]})

    assert "the guard" in refused(rewritten(archive, tmp_path / "evil.pt2", change), capsys)
    assert not marker.exists()


def test_entries_that_are_none_of_an_archive(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("../outside", "/etc/outside", "model\\..\\outside", "C:/outside", "a/../../b"):
        path = tmp_path / "evil.pt2"
        path.write_bytes(archive.read_bytes())
        with zipfile.ZipFile(path, "a") as copy:
            copy.writestr(name, b"x")
        assert "an entry outside of it" in refused(path, capsys)


def test_two_entries_of_one_name(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pt2"
    path.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(path, "a") as copy, pytest.warns(UserWarning, match="Duplicate name"):
        copy.writestr("model/models/model.json", b"{}")
    assert "two entries called" in refused(path, capsys)


def test_an_entry_that_unpacks_to_far_more(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pt2"
    path.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as copy:
        copy.writestr("model/extra", b"\0" * 2**25)
    assert "unpacks to" in refused(path, capsys)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_file_that_was_cut(
    share: float, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.pt2"
    content = archive.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, capsys)


def test_a_json_without_end(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = "[" * 100_000
    refused(rewritten(archive, tmp_path / "deep.pt2", lambda text: deep), capsys)


@pytest.mark.parametrize("step", range(12))
def test_a_flipped_byte_is_refused_or_does_not_matter(
    step: int, archive: Path, tmp_path: Path
) -> None:
    content = bytearray(archive.read_bytes())
    content[step * len(content) // 12 + 7] ^= 0xFF
    path = tmp_path / "flipped.pt2"
    path.write_bytes(content)
    x = torch.ones(2, 4)
    try:
        program = load_exported(path)
    except CaptureError:
        return
    assert torch.equal(program.module()(x, scale=x), Model()(x, scale=x))
