"""Kills and going on, bad options, and files that are damaged, foreign or hostile."""
import contextlib
import csv
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

import cql_pendulum as ours
from test_program import (  # noqa: F401
    FILES, SCRIPT, TOP, equal, lines, played, run, shrink, small, steps_in, table, untrained)


def same(one, other):
    """Whether two loaded contents are equal to the last bit."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


def log_without_seconds(out):
    with open(out / "log.csv") as file:
        return [line[:-1] for line in csv.reader(file)]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(out, reference):
    """All that two finished runs leave is equal to the last bit, but for the seconds."""
    assert log_without_seconds(out) == log_without_seconds(reference)
    assert (out / "dataset.npz").read_bytes() == (reference / "dataset.npz").read_bytes()
    for name in ("teacher.pt", "student.pt", "checkpoint.pt"):
        mine, theirs = ours.read_agent(out / name), ours.read_agent(reference / name)
        for saved in (mine, theirs):
            for row in saved.get("log", []):
                row.pop("seconds")
        assert same(mine, theirs), name
    assert {file.name for file in out.iterdir()} == FILES


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


# ---- bad options ----

def refused(arguments, capsys):
    """The one line of a call that is refused."""
    status = None
    try:
        ours.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    except ours.UserError as error:
        said = f"cql_pendulum.py: {' '.join(str(error).split())}\n"
    else:
        pytest.fail(f"accepted: {arguments}")
    captured = capsys.readouterr()
    if status is not None:
        assert status == 2
        said = captured.err
    assert captured.out == "", captured.out
    assert said.count("\n") == 1 and said.startswith("cql_pendulum.py: "), said
    return said


@pytest.fixture
def idle(monkeypatch):
    """What is accepted by mistake fails at once, and does not train for minutes."""
    def accepted(*_):
        pytest.fail("accepted")

    monkeypatch.setattr(ours, "train_teacher", accepted)
    monkeypatch.setattr(ours, "train_student", accepted)


@pytest.mark.parametrize("arguments, words", [
    (["--epochs", "0"], "--epochs: 0: give a number from 1"),
    (["--epochs", "-3"], "--epochs"),
    (["--epochs", "1000000001"], "--epochs"),
    (["--steps", "0"], "--steps: 0: give a number from 1"),
    (["--steps", "1.5"], "--steps: invalid int value"),
    (["--steps", "many"], "--steps: invalid int value"),
    (["--steps", "9" * 5000], "--steps"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2 ** 32)], f"--seed: {2 ** 32}: give a number from 0 to {2 ** 32 - 1}"),
    (["--weight", "-0.1"], "--weight: -0.1: give a number from 0"),
    (["--weight", "nan"], "--weight: nan: give a number"),
    (["--weight", "inf"], "--weight: inf: give a number"),
    (["--weight", "much"], "--weight: invalid float value"),
    (["--last", "-1"], "--last"),
    (["--last", "0"], "--last 0 leaves no data; add --random N"),
    (["--last", "0", "--dataset", "d.npz"], "--last 0 leaves no data; add --random N"),
    (["--last", "11", "--epochs", "10"], "--last 11: the teacher's data will have 10 episodes"),
    (["--last", "101"], "--last 101: the teacher's data will have 100 episodes"),
    (["--last", "501", "--epochs", "600"], "--last 501: the teacher's data will have 500"),
    (["--random", "-1"], "--random"),
    (["--random", "501"], "--random: 501: give a number from 0 to 500"),
    (["--student", "dqn"], "--student"),
    (["--weight", "3", "--student", "sac"], "--weight is for --student cql"),
    (["--weight", "0", "--student", "bc"], "--weight is for --student cql"),
    (["--dataset", "d.npz", "--epochs", "3"], "need no teacher; leave out --epochs"),
    (["--last", "0", "--random", "3", "--epochs", "3"], "need no teacher; leave out --epochs"),
    (["--as-printed", "sing"], "'sing'"),
    (["--as-printed", "sign", "--as-printed", "sing"], "'sing'"),
    (["--resume", "runs/x", "--steps", "5"], "--resume has the options of that run"),
    (["--resume", "runs/x", "--seed", "0"], "--resume has the options of that run"),
    (["--dataset", "d.npz", "--epochs=100"], "need no teacher; leave out --epochs"),
    (["--resume", "runs/x", "--as-printed"], "--resume has the options of that run"),
    (["--resume", "runs/x", "--out", "y"], "--resume has the options of that run"),
    (["--play", "x.pt", "--epochs", "5"], "--play takes --seed alone"),
    (["--play", "x.pt", "--out", "y"], "--play takes --seed alone"),
    (["--play", "x.pt", "--resume", "x"], "leave out all others"),
    (["--setps", "5"], "--setps"),
    (["--step", "5"], "--step"),
    (["--seed"], "--seed"),
    (["--plain"], "--plain"),
    (["--first", "3"], "--first"),
    (["extra"], "extra"),
])
def test_bad_options(arguments, words, capsys, tmp_path, monkeypatch, idle):
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    ["--seed", str(2 ** 32 - 1)], ["--epochs", "1"], ["--steps", "1"], ["--weight", "0"],
    ["--last", "100"], ["--last", "500", "--epochs", "501"], ["--random", "500", "--last", "0"],
    ["--dataset", "d.npz", "--last", "700"], ["--dataset", "d.npz", "--random", "3"],
    ["--play", "x.pt", "--seed", "3"], ["--as-printed", "sign", "range", "--student", "bc"]])
def test_good_options(arguments):
    ours.parse_options(arguments)


def test_bad_out(capsys, tmp_path, idle):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "file/below", "empty", "."):
        said = refused(["--out", tmp_path / name], capsys)
        assert f"--out {tmp_path / name}: " in said
        assert f"--resume {tmp_path / name}" in said
    assert content(tmp_path) == {tmp_path / "file": b"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"}


def test_a_users_mistake_is_one_line_on_stderr_and_no_traceback(tmp_path):
    """As a real process; the line of a damaged agent has several lines in torch's words."""
    agent = ours.SAC()
    agent.model_action.fc_mu = torch.nn.Linear(7, 1)
    ours.save_agent(tmp_path / "agent.pt", agent)
    done = subprocess.run([*SCRIPT, "--play", "agent.pt"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"cql_pendulum.py: agent.pt: .*size mismatch.*\n", done.stderr)


# ---- bad datasets ----

def rows(n=64, start=(2.0, 1.0)):
    """The arrays of a small dataset.npz that is right: one episode, spelled out."""
    env = ours.MyWrapper()
    env.reset(seed=0)
    env.unwrapped.state = np.array(start)
    state = np.array([math.cos(start[0]), math.sin(start[0]), start[1]], np.float32)
    kept = {name: [] for name in ("observations", "actions", "rewards", "next_observations")}
    for torque in np.linspace(-2, 2, n, dtype=np.float32):
        next_state, reward, _, _ = env.step([torque])
        for array, x in zip(kept.values(), (state, [torque], reward, next_state)):
            array.append(x)
        state = next_state
    widths = {"observations": 3, "actions": 1, "rewards": None, "next_observations": 3}
    arrays = {name: np.array(x, np.float32).reshape([n, widths[name]] if widths[name] else [n])
              for name, x in kept.items()}
    return arrays | {"terminals": np.zeros(n, bool), "timeouts": np.arange(n) == n - 1}


def changed(name, change):
    arrays = rows()
    arrays[name] = change(arrays[name].copy())
    return arrays


def with_value(value, at=5):
    def change(array):
        array.flat[at] = value
        return array
    return change


def without(*names):
    return {name: x for name, x in rows().items() if name not in names}


BAD_DATASETS = {
    "missing keys": (without("rewards"), "lacks rewards"),
    "more missing keys": (without("rewards", "actions"), "lacks actions, rewards"),
    "wrong width": (changed("observations", lambda x: x[:, :2]),
                    "observations is float32 [64, 2]; it must be float32 [64, 3]"),
    "flat actions": (changed("actions", lambda x: x[:, 0]), "actions is float32 [64]; it must"),
    "integers": (changed("actions", lambda x: x.astype(int)), "actions is int64"),
    "text": (changed("rewards", lambda x: x.astype(str)), "rewards is <U"),
    "complex": (changed("rewards", lambda x: x.astype(complex)), "rewards is complex"),
    "numbers for flags": (changed("terminals", lambda x: x.astype(np.float32)),
                          "terminals is float32 [64]; it must be bool [64]"),
    "unequal lengths": (changed("next_observations", lambda x: x[:-1]), "next_observations is"),
    "scalars": ({name: array[0] for name, array in rows().items()}, "observations is"),
    "nan": (changed("rewards", with_value(np.nan)), "row 5 of rewards, nan, is not"),
    "nan in a state": (changed("observations", with_value(np.nan, 21)), "row 7 of observations"),
    "nan in a torque": (changed("actions", with_value(np.nan)), "row 5 of actions"),
    "nan in a next state": (changed("next_observations", with_value(np.nan, 63)),
                            "row 21 of next_observations"),
    "infinite": (changed("observations", with_value(-np.inf)), "row 1 of "),
    "too large": (changed("rewards", lambda x: x.astype(float) * 1e300), "row 0 of rewards"),
    "one reward": (changed("rewards", with_value(-1.25, 9)), "row 9 of rewards, -1.25,"),
    "no circle": (changed("observations", lambda x: x * np.float32([5, 5, 1])),
                  "row 0 of observations"),
    "another speed": (changed("next_observations", with_value(3.0, 191)),
                      "row 63 of next_observations"),
    "another angle": (changed("next_observations", with_value(0.5, 30)),
                      "row 10 of next_observations"),
    "too much torque": (changed("actions", with_value(2.5)), "row 5 of actions"),
    "too much torque the other way": (changed("actions", with_value(-2.001)), "row 5 of actions"),
    "torques in another unit": (changed("actions", lambda x: x / 2), "row 0 of rewards"),
    "rewards divided by 8": (changed("rewards", lambda x: x / 8), "row 0 of rewards"),
    "rewards shifted": (changed("rewards", lambda x: x + 8), "row 0 of rewards"),
    "reversed next states": (changed("next_observations", lambda x: x[::-1]),
                             "row 0 of next_observations"),
    "a terminal state": (changed("terminals", with_value(True)), "row 5 of terminals, True"),
    "too few rows": (rows(63), "63 rows; a batch draws 64"),
    "no rows": (rows(0), "0 rows; a batch draws 64"),
    "more episodes asked for": (rows(), "--last 2: the data has 1 episodes"),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_bad_datasets(case, capsys, tmp_path, idle):
    arrays, words = BAD_DATASETS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    more = ["--last", 2] if "asked for" in case else []
    arguments = ["--dataset", tmp_path / "data.npz", "--out", tmp_path / "out", *more]
    message = refused(arguments, capsys)
    assert words in message and ("data.npz" in message or more)
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_what_pendulum_gives_is_accepted(tmp_path):
    """Whole turns, the speed's limit and both ends of the torque among them, and wider floats."""
    arrays = [rows(), rows(200, (3.1, 8.0)), rows(200, (-3.1, -7.9)), rows(100, (0.0, 0.0))]
    whole = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    assert abs(whole["observations"][:, 2]).max() == 8
    assert {-2, 2} <= set(whole["actions"].flatten().tolist())
    np.savez(tmp_path / "data.npz", **whole)
    data = ours.load_dataset(str(tmp_path / "data.npz"))
    wanted = np.column_stack([*whole.values()]).astype(np.float32)
    np.testing.assert_array_equal(data.rows, wanted)
    assert data.rows.dtype == np.float32 and not data.frozen
    whole["actions"] = whole["actions"].astype(float)
    np.savez(tmp_path / "wide.npz", **whole, more=np.zeros(3))
    data = ours.load_dataset(tmp_path / "wide.npz")
    np.testing.assert_array_equal(data.rows, wanted)
    assert data.rows.dtype == np.float32


@pytest.mark.parametrize("what, noticed", [
    ("in order", False), ("shuffled", True), ("200 without an end", True),
    ("one row left out", True), ("the last episode cut", True)])
def test_a_notice_where_rows_are_not_whole_episodes(
        what, noticed, untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", 200)
    arrays = {name: np.concatenate([x, x]) for name, x in rows(200).items()}
    if what == "shuffled":
        order = np.random.default_rng(0).permutation(400)
        arrays = {name: x[order] for name, x in arrays.items()}
    elif what == "one row left out":
        arrays = {name: np.delete(x, 50, axis=0) for name, x in arrays.items()}
    elif what == "200 without an end":
        arrays = rows(200) | {"timeouts": np.zeros(200, bool)}
    elif what == "the last episode cut":
        arrays = {name: x[:250] for name, x in arrays.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    text = run(capsys, "--dataset", tmp_path / "data.npz", "--steps", 1, "--out", tmp_path / "run")
    notes = [line for line in text.splitlines() if line.startswith("note:")]
    assert len(notes) == noticed
    assert all("data.npz: rows are not whole episodes in order" in x for x in notes)
    kept = ours.load_dataset(tmp_path / "run" / "dataset.npz").rows
    np.testing.assert_array_equal(kept, np.column_stack([*arrays.values()]).astype(np.float32))


# ---- bad files ----

@pytest.fixture(scope="module")
def agent_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("agent") / "student.pt"
    ours.save_agent(path, ours.CQL())
    return path


def bad_files(folder, agent):
    """Files that are neither a dataset nor an agent."""
    np.savez(folder / "good.npz", **rows())
    whole = {"agent": agent.read_bytes(), "data": (folder / "good.npz").read_bytes()}
    (folder / "good.npz").unlink()
    for name, good in whole.items():
        for length in (1, 500, len(good) // 2, len(good) - 1000, len(good) - 1):
            (folder / f"{name} cut at {length}").write_bytes(good[:length])
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("state,action\n1,2\n")
    (folder / "a folder").mkdir()
    np.save(folder / "array.npy", np.zeros(3))
    with zipfile.ZipFile(folder / "zip", "w") as file:
        file.writestr("hello", "world")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "old.pt",
               _use_new_zipfile_serialization=False)
    return ["missing", "missing/below", *(path.name for path in sorted(folder.iterdir()))]


@pytest.mark.parametrize("option", ["--dataset", "--play"])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_files_that_are_something_else(option, capsys, tmp_path, agent_file, idle):
    for name in bad_files(tmp_path, agent_file):
        before = sorted(tmp_path.iterdir())
        out = [] if option == "--play" else ["--out", tmp_path / "out"]
        said = refused([option, tmp_path / name, *out], capsys)
        assert f"{tmp_path / name}: " in said
        if name.startswith("missing"):
            assert "No such file or directory" in said
        if name == "a folder":
            assert "Is a directory" in said
        assert sorted(tmp_path.iterdir()) == before


def test_agents_and_datasets_in_each_others_place(capsys, tmp_path, agent_file, idle):
    said = refused(["--dataset", agent_file, "--out", tmp_path / "out"], capsys)
    assert f"{agent_file}: is an agent, not a dataset" in said
    np.savez(tmp_path / "data.npz", **rows())
    assert "data.npz: " in refused(["--play", tmp_path / "data.npz"], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_an_agent_of_other_layers_is_refused_as_that(capsys, agent_file, monkeypatch):
    monkeypatch.setattr(ours, "WIDTH", 256)
    said = refused(["--play", agent_file], capsys)
    assert "size mismatch" in said and "[128" in said and "[256" in said
    assert "student.pt" in said


@pytest.mark.parametrize("change", [
    "saved['class'] = 7", "saved['class'] = []", "saved['class'] = 'Data'", "saved.clear()",
    "saved['as_printed'] = ['sing']", "saved['as_printed'] = 3", "saved['state'] = None",
    "state['alpha'] = torch.zeros(3)",
    "state['model_action'] = {'fc': torch.zeros(3)}", "state['optimizer_value'] = {}",
    "state['model_value2']['sequential.2.weight'] = torch.zeros(128, 127)"])
def test_agents_of_another_program(change, capsys, tmp_path, agent_file):
    saved = ours.read_agent(agent_file)
    exec(change, {"saved": saved, "torch": torch, "state": saved["state"]})
    torch.save(saved, tmp_path / "agent.pt")
    assert "agent.pt: is damaged, or does not fit" in refused(
        ["--play", tmp_path / "agent.pt"], capsys)


class Planted:
    """A pickle that would make a folder if anybody unpickled it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_planted_code_never_runs(untrained, capsys, tmp_path, agent_file):
    witness = tmp_path / "witness"
    np.savez(tmp_path / "data.npz",
             **rows() | {"observations": np.array([Planted(witness)], dtype=object)})
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Planted(witness)))
    for name in ("data.npz", "plain.npz"):
        refused(["--dataset", tmp_path / name, "--out", tmp_path / "out"], capsys)
    run(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    torch.save(ours.read_agent(checkpoint) | {"log": Planted(witness)}, checkpoint)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Planted(witness)))
    for arguments in (["--play", checkpoint], ["--resume", tmp_path / "run"],
                      ["--play", tmp_path / "plain.pt"]):
        assert ": is damaged, or does not fit" in refused(arguments, capsys)
    assert not witness.exists()
    torch.load(checkpoint, weights_only=False)                  # it is alive: it would have run
    assert witness.exists()


@pytest.mark.parametrize("option", ["--dataset", "--play"])
def test_too_little_memory_is_said_as_that(option, agent_file, tmp_path, capsys, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    np.savez(tmp_path / "data.npz", **rows())
    monkeypatch.setattr(np, "load", load)
    monkeypatch.setattr(torch, "load", load)
    path = agent_file if option == "--play" else tmp_path / "data.npz"
    said = refused([option, path], capsys)
    assert said == f"cql_pendulum.py: {path}: not enough memory to read it\n"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("shapes"),
                                   OSError(28, "mine"), MemoryError("mine")])
def test_a_learners_own_errors_keep_their_traceback(
        error, small, tmp_path, capsys, monkeypatch):
    def loss(*_):
        raise error

    monkeypatch.setattr(ours.CQL, "_get_loss_value", loss)
    with pytest.raises(type(error)) as raised:
        ours.main(["--epochs", "1", "--steps", "1", "--out", str(tmp_path / "run")])
    assert raised.value is error


# ---- damaged bits ----

# BITS=8 python -m pytest tests/test_files.py -k flipped: each bit of each byte
BITS = int(os.environ.get("BITS", "1"))


def flips(whole, step=1):
    """The content with one bit flipped, for each place, or each step-th, and BITS of its bits."""
    for place in range(0, len(whole), step):
        for bit in range(place, place + BITS):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << (3 * bit % 8)
            yield bytes(flipped)


def count_harmless(path, contents, load, wanted):
    """How many of these contents load, all of them as what was wanted; a UserError for the rest."""
    harmless = 0
    for damaged in contents:
        path.write_bytes(damaged)
        try:
            found = load(path)
        except ours.UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert same(found, wanted)
            harmless += 1
    return harmless


def test_flipped_bits_of_a_small_agent_file(tmp_path):
    path = tmp_path / "small.pt"
    wanted = {"class": "SAC", "state": {"alpha": torch.tensor([1.5, -2.5]), "weight": 5.0}}
    torch.save(wanted, path)
    whole = path.read_bytes()
    assert count_harmless(path, [whole], ours.read_agent, wanted) == 1
    harmless = count_harmless(path, flips(whole), ours.read_agent, wanted)
    assert harmless < 0.6 * BITS * len(whole)


def test_flipped_bits_of_a_saved_agent(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "WIDTH", 1)
    path = tmp_path / "tiny.pt"
    ours.save_agent(path, ours.CQL())
    wanted = ours.read_agent(path)
    whole = path.read_bytes()
    harmless = count_harmless(path, flips(whole, 41), ours.read_agent, wanted)
    assert harmless < 0.6 * BITS * len(whole) / 41


def resting_rows():
    """A pendulum that hangs still: rows that compress to almost nothing."""
    arrays = ours.arrays_of(np.zeros([64, 10], np.float32))
    arrays["observations"][:, 0] = arrays["next_observations"][:, 0] = -1
    arrays["rewards"][:] = -math.pi ** 2
    return arrays


def test_flipped_bits_of_a_small_dataset(tmp_path):
    path = tmp_path / "small.npz"
    arrays = resting_rows()
    np.savez_compressed(path, **arrays)
    wanted = np.column_stack([*arrays.values()]).astype(np.float32).tolist()

    def load(path):
        return ours.load_dataset(path).rows.tolist()

    whole = path.read_bytes()
    assert count_harmless(path, [whole], load, wanted) == 1
    harmless = count_harmless(path, flips(whole), load, wanted)
    assert harmless < 0.6 * BITS * len(whole)


def test_a_member_that_became_a_folder_is_refused(tmp_path, agent_file):
    """No checksum covers this bit, and torch would return memory that nobody wrote."""
    whole = agent_file.read_bytes()
    np.savez(tmp_path / "data.npz", **rows())
    data = (tmp_path / "data.npz").read_bytes()
    for content_of, load in ((whole, ours.load_agent), (data, ours.load_dataset)):
        entries = [found.start() for found in re.finditer(b"PK\1\2", content_of)]
        assert len(entries) > 5
        for entry in entries:
            flipped = bytearray(content_of)
            flipped[entry + 38] ^= 16
            (tmp_path / "flipped").write_bytes(flipped)
            with pytest.raises(ours.UserError, match="flipped: damaged"):
                load(tmp_path / "flipped")


def test_a_flipped_bit_in_each_array_of_an_agent(tmp_path, agent_file):
    rng = random.Random(0)
    whole = agent_file.read_bytes()
    for member in zipfile.ZipFile(io.BytesIO(whole)).infolist():
        start = member.header_offset + 30                           # the header's fixed part
        name_length = int.from_bytes(whole[start - 4:start - 2], "little")
        extra_length = int.from_bytes(whole[start - 2:start], "little")
        start += name_length + extra_length
        flipped = bytearray(whole)
        flipped[start + rng.randrange(member.file_size)] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(ours.UserError, match="flipped.pt: damaged"):
            ours.load_agent(tmp_path / "flipped.pt")


# ---- writing ----

def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    for text in (b"first", b"second"):
        with ours.whole_file(path) as file:
            file.write(text)
            before = content(tmp_path).get(path)
            assert before == (None if text == b"first" else b"first")
        assert content(tmp_path) == {path: text}
    with pytest.raises(KeyboardInterrupt):
        with ours.whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert content(tmp_path) == {path: b"second"}


def test_where_no_file_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, words in (("missing/file", "No such file or directory"),
                        ("folder", "Is a directory")):
        with pytest.raises(ours.UserError, match=f"{name}: cannot be written .{words}"):
            with ours.whole_file(str(tmp_path / name)) as file:
                file.write(b"content")
    assert content(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize("save, make, room", [
    (ours.save_agent, ours.SAC, 5_000),
    (ours.save_agent, ours.SAC, 100_000),
    (ours.save_dataset, lambda: played(2), 5_000)])
def test_a_full_disk_leaves_the_earlier_file(save, make, room, tmp_path):
    thing = make()
    save(tmp_path / "file", thing)
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(ours.UserError, match="file: cannot be written .File too large"):
            save(tmp_path / "file", thing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert content(tmp_path) == before


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


def test_a_diverged_run_keeps_its_last_good_checkpoint(small, tmp_path, capsys, monkeypatch):
    update = ours.CQL.train
    updates = []

    def poisoned(agent, *batch):
        updates.append(1)
        update(agent, *batch)
        if len(updates) == 5:
            with torch.no_grad():
                agent.model_value1.sequential[2].bias[3] = math.nan

    out = tmp_path / "run"
    monkeypatch.setattr(ours.CQL, "train", poisoned)
    with pytest.raises(ours.UserError) as error:
        ours.main(["--epochs", "1", "--steps", "6", "--out", str(out)])
    assert "checkpoint.pt: not written, the agent is NaN or infinite" in str(error.value)
    assert "\n" not in str(error.value)
    saved = ours.read_agent(out / "checkpoint.pt")
    assert (saved["stage"], saved["done"]) == ("student", 1)
    assert_whole(out)
    assert not list(out.glob("*.part"))
    monkeypatch.setattr(ours.CQL, "train", update)
    capsys.readouterr()
    run(capsys, "--resume", out)
    assert steps_in(out) == ["teacher 0", "student 0", "student 5"]


# ---- going on ----

class Killed(BaseException):
    """In the place of SIGKILL, in this process: nothing answers it."""


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(n): the program dies at the n-th update from now."""
    count = [0]
    batch = ours.Data.get_sample

    def get_sample(data):
        count[0] -= 1
        if count[0] == 0:
            raise Killed
        return batch(data)

    def at(n):
        count[0] = n

    monkeypatch.setattr(ours.Data, "get_sample", get_sample)
    return at


# 15 epochs of 3 updates, tests at epochs 0, 10 and 14; then 12 updates, tests at 0 and 11
ARGUMENTS = ["--epochs", "15", "--steps", "12", "--seed", "2", "--last", "3", "--random", "1"]
UPDATES = 15 * 3 + 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A small run that nothing stopped."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as monkeypatch, open(folder / "stdout", "w") as file:
        shrink(ours, monkeypatch)
        with contextlib.redirect_stdout(file):
            ours.main([*ARGUMENTS, "--out", str(folder / "whole")])
    return folder


@pytest.fixture
def uninterrupted(small, reference, tmp_path):
    """A copy of it: its folder, and beside it what it printed."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    return tmp_path / "whole"


def die(*arguments):
    with pytest.raises(Killed):
        ours.main([str(argument) for argument in arguments])


def test_killed_at_many_moments_and_the_same_bits(uninterrupted, tmp_path, capsys, killed_at):
    """Before each stage's first test, between tests, just before and after them."""
    out = tmp_path / "run"
    killed_at(20)
    die(*ARGUMENTS, "--out", out)
    assert steps_in(out) == ["teacher 0"]
    for moment in (2, 31, 1, 12):               # from epoch 1; past 10; from 11; into 14
        killed_at(moment)
        die("--resume", out)
        assert_whole(out)
    assert steps_in(out) == ["teacher 0", "teacher 10"]
    killed_at(13)                               # the student's first update
    die("--resume", out)
    assert steps_in(out) == ["teacher 0", "teacher 10", "teacher 14"]
    assert (out / "dataset.npz").exists()
    for moment in (1, 2, 7, 11):
        killed_at(moment)
        die("--resume", out)
    assert steps_in(out)[-1] == "student 0"
    killed_at(0)
    text = run(capsys, "--resume", out)
    assert_same_run(out, uninterrupted)
    assert table(text) == table((tmp_path / "stdout").read_text())


def test_killed_late_in_a_long_student(small, tmp_path, capsys, killed_at):
    arguments = ["--epochs", "1", "--steps", "2003", "--student", "bc"]
    run(capsys, *arguments, "--out", tmp_path / "whole")
    out = tmp_path / "run"
    killed_at(3 + 2002)
    die(*arguments, "--out", out)
    assert steps_in(out)[-1] == "student 2000"
    run(capsys, "--resume", out)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.csv", "teacher.pt", "dataset.npz",
                                  "student.pt", "curves.png"])
def test_killed_in_every_save(name, uninterrupted, tmp_path, capsys, monkeypatch):
    """Each time that the file is to be replaced, at the moment before; no test's row is lost."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "run"
    replace = os.replace
    rng = random.Random(0)
    deaths = []

    def dying(source, target):
        if pathlib.Path(target).name == name and (not deaths or rng.random() < 0.5):
            deaths.append(target)
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    die(*ARGUMENTS, "--out", out)
    for _ in range(20):
        with contextlib.suppress(Killed):
            ours.main(["--resume", str(out)])
            break
    assert len(deaths) < 20
    assert_same_run(out, uninterrupted)


def test_a_kill_between_log_and_checkpoint_loses_no_row(
        untrained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    replace = os.replace

    def dying(source, target):
        if pathlib.Path(target).name == "checkpoint.pt" and "student,1," in (
                out / "log.csv").read_text():
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    die("--epochs", 1, "--steps", 2, "--out", out)
    assert steps_in(out) == ["teacher 0", "student 0", "student 1"]
    monkeypatch.setattr(os, "replace", replace)
    run(capsys, "--resume", out)
    assert steps_in(out) == ["teacher 0", "student 0", "student 1"]


def test_a_finished_run_writes_its_last_files_again(uninterrupted, tmp_path, capsys):
    before = content(uninterrupted)
    shutil.copytree(uninterrupted, tmp_path / "before")
    for name in ("log.csv", "student.pt", "curves.png"):
        (uninterrupted / name).unlink()
    text = run(capsys, "--resume", uninterrupted)
    assert text.splitlines()[0] == "the student was finished"
    assert table(text) == table((tmp_path / "stdout").read_text())
    assert_same_run(uninterrupted, tmp_path / "before")
    after = content(uninterrupted)
    for name in ("log.csv", "student.pt", "curves.png", "teacher.pt", "config.json"):
        assert after[uninterrupted / name] == before[uninterrupted / name]


def test_a_run_of_a_given_dataset_goes_on_without_it(uninterrupted, tmp_path, capsys, killed_at):
    shutil.copy(uninterrupted / "dataset.npz", tmp_path / "data.npz")
    arguments = ["--dataset", tmp_path / "data.npz", "--random", 2, "--steps", 9]
    run(capsys, *arguments, "--out", tmp_path / "a")
    killed_at(1)                                                # before any checkpoint
    die(*arguments, "--out", tmp_path / "b")
    (tmp_path / "data.npz").unlink()
    killed_at(5)
    die("--resume", tmp_path / "b")
    killed_at(0)
    run(capsys, "--resume", tmp_path / "b")
    assert log_without_seconds(tmp_path / "a") == log_without_seconds(tmp_path / "b")
    agents = [ours.load_agent(tmp_path / name / "student.pt") for name in ("a", "b")]
    assert equal(*agents)


def test_resume_of_something_else(capsys, tmp_path, idle):
    assert "No such file" in refused(["--resume", tmp_path / "missing"], capsys)
    assert "config.json: No such file" in refused(["--resume", tmp_path], capsys)
    for text in ("", "no json", "[]", "{}", '{"argv": 5}', '{"argv": ["--nonsense"]}'):
        (tmp_path / "config.json").write_text(text)
        refused(["--resume", tmp_path], capsys)
    (tmp_path / "config.json").write_text('{"argv": []}')
    for damaged in (b"", b"text", b"PK\3\4"):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        assert "checkpoint.pt: " in refused(["--resume", tmp_path], capsys)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "checkpoint.pt"}


@pytest.mark.parametrize("change", [
    "del saved['done']", "del saved['log']", "del saved['stage']", "saved['log'] = 5",
    "saved['random'] = (1, 2, 3)",
    "saved['env'] = None", "saved['torch'] = torch.zeros(3)", "state['model_action'] = 5",
    "state['alpha'] = torch.zeros(3)", "state['optimizer_value'] = {}"])
def test_checkpoints_made_by_hand(change, untrained, capsys, tmp_path):
    run(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    saved = ours.read_agent(file)
    exec(change, {"saved": saved, "torch": torch, "state": saved["state"]})
    torch.save(saved, file)
    before = content(tmp_path)
    assert f"{file}: is damaged, or does not fit" in refused(["--resume", tmp_path / "run"], capsys)
    assert content(tmp_path) == before


def test_an_agent_in_the_checkpoints_place(untrained, capsys, tmp_path):
    out = tmp_path / "run"
    run(capsys, "--epochs", 1, "--steps", 1, "--out", out)
    shutil.copy(out / "teacher.pt", out / "checkpoint.pt")
    assert f"{out / 'checkpoint.pt'}: is damaged, or does not fit" in refused(
        ["--resume", out], capsys)


def test_a_lost_dataset_is_said_as_that(untrained, capsys, tmp_path):
    """And no new teacher is trained in its place."""
    out = tmp_path / "run"
    run(capsys, "--epochs", 1, "--steps", 1, "--out", out)
    (out / "dataset.npz").unlink()
    before = content(out)
    said = refused(["--resume", out], capsys)
    assert f"{out / 'dataset.npz'}: No such file or directory" in said
    assert content(out) == before


# ---- real kills ----

SMALL = """
import sys, cql_pendulum as ours
ours.EPISODE, ours.UPDATES = 70, 5
ours.draw_torques = lambda *_: None
ours.main(sys.argv[1:])
"""


def start(folder, command, *arguments):
    """A real process at work in a folder; what it prints goes to files there."""
    env = os.environ | {"PYTHONPATH": str(TOP)}
    env.pop("PYTHONUNBUFFERED", None)                   # so that lines come only where we flush
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        return subprocess.Popen(
            [*command, *map(str, arguments)], stdout=out, stderr=err, cwd=folder, env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(process, folder, text):
    """Until the process has printed this: it is flushed, or a killed program says nothing."""
    end = time.monotonic() + 120
    while text not in (folder / "stdout").read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail((folder / "stderr").read_text())
        time.sleep(0.003)


def test_real_kills_change_nothing(small, tmp_path, capsys, monkeypatch):
    """CHAIN=7 python -m pytest tests/test_files.py -k real_kills: other moments."""
    monkeypatch.setattr(ours, "UPDATES", 5)
    rng = random.Random(int(os.environ.get("CHAIN", "0")))
    arguments = ["--epochs", 45, "--steps", 90]
    run(capsys, *arguments, "--out", tmp_path / "whole")
    out = tmp_path / "run"
    command = [sys.executable, "-c", SMALL]
    kills = [(signal.SIGKILL, "   return "), (signal.SIGTERM, "   return "),
             (signal.SIGKILL, "student      0")]
    arguments = [*arguments, "--out", out]
    for signum, moment in kills:
        process = start(tmp_path, command, *arguments)
        wait_for(process, tmp_path, moment)
        time.sleep(rng.uniform(0, 0.15))         # a test or two further, not more
        process.send_signal(signum)
        process.wait()
        assert process.returncode == -signum, (tmp_path / "stderr").read_text()
        for part in out.glob("*.part"):                 # of the moment of the kill
            part.unlink()
        assert_whole(out)
        arguments = ["--resume", out]
    run(capsys, "--resume", out)
    assert_same_run(out, tmp_path / "whole")


def test_ctrl_c_is_one_line_with_the_command_that_goes_on(tmp_path, capsys, monkeypatch):
    process = start(tmp_path, SCRIPT, "--epochs", 1, "--steps", 500, "--student", "sac", "--out",
                    "my/run")
    wait_for(process, tmp_path, "student      0")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1
    said = re.fullmatch(r"cql_pendulum.py: stopped. Go on: (.*)\n",
                        (tmp_path / "stderr").read_text())
    assert said, (tmp_path / "stderr").read_text()
    words = shlex.split(said[1])
    assert words == ["python", SCRIPT[1], "--resume", "my/run"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "draw_torques", lambda *_: None)
    text = run(capsys, *words[2:])
    assert steps_in(tmp_path / "my/run") == ["teacher 0", "student 0", "student 499"]
    assert {file.name for file in (tmp_path / "my/run").iterdir()} == FILES
    assert list(table(text)) == ["the data", "the teacher", "the student"]


@pytest.mark.parametrize("name", ["file/x.pt", "nowhere/x.pt", "a" * 248 + ".pt"])
def test_a_place_that_cannot_be_written_is_named_in_a_line(name, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ours.UserError, match="cannot be written"):
        ours.save_agent(tmp_path / name, ours.SAC())
