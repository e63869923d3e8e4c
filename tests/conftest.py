"""What several test files use, each thing once: a batch, an agent, a run of the program."""
import contextlib
import copy
import csv
import io
import math
import os
import pathlib
import random
import sys
import types

os.environ["OMP_NUM_THREADS"] = "1"       # here and in every child: two runs do not fight
TOP = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TOP), str(TOP / "study")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import cql_pendulum as ours  # noqa: E402

FILES = {"checkpoint.pt", "config.json", "curves.png", "dataset.npz", "log.csv", "student.pt",
         "teacher.pt"}
CRITICS = ["model_value1", "model_value2", "model_value_next1", "model_value_next2"]
NETWORKS = ["model_action", *CRITICS]


def cql(weight):
    """A CQL with a weight of its own."""
    student = ours.CQL()
    student.weight = weight
    return student


def choose(data, last=None, random=0, seed=0):
    """The episodes that the options --last, --random and --seed choose."""
    return ours.choose_episodes(data, types.SimpleNamespace(last=last, random=random, seed=seed))


def shrink(monkeypatch):
    """Short episodes, few updates and final episodes, small networks, empty panels in the picture:
    a run takes a fraction of a second."""
    starts = ours.Run.starts
    for name, value in (("EPISODE", 20), ("BATCH", 16), ("UPDATES", 3), ("WIDTH", 8)):
        monkeypatch.setattr(ours, name, value)
    monkeypatch.setattr(ours.Run, "starts", lambda *given: starts(*given)[:3])
    monkeypatch.setattr(ours, "draw_tests", lambda *_: None)
    monkeypatch.setattr(ours, "draw_critic", lambda *_: None)


@pytest.fixture(autouse=True)
def seeded():
    ours.seed_everything(0)
    ours.note.cache_clear()
    yield
    ours.AS_PRINTED.clear()


@pytest.fixture
def double():
    """Two orders of summation then differ by 1e-15 and not by 1e-7, which Adam would magnify."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def untrained(monkeypatch, small):
    """A main job that trains and plays nothing: its agents stay as they were made."""
    monkeypatch.setattr(ours.SAC, "train", lambda *_: None)
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [-np.arange(len(seeds)) - 1.0])


@pytest.fixture
def program(capsys):
    """What the program prints, once it has ended well and without a word on stderr."""
    def run(*arguments):
        ours.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out
    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A small main job: its folder, and what it printed. Only to be read."""
    folder, text = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(text):
        starts = ours.Run.starts
        shrink(monkeypatch)
        monkeypatch.setattr(ours.Run, "starts", starts)
        ours.main(["--epochs", "2", "--steps", "7", "--out", str(folder)])
    return folder, text.getvalue()


def batch(b=64, seed=0):
    """Rows that are no episode: any state, torque, reward and end; in the default dtype."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.empty(2, b, 1).uniform_(-math.pi, math.pi, generator=g)
    speed = torch.empty(2, b, 1).uniform_(-8, 8, generator=g)
    state, next_state = torch.cat([angle.cos(), angle.sin(), speed], dim=2)
    action = torch.empty(b, 1).uniform_(-2, 2, generator=g)
    reward = torch.empty(b, 1).uniform_(-16, 0, generator=g)
    over = torch.randint(2, (b, 1), generator=g)
    return state, action, reward, next_state, over


def with_seed(seed, function, *arguments):
    torch.manual_seed(seed)
    return function(*arguments)


def flat(*parts):
    """Copies of all weights of some networks, in a row."""
    parameters = [p for part in parts for p in part.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


def numbers(agent):
    """A copy of every number that an agent's next update needs, by attribute."""
    found = {}
    for name, part in vars(agent).items():
        if hasattr(part, "state_dict"):
            found[name] = copy.deepcopy(part.state_dict())
        elif torch.is_tensor(part):
            found[name] = part.detach().clone()
    return found


def same(one, other):
    """Whether two nested contents are equal to the last bit."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    nan = one != one and other != other
    return type(one) is type(other) and (one == other or nan)


class Constant:
    """An agent of one torque."""

    def __init__(self, torque):
        self.torque = torque

    def get_action(self, state):
        return self.torque


def filled(data, episodes=1):
    """A Data with so many more episodes of the torques 0, 0.5, 1, ..."""
    for k in range(episodes):
        data.update_data(Constant(k / 2))
    return data


def printed_tests(text):
    """The lines of tests and of the table, without what no two runs share."""
    return [line for line in text.splitlines()
            if not line.startswith(("minutes", "all files", "note"))]


def table(text):
    """The numbers of the table: episodes, mean, standard error, worst, best."""
    found = [line for line in text.splitlines() if line.startswith("the ") and "was" not in line]
    return {line[:22].strip(): [float(x) for x in line[22:].split()] for line in found}


def log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def steps_in(out):
    """Stage and step of each test in log.csv."""
    return [f"{row['stage']} {row['step']}" for row in log(out)]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
