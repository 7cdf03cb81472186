"""The command line: its table on standard output, its numbers in a file, its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glmjax import eval as command
from glmjax.evaluation.report import Report
from glmjax.evaluation.text import Text

SUBCOMMANDS = ("text", "needle", "drafts", "agreement")


def test_help_names_the_subcommands(capfd):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    out = capfd.readouterr().out
    assert all(f"• {name}" in out for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_explains_every_option(name, capfd):
    with pytest.raises(SystemExit, match="0"):
        command.main([name, "--help"])
    options = capfd.readouterr().out.split("options")[-1].split("│ --")
    assert len(options) > 5
    for option in options[1:]:
        text = " ".join(option.replace("│", " ").split())
        assert len(text.split("(default")[0].split()) > 3, option


def test_the_table_is_printed_and_the_numbers_written(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(Text, "run", lambda self: Report(f"of {self.files[0]}", {"bits": 1.25}))
    assert command.main(["text", "a.py", "--json", str(tmp_path / "out.json"), "--model-path", "somewhere"]) == 0
    assert capfd.readouterr().out == "of a.py\n"
    assert json.loads((tmp_path / "out.json").read_text()) == {"model": "somewhere", "bits": 1.25}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text"], "give files to measure on, or --stdlib instead of them"),
        (["text", "/nowhere.py"], "No such file or directory: '/nowhere.py'"),
        (["needle", "--model-path", "/nowhere"], "no config.json at /nowhere"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capfd):
    assert command.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("glmjax.eval: ")
    assert message in err
    assert err.count("\n") == 1


def test_as_a_command(tmp_path):
    file = Path(tmp_path, "a.py")
    file.write_text("import os\n")
    found = subprocess.run(
        [sys.executable, "-m", "glmjax.eval", "text", str(file), "--seq-len", "8", "--batch-size", "1"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("1 text, 10 bytes, ")
