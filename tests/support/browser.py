"""Pages in a real browser, where there is one."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package chromium) on the PATH")


def browse(file, folder):
    """Screenshot of a page as gray values [1600, 1200], and what the browser's console said."""
    shot = folder / "shot.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += ["--hide-scrollbars", "--window-size=1200,1600", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, f"--screenshot={shot}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    return np.asarray(Image.open(shot).convert("L")), lines


def dom(file, folder, script):
    """What a script that runs after those of a page leaves in its title, as JSON."""
    probe = folder / "probe.html"
    probe.write_text(file.read_text() + f"<script>addEventListener('load', () => {{{script}}})</script>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
    command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout).group(1)))
