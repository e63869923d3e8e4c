"""Interruption, bad input, full disks, damaged and hostile files, two runs at once."""
import csv
import hashlib
import io
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import signal
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cql_pendulum as ours
from test_program import (  # noqa: F401
    FILES, SCRIPT, TINY, UNDRAWN, Program, inside, lines, log, nothing_is_left_running, quick,
    returns_of, table, undrawn, without_versions)

# counts the updates of each stage in the file "ticks" of the folder where the program runs
TICKS = '''
sample, ticks = ours.Data.get_sample, os.open("ticks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def counted(data):
    os.write(ticks, b"s" if data.frozen else b"t")
    return sample(data)
ours.Data.get_sample = counted
'''
UNTRAINED = UNDRAWN + '''
ours.SAC.train = lambda *_: None
ours.evaluate = lambda agent, seeds: 3 * [np.arange(len(seeds))]
'''


def ticks(folder, stage):
    return (folder / "ticks").read_bytes().count(stage) if (folder / "ticks").exists() else 0


def same(one, other):
    """Whether two loaded contents are equal to the last bit."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def log_without_seconds(out):
    with open(out / "log.csv") as file:
        return [line[:-1] for line in csv.reader(file)]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole(out):
    """Every file that is there can be read to its end."""
    for file in out.iterdir():
        if file.suffix == ".pt":
            ours.load_agent(file)
        elif file.suffix == ".npz":
            ours.load_dataset(file)
        elif file.suffix == ".csv":
            assert file.read_text().endswith("\n")
            assert {len(line) for line in log_without_seconds(out)} == {5}


def assert_stopped(program, signum, out, stage):
    """It ended on the signal, saved, with one line that says how to go on; that command."""
    assert program.end() == 128 + signum
    said = re.fullmatch(r"stopped in stage (\w+) after update \d+; (.*) has it all\. "
                        r"Go on with: (.*)\n", program.err)
    assert said and said[1] in stage and said[2] == str(out), program.err
    return shlex.split(said[3])


# ---- interruption ----

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A small run that nothing stopped."""
    folder = tmp_path_factory.mktemp("reference")
    program = Program(folder, *TINY, "--out", "run", before=UNDRAWN)
    assert (program.end(), program.err) == (0, "")
    (folder / "stdout").write_text(program.out)
    return folder / "run"


def test_ten_interruptions_at_random_moments_change_nothing(uninterrupted, tmp_path):
    """CHAIN=7 python -m pytest tests/test_trust.py -k ten: other moments."""
    rng, out, arguments = random.Random(int(os.environ.get("CHAIN", "0"))), tmp_path / "run", TINY
    signals = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
    for k in range(10):
        stage, most = (b"t", 60) if k < 5 else (b"s", 9)
        enough = ticks(tmp_path, stage) + rng.randint(1, most)
        plain = ["--plain"] * (k not in (2, 7))              # with and without, and the same bits
        program = Program(tmp_path, *arguments, f"--out={out}" if k == 0 else f"--resume={out}",
                          *plain, before=TICKS + UNDRAWN)
        program.until(lambda: ticks(tmp_path, stage) >= enough)
        time.sleep(rng.uniform(0, 0.004))
        program.send(signals[k % 5])
        if signals[k % 5] == signal.SIGKILL:
            assert program.end() == -signal.SIGKILL
        else:
            command = assert_stopped(program, signals[k % 5], out, ["teacher", "student"][k >= 5:])
            assert command == [sys.executable, ours.__file__, f"--resume={out}"]
            assert not list(out.glob("*.part"))
        assert_whole(out)
        arguments = []
    program = Program(tmp_path, f"--resume={out}", before=UNDRAWN)
    assert (program.end(), program.err) == (0, "")
    assert log_without_seconds(out) == log_without_seconds(uninterrupted)
    assert table(program.out) == table((uninterrupted.parent / "stdout").read_text())
    for name in ("teacher.pt", "student.pt", "checkpoint.pt"):
        mine, theirs = (torch.load(folder / name, weights_only=True)
                        for folder in (out, uninterrupted))
        for saved in (mine, theirs):
            for row in saved.get("run", {}).pop("log", []):
                row.pop()
            saved["run"] = {k: x for k, x in saved.get("run", {}).items()
                            if k not in ("seconds", "argv")}
        assert same(mine, theirs), name
    assert (out / "dataset.npz").read_bytes() == (uninterrupted / "dataset.npz").read_bytes()


def test_the_printed_command_goes_on(uninterrupted, tmp_path):
    """In a folder whose name needs quoting, typed and answered as a user does."""
    name = "-it's a run"
    program = Program(tmp_path, *TINY, "--plain", f"--out={name}", command=SCRIPT)
    program.until((tmp_path / name / "checkpoint.pt").exists)
    program.send(signal.SIGINT)
    command = assert_stopped(program, signal.SIGINT, name, ["teacher"])
    assert command == [*SCRIPT, f"--resume={name}"]
    program = Program(tmp_path, command=command)
    assert (program.end(), program.err) == (0, "")
    assert log_without_seconds(tmp_path / name) == log_without_seconds(uninterrupted)
    assert {file.name for file in (tmp_path / name).iterdir()} >= FILES - {"curves.png"}


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")


def mask(program, name):
    """A signal mask of the process: SigBlk blocked, SigCgt caught."""
    status = pathlib.Path(f"/proc/{program.process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s*(\w+)", status)[1], 16)


@needs_proc
def test_a_signal_while_it_starts(tmp_path):
    """From the module's first lines on; before them a signal is Python's own affair."""
    for delay, signum in ((0.0, signal.SIGINT), (0.1, signal.SIGTERM), (0.3, signal.SIGINT),
                          (1.0, signal.SIGINT)):
        folder = tmp_path / str(delay)
        folder.mkdir()
        program = Program(folder, "--plain", "--epochs", 9, "--out", "run", command=SCRIPT)
        program.until(lambda: mask(program, "SigBlk") >> signal.SIGINT - 1 & 1)
        time.sleep(delay)
        program.send(signum)
        assert program.end() == 128 + signum
        assert program.out == "" and program.err.count("\n") <= 1
        assert "Traceback" not in program.err
        if (folder / "run").exists():
            assert_whole(folder / "run")


@pytest.fixture
def signalled(monkeypatch):
    """signalled(n, signum): a signal comes at the n-th batch from now."""
    count, sample = [], ours.Data.get_sample

    def at(n, signum=signal.SIGINT):
        count[:] = [n, signum]

    def get_sample(data):
        if count:
            count[0] -= 1
            if count[0] == 0:
                os.kill(os.getpid(), count[1])
        return sample(data)

    def unanswered(*_):
        pytest.fail("the program does not answer this signal")

    monkeypatch.setattr(ours.Data, "get_sample", get_sample)
    handlers = {signum: signal.signal(signum, unanswered)
                for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield at
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def stopped(capsys, *arguments):
    """The line of a run that a signal stops."""
    with pytest.raises(SystemExit) as stop:
        ours.main([str(argument) for argument in arguments])
    said = without_versions(capsys.readouterr().err)
    assert said.count("\n") == 1 and said.startswith("stopped")
    return stop.value.code, said


@pytest.mark.parametrize("batch, stage, step", [(1, "teacher", 1), (150, "teacher", 150),
                                                (200, "teacher", 200), (201, "student", 1),
                                                (207, "student", 7), (210, "student", 10)])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_this_very_update(
        signum, batch, stage, step, quick, signalled, tmp_path, capsys):
    signalled(batch, signum)
    status, said = stopped(capsys, "--epochs", 1, "--steps", 10, "--out", tmp_path / "run")
    assert status == 128 + signum
    assert said.startswith(f"stopped in stage {stage} after update {step}; ")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (saved["run"]["stage"], saved["run"]["step"]) == (stage, step)
    inside(capsys, "--resume", tmp_path / "run" / "checkpoint.pt")          # the file itself, too
    assert len(quick.trained) == 210


def test_seconds_survive(quick, signalled, tmp_path, capsys, monkeypatch):
    """The log of a run that took 1 second for each update, stopped and not."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    train = ours.SAC.train

    def slow(agent, *batch):
        clock[0] += 1
        train(agent, *batch)

    monkeypatch.setattr(ours.SAC, "train", slow)
    inside(capsys, "--epochs", 12, "--steps", 2005, "--out", tmp_path / "whole")
    signalled(300)
    stopped(capsys, "--epochs", 12, "--steps", 2005, "--out", tmp_path / "run")
    for batch in (1000, 2000):
        signalled(batch)
        clock[0] = 50.0 * batch                                 # another day, and another boot
        stopped(capsys, "--resume", tmp_path / "run")
    clock[0] = 7.0
    inside(capsys, "--resume", tmp_path / "run")
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert [row["seconds"] for row in log(tmp_path / "run")] == [
        "200.0", "2200.0", "2400.0", "1.0", "2001.0", "2005.0"]


@pytest.mark.parametrize("which, stage", [(1, "student"), (3, "student")])
def test_a_signal_during_the_final_episodes(
        which, stage, quick, tmp_path, capsys, monkeypatch):
    evaluate = ours.evaluate

    def interrupted(agent, seeds):
        if len(quick.evaluated) == which:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(agent, seeds)

    monkeypatch.setattr(ours, "evaluate", interrupted)
    status, said = stopped(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    assert status == 128 + signal.SIGTERM and f"in stage {stage} after update 1;" in said
    text = inside(capsys, "--resume", tmp_path / "run")
    assert table(text)["the teacher"][1] == pytest.approx(returns_of(ours.SAC(), 100).mean(), 1e-3)
    assert table(text)["the student"][1] == pytest.approx(returns_of(ours.CQL(), 100).mean(), 1e-3)


def test_a_signal_while_playing(uninterrupted, tmp_path, capsys, monkeypatch):
    step = ours.MyWrapper.step

    def interrupted(env, action):
        os.kill(os.getpid(), signal.SIGINT)
        return step(env, action)

    monkeypatch.setattr(ours.MyWrapper, "step", interrupted)
    before = content(uninterrupted)
    status, said = stopped(capsys, "--play", uninterrupted / "student.pt")
    assert (status, said) == (130, "stopped; nothing was saved yet\n")
    assert content(uninterrupted) == before


@needs_proc
def test_a_second_signal_ends_an_endless_loop(tmp_path):
    """A learner's loss that never returns: the first signal waits for the update's end in vain."""
    program = Program(tmp_path, "--plain", "--out", "run", before=UNDRAWN + '''
def endless(agent, *batch):
    open("looping", "w").close()
    while True:
        pass
ours.SAC.train = endless
''')
    program.until((tmp_path / "looping").exists)
    program.send(signal.SIGTERM)
    program.until(lambda: not mask(program, "SigCgt") >> signal.SIGTERM - 1 & 1)    # it was heard
    program.send(signal.SIGTERM)
    assert program.end() == -signal.SIGTERM
    assert_whole(tmp_path / "run")


def test_handlers_are_put_back(quick, tmp_path, capsys):
    def state():
        handled = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        return [*map(signal.getsignal, handled), signal.pthread_sigmask(signal.SIG_BLOCK, [])]

    during = []
    quick.stages = type("Watched", (dict,), {
        "__setitem__": lambda *_: during.append(state())})()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                                # nohup
    try:
        before = state()
        inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
        assert state() == before
        refused(["--out", tmp_path / "run"], capsys)
        assert state() == before
        refused(["--epochs", 0], capsys)
        assert state() == before
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert during and all(now[0] != before[0] and now[1] != before[1] and
                          now[2] == signal.SIG_IGN for now in during)


def test_a_finished_run_goes_on_to_the_same_table(uninterrupted, capsys, undrawn):
    before = content(uninterrupted)
    text = inside(capsys, "--resume", uninterrupted)
    assert table(text) == table((uninterrupted.parent / "stdout").read_text())
    assert lines(text)[0] == "" and content(uninterrupted).keys() == before.keys()


def test_another_version_goes_on_with_a_note(quick, tmp_path, capsys, monkeypatch):
    inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    monkeypatch.setattr(ours, "PROGRAM", "another")
    assert ours.main(["--resume", str(tmp_path / "run")]) == 0
    assert re.fullmatch(r"note: another version .*\n", capsys.readouterr().err)


# ---- disks ----

def test_a_full_disk_while_saving_leaves_the_earlier_files(quick, tmp_path, capsys):
    inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    (tmp_path / "run" / "student.pt").unlink()
    before = content(tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = refused(["--resume", tmp_path / "run"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "student.pt: cannot be written (File too large)" in said
    assert content(tmp_path / "run") == before


def test_a_full_disk_for_a_stopped_run(quick, signalled, tmp_path, capsys, monkeypatch):
    """The checkpoint of the last test stays, and its run goes on when there is room again."""
    signalled(250)
    sample, limits = ours.Data.get_sample, resource.getrlimit(resource.RLIMIT_FSIZE)
    count = []

    def get_sample(data):
        count.append(1)
        if len(count) == 240:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return sample(data)

    monkeypatch.setattr(ours.Data, "get_sample", get_sample)
    try:
        said = refused(["--epochs", 2, "--steps", 1, "--out", tmp_path / "run"], capsys, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt: cannot be written (File too large)" in said
    assert not list((tmp_path / "run").glob("*.part"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["run"]
    assert (saved["stage"], saved["step"]) == ("teacher", 200)
    inside(capsys, "--resume", tmp_path / "run")


def test_writes_reach_the_disk_before_they_replace(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(number):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def replaced(source, target):
        assert pathlib.Path(source).read_bytes() == b"content"
        calls.append(("replace", str(source), str(target)))
        replace(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("there is no /proc here")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    ours.write_whole(tmp_path / "file", b"content")
    part = calls[0][1]
    assert calls == [("fsync", part), ("replace", part, str(tmp_path / "file")),
                     ("fsync", str(tmp_path))]
    assert content(tmp_path) == {tmp_path / "file": b"content"}


def test_a_file_that_cannot_even_be_cleaned_up_is_one_line(tmp_path):
    """As on a read-only disk: neither opening nor removing the part works."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ours.UserError, match="below: cannot be written"):
        ours.write_whole(tmp_path / "file" / "below", b"content")
    assert content(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_in_the_middle_of_a_save(moment, quick, tmp_path, capsys):
    """The files are those of the save before, and the run goes on."""
    inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    for file in ("checkpoint.pt", "student.pt"):
        before = content(tmp_path / "run")
        name = f"os.{moment}"
        program = Program(tmp_path, "--resume", "run", before=UNTRAINED + f"""
written = ours.write_whole
def write_whole(path, content):
    if path.name == "{file}":
        {name} = lambda *_: os.kill(os.getpid(), 9)
    written(path, content)
ours.write_whole = write_whole
work = ours.Run.restore
def restore(run, saved):
    rows = work(run, saved)
    run.step = 0
    return rows
ours.Run.restore = restore
""")
        assert program.end() == -signal.SIGKILL
        after = content(tmp_path / "run")
        assert after[tmp_path / "run" / file] == before[tmp_path / "run" / file]
        assert_whole(tmp_path / "run")
    inside(capsys, "--resume", tmp_path / "run")


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    update, updates = ours.SAC.train, []

    def poisoned(agent, *batch):
        updates.append(1)
        update(agent, *batch)
        if len(updates) == 203:
            with torch.no_grad():
                agent.model_value1.sequential[2].bias[3] = math_nan

    math_nan, out = float("nan"), tmp_path / "run"
    monkeypatch.setattr(ours.SAC, "train", poisoned)
    said = refused(["--epochs", 1, "--steps", 6, "--plain", "--out", out], capsys, silent=False)
    assert "checkpoint.pt: not written, the agent is NaN or infinite" in said
    _, saved = ours.load_agent(out / "checkpoint.pt")
    assert (saved["run"]["stage"], saved["run"]["step"]) == ("student", 1)
    assert_whole(out)
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [np.zeros(len(seeds))])
    monkeypatch.setattr(ours, "draw_curves", lambda *_: None)
    inside(capsys, "--resume", out)


# ---- two at once ----

def test_a_folder_is_one_runs_own(tmp_path, capsys, idle):
    first = Program(tmp_path, "--plain", "--epochs", 500, "--out", "run", before=TICKS + UNDRAWN)
    first.until(lambda: ticks(tmp_path, b"t") > 5)
    for arguments in (["--resume", tmp_path / "run"], ["--out", tmp_path / "run"]):
        assert "another run is at work" in refused(arguments, capsys)
    first.send(signal.SIGINT)
    assert_stopped(first, signal.SIGINT, "run", ["teacher"])


def together(tmp_path, n, *arguments):
    """n programs that begin at the same moment, as nearly as can be."""
    wait = f"""
open(f"ready{{os.getpid()}}", "w").close()
while len([name for name in os.listdir() if name.startswith("ready")]) < {n}:
    time.sleep(0.001)
"""
    programs = [Program(tmp_path, "--epochs", 1, "--steps", 1, "--plain", *arguments,
                        before=UNTRAINED + wait) for _ in range(n)]
    return sorted(programs, key=lambda program: program.end())


def test_two_starts_in_one_folder(tmp_path):
    one, other = together(tmp_path, 2, "--out", "run")
    assert (one.status(), other.status()) == (0, 2)
    assert other.out == "" and other.err.count("\n") == 1
    assert re.match("cql_pendulum.py: .*(another run is at work|has files in it)", other.err)
    assert table(one.out)
    assert_whole(tmp_path / "run")


def test_four_starts_without_a_folder(tmp_path):
    programs = together(tmp_path, 4)
    assert [(program.status(), program.err) for program in programs] == 4 * [(0, "")]
    said = {program.out.splitlines()[-1] for program in programs}
    assert said == {f"all files: runs/cql-seed0-{k}" for k in (1, 2, 3, 4)}
    for k in (1, 2, 3, 4):
        assert_whole(tmp_path / "runs" / f"cql-seed0-{k}")


# ---- where it prints, and what it draws with ----

@pytest.mark.parametrize("where, env", [
    ('"$@" >&-', {}),
    ('("$@"; echo $? >status) | head -n 1', {"MPLBACKEND": "module://nonexistent"}),
    ('"$@" >/dev/full', {"MATPLOTLIBRC": "broken"}),
    ('"$@"', {"PYTHONIOENCODING": "ascii"})])
def test_output_that_cannot_be_written(where, env, uninterrupted, tmp_path):
    (tmp_path / "broken").write_bytes(b"\xff\xfe\x00 text.usetex")
    program = Program(
        tmp_path, "--dataset", uninterrupted / "dataset.npz", "--steps", 3, "--plain", "--out",
        "é", command=["sh", "-c", where, "sh", *SCRIPT], **env)
    status = program.end()
    if "status" in where:
        status = int((tmp_path / "status").read_text())
    assert "Traceback" not in program.err and "Exception" not in program.err
    assert status == 0, program.err
    assert program.err == "" or "MATPLOTLIBRC" in env
    assert [row["step"] for row in log(tmp_path / "é")] == ["0", "2"]
    made = {file.name for file in (tmp_path / "é").iterdir()}
    assert made | {"curves.png"} == FILES - {"teacher.pt"}
    assert "curves.png" in made or env
    if "PYTHONIOENCODING" in env:
        assert program.out.splitlines()[-1] == r"all files: \xe9"


def test_a_matplotlib_that_cannot_draw_text(quick, monkeypatch, tmp_path, capsys):
    """A matplotlibrc with usetex, where there is no TeX."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.undo()
    monkeypatch.setattr(ours.SAC, "train", lambda *_: None)
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [np.arange(len(seeds))])
    monkeypatch.setenv("PATH", str(tmp_path))
    with matplotlib.rc_context({"text.usetex": True}):
        status = ours.main(["--epochs", "1", "--steps", "1", "--plain", "--out",
                            str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert status == 0 and captured.out.splitlines()[-1] == f"all files: {tmp_path / 'run'}"
    assert without_versions(captured.err).count("\n") <= 1


# ---- bad options ----

def refused(arguments, capsys, silent=True):
    """The one line on stderr of a call that must end with status 2."""
    try:
        status = ours.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    said = without_versions(captured.err)
    assert status == 2, arguments
    assert captured.out == "" or not silent, arguments
    assert said.count("\n") == 1 and said.startswith("cql_pendulum.py: "), said
    return said


@pytest.fixture
def idle(monkeypatch):
    """What is accepted by mistake fails at once, and does not train for minutes."""
    def accepted(*_):
        pytest.fail("accepted")

    for name in ("train_teacher", "train_student", "play"):
        monkeypatch.setattr(ours, name, accepted)


@pytest.mark.parametrize("arguments, words", [
    (["--epochs", "0"], "--epochs 0: give a number from 1"),
    (["--epochs", "-3"], "--epochs"),
    (["--epochs", "1000001"], "--epochs"),
    (["--steps", "0"], "--steps 0: give a number from 1"),
    (["--steps", "1.5"], "--steps"),
    (["--steps", "many"], "--steps"),
    (["--steps", "9" * 5000], "--steps"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2 ** 32)], "--seed"),
    (["--weight", "-1"], "--weight"),
    (["--weight", "nan"], "--weight"),
    (["--weight", "inf"], "--weight"),
    (["--last", "0"], "--last"),
    (["--first", "-1"], "--first"),
    (["--last", "11", "--epochs", "10"], "--last 11: give a number from 1 to 10"),
    (["--first", "101"], "--first 101: give a number from 1 to 100"),
    (["--first", "10", "--epochs", "501"], "--epochs 501: give a number from 1 to 500"),
    (["--last", "501", "--epochs", "600"], "--last 501: give a number from 1 to 500"),
    (["--last", "1", "--first", "1"], "--first has no use for --last"),
    (["--student", "dqn"], "--student"),
    (["--weight", "3", "--student", "sac"], "--student has no use for --weight"),
    (["--dataset", "d.npz", "--epochs", "3"], "--dataset has no use for --epochs"),
    (["--as-printed", "sing"], "'sing' (choose from"),
    (["--as-printed", "sign", "--as-printed", "sing"], "--as-printed: invalid choice: 'sing'"),
    (["--resume", "runs/x", "--steps", "5"], "--resume has no use for --steps"),
    (["--resume", "runs/x", "--as-printed"], "--resume has no use for --as-printed"),
    (["--play", "x.pt", "--epochs", "5"], "--play has no use for --epochs"),
    (["--play", "x.pt", "--plain"], "--play has no use for --plain"),
    (["--play", "x.pt", "--resume", "x"], "has no use for"),
    (["--setps", "5"], "--setps"),
    (["--step", "5"], "--step"),
    (["--seed"], "--seed"),
    (["extra"], "extra"),
])
def test_bad_options(arguments, words, capsys, tmp_path, monkeypatch, idle):
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_bad_out(capsys, tmp_path, uninterrupted, idle):
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(["--out", tmp_path / "file"], capsys)
    assert "--out" in refused(["--out", tmp_path / "file" / "below"], capsys)
    assert "--out" in refused(["--out", "/proc/none"], capsys)
    before = content(uninterrupted)
    said = refused(["--out", uninterrupted], capsys)
    assert "has files in it" in said and f"--resume={uninterrupted}" in said
    assert content(uninterrupted) == before
    said = refused(["--out", tmp_path], capsys)
    assert "has files in it" in said and "--resume" not in said
    assert content(tmp_path) == {tmp_path / "file": b"mine"}


# ---- bad datasets ----

def rows(n=64):
    """The arrays of a small dataset.npz that is right."""
    angle, speed = np.linspace(-3, 3, n + 1), np.linspace(-8, 8, n + 1)
    states = np.column_stack([np.cos(angle), np.sin(angle), speed]).astype(np.float32)
    return {"observations": states[:-1],
            "actions": np.linspace(-2, 2, n, dtype=np.float32)[:, None],
            "rewards": np.linspace(-16.2, 0, n, dtype=np.float32), "next_observations": states[1:],
            "terminals": np.zeros(n, bool), "timeouts": np.arange(n) == n - 1}


def changed(name, change):
    arrays = rows()
    arrays[name] = change(arrays[name].copy())
    return arrays


def with_value(value, at=5):
    def change(array):
        array.flat[at] = value
        return array
    return change


BAD_DATASETS = {
    "missing keys": ({k: x for k, x in rows().items() if k != "rewards"}, "lacks rewards"),
    "wrong width": (changed("observations", lambda x: x[:, :2]), "observations is float32 [64, 2]"),
    "flat actions": (changed("actions", lambda x: x[:, 0]), "actions is float32 [64]"),
    "integers": (changed("actions", lambda x: x.astype(int)), "actions is int64"),
    "text": (changed("rewards", lambda x: x.astype(str)), "rewards is <U"),
    "complex": (changed("rewards", lambda x: x.astype(complex)), "rewards is complex"),
    "numbers for flags": (changed("terminals", lambda x: x.astype(np.float32)), "terminals is"),
    "unequal lengths": (changed("next_observations", lambda x: x[:-1]), "next_observations is"),
    "nan": (changed("rewards", with_value(np.nan)), "rewards has NaN"),
    "infinite": (changed("observations", with_value(-np.inf)), "observations has NaN"),
    "too large": (changed("rewards", lambda x: x.astype(float) * 1e300), "rewards has NaN or"),
    "positive rewards": (changed("rewards", with_value(1.0)), "rewards has NaN or numbers"),
    "too small a reward": (changed("rewards", with_value(-17)), "rewards has NaN or numbers"),
    "no circle": (changed("observations", lambda x: x * np.float32([5, 5, 1])), "observations has"),
    "no angle": (changed("next_observations", lambda x: x * np.float32([0.5, 0.5, 1])),
                 "next_observations has"),
    "too fast": (changed("observations", with_value(1e6)), "observations has"),
    "too fast after": (changed("next_observations", with_value(8.1)), "next_observations has"),
    "too much torque": (changed("actions", with_value(2.5)), "actions has"),
    "too much torque the other way": (changed("actions", with_value(-2.001)), "actions has"),
    "too few rows": (rows(63), "63 rows; a batch draws 64"),
    "no rows": (rows(0), "0 rows"),
    "scalars": ({name: array[0] for name, array in rows().items()}, "observations is"),
    "more episodes asked for": (rows(), "the data has 1 episodes"),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_datasets(case, capsys, tmp_path, idle):
    arrays, words = BAD_DATASETS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    more = ["--last", 2] if "asked for" in case else []
    arguments = ["--dataset", tmp_path / "data.npz", "--out", tmp_path / "out", *more]
    message = refused(arguments, capsys)
    assert words in message and ("data.npz" in message or more)
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_pendulums_limits_are_accepted(tmp_path):
    np.savez(tmp_path / "data.npz", **rows())
    data = ours.load_dataset(tmp_path / "data.npz")
    assert data.rows[:, 3].tolist()[::63] == [-2, 2] and data.rows[:, 2].min() == -8
    np.savez(tmp_path / "wide.npz", **changed("actions", lambda x: x.astype(float)))
    np.testing.assert_array_equal(ours.load_dataset(tmp_path / "wide.npz").rows, data.rows)


# ---- bad files ----

class Planted:
    """A pickle that would make a file if anybody unpickled it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def bad_files(folder, good):
    """Files that are neither a dataset nor a checkpoint."""
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("state,action\n1,2\n")
    (folder / "truncated").write_bytes(good.read_bytes()[:-1000])
    (folder / "a folder").mkdir()
    np.save(folder / "array.npy", np.zeros(3))
    with zipfile.ZipFile(folder / "zip", "w") as file:
        file.writestr("hello", "world")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    return ["missing", "missing/below", *(path.name for path in sorted(folder.iterdir()))]


@pytest.mark.parametrize("option", ["--dataset", "--play"])
def test_files_that_are_something_else(option, capsys, tmp_path, uninterrupted, idle, monkeypatch):
    if option == "--play":
        monkeypatch.undo()
    good = uninterrupted / ("dataset.npz" if option == "--dataset" else "student.pt")
    for name in bad_files(tmp_path, good):
        before = sorted(tmp_path.iterdir())
        out = [] if option == "--play" else ["--out", tmp_path / "out"]
        assert str(tmp_path / name) in refused([option, tmp_path / name, *out], capsys)
        assert sorted(tmp_path.iterdir()) == before


def test_resume_of_something_else(capsys, tmp_path, uninterrupted, idle):
    refused(["--resume", tmp_path / "missing"], capsys)
    refused(["--resume", tmp_path / "missing" / "below"], capsys)
    refused(["--resume", tmp_path], capsys)
    whole = (uninterrupted / "checkpoint.pt").read_bytes()
    agent = (uninterrupted / "student.pt").read_bytes()
    for name, damaged in (("empty", b""), ("half", whole[:len(whole) // 2]), ("agent", agent)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "checkpoint.pt"
        file.write_bytes(damaged)
        assert f"{file}: damaged, or" in refused(["--resume", tmp_path / name], capsys)
        assert list((tmp_path / name).iterdir()) == [file]


def test_an_agent_of_an_older_version(capsys, tmp_path):
    """The keys of the .pt files before this format."""
    torch.save({"class": "CQL", "as_printed": ["sign"], "weight": 5.0,
                "tensors": {"alpha": torch.zeros(1), "model_action.fc_mu.bias": torch.zeros(1)}},
               tmp_path / "checkpoint.pt")
    for arguments in (["--play", tmp_path / "checkpoint.pt"], ["--resume", tmp_path]):
        assert "written by something else than this cql_pendulum.py" in refused(arguments, capsys)


def test_a_subclass_must_be_known(capsys, tmp_path):
    class Mine(ours.CQL):
        pass

    ours.save_agent(tmp_path / "mine.pt", Mine())
    assert type(ours.load_agent(tmp_path / "mine.pt")[0]) is Mine
    saved = torch.load(tmp_path / "mine.pt", weights_only=True)
    torch.save(saved | {"class": "Yours"}, tmp_path / "mine.pt")
    signed(tmp_path / "mine.pt")
    assert "holds a Yours; define or import that class" in refused(
        ["--play", tmp_path / "mine.pt"], capsys)


def test_planted_code_never_runs(capsys, tmp_path, uninterrupted, idle, monkeypatch):
    witness = tmp_path / "witness"
    np.savez(tmp_path / "data.npz",
             **rows() | {"observations": np.array([Planted(witness)], dtype=object)})
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Planted(witness)))
    for name in ("data.npz", "plain.npz"):
        refused(["--dataset", tmp_path / name, "--out", tmp_path / "out"], capsys)
    monkeypatch.undo()
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"log": Planted(witness)}, tmp_path / "checkpoint.pt")
    signed(tmp_path / "checkpoint.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Planted(witness)))
    for arguments in (["--play", "checkpoint.pt"], ["--resume", "checkpoint.pt"],
                      ["--play", "plain.pt"]):
        refused([arguments[0], tmp_path / arguments[1]], capsys)
    assert not witness.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)      # it is alive: it would have run
    assert witness.exists()


def test_a_small_file_that_unpacks_to_gigabytes(capsys, tmp_path, idle, monkeypatch):
    """It is refused, and its content is never in memory."""
    zeros = bytes(1 << 24)
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED,
                         compresslevel=1) as file:
        for name in ("archive/data.pkl", "archive/data/0", "rewards.npy"):
            with file.open(name, "w") as member:
                for _ in range(23):
                    member.write(zeros)
    assert (tmp_path / "checkpoint.pt").stat().st_size < 1 << 23
    del zeros
    monkeypatch.undo()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for arguments in (["--play", tmp_path / "checkpoint.pt"], ["--resume", tmp_path]):
        refused(arguments, capsys)
    assert "unpacks to more than a gigabyte" in refused(
        ["--dataset", tmp_path / "checkpoint.pt", "--out", tmp_path / "out"], capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 200_000       # kB on Linux


def signed(path):
    """Give a file the digest that a run gives its own."""
    plain = path.read_bytes()
    path.write_bytes(plain[:-2] + b"@\0" + hashlib.sha256(plain).hexdigest().encode())


@pytest.mark.parametrize("change", [
    "run['seed'] = 'x'", "run['argv'] = None", "run['stage'] = 5", "run['step'] = '3'",
    "run['log'] = [5]", "run['seconds'] = 5", "run['table'] = {'the data': 3}",
    "saved['random'] = (1, 2, 3)", "saved['rows'] = torch.zeros(10).expand(10 ** 10, 10)",
    "parts['weight'] = 'much'", "parts['model_action'] = 5",
    "parts['optimizer_value']['param_groups'][0]['lr'] = 'x'",
    "parts['optimizer_value']['state'][0]['exp_avg'] = torch.zeros(3)", ""])
def test_checkpoints_made_by_hand(change, uninterrupted, capsys, tmp_path, idle):
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    exec(change, {"saved": saved, "torch": torch, "run": saved["run"], "parts": saved["parts"]})
    torch.save(saved, tmp_path / "checkpoint.pt")
    before = content(tmp_path)
    said = refused(["--resume", tmp_path], capsys)
    assert f"{tmp_path / 'checkpoint.pt'}: damaged, or written by something else" in said
    assert content(tmp_path) == before


@pytest.mark.parametrize("change", [
    "saved['class'] = 7", "saved['class'] = []", "saved['class'] = 'Data'", "saved.clear()",
    "saved['as_printed'] = ['sing']", "saved['as_printed'] = 3", "del saved['rows']",
    "saved['parts'] = {}", "parts['weight'] = 'much'", "parts['alpha'] = 'x'",
    "parts['alpha'] = torch.zeros(3)", "parts['model_action'] = 5", "saved['run'] = None",
    "parts['model_value2']['sequential.2.weight'] = torch.zeros(128, 127)", "del run['table']",
    "parts['optimizer_value'] = {}", "saved['random'] = None", "saved['random'] = (1, 2, 3)",
    "saved['rows'] = torch.zeros(7)", "run['argv'] = ['--nonsense']"])
def test_checkpoints_of_another_program(change, uninterrupted, capsys, tmp_path, idle):
    """As a learner's edited module may save them: with a digest, and with other parts."""
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    exec(change, {"saved": saved, "torch": torch, "run": saved["run"], "parts": saved["parts"]})
    torch.save(saved, tmp_path / "checkpoint.pt")
    signed(tmp_path / "checkpoint.pt")
    refused(["--resume", tmp_path], capsys)


def test_what_is_signed_and_unchanged_is_accepted(uninterrupted, tmp_path):
    """Or the test above would show nothing."""
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    torch.save(saved, tmp_path / "checkpoint.pt")
    signed(tmp_path / "checkpoint.pt")
    assert same(saved_in(tmp_path / "checkpoint.pt"), saved_in(uninterrupted / "checkpoint.pt"))


# ---- damaged files ----

def loads_alike(path, load, wanted):
    """Whether the file still loads, and then to the very same numbers; else one line says why."""
    try:
        found = load(path)
    except ours.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    assert same(found, wanted), path
    return True


def saved_in(path):
    agent, saved = ours.load_agent(path)
    return saved, ours.parts(agent)


def test_single_flipped_bits(uninterrupted, tmp_path):
    """FLIPS=5000 python -m pytest tests/test_trust.py -k flipped"""
    rng, whole = random.Random(0), (uninterrupted / "checkpoint.pt").read_bytes()
    wanted = saved_in(uninterrupted / "checkpoint.pt")
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        headers = [member.header_offset for member in file.infolist()]
    loaded = 0
    for k in range(int(os.environ.get("FLIPS", "60"))):
        at = [rng.randrange(len(whole)), rng.choice(headers) + rng.randrange(40),
              len(whole) - rng.randrange(1, 5000)][k % 3]      # data, headers, the zip's directory
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        loaded += loads_alike(tmp_path / "flipped.pt", saved_in, wanted)
    assert loaded < 40


def test_truncated_files(uninterrupted, tmp_path):
    rng = random.Random(0)
    for name, load in (("checkpoint.pt", saved_in), ("dataset.npz", ours.load_dataset)):
        whole = (uninterrupted / name).read_bytes()
        for length in [1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))]:
            (tmp_path / name).write_bytes(whole[:length])
            assert not loads_alike(tmp_path / name, load, None)


# FUZZ=10000 python -m pytest tests/test_trust.py -k fuzz
fuzz = settings(max_examples=int(os.environ.get("FUZZ", "60")), deadline=None, database=None,
                derandomize=True, suppress_health_check=[*HealthCheck])
edits = st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["flip", "cut", "drop", "repeat"]),
                           st.binary(min_size=1, max_size=8)), max_size=6)


def edited(whole, changes):
    whole = bytearray(whole)
    for where, how, data in changes:
        at = where * len(whole) // 1000
        if how == "flip":
            whole[at:at + len(data)] = data
        elif how == "cut":
            del whole[at:]
        elif how == "drop":
            del whole[at:at + len(data)]
        else:
            whole[at:at] = whole[at:at + 100]
    return bytes(whole)


@fuzz
@given(changes=edits, raw=st.none() | st.binary(max_size=200))
def test_fuzz_datasets(changes, raw, tmp_path_factory):
    buffer, file = io.BytesIO(), tmp_path_factory.getbasetemp() / "fuzz.npz"
    np.savez_compressed(buffer, **rows())
    file.write_bytes(edited(buffer.getvalue(), changes) if raw is None else raw)
    wanted = np.column_stack([*rows().values()]).astype(np.float32).tolist()
    loads_alike(file, lambda path: ours.load_dataset(path).rows.tolist(), wanted)


@fuzz
@given(changes=edits, raw=st.none() | st.binary(max_size=200))
def test_fuzz_checkpoints(changes, raw, tmp_path_factory, uninterrupted):
    file = tmp_path_factory.getbasetemp() / "fuzz.pt"
    whole = (uninterrupted / "student.pt").read_bytes()
    file.write_bytes(edited(whole, changes) if raw is None else raw)
    wanted = saved_in(uninterrupted / "student.pt")
    loads_alike(file, saved_in, wanted)
