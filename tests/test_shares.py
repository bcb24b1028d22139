"""Nothing is lost where tests are divided among processes."""

import os
import sys

import pytest

from . import shares


def test_every_test_is_in_one_share(monkeypatch):
    found = []
    for number in range(3):
        monkeypatch.setenv(shares.SHARE_VARIABLE, f"{number}/3")
        items = list(range(8))
        shares.pytest_collection_modifyitems(items)
        found += items
    assert sorted(found) == list(range(8))


def test_what_fails_in_one_process_fails():
    commands = [[sys.executable, "-c", code] for code in ("print('whole')", "raise SystemExit('broken')")]
    assert shares.outputs(commands[:1], [dict(os.environ)]) == ["whole\n"]
    with pytest.raises(AssertionError, match="broken"):
        shares.outputs(commands, [dict(os.environ)] * 2)
