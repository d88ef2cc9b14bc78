"""Fixtures of several folders."""

import sys

import pytest


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command line in an empty directory: its exit code, what it printed, and its errors."""
    pytest.importorskip("typer")
    from unroll.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call
