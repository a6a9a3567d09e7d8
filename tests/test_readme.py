"""The README cannot go stale: its equations, files, pictures and commands exist."""
import inspect
import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
EQUATIONS = re.findall(r"^\| ([\d, ]+) \| [^|]+ \| `(0\d_\w+\.py): ([^|]+?) \|$", TEXT, re.M)
COMMANDS = sorted(set(re.findall(r"python (0\d_\w+\.py[^&|`\n]*)", TEXT)))


@pytest.mark.parametrize("numbers,file,functions", EQUATIONS)
def test_every_equation_is_where_the_table_says(stage, numbers, file, functions):
    """One of the functions named carries the number, in a comment or its docstring."""
    names = re.findall(r"\w+", functions.replace("called in", ""))
    source = "".join(inspect.getsource(getattr(stage(int(file[1])), name)) for name in names)
    for number in re.findall(r"\d+", numbers):
        assert re.search(rf"[Ee]qs?\. [\d, -]*\b{number}\b", source), number


def test_the_table_has_all_equations():
    found = {number for numbers, _, _ in EQUATIONS for number in re.findall(r"\d+", numbers)}
    assert found >= {"1", "2", "3", "4", "5", "6", "7", "9", "10", "11"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(stage, command):
    file, *flags = shlex.split(command)
    stage(int(file[1])).parse_args(flags)


def test_every_file_named_is_there():
    for name in re.findall(r"\]\((\.assets/[^)]+)\)|`?(tests/\w+\.py)", TEXT):
        assert Path(ROOT, next(filter(None, name))).exists(), name
