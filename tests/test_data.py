"""The environment, the dataset, what an episode returns and pays, and the loops."""
import copy
import math
import random
import re
import sys
import types

import gym
import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import Constant, choose, filled
from cql_pendulum import AS_PRINTED, BC, SAC, Data, Run, env, evaluate

PAGE_LOOPS = '''
teacher = SAC()

data = Data()

# Online training loop
for epoch in range(100):
    data.update_data(teacher)
    for i in range(200):
        teacher.train(*data.get_sample())

    if epoch % 10 == 0:
        test_result = sum([teacher.test(play=False) for _ in range(10)]) / 10
        print(epoch, test_result)

student = CQL()

# Offline training — dataset never changes
for i in range(50000):
    student.train(*data.get_sample())

    if i % 2000 == 0:
        test_result = sum([student.test(play=False) for _ in range(10)]) / 10
        print(i, test_result)
'''


def test_the_pages_loops_run_unchanged(capsys, monkeypatch):
    """The page's text with its three counts cut down: 100 epochs, 200 updates, 50,000 updates."""
    monkeypatch.setattr(ours, "EPISODE", 64)
    fewer = {"100": 2, "200": 3, "50000": 4}
    loops, found = re.subn(r"range\((100|200|50000)\)", lambda match: f"range({fewer[match[1]]})",
                           PAGE_LOOPS)
    assert found == 3
    scope = {}
    exec("from cql_pendulum import *", scope)
    assert {"MyWrapper", "env", "Data", "SAC", "CQL", "ERRATA"} < scope.keys()
    exec(loops, scope)
    (epoch, teacher), (i, student) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (epoch, i) == ("0", "0")
    assert all(-640 < float(result) < -50 for result in (teacher, student))
    assert len(scope["data"].datas) == 128


def drawn():
    """Numbers of every generator; the last are a start of env."""
    return [torch.rand(1).item(), random.random(), np.random.random(), *env.reset().tolist()]


def test_a_seed_fixes_all_chance_and_every_start_is_another():
    def seeded(seed):
        return [*ours.seed_everything(seed).tolist(), *drawn()]

    assert seeded(3) == seeded(3)
    assert all(x != y for x, y in zip(seeded(3), seeded(4)))


@pytest.mark.parametrize("torque", [np.array([0.5]), np.array([[0.5]]), torch.tensor([0.5])])
def test_a_torque_may_be_an_array_of_one(torque):
    rows = filled(Data(), 2).rows[200:]                         # torques of 0.5
    for action in (torque, [torque]):
        ours.start_from(rows[0])
        np.testing.assert_allclose(env.step(action)[0], rows[0, 5:8], atol=1e-5)
    data = Data()
    data.update_data(Constant(torque))
    assert (data.rows[:, 3] == 0.5).all()


@pytest.mark.parametrize("last, terminated", [(5, True), (200, True), (5, False)])
def test_an_end_is_terminal_only_where_the_environment_says_so(last, terminated, monkeypatch):
    steps = iter(range(1, last + 1))

    def step(action):
        ends = next(steps) == last
        return np.zeros(3), -1.0, ends and terminated, ends and not terminated, {}

    monkeypatch.setattr(env.unwrapped, "step", step)
    data = filled(Data())
    assert data.rows[:, 8].tolist() == [0] * (last - 1) + [terminated]
    assert data.rows[:, 9].tolist() == [0] * (last - 1) + [not terminated]


def test_show_replaces_the_picture_by_the_pendulum_as_it_is_now(monkeypatch):
    """In a window; and in a notebook, whose cell shows one picture that changes."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    shown = []

    def showing(how):
        def show(figure, display_id=None):
            image, = figure.axes[0].images          # no heap of old pictures, slower each time
            np.testing.assert_array_equal(image.get_array(), env.render())
            shown.append((how, display_id))
        return show

    display = types.SimpleNamespace(display=showing("new"), update_display=showing("in its place"))
    monkeypatch.setattr(pyplot, "pause", lambda seconds: showing("window")(pyplot.gcf()))
    for _ in range(2):
        env.reset()
        for _ in range(3):
            env.step([2.0])
            env.show()
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    assert shown == 3 * [("window", None)] + [("new", "pendulum")] + 2 * [
        ("in its place", "pendulum")]
    assert not pyplot.get_fignums()                 # else the cell would show it once more


def test_datas_has_the_pages_rows_and_changes_nothing():
    data = filled(Data(), 2)
    before, datas = data.rows.copy(), data.datas
    assert len(datas) == 400
    for k, (state, action, reward, next_state, over) in enumerate(datas):
        assert (type(action), type(reward), over) == (float, float, False)
        np.testing.assert_array_equal([*state, action, reward, *next_state], data.rows[k, :8])
    with pytest.raises(AttributeError):
        datas.append(datas[0])
    with pytest.raises(AttributeError):
        data.datas = []
    assert [row[1] for row in datas[-3:-1]] == [0.5, 0.5] and len(datas[398:]) == 2
    assert datas[200][1] == datas[-200][1] == 0.5 and datas[199][1] == 0
    datas[0][0][:] = 0
    np.testing.assert_array_equal(data.rows, before)
    data.rows[5, 8] = 1
    ends = np.array([row[4] for row in datas])
    assert np.flatnonzero(ends).tolist() == [5]                 # the time limit is no end
    AS_PRINTED.add("timeout")
    ends = np.array([row[4] for row in datas])
    assert np.flatnonzero(ends).tolist() == [5, 199, 399]


@pytest.mark.parametrize("rows, b", [(80, 16), (64, None), (5000, None)])
def test_sample_draws_every_row_equally_often_none_twice_and_keeps_rows_together(
        rows, b, monkeypatch):
    if b:
        monkeypatch.setattr(ours, "BATCH", b)
    b = b or 64
    data = Data()
    data.rows = np.random.default_rng(0).random([rows, 10], np.float32)
    data.rows[:, 8] = np.arange(rows) % 3 == 0
    data.rows[:, 3] = np.arange(rows)                           # the action names its row
    counts, draws = torch.zeros(rows), 500
    for _ in range(draws):
        sample = data.get_sample()
        assert [tuple(x.shape) for x in sample] == [(b, 3), (b, 1), (b, 1), (b, 3), (b, 1)]
        assert [x.dtype for x in sample] == [torch.float32] * 4 + [torch.int64]
        drawn = sample[1].flatten().long()
        assert len(drawn.unique()) == b
        assert torch.equal(torch.from_numpy(data.rows)[drawn][:, :9], torch.cat(sample, dim=1))
        counts[drawn] += 1
    tenths = counts.reshape(10, -1).sum(dim=1) if rows == 5000 else counts
    expected = draws * b / len(tenths)
    assert ((tenths - expected).abs() <= 5 * expected ** 0.5).all()
    data.rows = data.rows[:b - 1]
    with pytest.raises(ValueError, match=f"{b - 1} rows; a batch draws {b}"):
        data.get_sample()


def test_the_newest_rows_are_kept(monkeypatch):
    monkeypatch.setattr(ours, "CAPACITY", 300)
    data = filled(Data(), 2)
    assert data.rows[:, 3].tolist() == 100 * [0] + 200 * [0.5]


def test_episodes_end_at_the_time_limit_and_at_terminal_states():
    data = filled(Data(), 2)
    assert [len(rows) for rows in ours.episodes(data)] == [200, 200]
    data.rows[49, 8] = 1
    data.rows = data.rows[:220]                                 # the last episode has no end
    assert [len(rows) for rows in ours.episodes(data)] == [50, 150, 20]
    np.testing.assert_array_equal(np.concatenate(ours.episodes(data)), data.rows)


@pytest.mark.parametrize("last, n", [(0, 2), (2, 0), (2, 2), (None, 2), (None, 0)])
def test_random_episodes_then_the_last_ones_are_chosen(last, n):
    """Random ones are what seed_everything and an agent of uniform torques give."""
    uniform = types.SimpleNamespace(get_action=lambda state: random.uniform(-2, 2))
    data = filled(Data(), 3).freeze()
    before = data.rows.tobytes()
    chosen = choose(data, last, n, seed=7)
    ours.seed_everything(7)
    expected = Data()
    for _ in range(n):
        expected.update_data(uniform)
    first = 0 if last is None else 600 - 200 * last
    np.testing.assert_array_equal(chosen.rows, np.concatenate([expected.rows, data.rows[first:]]))
    assert chosen.rows.dtype == np.float32 and not chosen.frozen
    assert data.rows.tobytes() == before
    with pytest.raises(ours.UserError, match="--last 4: the data has 3 episodes"):
        choose(data, 4)


def test_frozen_data_cannot_change():
    data = filled(Data(), 2)
    free, rows, before = copy.deepcopy(data), data.rows, data.rows.tobytes()
    assert data.freeze() is data and data.frozen and not free.frozen
    ours.start_from([1, 0, 0.5])
    for frozen in (data, copy.deepcopy(data)):
        with pytest.raises(RuntimeError, match="frozen"):
            frozen.update_data(Constant(0))
    assert env.unwrapped.state.tolist() == [0, 0.5]             # no step was played
    with pytest.raises(ValueError, match="read-only"):
        data.rows[0] = 0
    rows[:] = 0                                                 # the old array is not the dataset's
    for x in data.get_sample():
        x.zero_()                                               # nor is a batch
    assert data.rows.tobytes() == before
    free.update_data(Constant(0))
    assert len(free) == 600


def test_a_test_is_shown_step_by_step_where_that_is_asked_for(monkeypatch):
    shown = []
    monkeypatch.setattr(ours, "EPISODE", 50)
    monkeypatch.setattr(env, "show", lambda: shown.append(env.step_n), raising=False)
    returns = {SAC().test(play=False)}
    assert shown == []
    returns |= {SAC().test(play=True), 0.0}
    assert shown == [*range(1, 51)] and len(returns) == 3       # from random starts


@pytest.mark.parametrize("steps, gamma, scale", [(1, 0.1, 1), (20, 0.7, 16), (60, 0.99, 8)])
def test_discounted_is_the_sum_and_a_tail(steps, gamma, scale, monkeypatch):
    rewards = np.random.default_rng(steps).uniform(-17, 0, [steps, 2])
    monkeypatch.setattr(ours, "GAMMA", gamma)
    monkeypatch.setattr(ours, "SCALE", scale)
    found = ours.discounted(rewards)
    for k in range(2):
        scaled = [(row[k] + scale) / scale for row in rewards]
        end = scaled[-20:]
        tail = gamma ** len(scaled) / (1 - gamma) * sum(end) / len(end)
        expected = sum(gamma ** t * r for t, r in enumerate(scaled)) + tail
        assert found[k] == pytest.approx(expected, abs=1e-9)


class Drawing(SAC):
    """Chance of one's own: every generator acts in its torques."""

    def get_action(self, state):
        noise = random.random() + np.random.random() + ours.env.unwrapped.np_random.random()
        return super().get_action(state) * 0.7 + noise * 0.2


@pytest.mark.parametrize("steps", [30, 200])
@pytest.mark.parametrize("make", [SAC, Drawing])
def test_an_evaluation_is_gyms_own_episodes_with_the_agents_torques(make, steps, monkeypatch):
    """In gym's Pendulum-v1, with the meter's sum written out."""
    monkeypatch.setattr(ours, "EPISODE", steps)
    agent, seeds = make(), [11, 12, 13]
    found = evaluate(agent, seeds)
    assert [x.shape for x in found] == [(3,)] * 3
    pendulum = gym.make("Pendulum-v1", disable_env_checker=True).unwrapped
    monkeypatch.setattr(ours, "env", pendulum)      # whose generator Drawing uses; it has no limit
    for k, seed in enumerate(seeds):
        torch.manual_seed(seed), random.seed(seed), np.random.seed([seed, 1])
        state, _ = pendulum.reset(seed=seed)
        start, torques, rewards = torch.tensor(state)[None], [], []
        for _ in range(steps):
            torques.append(agent.get_action(state))
            state, reward, *_ = pendulum.step([torques[-1]])
            rewards.append(float(reward))
        first = start, torch.tensor([[torques[0]]])
        scaled = [(reward + 8) / 8 for reward in rewards]
        tail = 0.99 ** steps / 0.01 * sum(scaled[-20:]) / 20
        delivered = sum(0.99 ** t * r for t, r in enumerate(scaled)) + tail
        promised = min(agent.model_value1(*first).item(), agent.model_value2(*first).item())
        expected = [sum(rewards), promised, delivered]
        assert [x[k] for x in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("measure", [
    lambda agent: [x.tolist() for x in evaluate(agent, [1, 2])],
    lambda agent: ours.deliver(agent, [1, 0, 0], 0.5, episodes=2),
    lambda agent: ours.mean_torque(agent, [[1, 0, 0], [0, 1, 5]]).tolist(),
    lambda agent: ours.possible()])
def test_a_measure_is_the_same_each_time_and_leaves_all_chance_as_it_was(measure):
    agent, results = Drawing(), []
    for seed in (5, 6):
        ours.seed_everything(seed)
        results.append(measure(agent))
        after = drawn()
        ours.seed_everything(seed)
        assert after == drawn()
    assert results[0] == results[1]


class Halved(gym.Wrapper):
    """Half of the reward."""

    def step(self, action):
        state, reward, over, info = self.env.step(action)
        return state, reward / 2, over, info


class Fast(gym.Wrapper):
    """Faster than 3 rad/s is a terminal state."""

    def step(self, action):
        state, reward, over, info = self.env.step(action)
        return state, reward, over or abs(state[2]) > 3, info


class Pushing(SAC):
    """An own way to act: along the speed, with half of the torque."""

    def get_action(self, state):
        return 1.0 if state[2] > 0 else -1.0


EDITS = {"none": {}, "gravity": {"g": 0.0}, "mass": {"m": 2.0}, "reward": {"share": 0.5},
         "end": {"fastest": 3}, "EPISODE": {"limit": 400}}


def edited_rewards(state, torque=None, g=10.0, m=1.0, share=1, fastest=9, limit=200):
    """Gym's own Pendulum with an edit, pushed by Pushing: the rewards from a state on."""
    pendulum = gym.make("Pendulum-v1", disable_env_checker=True).unwrapped
    pendulum.reset()
    pendulum.g, pendulum.m = g, m
    pendulum.state = np.array([math.atan2(state[1], state[0]), state[2]])
    rewards = []
    while len(rewards) < limit:
        push = Pushing.get_action(None, state) if torque is None else torque
        state, reward, *_ = pendulum.step([push])
        torque = None
        rewards.append(share * float(reward))
        if abs(state[2]) > fastest:
            break
    return rewards


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_world_is_in_every_number(name, monkeypatch, tmp_path):
    """Tests, data, delivery, and what a dataset is checked by."""
    edit, agent, data = EDITS[name], Pushing(), Data()
    with monkeypatch.context() as world:
        for attribute in {"g", "m"} & edit.keys():
            world.setattr(env.unwrapped, attribute, edit[attribute])
        if name in ("reward", "end"):
            world.setattr(ours, "env", {"reward": Halved, "end": Fast}[name](env))
        world.setattr(ours, "EPISODE", edit.get("limit", 200))
        for k in range(5, 8):
            expected = edited_rewards(ours.seed_everything(k), **edit)
            returned, _, delivered = evaluate(agent, [k])
            assert returned[0] == pytest.approx(sum(expected), rel=1e-4)
            assert delivered[0] == pytest.approx(
                ours.discounted(expected, name == "end"), rel=1e-4)
            ours.seed_everything(k)
            start = env.reset()
            ours.seed_everything(k)
            assert agent.test(play=False) == pytest.approx(
                sum(edited_rewards(start, **edit)), rel=1e-4)
        while len(data) < 100:
            n = len(data)
            data.update_data(agent)
            expected = edited_rewards(data.rows[n, :3], **edit)
            np.testing.assert_allclose(data.rows[n:, 4], expected, rtol=1e-3, atol=1e-4)
        state = data.rows[0, :3]
        assert ours.deliver(agent, state, 0.5) == pytest.approx(
            ours.discounted(edited_rewards(state, 0.5, **edit), name == "end"), rel=1e-4)
        ours.save_dataset(tmp_path / "data.npz", data)
        np.testing.assert_array_equal(ours.load_dataset(tmp_path / "data.npz").rows, data.rows)
        if name == "end":
            data.rows[-1, 8] = 0
            ours.save_dataset(tmp_path / "open.npz", data)
            with pytest.raises(ours.UserError, match="env ends here; put True in terminals"):
                ours.load_dataset(tmp_path / "open.npz")
        assert np.isfinite(ours.possible()).all()
        assert ours.possible()[0] == pytest.approx(
            (8 - edit.get("share", 1) * (math.pi ** 2 + 6.404)) / 8 * 100)
    if name in ("none", "EPISODE"):
        ours.load_dataset(tmp_path / "data.npz")
    else:
        with pytest.raises(ours.UserError, match="is not what env gives"):
            ours.load_dataset(tmp_path / "data.npz")


def test_without_a_discount_nothing_goes_on_for_ever(monkeypatch):
    monkeypatch.setattr(ours, "GAMMA", 1)
    assert ours.discounted([-8, 0, -4]) == pytest.approx(0 + 1 + 0.5)
    assert ours.possible() == [-math.inf, math.inf]


def test_a_runs_starts_are_its_seeds_and_its_purposes():
    starts = Run(None, 7).starts(0, 10)
    assert starts == np.random.SeedSequence([7, 0]).generate_state(10).tolist()
    assert not set(starts) & set(Run(None, 8).starts(0, 10))
    assert not set(starts) & set(Run(None, 7).starts(1, 100))


class Counted(BC):
    """Keeps, for each update, how many rows there were and what it was given."""

    def __init__(self, data):
        super().__init__()
        self.source, self.sizes, self.given = data, [], []

    def train(self, *rows):
        self.sizes.append(len(self.source))
        self.given.append(rows[1][:, 0])


@pytest.mark.parametrize("epochs, tested", [(1, [0]), (12, [0, 10, 11])])
def test_the_teachers_loop_plays_then_trains_and_tests_every_tenth_epoch(
        epochs, tested, monkeypatch, capsys):
    monkeypatch.setattr(ours, "EPISODE", 64)
    monkeypatch.setattr(ours, "UPDATES", 3)
    data = Data()
    teacher = Counted(data)
    run = Run(None, 0)
    ours.train_teacher(teacher, data, epochs, run)
    assert teacher.sizes == [64 * (epoch + 1) for epoch in range(epochs) for _ in range(3)]
    assert [(row["stage"], row["step"]) for row in run.log] == [("teacher", k) for k in tested]
    returns, _, delivered = evaluate(teacher, run.starts(0, 10))
    for row in run.log:
        assert row["return"] == pytest.approx(returns.mean(), abs=1e-3)
        assert row["delivered"] == pytest.approx(delivered.mean(), abs=1e-3)
    assert f"{returns.mean():.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("steps, tested", [(1, [0]), (2500, [0, 2000, 2499])])
def test_the_students_loop_trains_on_each_batch_and_tests_every_2000_updates(
        steps, tested, monkeypatch):
    """The data's batches, one for each update, and nothing added."""
    monkeypatch.setattr(ours, "EPISODE", 5)
    data = Data()
    data.rows = np.random.default_rng(0).random([70, 10], np.float32)
    student = Counted(data)
    run = Run(None, 0)
    ours.seed_everything(5)
    ours.train_student(student, data, steps, run)
    ours.seed_everything(5)
    assert student.sizes == [70] * steps
    assert all(torch.equal(data.get_sample()[1][:, 0], rows) for rows in student.given)
    assert [(row["stage"], row["step"]) for row in run.log] == [("student", i) for i in tested]
