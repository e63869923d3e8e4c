"""Bad options, saved agents, and files that are wrong, foreign or hostile."""
import enum
import os
import pickle
import re
import types

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import FILES, batch, log, numbers, pendulum, with_seed


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """The one line of a call that is refused; what is accepted by mistake fails at once."""
    def refuse(*arguments):
        before = sorted(tmp_path.iterdir())
        with pytest.raises((SystemExit, ours.UserError, OSError)) as stop:
            ours.main(arguments)
        said = capsys.readouterr().err.strip() or str(stop.value)
        assert "\n" not in said and sorted(tmp_path.iterdir()) == before
        return said

    monkeypatch.chdir(tmp_path)
    for name in ("train_teacher", "train_student"):
        monkeypatch.setattr(ours, name, lambda *_: pytest.fail("accepted"))
    return refuse


@pytest.mark.parametrize("typed, words", [
    ("--steps 0", "start at 1"), ("--epochs 0", "start at 1"), ("--seed -1", "numbers at 0"),
    (f"--seed {2 ** 32}", "--seed ends below 2^32"), ("--weight -0.1", "numbers at 0"),
    ("--weight nan", "numbers at 0"), ("--weight inf", "numbers at 0"),
    ("--last 0", "--last 0 needs --random"), ("--random -1", "numbers at 0"),
    ("--last -1", "numbers at 0"), ("--last 11 --epochs 10", "10 is the most"),
    ("--dataset d.npz --epochs=100", "need no teacher; leave out --epochs"),
    ("--last 0 --epochs 9", "need no teacher; leave out --epochs"),
    ("--as-printed sing", "'sing'"), ("--step 5", "--step"), ("--out .", "is there already")])
def test_bad_options_are_one_line(typed, words, refused):
    assert words in refused(*typed.split())


def recorded(episodes=2):
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
    rows = np.array(rows, np.float32)
    return rows, {"observations": rows[:, :3], "actions": rows[:, 3:4], "rewards": rows[:, 4],
                  "next_observations": rows[:, 5:8], "terminals": rows[:, 8],
                  "timeouts": rows[:, 9]}


@pytest.mark.parametrize("change, words", [
    ("rows[150:] = np.nan", "50 rows have NaN, the first is row 150"),
    ("del data['rewards'], data['actions']", "lacks actions, rewards"),
    ("data['timeouts'] = rows[:50, 9]", "is not an npz"),
    ("rows[199, 4] += 1", " 1 rewards, 0 next states, 0 terminals .* row 199"),
    ("rows[10, 6] = 5", " 0 rewards, 1 next states, 0 terminals .* row 10"),
    ("rows[99, 8:] = 1, 0", " 0 rewards, 0 next states, 1 terminals .* row 99"),
    ("rows[::3, 3] = -2.25", " 67 states or torques are imp"),
    ("rows[5:7, :2] *= 1.1", " 0 terminals .*, 2 states or torques are imp"),
    ("rows[:, [2, 7]] = rows[:, [2, 7]].round(1)", "--unchecked")])
def test_a_wrong_recording_is_refused_with_what_is_wrong(change, words, refused):
    rows, data = recorded()
    exec(change, {"rows": rows, "data": data, "np": np})
    np.savez("data.npz", **data)
    assert re.match(f"data.npz: .*{words}", refused("--dataset", "data.npz", "--out", "out"))
    if "states" in words or "unchecked" in words:
        np.testing.assert_array_equal(ours.load_dataset("data.npz", check=False).rows, rows)
        with pytest.raises(pytest.fail.Exception, match="accepted"):
            ours.main(["--dataset", "data.npz", "--unchecked", "--out", "out"])


def test_too_many_last_episodes_are_refused(refused):
    np.savez("data.npz", **recorded()[1])
    with pytest.raises(ours.UserError, match="--last 3: the data has 2 episodes"):
        ours.main(["--dataset", "data.npz", "--last", 3, "--out", "out"])


def test_of_many_rows_each_episodes_end_is_checked(capsys):
    rows, _ = recorded(5)
    ours.check_rows("a file", rows, sample=9)
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith("a file: checking 13 of 500 rows, each episode's end with")
    ours.check_rows("a file", np.delete(rows, 30, axis=0))
    assert "note: a file: no whole episodes in order" in capsys.readouterr().out
    rows[399, 8] = 1
    with pytest.raises(ours.UserError, match="0 next states, 1 terminals.*row 399"):
        ours.check_rows("a file", rows, sample=9)


def test_what_an_own_step_raises_in_the_check_is_told_as_it_is(tmp_path, monkeypatch):
    np.savez(tmp_path / "data.npz", **recorded()[1])
    monkeypatch.setattr(ours.MyWrapper, "step", lambda self, action: {}["motor"])
    with pytest.raises(KeyError, match="motor"):
        ours.load_dataset(tmp_path / "data.npz")


@pytest.mark.parametrize("kind", [np.int64, bool, np.float64])
def test_other_shapes_and_types_of_right_data_are_accepted(kind, tmp_path, monkeypatch):
    """And 2 N m, which env takes, by a program whose policy has a weaker motor."""
    monkeypatch.setattr(ours, "TORQUE", 1)
    rows, data = recorded()
    data |= {"rewards": rows[:, 4:5].astype(float), "actions": rows[:, 3],
             "terminals": rows[:, 8].astype(kind), "timeouts": rows[:, 9:].astype(kind)}
    np.savez(tmp_path / "data.npz", **data)
    np.testing.assert_array_equal(ours.load_dataset(tmp_path / "data.npz").rows, rows)


Phase = enum.IntEnum("Phase", "WARM_UP")


class Mine(ours.CQL):
    """A class of one's own: one more layer in its critics, and attributes of many kinds."""
    class ModelValue(ours.CQL.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.append(torch.nn.Linear(1, 1))

    def __init__(self):
        super().__init__()
        self.count, self.mean, self.errors = 0, torch.tensor(0), torch.empty(0)

    def train(self, *rows):
        super().train(*rows)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.7                       # a whole number at first
        self.errors = torch.cat([self.errors, torch.ones(2)])
        self.version, self.phase = torch.__version__, Phase.WARM_UP
        self.statistics = types.SimpleNamespace(state_dict=lambda: {"mean": np.zeros(3)})
        self.critics, self.array = [self.ModelValue()], np.zeros(3)


class Finer(Mine):
    """Made of one's own class."""


@pytest.mark.parametrize("make", [ours.SAC, ours.BC, Finer])
def test_a_saved_agent_learns_on_as_if_nothing_had_happened(make, tmp_path, capsys):
    agent, file = make(), tmp_path / "agent.pt"
    agent.train(*batch())
    agent.weight = 0.5
    for _ in range(2):
        ours.save_agent(str(file), agent)
    other = ours.load_agent(file)
    lost = "version, phase, statistics, critics, array"         # said once
    assert capsys.readouterr().out == {
        Finer: f"note: {file} does not keep {lost}; a torch.nn.ModuleList is kept\n"
    }.get(make, f"note: {file}: only one of the saved agent and a new one has weight\n")
    assert type(other) is make and getattr(other, "weight", 0.5) == 0.5
    for each in (agent, other):
        each.new = [each.__dict__.pop(name, None) for name in lost.split(", ")]
    for k in (0, 1):
        mine, its = ({name: x for name, x in numbers(each).items() if name in vars(make())}
                     for each in (agent, other))
        assert (mine | {"logged": 0}) == (its | {"logged": 0})
        for each in (agent, other):
            with_seed(k, each.train, *batch(seed=k))


@pytest.mark.parametrize("change, words", [
    ("del agent.model_value2", "model_value2 is {}, but in a new agent"),
    ("agent.model_action.fc_mu = torch.nn.Linear(7, 1)", "model_action is .*fc_mu.weight.*7"),
    ("agent.model_value1.double()", "model_value1 is .*float64"),
    ("agent.alpha = torch.zeros(2)", r"alpha is {'': '\[2\] torch"),
    ("agent.__class__ = type('Elsewhere', (), {})", "holds a Elsewhere; import the file that")])
def test_what_does_not_fit_is_said_as_that(change, words, tmp_path):
    agent = ours.SAC()
    exec(change, {"agent": agent, "torch": torch})
    ours.save_agent(tmp_path / "agent.pt", agent)
    with pytest.raises(ours.UserError, match=f"agent.pt: {words}"):
        ours.load_agent(tmp_path / "agent.pt")


def test_a_diverged_agent_replaces_no_good_file(small, tmp_path):
    agent, run = ours.CQL(), ours.Run(tmp_path, 0)
    run.test("student", 0, agent)
    torch.nn.init.constant_(agent.model_action.fc_mu.bias, np.nan)
    with pytest.raises(ours.UserError, match="the student has diverged .NaN at 5."):
        run.test("student", 5, agent)
    assert [row["step"] for row in log(tmp_path)] == ["0"]
    assert ours.load_agent(tmp_path / "student.pt").model_action.fc_mu.bias.isfinite().all()


class Planted:
    """A pickle that would make a folder if anybody unpickled it."""
    def __reduce__(self):
        return os.mkdir, ("witness",)


@pytest.mark.parametrize("option", ["--dataset", "--play"])
@pytest.mark.filterwarnings("ignore")
def test_files_that_are_something_else(option, refused, tmp_path, monkeypatch):
    """Cut, foreign, or with code in them, which never runs."""
    rows, data = recorded()
    np.savez("data.npz", **data), ours.save_agent("agent.pt", ours.CQL())
    good = tmp_path / ("data.npz" if option == "--dataset" else "agent.pt")
    whole = good.read_bytes()
    good.unlink()
    for name, text in (("empty", b""), ("cut", whole[:-1]), ("half", whole[:len(whole) // 2]),
                       ("text.csv", b"state,action"), ("pickle", pickle.dumps(Planted()))):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "folder").mkdir()
    np.save("array.npy", rows)
    np.savez("code.npz", **data | {"rewards": np.array([Planted()], dtype=object)})
    torch.save({"weights": torch.zeros(3)}, "dict.pt")
    torch.save({"class": "SAC", "state": Planted()}, "code.pt")
    words = {"missing": "No such file", "folder": "Is a directory"}
    for name in ["missing", *(path.name for path in tmp_path.iterdir())]:
        assert refused(option, name).startswith(f"{name}: {words.get(name, '')}")
    torch.load("code.pt", weights_only=False)                   # it is alive: it would have run
    assert (tmp_path / "witness").exists()


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    with pytest.raises(KeyboardInterrupt), ours.whole_file(path):
        raise KeyboardInterrupt
    with ours.whole_file(path) as file:
        file.write(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("typed, kind, weight", [
    ("cql --weight 0.5", ours.CQL, 0.5), ("cql --weight 0", ours.CQL, 0), ("sac", ours.SAC, None),
    ("bc", ours.BC, None)])
def test_the_dataset_alone_gives_the_same_student(typed, kind, weight, small, tmp_path, program):
    """To the last bit, with the seed, the weight and the steps; the tests' numbers, too."""
    a, b, words = tmp_path / "a", tmp_path / "b", f"--seed 2 --steps 5 --student {typed}".split()
    program(*words, "--epochs", 2, "--last", 1, "--random", 1, "--out", a)
    program(*words, "--dataset", a / "dataset.npz", "--out", b)
    one, two = (ours.load_agent(out / "student.pt") for out in (a, b))
    assert type(one) is type(two) is kind and getattr(one, "weight", None) == weight
    assert numbers(one) == numbers(two)
    assert (a / "dataset.npz").read_bytes() == (b / "dataset.npz").read_bytes()
    of_students = [[list(row.values())[:5] for row in log(out) if row["stage"] == "student"]
                   for out in (a, b)]
    assert of_students[0] == of_students[1] and len(of_students[0]) == 2
    assert type(ours.load_agent(a / "teacher.pt")) is ours.SAC
    assert {path.name for path in b.iterdir()} == FILES - {"teacher.pt", "curves.png"}
