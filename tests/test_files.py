"""Kills and going on, bad options, and files that are damaged, foreign or hostile."""
import contextlib
import io
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cql_pendulum as ours
from conftest import (
    FILES, SCRIPT, TOP, batch, content, cql, filled, log, numbers, pendulum, same, shrink,
    steps_in, table, with_seed)


def without_seconds(out):
    """log.csv without the seconds."""
    return [[value for name, value in row.items() if name != "seconds"] for row in log(out)]


def assert_same_run(out, reference):
    """All that two finished runs leave is equal to the last bit, but for the seconds."""
    assert without_seconds(out) == without_seconds(reference)
    assert (out / "dataset.npz").read_bytes() == (reference / "dataset.npz").read_bytes()
    for name in ("teacher.pt", "student.pt"):
        assert same(ours.read_agent(out / name), ours.read_agent(reference / name)), name
    assert {file.name for file in out.iterdir()} == FILES


def assert_whole(out):
    """Every file that is there can be read to its end."""
    for file in out.iterdir():
        if file.suffix == ".pt":
            ours.load_agent(file)
        elif file.suffix == ".npz":
            ours.load_dataset(file)
        elif file.suffix == ".csv":
            assert file.read_text().endswith("\n") and len(without_seconds(out)) > 0


# ---- bad options ----

@pytest.fixture
def refused(capsys, monkeypatch):
    """The one line of a call that is refused; what is accepted by mistake fails at once."""
    def accepted(*_):
        pytest.fail("accepted")

    def refuse(*arguments):
        try:
            ours.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert stop.code == 2
            captured = capsys.readouterr()
            said, printed = captured.err, captured.out
        except ours.UserError as error:
            said = f"cql_pendulum.py: {' '.join(str(error).split())}\n"
            printed = capsys.readouterr().out
        else:
            pytest.fail(f"accepted: {arguments}")
        assert printed == "" and said.count("\n") == 1 and said.startswith("cql_pendulum.py: ")
        return said

    monkeypatch.setattr(ours, "train_teacher", accepted)
    monkeypatch.setattr(ours, "train_student", accepted)
    return refuse


@pytest.mark.parametrize("typed, words", [
    ("--epochs 0", "--epochs: 0: give a number from 1"),
    ("--steps 0", "--steps: 0: give a number from 1"),
    ("--seed -1", "--seed: -1: give a number from 0"),
    (f"--seed {2 ** 32}", f"--seed: {2 ** 32}: give a number from 0 to {2 ** 32 - 1}"),
    ("--weight -0.1", "--weight: -0.1: give a number from 0"),
    ("--weight inf", "--weight: inf: give a number"),
    ("--weight much", "--weight: invalid float value"),
    ("--last 0", "--last 0 leaves no data; add --random N"),
    ("--last 11 --epochs 10", "--last 11: the teacher's data will have 10 episodes"),
    ("--last 501 --epochs 600", "--last 501: the teacher's data will have 500"),
    ("--random 501", "--random: 501: give a number from 0 to 500"),
    ("--weight 0 --student bc", "--weight is for --student cql"),
    ("--dataset d.npz --epochs=100", "need no teacher; leave out --epochs"),
    ("--as-printed sign --as-printed sing", "'sing'"),
    ("--resume runs/x --steps 5", "--resume has the options of that run"),
    ("--play x.pt --epochs 5", "--play takes --seed alone"),
    ("--step 5", "--step"),
    ("extra", "extra"),
])
def test_bad_options(typed, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*typed.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", [
    f"--seed {2 ** 32 - 1}", "--epochs 1", "--steps 1", "--weight 0", "--last 100",
    "--last 500 --epochs 501", "--random 500 --last 0", "--dataset d.npz --last 700",
    "--dataset d.npz --random 3", "--play x.pt --seed 3", "--as-printed sign range --student bc"])
def test_good_options(typed):
    ours.parse_options(typed.split())


def test_a_users_mistake_is_one_line_on_stderr_and_no_traceback(tmp_path):
    """As a real process; what torch says of other layers has several lines."""
    agent = ours.SAC()
    agent.model_action.fc_mu = torch.nn.Linear(7, 1)
    ours.save_agent(tmp_path / "agent.pt", agent)
    done = subprocess.run([*SCRIPT, "--play", "agent.pt"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"cql_pendulum.py: agent.pt: .*size mismatch.*\n", done.stderr)


# ---- datasets ----

def an_episode(n=64, start=(2.0, 1.0)):
    """The arrays of a small dataset.npz that is right: one episode, spelled out."""
    state = np.array([[math.cos(start[0]), math.sin(start[0]), start[1]]])
    rows = []
    for torque in np.linspace(-2, 2, n):
        reward, next_state = pendulum(state, np.array([torque]))
        rows.append([*state[0], torque, *reward, *next_state[0]])
        state = next_state
    rows = np.array(rows, np.float32).reshape(n, 8)
    return {"observations": rows[:, :3], "actions": rows[:, 3:4], "rewards": rows[:, 4],
            "next_observations": rows[:, 5:], "terminals": np.zeros(n, bool),
            "timeouts": np.arange(n) == n - 1}


def rows_from(arrays):
    return np.column_stack([*arrays.values()]).astype(np.float32)


def changed(name, change):
    return an_episode() | {name: change(an_episode()[name])}


def with_value(name, value, at=5):
    arrays = an_episode()
    arrays[name].flat[at] = value
    return arrays


BAD_DATASETS = [
    ({k: x for k, x in an_episode().items() if k not in ("rewards", "actions")},
     "lacks actions, rewards"),
    (changed("observations", lambda x: x[:, :2]),
     "observations is float32 [64, 2]; it must be float32 [64, 3]"),
    (changed("rewards", lambda x: x.astype(str)), "rewards is <U"),
    (changed("terminals", lambda x: x.astype(np.float32)),
     "terminals is float32 [64]; it must be bool [64]"),
    (with_value("rewards", np.nan), "row 5 of rewards, nan, is not"),
    (with_value("observations", np.nan, 21), "row 7 of observations"),
    (with_value("rewards", -1.25, 9), "row 9 of rewards, -1.25,"),
    (changed("observations", lambda x: x * np.float32([5, 5, 1])), "row 0 of observations"),
    (with_value("observations", 8.5, 11), "row 3 of observations"),
    (with_value("next_observations", 0.5, 30), "row 10 of next_observations"),
    (with_value("actions", 2.5), "row 5 of actions"),
    (with_value("actions", -2.001), "row 5 of actions"),
    (with_value("terminals", True), "row 5 of terminals, True"),
    (an_episode(63), "63 rows; a batch draws 64"),
]


@pytest.mark.parametrize("arrays, words", BAD_DATASETS, ids=lambda x: x if type(x) is str else "")
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_bad_datasets(arrays, words, refused, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    said = refused("--dataset", tmp_path / "data.npz", "--out", tmp_path / "out")
    assert words in said and "data.npz" in said
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("what, noticed", [
    ("in order", False), ("shuffled", True), ("without an end", True), ("a row left out", True),
    ("the last episode cut", True)])
def test_a_notice_where_rows_are_not_whole_episodes(what, noticed, untrained, tmp_path, program):
    arrays = {name: np.concatenate([x, x]) for name, x in an_episode(200).items()}
    changes = {"in order": lambda x: x, "shuffled": np.random.default_rng(0).permutation(400),
               "a row left out": np.r_[:50, 51:400], "the last episode cut": np.r_[:250]}
    if what == "without an end":
        arrays = an_episode(200) | {"timeouts": np.zeros(200, bool)}
    elif what != "in order":
        arrays = {name: x[changes[what]] for name, x in arrays.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    text = program("--dataset", tmp_path / "data.npz", "--steps", 1, "--out", tmp_path / "run")
    notes = [line for line in text.splitlines() if line.startswith("note:")]
    assert len(notes) == noticed
    assert all("data.npz: rows are not whole episodes in order" in x for x in notes)
    kept = ours.load_dataset(tmp_path / "run" / "dataset.npz").rows
    np.testing.assert_array_equal(kept, rows_from(arrays))


@given(seed=st.integers(0, 10), n=st.integers(64, 70),
       numbers=st.lists(st.floats(width=32, allow_subnormal=False), max_size=20))
def test_a_saved_dataset_comes_back_to_the_last_bit(seed, n, numbers, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "there and back.npz"
    rng = np.random.default_rng(seed)
    data = ours.Data()
    data.rows = rng.standard_normal([n, 10]).astype(np.float32)
    data.rows[:, 8:] = rng.integers(2, size=[n, 2])
    data.rows[:, :8].flat[:len(numbers)] = numbers
    ours.save_dataset(path, data)
    back = ours.load_dataset(path)
    assert back.rows.dtype == np.float32 and not back.frozen
    np.testing.assert_array_equal(back.rows, data.rows)


# ---- agents ----

@pytest.mark.parametrize("make", [ours.SAC, ours.BC, lambda: cql(np.float64(0.5)), lambda: cql(2)])
def test_a_saved_agent_learns_on_as_if_nothing_had_happened(make, tmp_path):
    agent = make()
    agent.train(*batch())
    ours.save_agent(str(tmp_path / "agent.pt"), agent)
    other = ours.load_agent(tmp_path / "agent.pt")
    assert type(other) is type(agent)
    assert getattr(other, "weight", None) == getattr(agent, "weight", None)
    assert same(numbers(other), numbers(agent))
    for each in (agent, other):
        with_seed(5, each.train, *batch(seed=1))
    assert same(numbers(other), numbers(agent))


def test_errata_come_back_with_an_agent(printed, tmp_path):
    ours.save_agent(tmp_path / "agent.pt", printed(ours.CQL, ["sign"]))
    assert ours.load_agent(tmp_path / "agent.pt").as_printed == {"sign"}


def test_an_agent_of_a_class_of_ones_own_comes_back(tmp_path):
    class Mine(ours.CQL):
        class ModelValue(ours.CQL.ModelValue):
            def __init__(self):
                super().__init__()
                self.sequential.append(torch.nn.Linear(1, 1))

        def train(self, *rows):
            super().train(*rows)
            self.count = getattr(self, "count", 0) + 1

    agent = Mine()
    agent.train(*batch())
    ours.save_agent(tmp_path / "mine.pt", agent)
    other = Mine()
    ours.restore_agent(other, ours.read_agent(tmp_path / "mine.pt"))
    assert other.count == 1 and same(numbers(other), numbers(agent))


@pytest.mark.parametrize("part", ["model_value1", "model_value_next2", "model_action", "alpha"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_agent_never_replaces_a_good_one(part, value, tmp_path):
    agent = ours.CQL()
    ours.save_agent(tmp_path / "agent.pt", agent)
    before = content(tmp_path)
    with torch.no_grad():
        tensor = agent.alpha if part == "alpha" else list(getattr(agent, part).parameters())[-1]
        tensor.fill_(value)
    with pytest.raises(ours.UserError, match="agent.pt: not written, the agent is NaN or infinite"):
        ours.save_agent(tmp_path / "agent.pt", agent)
    assert content(tmp_path) == before


def test_a_diverged_run_keeps_its_last_good_checkpoint(small, tmp_path, program, monkeypatch):
    update, updates = ours.CQL.train, []

    def poisoned(agent, *rows):
        updates.append(1)
        update(agent, *rows)
        if len(updates) == 5:
            with torch.no_grad():
                agent.model_value1.sequential[2].bias[3] = math.nan

    out = tmp_path / "run"
    monkeypatch.setattr(ours.CQL, "train", poisoned)
    with pytest.raises(ours.UserError, match="NaN") as error:
        program("--epochs", 1, "--steps", 6, "--out", out)
    assert "\n" not in str(error.value)
    assert_whole(out)
    assert not list(out.glob("*.part"))
    monkeypatch.setattr(ours.CQL, "train", update)
    program("--resume", out)
    assert steps_in(out) == ["teacher 0", "student 0", "student 5"]


# ---- bad files ----

@pytest.fixture(scope="session")
def agent_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("agent") / "student.pt"
    ours.save_agent(path, ours.CQL())
    return path


@pytest.mark.parametrize("option", ["--dataset", "--play"])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_files_that_are_something_else(option, refused, tmp_path, agent_file):
    np.savez(tmp_path / "data.npz", **an_episode())
    for file in (agent_file, tmp_path / "data.npz"):
        good = file.read_bytes()
        for length in (1, 500, len(good) // 2, len(good) - 1000, len(good) - 1):
            (tmp_path / f"{file.name} cut at {length}").write_bytes(good[:length])
    if option == "--dataset":
        (tmp_path / "data.npz").write_bytes(agent_file.read_bytes())
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("state,action\n1,2\n")
    (tmp_path / "a folder").mkdir()
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("hello", "world")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    before = sorted(tmp_path.iterdir())
    for name in ["missing/below", *(path.name for path in before)]:
        out = [] if option == "--play" else ["--out", tmp_path / "out"]
        said = refused(option, tmp_path / name, *out)
        assert f"{tmp_path / name}: " in said
        words = {"missing/below": "No such file", "a folder": "Is a directory"}
        if option == "--dataset":
            words["data.npz"] = "is an agent, not a dataset"
        assert words.get(name, "") in said
        assert sorted(tmp_path.iterdir()) == before


class Planted:
    """A pickle that would make a folder if anybody unpickled it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_planted_code_never_runs(untrained, refused, program, tmp_path, whole):
    witness = tmp_path / "witness"
    np.savez(tmp_path / "data.npz",
             **an_episode() | {"observations": np.array([Planted(witness)], dtype=object)})
    for name in ("plain.npz", "plain.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Planted(witness)))
    shutil.copytree(whole[0], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    torch.save(ours.read_agent(checkpoint) | {"log": Planted(witness)}, checkpoint)
    for arguments in (["--dataset", tmp_path / "data.npz"], ["--dataset", tmp_path / "plain.npz"],
                      ["--play", checkpoint], ["--resume", tmp_path / "run"],
                      ["--play", tmp_path / "plain.pt"]):
        refused(*arguments)
    assert not witness.exists()
    torch.load(checkpoint, weights_only=False)                  # it is alive: it would have run
    assert witness.exists()


@pytest.mark.parametrize("kind", ["agent", "dataset"])
def test_a_flipped_bit_in_any_member_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "WIDTH", 1)
    path = tmp_path / kind
    if kind == "agent":
        ours.save_agent(path, ours.CQL())
    else:
        ours.save_dataset(path, filled(ours.Data()))
    good = path.read_bytes()
    for member in zipfile.ZipFile(io.BytesIO(good)).infolist():
        header = good[member.header_offset:][:30]           # its last four bytes are two lengths
        start = member.header_offset + 30 + sum(np.frombuffer(header[26:], "<u2").tolist())
        flipped = bytearray(good)
        flipped[start + random.randrange(member.compress_size)] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ours.UserError, match=f"{kind}: "):
            ours.read_agent(path) if kind == "agent" else ours.load_dataset(path)


# ---- writing ----

def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    for text in (b"first", b"second"):
        with ours.whole_file(path) as file:
            file.write(text)
            assert content(tmp_path).get(path) == (None if text == b"first" else b"first")
        assert content(tmp_path) == {path: text}
    with pytest.raises(KeyboardInterrupt):
        with ours.whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert content(tmp_path) == {path: b"second"}
    (tmp_path / "folder").mkdir()
    for name in ("missing/x.pt", "file/x.pt", "folder", "a" * 248 + ".pt"):
        with pytest.raises(ours.UserError, match=f"{name}: cannot be written"):
            ours.save_agent(tmp_path / name, ours.SAC())
    assert content(tmp_path) == {path: b"second"}


# ---- going on ----

class Killed(BaseException):
    """In the place of SIGKILL, in this process: nothing answers it."""


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(n): the program dies at the n-th update from now."""
    count = [0]
    get_sample = ours.Data.get_sample

    def dying(data):
        count[0] -= 1
        if count[0] == 0:
            raise Killed
        return get_sample(data)

    def at(n):
        count[0] = n

    monkeypatch.setattr(ours.Data, "get_sample", dying)
    return at


# 12 epochs of 3 updates, tests at epochs 0, 10 and 11; then 2,003 updates, tests at 0, 2,000, 2,002
ARGUMENTS = ["--epochs", "12", "--steps", "2003", "--seed", "2", "--last", "3", "--random", "1",
             "--student", "bc"]


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A small run that nothing stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("reference")
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(text):
        shrink(ours, monkeypatch)
        ours.main([*ARGUMENTS, "--out", str(folder / "whole")])
    return folder / "whole", text.getvalue()


def die(*arguments):
    with pytest.raises(Killed):
        ours.main([str(argument) for argument in arguments])


def test_killed_at_many_moments_and_the_same_bits(small, reference, tmp_path, program, killed_at):
    """Before each stage's first test, between tests, just before and after them."""
    out = tmp_path / "run"
    killed_at(2)
    die(*ARGUMENTS, "--out", out)
    for moment in (1, 20, 36):                  # of the teacher's 36
        killed_at(moment)
        die("--resume", out)
        assert_whole(out)
    killed_at(37)                               # the student's first update, at the latest
    die("--resume", out)
    assert steps_in(out)[:3] == ["teacher 0", "teacher 10", "teacher 11"]
    assert (out / "dataset.npz").exists()
    for moment in (1, 2, 1999, 2002):           # the last is past the test at 2,000
        killed_at(moment)
        die("--resume", out)
        assert_whole(out)
    assert steps_in(out)[-1] == "student 2000"
    killed_at(2)                                # it does go on from there
    die("--resume", out)
    killed_at(0)
    text = program("--resume", out)
    assert_same_run(out, reference[0])
    assert table(text) == table(reference[1])


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.csv", "teacher.pt", "dataset.npz",
                                  "student.pt", "curves.png"])
def test_killed_in_every_save(name, small, tmp_path, program, monkeypatch):
    """Each time that the file is to be replaced, at the moment before; no test's row is lost."""
    arguments = ["--epochs", 2, "--steps", 3]
    program(*arguments, "--out", tmp_path / "whole")
    out, deaths, rng = tmp_path / "run", [], random.Random(0)
    replace = os.replace

    def dying(source, target):
        if pathlib.Path(target).name == name and (not deaths or rng.random() < 0.5):
            deaths.append(target)
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    die(*arguments, "--out", out)
    for _ in range(20):
        with contextlib.suppress(Killed):
            ours.main(["--resume", str(out)])
            break
    assert len(deaths) < 20
    assert_same_run(out, tmp_path / "whole")


def test_a_given_dataset_is_needed_once(small, reference, tmp_path, program, killed_at):
    given = tmp_path / "data.npz"
    shutil.copy(reference[0] / "dataset.npz", given)
    arguments = ["--dataset", given, "--random", 2, "--steps", 9]
    program(*arguments, "--out", tmp_path / "a")
    killed_at(1)                                                # before any checkpoint
    die(*arguments, "--out", tmp_path / "b")
    given.unlink()
    killed_at(5)
    die("--resume", tmp_path / "b")
    killed_at(0)
    program("--resume", tmp_path / "b")
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")
    agents = [ours.load_agent(tmp_path / name / "student.pt") for name in ("a", "b")]
    assert same(*map(numbers, agents))


def test_resume_of_something_else(refused, tmp_path):
    assert "No such file" in refused("--resume", tmp_path / "missing")
    assert "config.json: No such file" in refused("--resume", tmp_path)
    for text in ("", "no json", "[]", "{}", '{"argv": 5}', '{"argv": ["--nonsense"]}'):
        (tmp_path / "config.json").write_text(text)
        refused("--resume", tmp_path)


@pytest.mark.parametrize("change", [
    "content = b''", "content = b'text'", "del saved['done']", "del saved['log']",
    "saved['random'] = (1, 2, 3)", "saved['env'] = None", "saved['torch'] = torch.zeros(3)",
    "state['model_action'] = 5", "state['optimizer_value'] = {}"])
def test_damaged_checkpoints(change, refused, tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    file = out / "checkpoint.pt"
    saved = ours.read_agent(file)
    scope = {"saved": saved, "torch": torch, "state": saved["state"]}
    exec(change, scope)
    torch.save(saved, file)
    if "content" in scope:
        file.write_bytes(scope["content"])
    before = content(out)
    assert f"{file}: " in refused("--resume", out)
    assert content(out) == before


def test_a_lost_dataset_is_said_as_that(refused, tmp_path, whole):
    """And no new teacher is trained in its place."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "dataset.npz").unlink()
    before = content(out)
    assert f"{out / 'dataset.npz'}: No such file or directory" in refused("--resume", out)
    assert content(out) == before


# ---- real kills ----

SMALL = f"""
import sys
sys.path[:0] = [{str(TOP / "tests")!r}, {str(TOP)!r}]
import pytest, conftest
conftest.shrink(conftest.ours, pytest.MonkeyPatch())
conftest.ours.main(sys.argv[1:])
"""


def kill_when(text, signum, folder, command, *arguments):
    """Start a process in a folder, and send it a signal once it has printed this: it is flushed,
    or a killed program says nothing. What it prints goes to files there."""
    env = os.environ.copy()
    env.pop("PYTHONUNBUFFERED", None)                   # so that lines come only where we flush
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=out, stderr=err, cwd=folder, env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.monotonic() + 120
    while text not in (folder / "stdout").read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail((folder / "stderr").read_text())
        time.sleep(0.003)
    process.send_signal(signum)
    return process.wait()


def test_ctrl_c_is_one_line_with_the_command_that_goes_on(small, tmp_path, program, monkeypatch):
    command = [sys.executable, "-c", SMALL]
    arguments = ["--epochs", 1, "--steps", 900, "--student", "sac", "--out", "my/run"]
    failed = kill_when("student      0", signal.SIGINT, tmp_path, command, *arguments)
    error = (tmp_path / "stderr").read_text()
    assert failed and "Traceback" in error              # it is the script that says it in a line
    said = re.search(r"UserError: stopped. Go on: (.*)\n", error)
    assert shlex.split(said[1])[-2:] == ["--resume", "my/run"]
    monkeypatch.chdir(tmp_path)
    program("--resume", "my/run")
    assert steps_in(tmp_path / "my/run") == ["teacher 0", "student 0", "student 899"]
