"""The command as its user meets it: what it prints, its files, its pictures, its options."""
import contextlib
import csv
import json
import math
import multiprocessing
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import types

import numpy as np
import pytest
import torch

import cql_pendulum as ours

TOP = pathlib.Path(__file__).parents[1]
SCRIPT = [sys.executable, str(TOP / "cql_pendulum.py")]
TINY = ["--epochs", "2", "--steps", "70"]
FILES = {"checkpoint.pt", "config.json", "curves.png", "dataset.npz", "log.csv", "student.pt",
         "teacher.pt"}
UNDRAWN = "ours.draw_curves = lambda *_: None\n"

# ---- the program in a process of its own ----

# PyTorch's CUDA builds cannot fork after autograd has run; this server imports and runs nothing
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["cql_pendulum", "torch._dynamo", "tqdm", "pytest"])


def without_versions(text):
    """What was said on stderr, without the note that this machine has other versions."""
    return re.sub("note: .* differ from README's\n", "", text)


def forked(folder, arguments, before, files, env):
    os.chdir(folder)
    os.environ.update(env)
    for file, stream in zip(files, (1, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)
    exec(before, globals())
    sys.exit(ours.main(arguments))


class Program:
    """The program at work in `folder`, what it prints in files outside it. Without a `command` it
    is forked from the server, which has its imports behind it, and runs the Python `before`."""

    started = []

    def __init__(self, folder, *arguments, before="", command=None, **env):
        self.arguments = [*map(str, arguments)]
        prints = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
        self.files = prints / "out", prints / "err"
        if command:
            with open(self.files[0], "wb") as out, open(self.files[1], "wb") as err:
                self.process = subprocess.Popen([*command, *self.arguments], stdout=out, stderr=err,
                                                cwd=folder, env=os.environ | env)
        else:
            self.process = SERVER.Process(
                target=forked, args=(folder, self.arguments, before, self.files, env))
            with contextlib.chdir(TOP):                         # where the server finds the module
                self.process.start()
        self.started.append(self)

    def status(self):
        """None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def until(self, true, limit=120):
        """Wait until true(); a failure with all that was printed if that never comes."""
        end = time.monotonic() + limit
        while not true():
            ended = self.status() is not None
            if (ended or time.monotonic() > end) and not true():
                self.process.kill()
                pytest.fail(f"{self.arguments}: status {self.status()}\n{self.out}\n{self.err}")
            time.sleep(0.003)

    def end(self):
        self.until(lambda: self.status() is not None)
        return self.status()

    def send(self, signum):
        os.kill(self.process.pid, signum)

    @property
    def out(self):
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def err(self):
        return without_versions(self.files[1].read_text()) if self.files[1].exists() else ""


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_running():
    yield
    while Program.started:
        program = Program.started.pop()
        if program.status() is None:
            program.process.kill()


# ---- the program in this process ----

def inside(capsys, *arguments):
    """Run the program in this process: its stdout, once it has ended well and silently."""
    assert ours.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert without_versions(captured.err) == ""
    return captured.out


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(ours, "draw_curves", lambda *_: None)


@pytest.fixture
def quick(monkeypatch, undrawn):
    """A main job that trains nothing and tests at once; what its parts were given."""
    seen = types.SimpleNamespace(stages={}, evaluated=[], recorded=[], threads=[], trained=[])
    teach, learn = ours.train_teacher, ours.train_student

    def evaluate(agent, seeds):
        seen.evaluated.append((type(agent), seeds))
        return returns_of(agent, len(seeds)), np.full(len(seeds), 5.0), np.full(len(seeds), 7.0)

    def train(agent, *batch):
        seen.trained.append((type(agent), seen.threads[-1:]))

    def train_teacher(agent, data, *rest):
        seen.stages["teacher"] = agent, data
        teach(agent, data, *rest)

    def train_student(agent, data, *rest):
        seen.stages["student"] = agent, data
        learn(agent, data, *rest)

    def accelerate(agent):
        seen.recorded.append(type(agent))
        return agent.train

    for stub in (evaluate, train_teacher, train_student, accelerate):
        monkeypatch.setattr(ours, stub.__name__, stub)
    monkeypatch.setattr(ours.SAC, "train", train)
    monkeypatch.setattr(torch, "set_num_threads", seen.threads.append)
    return seen


def returns_of(agent, n):
    return (-300.0 if isinstance(agent, ours.CQL) else -100.0) - np.arange(n) ** 1.5


def lines(text):
    """What was printed, without what no two runs share."""
    return [line for line in text.splitlines() if not line.startswith(("minutes", "all files"))]


def table(text):
    found = [line for line in text.splitlines() if line.startswith("the ")]
    return {line[:22].strip(): [float(x) for x in line[22:].split()] for line in found}


def log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def played(n, as_printed=()):
    """A Data of n episodes."""
    torch.manual_seed(0)
    ours.env.reset(seed=0)
    data, agent = ours.Data(as_printed), ours.SAC()
    for _ in range(n):
        data.update_data(agent)
    return data


# ---- the whole main job ----

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The main job as its user starts it, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    program = Program(folder, *TINY, "--out", "run", command=SCRIPT)
    assert (program.end(), program.err) == (0, "")
    return folder / "run", program.out


def test_import_is_silent_and_changes_nothing():
    code = ("import signal, torch; before = lambda: [torch.get_num_threads(), "
            "signal.pthread_sigmask(0, []), *map(signal.getsignal, (1, 2, 15))]; "
            "old = before(); import cql_pendulum; assert before() == old")
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_main_job_end_to_end(whole):
    out, text = whole
    assert {file.name for file in out.iterdir()} == FILES
    steps = ["teacher 0", "teacher 1", "student 0", "student 69"]
    tests = lines(text)[:4]
    assert [" ".join(line.split()[:2]) for line in tests] == steps
    assert [re.sub(r"-?\d+(\.\d+)?", "", line).split() for line in tests] == [
        [step.split()[0], "return", "promised", "delivered"] for step in steps]
    assert [f"{row['stage']} {row['step']}" for row in log(out)] == steps
    for row, line in zip(log(out), tests):
        said = [float(x) for x in re.findall(r"-?\d+\.\d+", line)]
        kept = [float(row[name]) for name in ("return", "promised", "delivered")]
        assert said == pytest.approx(kept, abs=0.051)
    with np.load(out / "dataset.npz") as data:
        assert {name: (array.dtype.name, array.shape) for name, array in data.items()} == {
            "observations": ("float32", (400, 3)), "actions": ("float32", (400, 1)),
            "rewards": ("float32", (400,)), "next_observations": ("float32", (400, 3)),
            "terminals": ("bool", (400,)), "timeouts": ("bool", (400,))}
        returns = data["rewards"].reshape(2, 200).sum(axis=1)
    rows = table(text)
    assert list(rows) == ["the data", "the teacher", "the student"]
    assert [row[0] for row in rows.values()] == [2, 100, 100]
    assert rows["the data"][1:] == pytest.approx(
        [returns.mean(), statistics.stdev(returns) / 2 ** 0.5, returns.min(), returns.max()],
        abs=0.06)
    config = json.loads((out / "config.json").read_text())
    assert (config["options"]["seed"], config["options"]["steps"]) == (0, 70)
    assert config["versions"]["torch"] == torch.__version__
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, kind in (("teacher.pt", ours.SAC), ("student.pt", ours.CQL)):
        assert type(ours.load_agent(out / name)[0]) is kind


def test_plain_prints_the_same_lines(whole, tmp_path, capsys, undrawn):
    text = inside(capsys, *TINY, "--plain", "--out", tmp_path / "run")
    assert lines(text) == lines(whole[1])
    assert (tmp_path / "run" / "dataset.npz").read_bytes() == (
        whole[0] / "dataset.npz").read_bytes()
    for name in ("teacher.pt", "student.pt"):
        mine, theirs = (ours.load_agent(out / name)[0] for out in (tmp_path / "run", whole[0]))
        pairs = zip(ours.tensors(ours.parts(mine)), ours.tensors(ours.parts(theirs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_plain_prints_the_same_lines_of_a_sac_student(whole, tmp_path, capsys, undrawn):
    arguments = ["--dataset", whole[0] / "dataset.npz", "--student", "sac", "--steps", 150]
    texts = [inside(capsys, *arguments, *plain, "--out", tmp_path / f"run{len(plain)}")
             for plain in ([], ["--plain"])]
    assert lines(texts[0]) == lines(texts[1])


def test_an_edit_that_cannot_be_recorded_costs_one_line(
        whole, tmp_path, capsys, monkeypatch, undrawn):
    loss, seen = ours.CQL._get_loss_value, []

    def edited(*arguments):
        value = loss(*arguments)
        seen.append(value.item())
        return value

    monkeypatch.setattr(ours.CQL, "_get_loss_value", edited)
    arguments = ["--dataset", whole[0] / "dataset.npz", "--steps", 70, "--out", tmp_path / "run"]
    assert ours.main([*map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: updates cannot be recorded")
    assert captured.err.count("\n") == 1
    assert len(seen) >= 140
    assert lines(captured.out)[:2] == [x for x in lines(whole[1]) if x.startswith("student")]
    assert table(captured.out)["the student"] == table(whole[1])["the student"]


def test_another_seed_prints_other_lines(whole, tmp_path, capsys, undrawn):
    text = inside(capsys, "--epochs", 1, "--steps", 1, "--seed", 1, "--plain", "--out",
                  tmp_path / "other")
    assert not set(lines(text)[:2]) & set(lines(whole[1]))
    assert {line.split("return")[0] for line in lines(text)[:2]} == {"teacher      0   ",
                                                                     "student      0   "}


def test_the_saved_dataset_gives_the_same_student(whole, tmp_path, capsys, undrawn):
    text = inside(capsys, "--dataset", whole[0] / "dataset.npz", "--steps", 70, "--out",
                  tmp_path / "run")
    assert lines(text)[:2] == [line for line in lines(whole[1]) if line.startswith("student")]
    rows, theirs = table(text), table(whole[1])
    assert rows == {who: theirs[who] for who in ("the data", "the student")}


def test_gymnasium_in_gyms_place(whole, tmp_path):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    text = (TOP / "cql_pendulum.py").read_text()
    assert len(re.findall(r"^import gym\b", text, re.MULTILINE)) == 1
    text = re.sub(r"(?m)^import gym\b", "import gymnasium as gym", text)
    (tmp_path / "other.py").write_text(text)
    program = Program(tmp_path, *TINY, "--out", "run", command=[sys.executable, "other.py"])
    assert (program.end(), program.err) == (0, "")
    assert lines(program.out) == lines(whole[1])
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES


def test_without_the_optional_packages(whole, tmp_path):
    """One line of notice for each, and the same numbers."""
    gone = "for name in ('tqdm', 'matplotlib', 'pygame'): sys.modules[name] = None"
    program = Program(tmp_path, *TINY, "--out", "run", before=gone)
    assert program.end() == 0
    notes = program.err.splitlines()
    assert [note.split(" (")[0] for note in notes] == ["note: no progress bars",
                                                       "note: no curves.png"]
    assert all("ModuleNotFoundError(" in note for note in notes)
    assert lines(program.out) == lines(whole[1])
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES - {"curves.png"}
    program = Program(tmp_path, "--play", "run/student.pt", before=gone)
    assert program.end() == 0
    assert re.fullmatch(r"return -\d+\.\d\n", program.out)
    assert re.fullmatch(r"note: no animation \(.*\)\n", program.err)
    assert not list((tmp_path / "run").glob("*.gif"))


# ---- the animation ----

def played_return(path, seed):
    agent, _ = ours.load_agent(path)
    env = ours.MyWrapper()
    torch.manual_seed(seed)
    state, total, over = env.reset(seed=seed), 0.0, False
    while not over:
        state, reward, over, _ = env.step([agent.get_action(state)])
        total += float(reward)
    return total


def test_play_prints_the_return_and_writes_an_animation(whole, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    pytest.importorskip("pygame", reason="pygame-ce is not installed")
    for name in ("teacher.pt", "checkpoint.pt"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    before = (tmp_path / "teacher.pt").read_bytes()
    shown = {}
    for name, k, seed in (("teacher.pt", 1, 3), ("teacher.pt", 2, 4), ("checkpoint.pt", 1, 3)):
        said = inside(capsys, "--play", tmp_path / name, "--seed", seed).splitlines()
        file = tmp_path / f"{name}-{k}.gif"
        assert said == [f"return {played_return(tmp_path / name, seed):.1f}", f"animation: {file}"]
        with image.open(file) as gif:
            assert gif.n_frames > 100                           # equal frames are merged
            assert gif.info["duration"] == 50
            assert gif.info["loop"] == 0
        shown[file] = file.read_bytes()
    assert len(set(shown.values())) == 3
    assert all(file.read_bytes() == content for file, content in shown.items())
    assert (tmp_path / "teacher.pt").read_bytes() == before


# ---- options reach what they name ----

@pytest.mark.parametrize("typed, restored", [
    ([], set()), (["--as-printed"], {*ours.ERRATA}), (["--as-printed", "timeout"], {"timeout"}),
    (["--as-printed", "sign", "--as-printed", "range"], {"sign", "range"}),
    (["--as-printed", "jacobian", "timeout"], {"jacobian", "timeout"}),
    (["--student", "sac", "--as-printed", "jacobian"], {"jacobian"})])
def test_as_printed_reaches_every_part(typed, restored, quick, tmp_path, capsys):
    inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run", *typed)
    inside(capsys, "--dataset", tmp_path / "run" / "dataset.npz", "--steps", 1, "--out",
           tmp_path / "again", *typed)
    quick.stages["loaded"] = quick.stages["student"]
    inside(capsys, "--resume", tmp_path / "run")
    for agent, data in quick.stages.values():
        assert (agent.as_printed, data.as_printed) == (restored, restored)
        assert agent.model_action.as_printed == restored
    for file in [*tmp_path.glob("*/teacher.pt"), *tmp_path.glob("*/student.pt")]:
        assert ours.load_agent(file)[0].as_printed == restored


@pytest.mark.parametrize("typed, kind, weight", [
    ([], ours.CQL, 5.0), (["--weight", "2.5"], ours.CQL, 2.5), (["--weight", "0"], ours.CQL, 0.0),
    (["--student", "sac"], ours.SAC, None)])
def test_the_student_is_the_one_asked_for(typed, kind, weight, quick, tmp_path, capsys):
    inside(capsys, "--epochs", 1, "--steps", 3, "--out", tmp_path / "run", *typed)
    teacher, student = (quick.stages[stage][0] for stage in ("teacher", "student"))
    assert (type(teacher), type(student), getattr(student, "weight", None)) == (
        ours.SAC, kind, weight)
    assert quick.recorded == [ours.SAC, kind]
    assert [kind for kind, _ in quick.trained] == [ours.SAC] * 200 + [kind] * 3


@pytest.mark.parametrize("typed", [["--plain"], []])
def test_plain_records_nothing_and_each_stage_has_its_threads(
        typed, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    inside(capsys, "--epochs", 1, "--steps", 3, "--out", tmp_path / "run", *typed)
    assert quick.recorded == ([] if typed else [ours.SAC, ours.CQL])
    assert quick.trained == 200 * [(ours.SAC, [1])] + 3 * [(ours.CQL, [7])]
    inside(capsys, "--resume", tmp_path / "run")
    assert quick.recorded == ([] if typed else [ours.SAC, ours.CQL, ours.CQL])


def test_plain_can_be_added_when_a_run_goes_on(quick, tmp_path, capsys):
    inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    quick.recorded.clear()
    inside(capsys, "--resume", tmp_path / "run", "--plain")
    assert quick.recorded == []


@pytest.mark.parametrize("files, threads", [
    ({"cpu.max": "250000 100000"}, [2]), ({"cpu.max": "50000 100000"}, [1]),
    ({"cpu.max": "900000 100000"}, [7]), ({"cpu.max": "max 100000"}, []), ({}, []),
    ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, [1]),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, [])])
def test_control_groups_limit_the_threads(files, threads, monkeypatch, tmp_path):
    """Files of /sys/fs/cgroup, version 2 and 1; conftest sets OMP_NUM_THREADS, which wins."""
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    ours.settle_process(tmp_path)
    assert used == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    ours.settle_process(tmp_path)
    assert used == threads


@pytest.mark.parametrize("episodes", ["--first", "--last"])
def test_first_and_last_choose_the_episodes(episodes, quick, tmp_path, capsys):
    inside(capsys, "--epochs", 4, "--steps", 1, "--out", tmp_path / "all")
    whole = ours.load_dataset(tmp_path / "all" / "dataset.npz").rows
    inside(capsys, "--epochs", 4, "--steps", 1, episodes, 3, "--out", tmp_path / "run")
    inside(capsys, "--dataset", tmp_path / "all" / "dataset.npz", "--steps", 1, episodes, 3,
           "--out", tmp_path / "given")
    wanted = whole[:600] if episodes == "--first" else whole[200:]
    for folder in ("run", "given"):
        text = inside(capsys, "--resume", tmp_path / folder)
        assert table(text)["the data"][0] == 3
        rows = ours.load_dataset(tmp_path / folder / "dataset.npz").rows
        np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_array_equal(quick.stages["student"][1].rows, wanted)


# ---- what is printed, and when ----

def test_the_table_says_who_got_what(quick, tmp_path, capsys):
    text = inside(capsys, "--epochs", 3, "--steps", 1, "--last", 2, "--out", tmp_path / "run")
    data = ours.load_dataset(tmp_path / "run" / "dataset.npz").rows[:, 4].reshape(2, 200)
    rows = {"the data": data.sum(axis=1, dtype=float), "the teacher": returns_of(ours.SAC(), 100),
            "the student": returns_of(ours.CQL(), 100)}
    assert list(table(text)) == list(rows)
    for who, x in rows.items():
        error = statistics.stdev(x.tolist()) / math.sqrt(len(x))
        assert table(text)[who] == pytest.approx(
            [len(x), x.mean(), error, x.min(), x.max()], abs=0.051), who
    again = inside(capsys, "--resume", tmp_path / "run")
    assert table(again) == table(text)


def test_one_episode_has_no_standard_error(quick, tmp_path, capsys):
    text = inside(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    assert math.isnan(table(text)["the data"][2])


def test_tests_come_when_the_page_has_them(quick, tmp_path, capsys):
    inside(capsys, "--epochs", 12, "--steps", 4002, "--out", tmp_path / "run")
    assert [f"{row['stage']} {row['step']}" for row in log(tmp_path / "run")] == [
        "teacher 0", "teacher 10", "teacher 11", "student 0", "student 2000", "student 4000",
        "student 4001"]
    assert len(quick.trained) == 12 * 200 + 4002


def test_tests_and_final_episodes_have_their_own_starts(quick, tmp_path, capsys):
    for seed in (0, 1):
        inside(capsys, "--epochs", 1, "--steps", 1, "--seed", seed, "--out", tmp_path / f"{seed}")
    starts = [seeds for _, seeds in quick.evaluated]
    for run in (starts[:4], starts[4:]):
        assert run[:2] == [run[2], run[1]] and run[1] == run[3]     # teacher's and student's
        assert [len(set(seeds)) for seeds in run] == [10, 100, 10, 100]
        assert not set(run[0]) & set(run[1])
    assert not {*starts[0], *starts[1]} & {*starts[4], *starts[5]}


def test_progress_is_saved_before_it_is_printed(quick, tmp_path, capsys, monkeypatch):
    say, out, checked = ours.say, tmp_path / "run", []

    def checking(line, *stream):
        if line.startswith(("teacher ", "student ")):
            checked.append(" ".join(line.split()[:2]))
            saved = torch.load(out / "checkpoint.pt", weights_only=True)["run"]
            assert f"{saved['log'][-1][0]} {saved['log'][-1][1]}" == checked[-1]
            assert f"{log(out)[-1]['stage']} {log(out)[-1]['step']}" == checked[-1]
        say(line, *stream)

    monkeypatch.setattr(ours, "say", checking)
    inside(capsys, "--epochs", 1, "--steps", 2, "--out", out)
    assert checked == ["teacher 0", "student 0", "student 1"]


def test_other_versions_are_named(quick, tmp_path, capsys, monkeypatch):
    pinned = dict(re.findall(r"(?m)^(\w+)==(\S+)", (TOP / "requirements.txt").read_text()))
    for module in (ours.gym, np, torch):
        if module.__name__ in pinned:
            monkeypatch.setattr(module, "__version__", pinned[module.__name__])
    monkeypatch.setattr(torch, "__version__", pinned["torch"] + "+cpu")
    arguments = ["--epochs", "1", "--steps", "1", "--out"]
    assert ours.main([*arguments, str(tmp_path / "same")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(np, "__version__", "1.0.0")
    assert ours.main([*arguments, str(tmp_path / "other")]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and without_versions(said) == ""
    assert f"numpy 1.0.0 (tested: {pinned['numpy']})" in said and "torch" not in said
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    assert ours.main([*arguments, str(tmp_path / "both")]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "numpy 1.0.0" in said and "torch 1.2.3" in said
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["versions"]["numpy"] == "1.0.0"


def test_default_folders_are_new(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in (1, 2):
        text = inside(capsys, "--epochs", 1, "--steps", 1, "--student", "sac", "--seed", 4)
        assert text.splitlines()[-1] == f"all files: runs/sac-seed4-{k}"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sac-seed4-1",
                                                                           "sac-seed4-2"]


# ---- the picture ----

def test_the_picture_shows_what_it_says(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    student, run = ours.CQL(), ours.Run()
    run.data = played(2).freeze()
    run.table = {"the data": [-900.0, -800.0], "the teacher": [-150.0, -250.0],
                 "the student": [-1.0]}
    run.log = [["teacher", 0, -1500.0, 1.0, 2.0, 9.0], ["teacher", 10, -230.0, 3.0, 4.0, 9.5],
               ["student", 0, -1400.0, 5.0, 6.0, 9.0], ["student", 2000, -300.0, 7.0, 8.5, 9.5]]
    figure = ours.draw_curves(run, student)
    teacher, learner, promise, policy, critic, slices = figure.axes[:6]
    written = [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert written[:6] == [
        ("Teacher, online", "epoch", "return of an episode"),
        ("Student, offline", "update", "return of an episode"),
        ("Promise and delivery", "update", "discounted sum of (reward + 8) / 8"),
        ("Student's policy; the data", "angle (degrees, 0 is up)", "speed (rad/s)"),
        ("Student's critic", "angle (degrees, 0 is up)", "speed (rad/s)"),
        ("Critic over all torques, | the data's", "torque (N m)", "value")]

    def curves(axes):
        return {line.get_label(): [np.asarray(x).tolist() for x in line.get_data()]
                for line in axes.lines if not line.get_label().startswith("_")}

    def legend(axes):
        return [text.get_text() for text in axes.get_legend().get_texts()]

    assert curves(teacher) == {"teacher": [[0, 10], [-1500, -230]]}
    assert curves(learner) == {"student": [[0, 2000], [-1400, -300]],
                               "the data": [[0, 1], [-850, -850]],
                               "the teacher's last test": [[0, 1], [-230, -230]]}
    assert curves(promise) == {"promised": [[0, 2000], [5, 7]], "delivered": [[0, 2000], [6, 8.5]],
                               "the most possible": [[0, 1], [100, 100]]}
    for axes in (teacher, learner, promise):
        assert legend(axes) == list(curves(axes))

    def value(state, torque):
        """Of the smaller critic, for one state and one torque."""
        batch = [torch.tensor([x], dtype=torch.float32) for x in (state, [torque])]
        with torch.no_grad():
            return min(student.model_value1(*batch).item(), student.model_value2(*batch).item())

    def mean(state):
        with torch.no_grad():
            hidden = student.model_action.fc_state(torch.tensor([state], dtype=torch.float32))
            return 2 * math.tanh(student.model_action.fc_mu(hidden).item())

    (torques,), (values,) = ([mesh for mesh in axes.collections] for axes in (policy, critic))
    torques_at, values_at = (mesh.get_array().reshape(121, 121) for mesh in (torques, values))
    for i, j in ((0, 0), (0, 120), (120, 0), (60, 60), (13, 77), (99, 30), (40, 101)):
        angle, speed = -math.pi + j * math.pi / 60, -8 + i * 16 / 120
        state = [math.cos(angle), math.sin(angle), speed]
        assert torques_at[i, j] == pytest.approx(mean(state), abs=1e-4)
        assert values_at[i, j] == pytest.approx(value(state, mean(state)), abs=1e-4)
        for mesh in (torques, values):                          # of this cell
            corners = mesh.get_coordinates()[i:i + 2, j:j + 2].mean(axis=(0, 1))
            assert corners.tolist() == pytest.approx([math.degrees(angle), speed], abs=1e-3)
    assert written[6:] == [("", "", "torque at the policy's mean (N m)"),
                           ("", "", "its value, clipped to the data's")]
    rows = run.data.rows
    mine = [value(row[:3].tolist(), row[3]) for row in rows]
    assert values.get_clim() == pytest.approx(np.percentile(mine, [1, 99]), abs=1e-4)
    dots = policy.lines[0].get_xydata()
    angles = np.degrees(np.arctan2(rows[:, 1], rows[:, 0]))
    np.testing.assert_allclose(dots[:, 0], angles, atol=1e-3)
    np.testing.assert_array_equal(dots[:, 1], rows[:, 2])

    drawn, marks = slices.lines[0::2], slices.lines[1::2]
    assert (len(drawn), len(marks)) == (3, 3)
    for k, row in enumerate(rows[[100, 200, 300]]):
        torque, y = drawn[k].get_data()
        np.testing.assert_allclose(torque.flatten(), np.linspace(-2, 2, 81), atol=1e-6)
        np.testing.assert_allclose(
            np.asarray(y).flatten(), [value(row[:3].tolist(), u) for u in np.linspace(-2, 2, 81)],
            atol=1e-4)
        angle = math.degrees(math.atan2(row[1], row[0]))
        assert legend(slices)[k] == f"{angle:.0f} degrees, {row[2]:.1f} rad/s"
        torque, y = marks[k].get_data()
        near = rows[(abs(rows[:, :3] - row[:3]) < 0.3).all(axis=1), 3]
        np.testing.assert_array_equal(torque.flatten(), near)
        np.testing.assert_allclose(
            np.asarray(y).flatten(), [value(row[:3].tolist(), u) for u in near], atol=1e-4)
        assert marks[k].get_marker() == "|" and marks[k].get_color() == drawn[k].get_color()


def test_the_picture_without_a_teacher():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = ours.Run()
    run.data, run.table = played(1).freeze(), {"the data": [-900.0]}
    figure = ours.draw_curves(run, ours.SAC())
    assert [line.get_label() for line in figure.axes[1].lines] == ["student", "the data"]


# ---- what is written about it ----

def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ours.main(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_explains_every_option(capsys, monkeypatch):
    entries = re.split(r"\n  (?=-)", help_text(capsys, monkeypatch).split("options:")[1])[1:]
    named = {re.search(r"--([a-z-]+)", entry)[1]: entry for entry in entries}
    assert named.keys() == {"help", *(name.replace("_", "-") for name in
                                      vars(ours.parse_options([])))}
    for name, entry in named.items():
        words = re.sub(r"^.*?(  +|\n +)", "", entry, count=1)
        assert len(words.split()) >= 3, name
    for name, default in (("seed", "0"), ("epochs", "100"), ("steps", "50000"), ("weight", "5.0"),
                          ("student", "cql")):
        assert f"({default})" in named[name]
    assert all(name in " ".join(named["as-printed"].split()) for name in ours.ERRATA)


def test_readme_links_to_the_errata():
    source = (TOP / "cql_pendulum.py").read_text().splitlines()
    links = re.findall(r"\[(\w+)\]\(cql_pendulum\.py#L(\d+)\)", (TOP / "README.md").read_text())
    assert {name for name, _ in links} == ours.ERRATA.keys()
    for name, line in links:
        assert f'"{name}"' in source[int(line) - 1], (name, line)
        assert any("Page:" in near for near in source[int(line) - 4:int(line) + 1]), (name, line)


def test_the_scripts_own_requirements_are_those_of_the_file():
    """As tools read it: the reference regular expression of PEP 723."""
    block = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
    (found,) = block.finditer((TOP / "cql_pendulum.py").read_text())
    assert found["type"] == "script"
    content = "".join(line[2:] if line.startswith("# ") else line[1:]
                      for line in found["content"].splitlines(keepends=True))
    stated = tomllib.loads(content)
    listed = (TOP / "requirements.txt").read_text().splitlines()
    assert sorted(stated["dependencies"]) == sorted(
        line.split("#")[0].strip() for line in listed if line.split("#")[0].strip())
    assert stated["requires-python"] == ">=3.11"


# ---- what is saved comes back ----

def test_saved_agents_come_back_whole(tmp_path):
    agent, data = ours.CQL(as_printed={"sign"}, weight=0.5), played(1)
    agent.train(*data.get_sample())
    ours.save_agent(tmp_path / "agent.pt", agent)
    other, _ = ours.load_agent(tmp_path / "agent.pt")
    assert (type(other), other.as_printed, other.weight) == (ours.CQL, {"sign"}, 0.5)
    batch = data.get_sample()
    for each in (agent, other):
        torch.manual_seed(5)
        each.train(*batch)
    pairs = zip(ours.tensors(ours.parts(agent)), ours.tensors(ours.parts(other)), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_saved_datasets_come_back_whole(tmp_path):
    data = played(1)
    data.rows[7, 8] = 1
    ours.save_dataset(data, tmp_path / "data.npz")
    other = ours.load_dataset(tmp_path / "data.npz")
    assert other.frozen
    np.testing.assert_array_equal(other.rows, data.rows)


def test_the_command_to_go_on_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(ours, "__name__", "__main__")
    monkeypatch.setattr(sys, "argv", ["my dir/cql_pendulum.py", "--epochs", "3"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", *sys.argv])
    words = shlex.split(ours.go_on(pathlib.Path("-a b'c")))
    assert words == ["python3", "-u", "my dir/cql_pendulum.py", "--resume=-a b'c"]
    assert ours.parse_options(words[3:]).resume == pathlib.Path("-a b'c")
