"""Programs in forks of one process that has imported what takes seconds, as processes of their own would run them."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.places import ROOT

# Each fork leaves the loop and goes on to the program, which ends it as it ends any process.
START = """
import json, os, sys
{ahead}
with open(sys.argv[1]) as calls:
    calls = json.load(calls)
statuses = []
for place, words, variables in calls:
    child = os.fork()
    if not child:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(place, name), os.O_WRONLY | os.O_CREAT), number)
        os.chdir(os.path.join(place, "folder"))
        os.environ.update(variables)
        sys.argv[1:] = words
        break
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(json.dumps(statuses))
    sys.exit()
del calls, statuses, place, words, variables, child, number, name
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended, what it wrote, and what is in the folder where it ran."""

    returncode: int
    stdout: str
    stderr: str
    left: list[str]


def in_forks(ahead, program, calls, timeout=120):
    """What became of a program for each of the words (and environment variables) that it is called with.

    Args:
        ahead: Imports that the program would make first anyway.
        program: The code.
        calls: For each call its words, and variables of its environment.
        timeout: Seconds for all.
    """
    with tempfile.TemporaryDirectory() as root:
        places = [Path(root, str(i)) for i in range(len(calls))]
        for place in places:
            (place / "folder").mkdir(parents=True)
        told = Path(root, "calls.json")
        told.write_text(json.dumps([[str(place), *call] for place, call in zip(places, calls, strict=True)]))
        command = [sys.executable, "-c", START.format(ahead=ahead) + program, str(told)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return [
            Ended(
                status,
                (place / "out").read_text(),
                (place / "err").read_text(),
                [each.name for each in (place / "folder").iterdir()],
            )
            for place, status in zip(places, json.loads(done.stdout), strict=True)
        ]
