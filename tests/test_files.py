"""Bad options, saved agents, and files that are damaged, foreign or hostile."""
import enum
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import FILES, batch, log, numbers, pendulum, same, steps_in, with_seed


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one line of a call that is refused; what is accepted by mistake fails at once."""
    def refuse(*arguments):
        with pytest.raises((SystemExit, ours.UserError, OSError)) as stop:
            ours.main(arguments)
        said = capsys.readouterr().err.strip() or str(stop.value)
        assert "\n" not in said
        return said

    monkeypatch.setattr(ours, "train_teacher", lambda *_: pytest.fail("accepted"))
    return refuse


@pytest.mark.parametrize("typed, words", [
    ("--steps 0", "start at 1"), ("--epochs 0", "start at 1"), ("--seed -1", "others at 0"),
    (f"--seed {2 ** 32}", "--seed ends below 2^32"), ("--weight -0.1", "other numbers at 0"),
    ("--weight nan", "other numbers at 0"), ("--random -1", "other numbers at 0"),
    ("--last -1", "other numbers at 0"), ("--last 11 --epochs 10", "the teacher plays 10"),
    ("--dataset d.npz --epochs=100", "need no teacher; leave out --epochs"),
    ("--last 0 --epochs 9", "need no teacher; leave out --epochs"),
    ("--as-printed sing", "'sing'"), ("--step 5", "--step"), ("--student ppo", "'ppo'"),
    ("--out .", "File exists")])
def test_bad_options_are_one_line(typed, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words.replace("others", "other numbers") in refused(*typed.split())
    assert not list(tmp_path.iterdir())


def test_a_misspelt_erratum_is_refused(refused):
    ours.AS_PRINTED.add("jacobain")
    assert "jacobain" in refused("--steps", 1)


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
                  "next_observations": rows[:, 5:8], "terminals": rows[:, 8], "timeouts": rows[:, 9]}


@pytest.mark.parametrize("change, words", [
    ("rows[150:] = np.nan", "50 rows have NaN, the first is row 150"),
    ("del data['rewards'], data['actions']", "lacks actions, rewards"),
    ("data['actions'] = rows[:, :2]", ""), ("data['timeouts'] = rows[:50, 9]", "is not a whole npz"),
    ("rows[199, 4] += 1", "1 rewards, 0 next states, 0 terminals are not env's (the first in row 199)"),
    ("rows[10, 6] = 5", "0 rewards, 1 next states, 0 terminals are not env's (the first in row 10)"),
    ("rows[99, 8:] = 1, 0", "0 rewards, 0 next states, 1 terminals are not env's (the first in row 99"),
    ("rows[::3, 3] = 2.25", "67 states or torques none"),
    ("rows[::3, 3] = -2.25", "67 states or torques none"),
    ("rows[5:7, :2] *= 1.1", "0 terminals are not env's (the first in row 0), 2 states or torques"),
    ("rows[150:] = 0", "50 next states"), ("rows[:, 3] /= 2", "134 rewards, 194 next states")])
def test_a_wrong_recording_is_refused_with_what_is_wrong(change, words, refused, tmp_path):
    rows, data = recorded()
    exec(change, {"rows": rows, "data": data, "np": np})
    np.savez(tmp_path / "data.npz", **data)
    said = refused("--dataset", tmp_path / "data.npz", "--out", tmp_path / "out")
    assert words in said and f"{tmp_path / 'data.npz'}: " in said
    assert not (tmp_path / "out").exists()


def test_of_many_rows_each_episodes_end_is_checked(capsys):
    rows, _ = recorded(5)
    ours.check_rows("a file", rows, sample=9)
    assert "a file: checking 13 of 500 rows, each episode's end with them" in capsys.readouterr().out
    rows[399, 8] = 1
    with pytest.raises(ours.UserError, match="0 next states, 1 terminals.*row 399"):
        ours.check_rows("a file", rows, sample=9)


def test_a_measured_pendulum_is_taken_unchecked(refused, tmp_path):
    """Friction, another time step, an encoder's steps."""
    rows, data = recorded()
    rows[:, [2, 7]] = rows[:, [2, 7]].round(1)
    np.savez(tmp_path / "bench.npz", **data)
    assert "For a measured pendulum: --unchecked" in refused(
        "--dataset", tmp_path / "bench.npz", "--out", tmp_path / "out")
    np.testing.assert_array_equal(
        ours.load_dataset(tmp_path / "bench.npz", check=False).rows, rows)
    with pytest.raises(ours.UserError, match="NaN"):
        rows[3, 3] = np.nan
        np.savez(tmp_path / "bench.npz", **data)
        ours.load_dataset(tmp_path / "bench.npz", check=False)


@pytest.mark.parametrize("kind", [np.int64, bool, np.float64])
def test_other_shapes_and_types_of_right_data_are_accepted(kind, tmp_path):
    rows, data = recorded()
    data["rewards"] = rows[:, 4:5].astype(float)
    data["actions"] = rows[:, 3]
    data["terminals"], data["timeouts"] = rows[:, 8].astype(kind), rows[:, 9:].astype(kind)
    np.savez(tmp_path / "data.npz", **data)
    np.testing.assert_array_equal(ours.load_dataset(tmp_path / "data.npz").rows, rows)


class Phase(enum.IntEnum):
    WARM_UP = 0


class Statistics:
    def state_dict(self):
        return {"mean": np.zeros(3)}


class Mine(ours.CQL):
    """A class of one's own: one more layer in its critics, a count, tensors that change."""
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
        self.mean = 0.9 * self.mean + 0.7                       # whole numbers at first
        self.errors = torch.cat([self.errors, torch.ones(2)])


@pytest.mark.parametrize("make", [ours.SAC, ours.BC, Mine])
def test_a_saved_agent_learns_on_as_if_nothing_had_happened(make, tmp_path, capsys):
    agent = make()
    agent.weight = 0.5
    agent.train(*batch())
    ours.save_agent(str(tmp_path / "agent.pt"), agent)
    other = ours.load_agent(tmp_path / "agent.pt")
    assert type(other) is make and getattr(other, "count", 1) == 1
    assert same(numbers(other), numbers(agent))
    said = capsys.readouterr().out
    if make is Mine:
        assert said == "" and other.weight == 0.5
    else:                                                       # a new one has none
        assert "only one of the saved agent and a new one has weight" in said
    for each in (agent, other):
        with_seed(5, each.train, *batch(seed=1))
    assert same(numbers(other), numbers(agent))


def test_what_a_file_does_not_keep_is_said_once_and_the_rest_comes_back(tmp_path, capsys):
    agent = ours.SAC()
    agent.critics, agent.mean, agent.phase = [ours.SAC.ModelValue()], np.zeros(3), Phase.WARM_UP
    agent.version, agent.statistics = torch.__version__, Statistics()
    for _ in range(2):
        ours.save_agent(tmp_path / "agent.pt", agent)
    note, = capsys.readouterr().out.splitlines()
    assert "agent.pt does not keep critics, mean, phase, version, statistics; a torch" in note
    assert same(numbers(ours.load_agent(tmp_path / "agent.pt"))["model_action"],
                agent.model_action.state_dict())


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


def test_a_diverged_agent_replaces_no_good_file(small, tmp_path, program, monkeypatch):
    """A policy of NaN ends the run in a line; what there is of it stays."""
    train, out = ours.CQL.train, tmp_path / "run"

    def diverging(agent, *rows):
        train(agent, *rows)
        if agent.model_action.fc_mu.bias.grad.isfinite().all() and getattr(agent, "told", False):
            torch.nn.init.constant_(agent.model_action.fc_mu.bias, np.nan)
        agent.told = True

    monkeypatch.setattr(ours.CQL, "train", diverging)
    with pytest.raises(ours.UserError, match="the student has diverged .NaN at 5.; try smaller"):
        program("--epochs", 1, "--steps", 6, "--out", out)
    assert steps_in(out) == ["teacher 0", "student 0"]
    assert ours.load_agent(out / "student.pt").model_action.fc_mu.bias.isfinite().all()


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
    monkeypatch.chdir(tmp_path)
    planted, (rows, data) = Planted(tmp_path / "witness"), recorded()
    np.savez("data.npz", **data), ours.save_agent("agent.pt", ours.CQL())
    good = tmp_path / ("data.npz" if option == "--dataset" else "agent.pt")
    whole = good.read_bytes()
    good.unlink()
    for name, text in (("empty", b""), ("cut", whole[:-1]), ("half", whole[:len(whole) // 2]),
                       ("text.csv", b"state,action"), ("hdf5", b"\x89HDF\r\n\x1a\n"),
                       ("pickle", pickle.dumps(planted))):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "array.npy", rows)
    np.savez(tmp_path / "code.npz", **data | {"rewards": np.array([planted], dtype=object)})
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("hello", "world")
    for name, what in (("dict.pt", {"weights": torch.zeros(3)}), ("tensor.pt", torch.zeros(3)),
                       ("code.pt", {"class": "SAC", "state": planted})):
        torch.save(what, tmp_path / name)
    before = sorted(tmp_path.iterdir())
    words = {"missing": "No such file", "folder": "Is a directory"}
    for name in ["missing", *(path.name for path in before)]:
        said = refused(option, tmp_path / name, "--out", tmp_path / "out")
        assert f"{tmp_path / name}: {words.get(name, '')}" in said
        assert sorted(tmp_path.iterdir()) == before
    torch.load(tmp_path / "code.pt", weights_only=False)        # it is alive: it would have run
    assert planted.witness.exists()


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    for text in (b"first", b"second"):
        with ours.whole_file(path) as file:
            file.write(text)
            assert path.exists() == (text == b"second") and (text == b"first" or (
                path.read_bytes() == b"first"))
    with pytest.raises(KeyboardInterrupt):
        with ours.whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("student", ["cql", "sac", "bc"])
def test_the_dataset_alone_gives_the_same_student(student, small, tmp_path, program):
    """To the last bit, with the seed, the weight and the steps; the tests' numbers, too."""
    same_words = ["--student", student, "--seed", 2, "--weight", 2, "--steps", 5]
    program(*same_words, "--epochs", 2, "--last", 1, "--random", 1, "--out", tmp_path / "a")
    program(*same_words, "--dataset", tmp_path / "a/dataset.npz", "--out", tmp_path / "b")
    a, b = (tmp_path / name for name in "ab")
    assert same(*(numbers(ours.load_agent(out / "student.pt")) for out in (a, b)))
    assert (a / "dataset.npz").read_bytes() == (b / "dataset.npz").read_bytes()
    by_columns = [[[row[name] for name in ("step", "return", "promised", "delivered")]
                   for row in log(out) if row["stage"] == "student"] for out in (a, b)]
    assert by_columns[0] == by_columns[1] and len(by_columns[0]) == 2
    assert {path.name for path in b.iterdir()} == FILES - {"teacher.pt", "curves.png"}
