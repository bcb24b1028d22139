"""The README's promises: its Python runs, its commands are those of CI, and what it names exists."""

import re
from pathlib import Path

import pytest
import typer

from knnbench import METRICS
from knnbench.backends import registry
from knnbench.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_in_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_python_in_the_readme():
    assert len(BLOCKS) >= 2


def test_nothing_is_left_to_fill_in():
    assert "PLACEHOLDER" not in README


def test_pictures_are_there():
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert names
    assert all((ROOT / name).stat().st_size < 200_000 for name in names)


def test_each_command_sets_itself_up():
    for mark in ("main", "tests"):
        (command,) = re.findall(rf"<!-- command: {mark} -->\n```bash\n(.*?)\n```", README, flags=re.DOTALL)
        assert command.startswith("python3 -m venv ")
        assert "pip install" in command


def test_ci_runs_the_command_of_the_readme():
    assert 'readme_command "command: tests"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*(name for name, line in registry().items() if not line.peer), *METRICS])
def test_every_own_backend_and_metric_is_named(name):
    assert name in README


def commands(group, path=("knnbench",)):
    """Return the command line's commands by name, each with its options."""
    found = {" ".join(path): {text for option in group.params for text in option.opts}}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*path, name))
    return found


def test_the_table_of_commands_is_that_of_the_command_line():
    known, named = commands(typer.main.get_command(app)), set()
    for head, text in re.findall(r"^\| (`knnbench.*?) \| (.*) \|$", README, flags=re.MULTILINE):
        names = re.findall(r"`(knnbench(?: [a-z-]+)*)", head)
        group = names[0].rpartition(" ")[0]
        names += [f"{group} {name}" for name in re.findall(r"`([a-z]+)`", head) if name != "knnbench"]
        names = [max((name for name in known if given.startswith(name)), key=len) for given in names]
        options = set(re.findall(r"`(--[a-z-]+)", head + text))
        assert options <= set().union(*(known[name] for name in names)), names
        named |= set(names)
    groups = {name.rpartition(" ")[0] for name in known} - {"", "knnbench"}
    assert named == known.keys() - groups
