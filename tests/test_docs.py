"""The documentation is right: its examples run, its tables name what there is, the site builds.

The ``python`` blocks of a page run in order, in one namespace and in an empty folder; those with
``>>>`` must print what stands below. A block with a title, such as ``model.py``, is written to that
file first, so that the lines which a report names are those of the file; of a ``test_*.py`` the
tests are called. The ``console`` blocks of the pages are run as far as they name such a file.

``UPDATE_DOCS=1 pytest tests/test_docs.py`` writes what is printed into the pages: read the diff.
"""

from __future__ import annotations

import doctest
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from sybil import Document, Region
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from torch import nn

import fxtemporal
from fxtemporal import Code, Mistake
from fxtemporal.cli import main as cli
from fxtemporal.cli.arguments import parser
from fxtemporal.factorization.factorize_2plus1d import Factorize2Plus1d
from fxtemporal.passes import DEFAULT_PASSES
from fxtemporal.passes.fold_in_chunks import FoldInChunks
from fxtemporal.reports.cures import CURES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
RULES = sorted({rule.name for rule in DEFAULT_PASSES} | {FoldInChunks.name, Factorize2Plus1d.name})

pytestmark = pytest.mark.filterwarnings(  # Inductor's own, when it is imported
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)

UPDATE = "UPDATE_DOCS" in os.environ
BLANK = "<BLANKLINE>"
GAIN = re.compile(r"\d+\.\d×(?:, [-+]?\d+ %)?")
BLOCKS = RawFencedCodeBlockLexer(
    re.compile(r'(?P<language>python|console)(?: title="(?P<title>[^"]+)")?$\n', re.MULTILINE)
)
WHAT_THE_READER_HAS = re.compile(r"^\w+ = \.\.\.(?:  #.*)?$", re.MULTILINE)
FILE = re.compile(r"`((?:benchmarks|examples|fxtemporal)/[\w/-]+\.\w+)`")
MEASURED = re.compile(r"^<!-- measured: ([\w.-]+): (.*) -->$", re.MULTILINE)
COMMAND = re.compile(
    r"^ *(?:\$ |- run: )?(fxtemporal (?:audit|bench|optimize|lower) (?:.*\\\n)*.*)$", re.MULTILINE
)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- running a page --------------------------------------------------------------------------------


def blocks(document: Document) -> Iterator[Region]:
    for region in BLOCKS(document):
        run = console if region.lexemes["language"] == "console" else python
        yield Region(region.start, region.end, region.lexemes, run)


def python(example: Any) -> str:
    """Run one block; what is returned says what was wrong with it."""
    source, title = str(example.parsed["source"]), example.parsed["title"]
    if source.lstrip().startswith(">>> "):
        return prints(source, example)
    source = WHAT_THE_READER_HAS.sub("", source)
    if title is None:
        code = compile("\n" * example.line + source, example.path, "exec")
    else:
        file = Path.cwd() / title
        file.write_text(source)
        code = compile(source, str(file), "exec")
    exec(code, example.namespace)
    if title is not None and title.startswith("test_"):
        tests = [name for name in code.co_names if name.startswith("test_")]
        assert tests, f"{title} has no tests"
        for name in tests:
            example.namespace[name]()
    return ""


class Checker(doctest.OutputChecker):
    """Lets predicted gains be others: what computes them is fitted to benchmarks."""

    def check_output(self, want: str, got: str, optionflags: int = doctest.ELLIPSIS) -> bool:
        want, got = (GAIN.sub("N×", text.rstrip() + "\n") for text in (want, got))
        return super().check_output(want, got, optionflags)


class Printing(doctest.DocTestRunner):
    """Keeps what was printed where the page says something else."""

    def __init__(self) -> None:
        super().__init__(Checker(), verbose=False, optionflags=doctest.ELLIPSIS)
        self.other: list[tuple[str, str]] = []

    def report_failure(self, out: Any, test: Any, example: doctest.Example, got: str) -> None:
        self.other.append((example.want, got))
        super().report_failure(out, test, example, got)


def prints(source: str, example: Any) -> str:
    """Run a block with prompts; blank lines in what it prints stand as they are."""
    source = re.sub(r"^\n(?!>>> |\Z)", f"{BLANK}\n", source, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(
        source, {}, named(Path(example.path)), example.path, example.line
    )
    test.globs = example.namespace
    said, runner = io.StringIO(), Printing()
    runner.run(test, out=said.write, clear_globs=False)
    return said.getvalue() if not UPDATE else corrected(example, runner.other)


def corrected(example: Any, other: list[tuple[str, str]]) -> str:
    """Write what was printed into the page."""
    path = Path(example.path)
    text = path.read_text()
    for wanted, got in other:
        wanted = wanted.replace(f"{BLANK}\n", "\n")
        if text.count(wanted) != 1:
            return f"not once in {named(path)}:\n{wanted}"
        text = text.replace(wanted, got)
    path.write_text(text)
    return ""


def console(example: Any) -> str:
    """Run the commands whose model is a file of the page; ``echo $?`` is their exit status."""
    source = str(example.parsed["source"]).replace("\\\n", " ")
    entries = [entry.partition("\n") for entry in source.removeprefix("$ ").split("\n$ ")]
    status = 0
    for number, (command, _, wanted) in enumerate(entries):
        asked = [following for following, *_ in entries[number + 1 : number + 2]] == ["echo $?"]
        if command == "echo $?":
            got = f"{status}\n"
        elif command.startswith("fxtemporal ") and _model_is_here(command):
            said = io.StringIO()
            with redirect_stdout(said):
                status = cli.main(shlex.split(command, comments=True)[1:])
            got = said.getvalue()
            if status != 0 and not asked:
                return f"{command}\nexit status {status}"
        else:
            continue
        if not wanted.strip() or Checker().check_output(wanted, got):
            continue
        if UPDATE:
            corrected(example, [(wanted, got.rstrip())])
        else:
            return f"{command}\nwanted:\n{wanted}\ngot:\n{got}"
    return ""


def _model_is_here(command: str) -> bool:
    return any(Path(word.partition(":")[0]).is_file() for word in shlex.split(command)[2:])


def missing(*names: str) -> bool:
    """Whether one of these packages is not installed: what a page skips a block for."""
    return any(importlib.util.find_spec(name) is None for name in names)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = str(getattr(sys.modules[name], "__file__", ""))
        if name.startswith("page_") or file.startswith(str(tmp_path)):
            del sys.modules[name]


def run(path: Path, names: dict[str, Any]) -> None:
    document = Document.parse(str(path), blocks, SkipParser())
    module = types.ModuleType(f"page_{path.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # classes are pickled by the name of their module
    document.namespace = vars(module)
    document.namespace.update(names, missing=missing)
    for example in document:
        try:
            example.evaluate()
        except SkipTest:
            continue


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_examples_of_a_page_run(page: Path, folder: Path) -> None:
    torch.manual_seed(0)
    run(page, {})


def test_the_examples_of_the_readme_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = [0.05 if value == 60.0 else value for value in fxtemporal.Tune.__init__.__defaults__]
    monkeypatch.setattr(fxtemporal.Tune.__init__, "__defaults__", tuple(defaults))  # seconds
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Flatten(2))
    clips = torch.randn(4, 3, 4, 8, 8)
    names = {"model": model.eval(), "clip": clips[:1], "loader": clips.split(2)}
    run(README, {**names, "fxtemporal": fxtemporal})


@pytest.mark.parametrize("page", [README, *PAGES], ids=named)
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    for match in COMMAND.finditer(page.read_text()):
        words = shlex.split(match[1].replace("\\\n", " "), comments=True)
        cli._check_names(parser().parse_args(words[1:]))


# -- what the pages name ---------------------------------------------------------------------------


def reasons(text: str) -> dict[str, str]:
    """Of the tables of reasons in ``text``: each code, and its cure."""
    found = {}
    for table in re.findall(
        r"^\| code \|.*\| cure \|\n\|[ \-|]+\n((?:\|.*\n)+)", text, re.MULTILINE
    ):
        for row in table.splitlines():
            code, *_, cure = (cell.strip() for cell in row.strip("|").split("|"))
            found[code.strip("`")] = cure.replace("`", "")
    return found


def section(page: Path, heading: str) -> str:
    _, there, text = page.read_text().partition(f"\n## {heading}\n")
    assert there, f"{named(page)} has no section {heading!r}"
    return text.partition("\n## ")[0]


@pytest.mark.parametrize("rule", RULES)
def test_each_pass_has_its_page(rule: str) -> None:
    page = DOCS / "passes" / f"{rule}.md"
    assert page.read_text().startswith(f"# {rule}\n")
    assert f"- passes/{rule}.md\n" in (ROOT / "mkdocs.yml").read_text()
    assert ".code" in section(page, "Before and after")
    assert reasons(section(page, "What it refuses"))
    for heading in ("What it finds", "Why it is faster", "Limits"):
        assert section(page, heading).strip()


def test_there_is_no_page_of_a_pass_that_is_gone() -> None:
    assert sorted(path.stem for path in (DOCS / "passes").glob("*.md")) == RULES


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_reason_that_is_named_exists_and_has_its_cure(page: Path) -> None:
    for code, cure in reasons(page.read_text()).items():
        assert code in set(Code)
        assert cure == CURES[Code(code)]


def test_the_reference_has_every_reason() -> None:
    assert list(reasons((DOCS / "reference.md").read_text())) == [*Code]


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text()
    there = set(re.findall(r"^::: fxtemporal\.(?:api\.)?(\w+)$", text, re.MULTILINE))
    assert there == set(fxtemporal.__all__) - {"__version__"}


def test_every_mistake_has_a_section_in_the_page_of_the_audit() -> None:
    headings = re.findall(r"^### (.+)$", section(DOCS / "audit.md", "Usual mistakes"), re.MULTILINE)
    assert sorted(headings) == sorted(Mistake)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_of_the_project_that_is_named_exists(page: Path) -> None:
    for name in FILE.findall(page.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_was_measured_stands_in_the_results(page: Path) -> None:
    """``<!-- measured: FILE: WORD, WORD -->`` above it: these words are in one line of the file."""
    text = page.read_text()
    for name, words in MEASURED.findall(text):
        lines = (ROOT / "benchmarks" / "results" / name).read_text().splitlines()
        assert any(all(word in line for word in words.split(", ")) for line in lines), words
    here = set(re.findall(r"`benchmarks/results/([\w-]+\.md)`", text))
    assert here <= {name for name, _ in MEASURED.findall(text)}


# -- the site --------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "passes" / "time-distribute" / "index.html").is_file()
