"""What tests of the commands share."""

import sys

import pytest

from visattn import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `visattn` with the given words; gives its exit status and what it printed on stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["visattn", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run
