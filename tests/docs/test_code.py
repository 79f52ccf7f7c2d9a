"""Code blocks of the pages: Python runs, data parses; tests/docs/test_commands.py has the shell's."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
import yaml

from scripts.pages import ROOT, blocks, pages

BLOCKS = [block for page in pages() for block in blocks(page)]
LANGUAGES = {"python", "sh", "toml", "json", "yaml", "text"}
PAGES = sorted({str(block.page) for block in BLOCKS if block.language == "python"})
READ = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load}
WRONG = "text\n\n```python\nx = 1\n```\n\n```python\nx + y\n```\n"


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Traceback of each page, "" for none; one page is wrong on purpose."""
    wrong = tmp_path_factory.mktemp("wrong") / "wrong.md"
    wrong.write_text(WRONG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.docs.run_page", *PAGES, str(wrong)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_python_runs(page, errors):
    assert not errors[page], errors[page]


def test_an_error_in_a_page_is_found(errors):
    (error,) = (text for page, text in errors.items() if page.endswith("wrong.md"))
    assert "NameError" in error and 'wrong.md", line 8' in error


@pytest.mark.parametrize("page", pages(), ids=lambda page: os.path.relpath(page, ROOT))
def test_blocks_say_their_language_and_data_parses(page):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: {block.language!r} is run by no test; use one of {LANGUAGES}"
        if block.language in READ:
            assert READ[block.language](block.code) is not None, where
