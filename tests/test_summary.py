"""What the README says was measured is what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as entry
from benchmarks import summary


def test_the_readme_and_the_summaries_say_what_the_results_say() -> None:
    for path, text in summary.written().items():
        assert path.read_text(encoding="utf-8") == text, "run python -m benchmarks summary"


def test_a_number_that_was_changed_by_hand_is_found(tmp_path: Path) -> None:
    text = summary.README.read_text(encoding="utf-8")
    block = text[text.index("<!-- benchmarks: peers -->") :]
    digit = next(c for c in block.split("|")[20] if c.isdigit())
    changed = text.replace(block, block.replace(digit, str((int(digit) + 1) % 10), 1))
    assert changed != text
    assert summary.blocks(changed) == text


def test_a_block_without_results_is_an_error() -> None:
    with pytest.raises(KeyError):
        summary.blocks("<!-- benchmarks: nothing -->\n<!-- /benchmarks -->")


def test_every_benchmark_has_an_entry_that_tells_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.main([]) == 0
    listed = capsys.readouterr().out
    for name in entry.BENCHMARKS:
        assert name in listed
        with pytest.raises(SystemExit) as stopped:
            entry.main([name, "--help"])
        assert stopped.value.code == 0
        assert "--" in capsys.readouterr().out
    assert entry.main(["nothing"]) == 2
