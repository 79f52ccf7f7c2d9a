"""The queue of measurements: its list, what begins when, steps that fail, hang or are stopped, and what is kept."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.gpu import queue as program
from scripts.gpu.check import brought, misunderstood, problems
from scripts.gpu.keep import HEAD, Kept, unpack
from scripts.gpu.order import Machine, Order, simulated
from scripts.gpu.running import GRACE, Queue
from scripts.gpu.steps import Step, read_plan
from tests.support.places import ROOT

TWO = Machine(cards=2, cores=32)
# Says that it is there, and does what it is told once it is asked to stop.
HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
STOPS = """
import time
try:
    print('on', flush=True); time.sleep(60)
except KeyboardInterrupt:
    open('late.json', 'w').write('whole'); print('written')
"""


def step(name, **values):
    return Step(**{"name": name, "command": "true", "seconds": 10.0, "least": 10.0, **values})


def program_of(code):
    return f"python -c {shlex.quote(code)}"


def queue_of(steps, folder, seconds=30.0, machine=TWO, **values):
    (folder / "root").mkdir(exist_ok=True)
    return Queue(steps, machine, seconds, folder / "out", folder / "root", **{"grace": 0.5, **values})


def names_of(begun):
    return [each.step.name for each in begun]


def test_timings_have_a_card_of_their_own_and_wait_for_one():
    steps = [step("share"), step("time", alone=True), step("also"), step("again", alone=True), step("more")]
    order = Order(TWO, steps, 100.0)
    first = order.begin(0.0)
    # What stands behind a timing that waits does not take what becomes free for it.
    assert [(each.step.name, each.card) for each in first] == [("share", 0), ("time", 1), ("also", 0)]
    order.ended("time")
    assert [(each.step.name, each.card) for each in order.begin(5.0)] == [("again", 1), ("more", 0)]


def test_a_card_takes_so_many_steps_and_a_machine_so_many_cores():
    steps = [step(str(i), card=0) for i in range(3)]
    assert names_of(Order(Machine(1, 32, sharing=2), steps, 100.0).begin(0.0)) == ["0", "1"]
    steps = [step("a", cores=16), step("b", cores=20), step("c", cores=8)]
    order = Order(TWO, steps, 100.0)
    assert names_of(order.begin(0.0)) == ["a"]
    order.ended("a")
    assert names_of(order.begin(1.0)) == ["b", "c"]
    # One that asks for more than there is has all of it.
    assert names_of(Order(Machine(1, 2), steps, 100.0).begin(0.0)) == ["a"]


def test_one_result_file_has_one_writer_and_steps_come_after_others():
    steps = [step("a", continues=("x.json",)), step("b", continues=("y.json", "x.json")), step("c", after=("b",))]
    order, begun = Order(TWO, steps, 100.0), []
    for now in range(3):
        begun.append(names_of(order.begin(now)))
        order.ended(begun[-1][0])
    assert begun == [["a"], ["b"], ["c"]]


def test_a_step_has_the_time_that_is_left_or_is_not_begun():
    order = Order(TWO, [step("long", seconds=50.0, least=20.0), step("whole", seconds=50.0, least=50.0)], 30.0)
    (begun,) = order.begin(0.0)
    assert (begun.step.name, begun.seconds, begun.end) == ("long", 30.0, 30.0)
    assert [each.name for each in order.late] == ["whole"]


def test_a_plan_ends_whatever_its_order(tmp_path):
    found, late = simulated([step("b", after=("a",)), step("a"), step("c", seconds=200.0, least=200.0)], TWO, 100.0)
    assert [(since, begun.step.name) for since, begun in found] == [(0.0, "a"), (10.0, "b")]
    assert [each.name for each in late] == ["c"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[steps.a]\nseconds = 5", "step a has no 'command'"),
        ("[steps.a]\ncommand = 'true'\nseconds = 5\nleest = 3", "step a has 'leest': known are after"),
        ("[steps.a]\ncommand = 'true'\nseconds = 5\nleast = 9", "least not above"),
        ("[steps.a]\ncommand = 'true'\nseconds = 5\nneeds = ['/data']", "below the checkout"),
        ("[steps.a]\ncommand = 'true'\nseconds = 5\nafter = ['b']", "after of a names 'b', which is no step"),
        ("[steps.a]\ncommand = 'true'\nseconds = 5\nafter = ['a']", "in a circle: a, a"),
        ("[calls]\nfirst = ['b']", "call first names 'b'"),
        ("[calls]\na = ['a']\n[steps.a]\ncommand = 'true'\nseconds = 5", "'a' is a call and a step"),
        ("[steps", "cannot be read"),
    ],
)
def test_a_wrong_list_is_told(tmp_path, text, error):
    file = tmp_path / "steps.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=error):
        read_plan(file)


def test_steps_end_well_badly_and_not_at_all(tmp_path, monkeypatch):
    steps = [
        step("good", command=program_of("open('good.json', 'w').write('1'); print('all done')"), continues=("*.json",)),
        step("bad", command=program_of("import sys; print('why'); sys.exit(3)")),
        step("hangs", command=program_of(HANGS), seconds=3.0, least=3.0),
        step("stops", command=program_of(STOPS), seconds=3.0, least=3.0, continues=("late.json",), card=1),
        step("lost", command="no-such-program"),
        step("poor", needs=("data/pack-*", "package no_such_package", "package no_such.part", "package breaking.part")),
    ]
    # A package that is there, but not for this machine: what else is to be run is run.
    (tmp_path / "breaking.py").write_text("raise OSError('another driver')")
    monkeypatch.syspath_prepend(tmp_path)
    queue = queue_of(steps, tmp_path, machine=replace(TWO, sharing=9))
    told = {each.step.name: each for each in queue.run()}
    assert {name: each.state for name, each in told.items() if name not in ("lost", "poor")} == {
        "good": "done", "bad": "failed", "hangs": "killed", "stops": "stopped"
    }  # fmt: skip
    assert told["bad"].code == 3 and told["hangs"].code == -signal.SIGKILL
    assert [told[name].last for name in ("good", "bad", "hangs", "stops")] == ["all done", "why", "on", "written"]
    assert "no-such-program" in told["lost"].state
    assert told["poor"].state.endswith(", ".join(["needs data/pack-*", *steps[-1].needs[1:]]))
    assert 3.0 <= told["stops"].seconds < 30
    unpack(tmp_path / "out", tmp_path / "home")
    assert (tmp_path / "home" / "late.json").read_text() == "whole"
    assert (tmp_path / "home" / "good.json").read_text() == "1"
    assert (tmp_path / "home" / "out" / "gpu-queue" / "bad.log").read_text() == "why\n"
    lines = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert len(lines) == 7 and lines[2].split()[:1] == ["bad"]
    assert "failed" in lines[2] and lines[2].endswith("why")


def test_what_a_step_started_ends_with_it(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    (told,) = queue_of([step("parent", command=program_of(code))], tmp_path).run()
    assert told.state == "done"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(int(told.last)):
        time.sleep(0.05)
    assert not _runs(int(told.last))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_time_of_all_ends_it_and_the_rest_is_not_begun(tmp_path):
    steps = [step("on", command=program_of(STOPS), seconds=60.0, least=0.1), step("rest", after=("on",))]
    start = time.monotonic()
    told = queue_of(steps, tmp_path, seconds=3.5).run()
    assert time.monotonic() - start < 30
    assert [each.state for each in told] == ["stopped", "not begun: no time was left"]


def test_a_step_knows_its_card_and_its_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:])"
    command = program_of(code) + " --budget {seconds}"
    steps = [step("a", command=command, seconds=40.0, card=0), step("b", command=command, seconds=400.0, card=3)]
    first, second = (each.last for each in queue_of(steps, tmp_path, seconds=300.0).run())
    assert first == "5 --budget 30"
    # What is left of all, less what it takes to stop and to end by itself.
    assert second.startswith("7 --budget ") and 200 < int(second.split()[-1]) < 290


def test_results_are_kept_while_a_step_runs(tmp_path):
    code = "import time; open('rows.json', 'w').write('first'); time.sleep(60)"
    queue = queue_of([step("a", command=program_of(code), continues=("rows.json",))], tmp_path, every=0.2)
    (tmp_path / "root" / "old.json").write_text("from before")
    running = threading.Thread(target=queue.run, daemon=True)
    running.start()
    kept, deadline = tmp_path / "home" / "rows.json", time.monotonic() + 20
    while time.monotonic() < deadline and not (kept.is_file() and kept.read_text() == "first"):
        if list((tmp_path / "out").glob("kept-*")):
            unpack(tmp_path / "out", tmp_path / "home")
        time.sleep(0.1)
    assert kept.read_text() == "first"
    assert "runs" in (tmp_path / "out" / "table.txt").read_text()
    assert running.is_alive()
    queue.children["a"].signal(signal.SIGKILL)
    running.join(20)


def test_what_was_there_before_and_is_as_it_was_is_not_kept(tmp_path):
    (tmp_path / "root").mkdir()
    for name in ("same.json", "other.json"):
        (tmp_path / "root" / name).write_text("before")
    code = "open('other.json', 'a').write(' and after')"
    queue_of([step("a", command=program_of(code), continues=("*.json",))], tmp_path).run()
    found = {file.name for file in unpack(tmp_path / "out", tmp_path / "home")}
    assert found == {"other.json", "a.log"}


@pytest.mark.parametrize(
    ("number", "sent"), [("SIGINT", "as from a terminal"), ("SIGTERM", "as from a terminal"), ("SIGTERM", "behind")]
)
def test_the_queue_is_stopped_with_its_steps(tmp_path, number, sent):
    file, name = tmp_path / "steps.toml", f"test-{number}-{sent.split()[0]}"
    # What a shell starts in the background begins with an ignored SIGINT: steps are asked to stop nevertheless.
    words = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"] if sent == "behind" else []
    late = str(tmp_path / "late.json")
    code = STOPS.replace("'late.json'", repr(late))
    text = f"[steps.{name}]\nseconds = 60\nleast = 9\ncommand = {json.dumps(program_of(code))}\n"
    file.write_text(text + f"[steps.b]\nseconds = 9\ncommand = 'true'\nafter = ['{name}']")
    words += [sys.executable, "-m", "scripts.gpu.queue", "run", "--list", str(file), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        log, deadline = ROOT / "out" / "gpu-queue" / f"{name}.log", time.monotonic() + 30
        assert process.stdout is not None and f"begins on card 0: {name}" in process.stdout.readline()
        while time.monotonic() < deadline and "on" not in log.read_text():
            time.sleep(0.05)
        process.send_signal(signal.Signals[number])
        said = process.stdout.read()
        assert process.wait(30) == 1
    log.unlink()
    assert "stopped" in said and "not begun: the queue was stopped" in said
    assert (tmp_path / "late.json").read_text() == "whole"
    assert (tmp_path / "out" / "kept-0.tar.gz").is_file()


def test_large_files_are_cut_and_what_has_no_room_is_told(tmp_path):
    part = 100_000
    for name, size in (("a", 10_000), ("b", 150_000), ("c", 90_000), ("d", 5_000)):
        (tmp_path / name).write_bytes(os.urandom(size))
    files = [(f"runs/{name}", tmp_path / name) for name in "abcd"]
    kept = Kept(tmp_path / "out", 2, part)
    assert kept.write(files) == ["runs/c"]
    archives = sorted((tmp_path / "out").glob("kept-*"))
    assert len(archives) == 2 and all(file.stat().st_size <= part + HEAD for file in archives)
    unpack(tmp_path / "out", tmp_path / "home")
    for name in "abd":
        assert (tmp_path / "home" / "runs" / name).read_bytes() == (tmp_path / name).read_bytes()
    # Only what has changed is written again, and what became less needs fewer archives.
    before = [file.stat().st_ino for file in archives]
    kept.write(files)
    assert [file.stat().st_ino for file in archives] == before
    assert kept.write(files[:1]) == []
    assert len(list((tmp_path / "out").glob("kept-*"))) == 1
    with pytest.raises(ValueError, match="archives of an earlier run"):
        Kept(tmp_path / "out", 2, part)


def test_pieces_that_are_missing_and_names_that_lead_elsewhere_are_refused(tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(150_000))
    (tmp_path / "small").write_text("whole")
    Kept(tmp_path / "out", 2, 100_000).write([(name, tmp_path / name) for name in ("small", "big")])
    (tmp_path / "out" / "kept-1.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"big has 1 of 2 pieces: .* 1 other files are written"):
        unpack(tmp_path / "out", tmp_path / "home")
    # An archive that does not come home takes nothing else with it.
    assert (tmp_path / "home" / "small").read_text() == "whole"
    Kept(tmp_path / "bad", 1).write([("../evil", tmp_path / "big")])
    with pytest.raises(ValueError, match=r"\.\./evil in .* leads out"):
        unpack(tmp_path / "bad", tmp_path / "home")
    with pytest.raises(SystemExit, match=r"has no kept-\*"):
        program.main(["unpack", str(tmp_path / "home")])


def test_commands_are_read_by_their_own_parsers_before_anything_runs():
    assert misunderstood(["python", "-m", "scripts.bench.shapes_gpu", "--jobs", "8"]) == ""
    assert "unrecognized arguments: --job_s 8" in misunderstood(
        ["python", "-m", "scripts.bench.shapes_gpu", "--job_s", "8"]
    )
    assert "invalid choice: 'full-1k'" in misunderstood(
        ["python", "-m", "scripts.bench.shapes_gpu", "--only", "full-1k"]
    )
    assert misunderstood(["python", "-m", "scripts.bench.no_such"]) == "there is no module scripts.bench.no_such"
    assert "does not read its options" in misunderstood(["python", "-m", "scripts.pages"])
    # What is no module of ours reads its options itself.
    assert misunderstood(["bash", "-c", "true"]) == ""


def test_what_steps_need_and_what_has_to_be_brought(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pack").write_bytes(bytes(1000))
    steps = [
        step("first", needs=("data",), keeps=("runs/*/student",)),
        step("then", needs=("runs/a/student", "package json")),
        step("never", needs=("other",)),
    ]
    assert problems(steps, tmp_path) == {"never": ["needs other, which is not there"]}
    assert brought(steps, tmp_path) == {"data": 1000}


def test_the_list_is_whole_and_its_commands_are_understood():
    plan = read_plan()
    assert {name for names in plan.calls.values() for name in names} == set(plan.steps)
    wrong = {name: misunderstood(each.planned(each.seconds)) for name, each in plan.steps.items()}
    assert not {name: reason for name, reason in wrong.items() if reason}
    for each in plan.steps.values():
        # Where a result goes on it is named by its own command, so that none is written over by another's.
        assert all(file in each.words or str(Path(file).parent) in each.words for file in each.continues), each.name
        # Timings have a card; whoever shares one says so to the script that would take times.
        timed = each.words[2] in ("scripts.measure.emoji", "scripts.measure.animoji", "scripts.measure.dynamic_table")
        assert not timed or each.alone != ("--shared" in each.words), each.name


@pytest.mark.parametrize("call", ["kernels", "parts", "short", "step"])
def test_the_first_calls_fit_into_their_time(call):
    found, late = simulated(read_plan().chosen([call]), TWO, 560.0 - GRACE)
    assert not late
    for since, begun in found:
        # Timings have sixteen cores for themselves, whatever else runs.
        others = [each.step.cores for at, each in found if at < begun.end and each.end > since and each != begun]
        assert not begun.step.alone or begun.step.cores + max(others, default=0) <= 32


def test_the_command_line(tmp_path, capsys):
    file = tmp_path / "steps.toml"
    file.write_text(
        "[calls]\nfirst = ['a']\n[steps.a]\ncommand = 'true'\nseconds = 5\n[steps.b]\ncommand = 'true'\nseconds = 9"
    )
    assert program.main(["check", "--list", str(file)]) == 0
    assert "2 of 2 steps are ready" in capsys.readouterr().out
    program.main(["plan", "first", "--list", str(file), "--seconds", "30"])
    assert capsys.readouterr().out.split() == ["0", "to", "5", "s", "card", "0,", "4", "cores", "a"]
    with pytest.raises(SystemExit, match="'c' is neither a call nor a step: choose from calls first; steps a, b"):
        program.main(["plan", "c", "--list", str(file)])
    with pytest.raises(SystemExit, match=r"--seconds 10 must be more than the 15"):
        program.main(["run", "--list", str(file), "--seconds", "10", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--cards 0 must be at least 1"):
        program.main(["plan", "--list", str(file), "--cards", "0"])


def test_a_queue_that_breaks_leaves_nothing_running(tmp_path, monkeypatch):
    queue = queue_of([step("a", command=program_of(HANGS))], tmp_path)

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(queue, "_look", broken)
    with pytest.raises(RuntimeError, match="broken"):
        queue.run()
    assert queue.children["a"].process.wait(10) == -signal.SIGKILL
    # And what there is is packed.
    assert [file.name for file in unpack(tmp_path / "out", tmp_path / "home")] == ["a.log"]


def test_a_queue_goes_on_where_nobody_reads_what_it_says(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        told = queue_of([step("a"), step("b", after=("a",))], tmp_path).run()
        monkeypatch.undo()
        assert [each.state for each in told] == ["done", "done"]
        with suppress(BrokenPipeError):
            unread.close()


def test_what_cannot_be_packed_is_told(tmp_path):
    queue = queue_of([step("a", keeps=("x.json",))], tmp_path)
    shutil.rmtree(tmp_path / "out")
    assert [each.state for each in queue.run()] == ["done"]
    assert "not kept: [Errno 2]" in queue.table()
    (tmp_path / "out").mkdir()
    queue.keep()
    assert "not kept" not in queue.table()


def test_a_long_log_takes_no_room_from_results(tmp_path):
    command = program_of("open('x.json', 'w').write('1'); open('x.bin', 'w').write('2'); print('on ' * 6_000_000)")
    queue = queue_of([step("a", command=command, continues=("x.json",), keeps=("x.bin",))], tmp_path, parts=1)
    queue.run()
    assert queue.left == ["out/gpu-queue/a.log"]
    assert {file.name for file in unpack(tmp_path / "out", tmp_path / "home")} == {"x.json", "x.bin"}
