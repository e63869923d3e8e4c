"""Kills and going on, bad options, and files that are damaged, foreign or hostile."""
import io
import math
import os
import pathlib
import pickle
import random
import re
import shlex
import sys
import zipfile

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import (FILES, batch, content, cql, filled, log, numbers, same, steps_in, table,
                      with_seed)
from measure import pendulum


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


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one line of a call that is refused; what is accepted by mistake fails at once."""
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

    for name in ("train_teacher", "train_student"):
        monkeypatch.setattr(ours, name, lambda *_: pytest.fail("accepted"))
    return refuse


@pytest.mark.parametrize("typed, words", [
    ("--steps 0", "--steps 0: give a number from 1"),
    (f"--seed {2 ** 32}", f"--seed {2 ** 32}: give a number from 0 to {2 ** 32 - 1}"),
    ("--weight -0.1", "--weight -0.1: give a number from 0"),
    ("--weight nan", "--weight nan: give a number"),
    ("--last 0", "--last 0 is for random torques alone: add --random N, leave out --dataset"),
    ("--last 0 --random 1 --dataset d.npz", "--last 0 is for random torques alone"),
    ("--last 11 --epochs 10", "--last 11: give a number from 0 to 10"),
    ("--random 501", "--random 501: give a number from 0 to 500"),
    ("--weight 0 --student bc", "--weight is for --student cql"),
    ("--dataset d.npz --epochs=100", "need no teacher; leave out --epochs"),
    ("--as-printed sign --as-printed sing", "'sing'"),
    ("--resume runs/x --steps 5", "--resume has the options of that run"),
    ("--play x.pt --epochs 5", "--play takes --seed alone"),
])
def test_bad_options(typed, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*typed.split())
    assert not list(tmp_path.iterdir())


def recorded(episodes=1):
    """Right rows that need no environment: the arrays of a dataset.npz, 100 steps an episode, each
    begun near 7 rad/s and pushed, so that some speeds are cut at 8."""
    rows, rng = [], np.random.default_rng(0)
    for _ in range(episodes):
        state = np.array([[-1.0, 0.0, rng.uniform(6.5, 7.5)]])
        for k in range(100):
            torque = np.array([[2.0, 0.3, -1.1][k % 3]])
            reward, next_state = pendulum(state, torque)
            rows.append([*state[0], *torque, *reward, *next_state[0], 0, k == 99])
            state = next_state
    return arrays_of(np.array(rows, np.float32))


def arrays_of(rows):
    return {"observations": rows[:, :3], "actions": rows[:, 3:4], "rewards": rows[:, 4],
            "next_observations": rows[:, 5:8], "terminals": rows[:, 8] > 0,
            "timeouts": rows[:, 9] > 0}


def rows_from(arrays):
    return np.column_stack([*arrays.values()]).astype(np.float32)


@pytest.mark.parametrize("change, words", [
    ("del data['rewards'], data['actions']", "lacks actions, rewards"),
    ("data['actions'] = data['rewards'][:, None] * [1, 1]", "must be numbers, [100, 1]"),
    ("data = {name: x.reshape(50, 2, -1) for name, x in data.items()}", "x.swapaxes(0, 1)"),
    ("data['observations'] = data['observations'][[*range(100), 0]]", "leave out the state after"),
    ("data['timeouts'] = data['timeouts'][:50]", "timeouts is bool [50]"),
    ("data['rewards'] = data['rewards'].astype(str)", "rewards is <U"),
    ("data['terminals'] = data['terminals'] + 0.5", "terminals must be 0 and 1"),
    ("data = {name: x[:63] for name, x in data.items()}", "63 rows; a batch draws 64"),
    ("data['next_observations'][10, 1] = 0.5", "row 10 is not what env gives"),
])
def test_bad_datasets(change, words, refused, tmp_path):
    scope = {"data": recorded(), "np": np}
    exec(change, scope)
    np.savez(tmp_path / "data.npz", **scope["data"])
    said = refused("--dataset", tmp_path / "data.npz", "--out", tmp_path / "out")
    assert words in said and "data.npz" in said
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def moved_as_in_v0(rows):
    """The angle moves with the speed before that is cut."""
    angle = np.arctan2(rows[:, 1], rows[:, 0])
    speed = rows[:, 2] + 0.05 * (15 * np.sin(angle) + 3 * rows[:, 3])
    angle = angle + 0.05 * speed
    rows[:, 5], rows[:, 6], rows[:, 7] = np.cos(angle), np.sin(angle), np.clip(speed, -8, 8)
    return int((abs(speed) > 8).argmax())


def changed(code, row):
    def change(rows):
        exec(code, {"rows": rows, "np": np})
        return row
    return change


@pytest.mark.parametrize("change, words", [
    (changed("rows[:, 3] /= 2", 0), "torques are divided by 2; multiply actions by 2"),
    (changed("rows[[99, 199], 8:] = 1, 0", 99), "a time limit belongs in timeouts"),
    (changed("rows[100, 3:8] = 0, 0, *rows[101, :3]", 100), "drop the rows whose reward is 0"),
    (changed("rows[99, 5:] = *rows[100, :3], 0, 0", 99), "is not the episode's last; take that"),
    (changed("rows[99, 4:9] = -1, *rows[100, :3], 1", 99), "or drop the row and put True"),
    (changed("rows[199, 4] += 1", 199), "PPO's buffers add to it"),
    (changed("rows[150:] = 0", 150), "drop the rows of zeros or NaN"),
    (changed("rows[150:] = np.nan", 150), "drop the rows of zeros or NaN"),
    (moved_as_in_v0, "as in Pendulum-v0 and envpool; use Gymnasium's v1"),
    (changed("rows[::3, 3] = 2.25", 0), "a torque of 2.250; clip actions to 2 N m"),
    (changed("rows[:, [1, 2, 3, 6, 7]] *= -1; rows[::3, 3] = -2.25", 0), "a torque of -2.250"),
    (changed("rows[:, 3] *= -1", 0), "look at the order and sign of actions"),
    (changed("rows[:, 5:8] = np.roll(rows[:, 5:8], 1, axis=0)", 0), "the state of row 1 is"),
    (changed("rows[:, 4] = 0", 0), "; undo it (a scale, rounding), or change MyWrapper's"),
    (changed("rows[::3, 3] = 1.5", 0), "reward and next state do not follow"),
    (changed("rows[1::3, 3] = 2.5", 1), "reward and next state do not follow"),
    (changed("rows[99, 5:8] = np.nan", 99), "is not the episode's last; take that"),
    (changed("rows[:, :8] *= 0.5", 0), "(cos angle, sin angle, speed in rad/s), not scaled"),
    (changed("rows[7, 4:8] = 1", 7), "the state of row 8 is"),
])
def test_a_foreign_recording_is_told_its_cause(change, words, tmp_path):
    """In the first row that is wrong, and what to do."""
    rows = rows_from(recorded(2))
    row = change(rows)
    np.savez(tmp_path / "data.npz", **arrays_of(rows))
    with pytest.raises(ours.UserError) as error:
        ours.load_dataset(tmp_path / "data.npz")
    assert f"data.npz: row {row} is not what env gives: " in str(error.value)
    assert words in str(error.value)


def test_other_shapes_and_types_of_right_data_are_accepted(tmp_path):
    arrays = recorded()
    right = rows_from(arrays)
    for kind in (np.int64, np.uint8, np.float64):
        arrays |= {"rewards": arrays["rewards"].reshape(-1, 1).astype(float),
                   "actions": arrays["actions"].flatten(),
                   "terminals": arrays["terminals"].astype(kind),
                   "timeouts": arrays["timeouts"].astype(kind).reshape(-1, 1)}
        np.savez(tmp_path / "data.npz", **arrays)
        np.testing.assert_array_equal(ours.load_dataset(tmp_path / "data.npz").rows, right)


@pytest.mark.parametrize("rows, noticed", [
    (np.r_[:200], False), (np.r_[100:200, :100], False), (np.r_[:99, 100:200], True),
    (np.r_[:50, 51:200], True), (np.r_[:150], True)])
def test_a_notice_where_rows_are_not_whole_episodes(rows, noticed, tmp_path, capsys):
    right = rows_from(recorded(2))[rows]
    np.savez(tmp_path / "data.npz", **arrays_of(right))
    np.testing.assert_array_equal(ours.load_dataset(tmp_path / "data.npz").rows, right)
    text = capsys.readouterr().out
    assert ("data.npz: rows are not whole episodes in order" in text) == bool(text) == noticed


class Mine(ours.CQL):
    """A class of one's own, with one more layer in its critics and a count."""

    class ModelValue(ours.CQL.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.append(torch.nn.Linear(1, 1))

    def train(self, *rows):
        super().train(*rows)
        self.count = getattr(self, "count", 0) + 1


@pytest.mark.parametrize("make", [ours.SAC, ours.BC, Mine, lambda: cql(np.float64(0.5))])
def test_a_saved_agent_learns_on_as_if_nothing_had_happened(make, tmp_path, capsys):
    agent = make()
    agent.train(*batch())
    ours.save_agent(str(tmp_path / "agent.pt"), agent)
    other = ours.load_agent(tmp_path / "agent.pt")
    assert type(other) is type(agent)
    for name in ("weight", "count"):
        assert getattr(other, name, None) == getattr(agent, name, None)
    assert same(numbers(other), numbers(agent))
    for each in (agent, other):
        with_seed(5, each.train, *batch(seed=1))
    assert same(numbers(other), numbers(agent))
    assert capsys.readouterr().out == ""


def test_what_a_file_does_not_keep_is_said_once(tmp_path, capsys):
    agent = ours.SAC()
    agent.critics, agent.mean = [ours.SAC.ModelValue()], np.zeros(3)
    for _ in range(2):
        ours.save_agent(tmp_path / "agent.pt", agent)
    note, = capsys.readouterr().out.splitlines()
    assert "agent.pt does not keep critics (list), mean (ndarray)" in note


def test_an_unknown_class_is_said_as_that(tmp_path):
    agent = type("Elsewhere", (ours.SAC,), {})()
    ours.save_agent(tmp_path / "agent.pt", agent)
    type(agent).__name__ = "Renamed"
    with pytest.raises(ours.UserError, match="holds a Elsewhere, which is not defined here"):
        ours.load_agent(tmp_path / "agent.pt")


@pytest.mark.parametrize("k", [0, 1])
def test_a_diverged_run_keeps_its_last_good_checkpoint(k, small, tmp_path, program, monkeypatch):
    """A return or a promise of NaN ends it in a line; then it goes on, once the cause is mended."""
    evaluate, tests, out = ours.evaluate, [], tmp_path / "run"

    def diverged(agent, seeds):
        found = evaluate(agent, seeds)
        tests.append(type(agent))
        if tests.count(ours.CQL) == 2:
            found[k][0] = math.nan
        return found

    monkeypatch.setattr(ours, "evaluate", diverged)
    with pytest.raises(ours.UserError, match="the student has diverged, at 5: return .*; its last"):
        program("--epochs", 1, "--steps", 6, "--out", out)
    assert steps_in(out) == ["teacher 0", "student 0"]
    monkeypatch.setattr(ours, "evaluate", evaluate)
    program("--resume", out)
    assert steps_in(out) == ["teacher 0", "student 0", "student 5"]


class Planted:
    """A pickle that would make a folder if anybody unpickled it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("option", ["--dataset", "--play"])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_files_that_are_something_else(option, refused, tmp_path, monkeypatch):
    """Cut, foreign, or with code in them, which never runs."""
    monkeypatch.setattr(ours, "WIDTH", 8)
    planted = Planted(tmp_path / "witness")
    np.savez(tmp_path / "data.npz", **recorded())
    ours.save_agent(tmp_path / "agent.pt", ours.CQL())
    for file in (tmp_path / "agent.pt", tmp_path / "data.npz"):
        good = file.read_bytes()
        for length in (1, len(good) // 2, len(good) - 1):
            (tmp_path / f"{file.name} cut at {length}").write_bytes(good[:length])
    (tmp_path / ("data.npz" if option == "--dataset" else "agent.pt")).unlink()
    for name, text in (("empty", b""), ("text", b"state,action"), ("hdf5", b"\x89HDF\r\n\x1a\n"),
                       ("pickle", pickle.dumps(planted))):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "a folder").mkdir()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "code.npz", **recorded() | {"rewards": np.array([planted], dtype=object)})
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("hello", "world")
    for name, what in (("dict", {"weights": torch.zeros(3)}), ("tensor", torch.zeros(3)),
                       ("code", {"class": "SAC", "state": planted})):
        torch.save(what, tmp_path / f"{name}.pt")
    before = sorted(tmp_path.iterdir())
    words = {"missing/below": "No such file", "a folder": "Is a directory",
             "hdf5": "is HDF5, not npz" if option == "--dataset" else ""}
    for name in ["missing/below", *(path.name for path in before)]:
        out = [] if option == "--play" else ["--out", tmp_path / "out"]
        said = refused(option, tmp_path / name, *out)
        assert f"{tmp_path / name}: " in said and words.get(name, "") in said
        assert sorted(tmp_path.iterdir()) == before
    torch.load(tmp_path / "code.pt", weights_only=False)        # it is alive: it would have run
    assert planted.witness.exists()


@pytest.mark.parametrize("kind", ["agent", "dataset"])
def test_a_flipped_bit_in_any_member_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "WIDTH", 1)
    path = tmp_path / kind
    ours.save_agent(path, ours.CQL()) if kind == "agent" else (
        ours.save_dataset(path, filled(ours.Data())))
    good = path.read_bytes()
    for member in zipfile.ZipFile(io.BytesIO(good)).infolist():
        header = good[member.header_offset:][:30]           # its last four bytes are two lengths
        start = member.header_offset + 30 + sum(np.frombuffer(header[26:], "<u2").tolist())
        flipped = bytearray(good)
        flipped[start + random.randrange(member.compress_size)] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ours.UserError, match=f"{kind}: "):
            ours.read_agent(path) if kind == "agent" else ours.load_dataset(path)


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
    (tmp_path / "folder").mkdir()
    for name in ("missing/x.pt", "file/x.pt", "folder", "a" * 248 + ".pt"):
        with pytest.raises(ours.UserError, match=f"{name}: cannot be written"):
            ours.save_agent(tmp_path / name, ours.SAC())
    assert content(tmp_path) == {path: b"second"}


class Killed(BaseException):
    """In the place of SIGKILL, in this process: nothing answers it."""


class Drawing(ours.CQL):
    """A student's class of one's own, in which every generator's chance acts."""

    def train(self, state, action, reward, *rows):
        noise = np.random.random() + ours.env.unwrapped.np_random.random()
        super().train(state, action, reward - noise, *rows)


# two epochs of 3 updates, tests at both; then 9 updates, tests at 0 and 8
ARGUMENTS = ["--epochs", 2, "--steps", 9, "--seed", 2, "--last", 1, "--random", 1, "--weight", 2]


@pytest.fixture
def killed(monkeypatch, small):
    """killed(arguments, n=7): a main job dies at its n-th update; killed(arguments, save="log.csv")
    where this file is to be replaced."""
    monkeypatch.setattr(ours, "CQL", Drawing)
    get_sample, replace, at = ours.Data.get_sample, os.replace, {"n": 0, "save": None}

    def sampling(data):
        at["n"] -= 1
        if at["n"] == 0:
            raise Killed
        return get_sample(data)

    def replacing(source, target):
        if pathlib.Path(target).name == at["save"]:
            raise Killed
        replace(source, target)

    def kill(arguments, n=0, save=None):
        at.update(n=n, save=save)
        with pytest.raises(Killed):
            ours.main([str(argument) for argument in arguments])
        at.update(n=0, save=None)

    monkeypatch.setattr(ours.Data, "get_sample", sampling)
    monkeypatch.setattr(os, "replace", replacing)
    return kill


def test_killed_at_any_moment_and_the_same_bits(killed, tmp_path, program):
    """In the teacher, behind it, before and after the student's tests, in each file's saving."""
    reference = program(*ARGUMENTS, "--out", tmp_path / "whole")
    assert table(reference)["the data"][0] == 2                 # a random and the last one
    out = tmp_path / "run"
    killed([*ARGUMENTS, "--out", out], n=2)
    moments = [{"n": 5}, {"save": "teacher.pt"}, {"save": "dataset.npz"}, {"n": 7},
               {"save": "checkpoint.pt"}, {"n": 2}, {"n": 8}, {"save": "log.csv"},
               {"save": "student.pt"}, {"save": "curves.png"}]
    found = []
    for moment in moments:
        killed(["--resume", out], **moment)
        found.append((out / "log.csv").exists() and len(log(out)))
    assert found == [1, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    (out / "teacher.pt").write_bytes((tmp_path / "whole" / "teacher.pt").read_bytes())
    text = program("--resume", out)
    assert_same_run(out, tmp_path / "whole")
    assert table(text) == table(reference)


def test_a_run_goes_on_with_its_own_constants(killed, tmp_path, program, monkeypatch):
    """Though the file was edited meanwhile; a line says which."""
    program(*ARGUMENTS, "--out", tmp_path / "whole")
    killed([*ARGUMENTS, "--out", tmp_path / "run"], n=10)
    for name, value in (("LR_VALUE", 1.0), ("GAMMA", 0.5), ("WEIGHT", 7.0)):
        monkeypatch.setattr(ours, name, value)
    text = program("--resume", tmp_path / "run")
    assert ("\nnote: this run goes on with its own LR_VALUE 0.003 (here 1.0), "
            "GAMMA 0.99 (here 0.5), WEIGHT 5.0 (here 7.0)\n") in text
    assert (ours.LR_VALUE, ours.GAMMA, ours.WEIGHT) == (1.0, 0.5, 7.0)      # put back
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_given_dataset_is_needed_once(killed, tmp_path, program):
    given, a, b = (tmp_path / name for name in ("data.npz", "a", "b"))
    np.savez(given, **recorded())
    arguments = ["--dataset", given, "--random", 2, "--steps", 9]
    assert table(program(*arguments, "--out", a))["the data"][0] == 3
    killed([*arguments, "--out", b], n=1)                       # before any checkpoint
    given.unlink()
    killed(["--resume", b], n=5)
    program("--resume", b)
    assert without_seconds(a) == without_seconds(b)
    assert same(*(ours.read_agent(out / "student.pt") for out in (a, b)))


def test_resume_of_something_else(refused, tmp_path):
    assert "config.json: No such file" in refused("--resume", tmp_path)
    for text in ("", "no json", "[]", "{}", '{"argv": 5}', '{"argv": [], "constants": {}}',
                 '{"argv": ["--nonsense"], "constants": {}}'):
        (tmp_path / "config.json").write_text(text)
        refused("--resume", tmp_path)


def test_ctrl_c_says_the_command_that_goes_on(small, tmp_path, monkeypatch, capsys):
    """It works as it stands, with spaces in its words; a notebook's is Python's."""
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ours.SAC, "train", interrupt)
    monkeypatch.setattr(sys, "argv", ["my folder/cql_pendulum.py"])
    out = tmp_path / "my run"
    with pytest.raises(KeyboardInterrupt):
        ours.main(["--out", str(out)])
    said = capsys.readouterr().out.splitlines()[-1].removeprefix("stopped; to go on: ")
    assert shlex.split(said) == [
        sys.executable, "my folder/cql_pendulum.py", "--resume", str(out)]
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    assert ours.command("--resume", out) == f"main(['--resume', '{out}'])"
    with pytest.raises(ours.UserError, match=re.escape(f"go on with the run in it: main(['--re")):
        ours.main(["--out", str(out)])
    (out / "config.json").unlink()
    with pytest.raises(ours.UserError, match="a new folder with --out$"):
        ours.main(["--out", str(out)])
