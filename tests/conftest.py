"""What several test files use, each thing once: a batch, an agent, a run of the program."""
import contextlib
import copy
import csv
import io
import math
import os
import pathlib
import sys
import types

os.environ["OMP_NUM_THREADS"] = "1"       # here and in every child: two runs do not fight
TOP = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(TOP))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import cql_pendulum as ours  # noqa: E402

FILES = {"config.json", "curves.png", "dataset.npz", "log.csv", "student.pt", "teacher.pt"}


def pendulum(states, torques):
    """Pendulum-v1's formulas, many at a time: [n, 3], [n] -> rewards [n], next states [n, 3]."""
    angle, speed = np.arctan2(states[:, 1], states[:, 0]), states[:, 2]
    rewards = -(angle ** 2 + 0.1 * speed ** 2 + 0.001 * torques ** 2)
    # gravity 10 m/s^2, length 1 m, mass 1 kg, a step of 0.05 s
    speed = np.clip(speed + (15 * np.sin(angle) + 3 * torques) * 0.05, -8, 8)
    angle = angle + 0.05 * speed
    return rewards, np.stack([np.cos(angle), np.sin(angle), speed], axis=1)


@pytest.fixture(autouse=True)
def seeded():
    ours.seed_everything(0)
    yield
    ours.AS_PRINTED.clear()


def shrink(monkeypatch):
    """Short episodes, few updates, small networks: a main job takes a second."""
    for name, value in (("EPISODE", 20), ("BATCH", 16), ("UPDATES", 3), ("WIDTH", 8)):
        monkeypatch.setattr(ours, name, value)


@pytest.fixture
def small(monkeypatch):
    """A main job takes a fraction of it: three final episodes, and no picture."""
    starts = ours.Run.starts
    shrink(monkeypatch)
    monkeypatch.setattr(ours.Run, "starts", lambda *given: starts(*given)[:3])
    monkeypatch.setattr(ours, "draw", lambda *_: None)


@pytest.fixture
def program(capsys):
    """What the program prints, once it has ended well and without a word on stderr."""
    def run(*arguments):
        ours.main(arguments)
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out
    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A small main job: its folder, and what it printed. Only to be read."""
    folder, text = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(text):
        shrink(monkeypatch)
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
    return state, action, reward, next_state, torch.randint(2, (b, 1), generator=g)


def with_seed(seed, function, *arguments):
    torch.manual_seed(seed)
    return function(*arguments)


def numbers(part):
    """Every number that an agent's next update needs, in dicts and lists."""
    if hasattr(part, "model_action"):
        return {name: numbers(x) for name, x in vars(part).items()}
    if isinstance(part, dict):
        return {key: numbers(x) for key, x in part.items()}
    if hasattr(part, "state_dict"):
        return numbers(part.state_dict())
    return part.tolist() if hasattr(part, "tolist") else copy.copy(part)


def constant(torque):
    """An agent of one torque."""
    return types.SimpleNamespace(get_action=lambda state: torque)


def filled(data, episodes=1):
    """A Data with so many more episodes of the torques 0, 0.5, 1, ..."""
    for k in range(episodes):
        data.update_data(constant(k / 2))
    return data


def log(out):
    """The rows of log.csv."""
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))
