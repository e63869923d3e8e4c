"""The environment, the dataset, what an episode returns and pays, and the loops."""
import copy
import math
import random
import re

import gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cql_pendulum as ours
from conftest import (
    CRITICS, Constant, begun, choose, filled, flat, numbers, pendulum, same, wrapper_at)
from cql_pendulum import BC, CQL, SAC, Data, MyWrapper, Run, env, evaluate

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


def test_the_pages_loops_run_unchanged(capsys):
    """The page's text with its three counts cut down: 100 epochs, 200 updates, 50,000 updates."""
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
    assert all(-2000 < float(result) < -50 for result in (teacher, student))
    assert len(scope["data"].datas) == 400


# ---- the environment ----

def test_a_seed_fixes_all_chance_and_every_start_is_another():
    def drawn(seed):
        ours.seed_everything(seed)
        return [torch.rand(1).item(), random.random(), *env.reset(), *env.reset()]

    assert drawn(3) == drawn(3)
    assert all(x != y for x, y in zip(drawn(3), drawn(4)))
    starts = np.array([env.reset() for _ in range(200)])
    assert len(np.unique(starts, axis=0)) == 200                # any angle, up to 1 rad/s
    for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
        assert 20 < (starts[:, :2] * signs > 0).all(axis=1).sum() < 80
    assert abs(starts[:, 2]).max() <= 1 < 5 * abs(starts[:, 2]).mean()


@pytest.mark.parametrize("steps", [50, 230])
def test_an_episode_is_as_long_as_the_constant_says(steps, monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", steps)
    wrapper = MyWrapper()
    wrapper.reset()
    ends = [wrapper.step([0.0])[2] for _ in range(steps)]
    assert ends == [False] * (steps - 1) + [True]


class Ends(gym.Env):
    """An environment in place of gym's that ends an episode by itself at a step."""
    observation_space = gym.spaces.Box(-8, 8, [3])
    action_space = gym.spaces.Box(-2, 2, [1])

    def __init__(self, last, terminated):
        self.last, self.terminated = last, terminated

    def reset(self, seed=None):
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        ends = self.t == self.last
        state = np.full(3, self.t, np.float32)
        return state, -1.0, ends and self.terminated, ends and not self.terminated, {}


@pytest.mark.parametrize("last, terminated", [(5, True), (200, True), (5, False)])
def test_an_end_is_terminal_only_where_the_environment_says_so(last, terminated, monkeypatch):
    monkeypatch.setattr(env, "env", Ends(last, terminated))
    data = filled(Data())
    assert data.rows[:, 8].tolist() == [0] * (last - 1) + [terminated]
    assert data.rows[:, 9].tolist() == [0] * (last - 1) + [not terminated]
    assert data.datas[-1][4] is terminated


def test_show_draws_the_pendulum_as_it_is_now(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    shown = []
    monkeypatch.setattr(pyplot, "pause",
                        lambda seconds: shown.extend(pyplot.gca().images[0].get_array()[None]))
    wrapper, _ = wrapper_at(1)
    wrapper.show()
    np.testing.assert_array_equal(shown[0], wrapper.env.render())
    for _ in range(20):
        wrapper.step([2.0])
    wrapper.show()
    assert (shown[0] != shown[1]).any()
    assert len(pyplot.gca().images) <= 1            # no heap of old pictures, slower each time
    pyplot.close()


# ---- the data ----

def test_an_episode_is_the_agents_torques_and_what_pendulum_gave_for_them():
    class Asked:
        states = []

        def get_action(self, state):
            self.states.append(state)
            return 0.01 * len(self.states)

    agent, data = Asked(), Data()
    data.update_data(agent)
    assert data.rows.shape == (200, 10) and data.rows.dtype == np.float32 and len(data) == 200
    np.testing.assert_array_equal(data.rows[:, :3], agent.states)
    np.testing.assert_array_equal(data.rows[:-1, 5:8], data.rows[1:, :3])
    np.testing.assert_allclose(data.rows[:, 3], 0.01 * np.arange(1, 201), rtol=1e-6)
    reward, next_state = pendulum(data.rows[:, :3].astype(float), data.rows[:, 3].astype(float))
    np.testing.assert_allclose(data.rows[:, 4], reward, atol=1e-4)
    np.testing.assert_allclose(data.rows[:, 5:8], next_state, atol=1e-4)
    assert data.rows[:, 8:].tolist() == [[0, 0]] * 199 + [[0, 1]]


def test_datas_has_the_pages_rows_and_changes_nothing(printed):
    data = filled(Data(), 2)
    before = data.rows.copy()
    assert len(data.datas) == 400
    for k, row in enumerate(data.datas):
        state, action, reward, next_state, over = row
        assert (type(action), type(reward), over) == (float, float, False)
        np.testing.assert_array_equal([*state, action, reward, *next_state], data.rows[k, :8])
    with pytest.raises(AttributeError):
        data.datas.pop(0)
    with pytest.raises(AttributeError):
        data.datas.append(data.datas[0])
    with pytest.raises(AttributeError):
        data.datas = []
    data.datas[0][0][:] = 0
    np.testing.assert_array_equal(data.rows, before)
    ends = [row[4] for row in filled(printed(Data, ["timeout"])).datas]
    assert ends == [False] * 199 + [True]


@pytest.mark.parametrize("rows, b", [(200, None), (80, 16), (64, None), (5000, None)])
def test_sample_draws_every_row_equally_often_none_twice_and_keeps_rows_together(
        rows, b, monkeypatch):
    if b:
        monkeypatch.setattr(ours, "BATCH", b)
    b = b or 64
    data = Data()
    data.rows = np.random.default_rng(0).random([rows, 10], np.float32)
    data.rows[:, 8] = np.arange(rows) % 3 == 0
    data.rows[:, 3] = np.arange(rows)                           # the action names its row
    counts, draws = torch.zeros(rows), 1000
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


@pytest.mark.parametrize("names, at_the_limit", [([], 0), (["timeout"], 64)])
def test_the_time_limit_is_terminal_only_as_printed(names, at_the_limit, printed):
    data = filled(printed(Data, names))
    data.rows = np.repeat(data.rows[-1:], 64, axis=0)           # the episode's last step, 64 times
    assert data.get_sample()[4].sum() == at_the_limit
    data.rows[:, 8:] = [1, 0]
    assert data.get_sample()[4].sum() == 64                     # a terminal state is, either way


@pytest.mark.parametrize("most", [None, 300])
def test_the_newest_rows_are_kept(most, monkeypatch):
    if most:
        monkeypatch.setattr(ours, "CAPACITY", most)
    most, data = most or 100_000, Data()
    data.rows = np.zeros([most - 100, 10], np.float32)
    data.rows[:, 3] = np.arange(most - 100) + 10
    data.update_data(Constant(0.5))
    assert data.rows[:, 3].tolist() == [*range(110, most - 90), *[0.5] * 200]


def test_episodes_end_at_the_time_limit_and_at_terminal_states():
    data = filled(Data(), 2)
    assert [len(rows) for rows in ours.episodes(data)] == [200, 200]
    data.rows[49, 8] = 1
    data.rows = data.rows[:220]                                 # the last episode has no end
    assert [len(rows) for rows in ours.episodes(data)] == [50, 150, 20]
    np.testing.assert_array_equal(np.concatenate(ours.episodes(data)), data.rows)


@pytest.mark.parametrize("last", [0, 1, 2, 3, None])
@pytest.mark.parametrize("n", [0, 2])
def test_random_episodes_then_the_last_ones_are_chosen(last, n, printed):
    """Random ones are what seed_everything and an agent of uniform torques give."""
    class Uniform:
        def get_action(self, state):
            return random.uniform(-2, 2)

    data = filled(printed(Data, ["timeout"]), 3).freeze()
    before = data.rows.tobytes()
    chosen = choose(data, last, n, seed=7)
    ours.seed_everything(7)
    drawn = Data()
    for _ in range(n):
        drawn.update_data(Uniform())
    first = 0 if last is None else 600 - 200 * last
    np.testing.assert_array_equal(chosen.rows, np.concatenate([drawn.rows, data.rows[first:]]))
    assert chosen.rows.dtype == np.float32 and not chosen.frozen
    assert len(chosen) < 200 or chosen.datas[-1][4] is True     # the errata are the data's
    assert data.rows.tobytes() == before
    with pytest.raises(ours.UserError, match="--last 4: the data has 3 episodes"):
        choose(data, 4)


def test_frozen_data_cannot_change():
    data = filled(Data(), 2)
    free, rows, before = copy.deepcopy(data), data.rows, data.rows.tobytes()
    assert data.freeze() is data and data.frozen and not free.frozen
    start = env.reset()
    for frozen in (data, copy.deepcopy(data)):
        with pytest.raises(RuntimeError, match="frozen"):
            frozen.update_data(Constant(0))
    angle, speed = env.unwrapped.state                          # no step was played
    np.testing.assert_allclose([math.cos(angle), math.sin(angle), speed], start, rtol=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        data.rows[0] = 0
    rows[:] = 0                                                 # the old array is not the dataset's
    assert data.rows.tobytes() == before
    free.update_data(Constant(0))
    assert len(free) == 600


@pytest.mark.parametrize("make", [CQL, SAC, BC])
def test_offline_training_leaves_every_byte_of_the_data(make):
    data = filled(Data(), 1).freeze()
    before = data.rows.tobytes()
    student = make()
    for _ in range(5):
        sample = data.get_sample()
        student.train(*sample)
        for x in sample:
            x.zero_()                           # even a caller that writes into its batch
    assert data.rows.tobytes() == before


# ---- what an episode returns, promises and delivers ----

def test_a_test_is_one_episode_of_the_agent_from_a_random_start(monkeypatch):
    """Played again with the same seeds; it is shown step by step where that is asked for."""
    agent, shown = SAC(), []
    monkeypatch.setattr(ours, "EPISODE", 50)
    monkeypatch.setattr(env, "show", lambda: shown.append(env.step_n), raising=False)
    ours.seed_everything(3)
    returns = [agent.test(play=False)]
    assert shown == []
    returns.append(agent.test(play=True))
    assert shown == [*range(1, 51)]
    ours.seed_everything(3)
    for expected in returns:
        state, total, over = env.reset(), 0.0, False
        while not over:
            state, reward, over, _ = env.step([agent.get_action(state)])
            total += reward
        assert type(expected) is float and expected == pytest.approx(total)
    assert returns[0] != returns[1]


@given(steps=st.integers(1, 60), gamma=st.floats(0.1, 0.99), scale=st.integers(1, 16))
def test_discounted_is_the_sum_and_a_tail(steps, gamma, scale):
    rewards = np.random.default_rng(steps).uniform(-17, 0, [steps, 2])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ours, "GAMMA", gamma)
        monkeypatch.setattr(ours, "SCALE", scale)
        found = ours.discounted(rewards)
    for k in range(2):
        scaled = [(row[k] + scale) / scale for row in rewards]
        end = scaled[-20:]
        tail = gamma ** len(scaled) / (1 - gamma) * sum(end) / len(end)
        expected = sum(gamma ** t * r for t, r in enumerate(scaled)) + tail
        assert found[k] == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
def silent():
    """An agent whose policy is its mean: no noise."""
    agent = SAC()
    agent.model_action.fc_std[0].bias.fill_(-40)
    agent.model_action.fc_std[0].weight.zero_()
    return agent


@pytest.mark.parametrize("steps", [30, 200])
def test_promise_and_delivery_by_hand(steps, monkeypatch):
    """One agent's episodes played again one by one, and the meter's sum written out."""
    monkeypatch.setattr(ours, "EPISODE", steps)
    agent, seeds = silent(), [11, 12, 13, 14]
    found = evaluate(agent, seeds)
    assert [x.shape for x in found] == [(4,)] * 3
    for k, seed in enumerate(seeds):
        wrapper, state = wrapper_at(seed)
        rewards, done = [], False
        first = torch.tensor(state)[None], torch.tensor([[agent.get_action(state)]])
        while not done:
            state, reward, done, _ = wrapper.step([agent.get_action(state)])
            rewards.append(float(reward))
        scaled = [(reward + 8) / 8 for reward in rewards]
        tail = 0.99 ** steps / 0.01 * sum(scaled[-20:]) / 20
        delivered = sum(0.99 ** t * r for t, r in enumerate(scaled)) + tail
        promised = min(agent.model_value1(*first).item(), agent.model_value2(*first).item())
        expected = [sum(rewards), promised, delivered]
        assert [x[k] for x in found] == pytest.approx(expected, abs=1e-2, rel=1e-5)
    assert len(set(found[0])) == 4


def test_a_test_has_the_policys_noise_the_same_every_time_and_leaves_training_alone():
    """Whatever the state of all chance is before: an evaluation puts it back."""
    agent, results, after = SAC(), [], []
    for seed in (5, 5, 6):
        ours.seed_everything(seed)
        results.append(evaluate(agent, [1, 2]))
        after.append([*torch.rand(2).tolist(), random.random(), np.random.random(),
                      *env.reset().tolist()])
        ours.seed_everything(seed)
        without = [*torch.rand(2).tolist(), random.random(), after[-1][3], *env.reset().tolist()]
        assert after[-1] == without
    assert same([x.tolist() for x in results[0]], [x.tolist() for x in results[2]])
    other = evaluate(agent, [4, 5])
    assert all((once != again).all() for once, again in zip(results[0], other))
    quiet = silent()
    for name in ("model_value1", "model_value2"):
        getattr(quiet, name).load_state_dict(getattr(agent, name).state_dict())
    quiet.model_action.fc_state.load_state_dict(agent.model_action.fc_state.state_dict())
    quiet.model_action.fc_mu.load_state_dict(agent.model_action.fc_mu.state_dict())
    assert (abs(evaluate(quiet, [1, 2])[0] - results[0][0]) > 1).all()


def test_a_runs_starts_are_its_seeds_and_its_purposes():
    starts = Run(None, 7).starts(0, 10)
    assert starts == np.random.SeedSequence([7, 0]).generate_state(10).tolist()
    assert not set(starts) & set(Run(None, 8).starts(0, 10))
    assert not set(starts) & set(Run(None, 7).starts(1, 100))


# ---- the two loops ----

class Counted(BC):
    """Keeps, for each update, how many rows there were and what it was given."""

    def __init__(self, data):
        super().__init__()
        self.source, self.sizes, self.given = data, [], []

    def train(self, *rows):
        self.sizes.append(len(self.source))
        self.given.append(rows[1][:, 0])


@pytest.mark.parametrize("epochs, tested", [(1, [0]), (11, [0, 10]), (12, [0, 10, 11])])
def test_the_teachers_loop_plays_then_trains_and_tests_every_tenth_epoch(
        epochs, tested, monkeypatch, capsys):
    monkeypatch.setattr(ours, "EPISODE", 64)
    monkeypatch.setattr(ours, "UPDATES", 3)
    data = Data()
    teacher = Counted(data)
    run = begun("teacher", teacher, data)
    ours.train_teacher(teacher, data, epochs, run)
    assert teacher.sizes == [64 * (epoch + 1) for epoch in range(epochs) for _ in range(3)]
    assert [(row["stage"], row["step"]) for row in run.log] == [("teacher", k) for k in tested]
    returns, _, delivered = evaluate(teacher, run.starts(0, 10))
    for row in run.log:
        assert row["return"] == pytest.approx(returns.mean())
        assert row["delivered"] == pytest.approx(delivered.mean())
    assert f"{returns.mean():.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("steps, tested", [(1, [0]), (2500, [0, 2000, 2499]), (2001, [0, 2000])])
def test_the_students_loop_trains_on_each_batch_and_tests_every_2000_updates(
        steps, tested, monkeypatch):
    """The data's batches, one for each update, and nothing added."""
    monkeypatch.setattr(ours, "EPISODE", 5)
    data = Data()
    data.rows = np.random.default_rng(0).random([70, 10], np.float32)
    student = Counted(data)
    run = begun("student", student, data)
    ours.seed_everything(5)
    ours.train_student(student, data, steps, run)
    ours.seed_everything(5)
    assert student.sizes == [70] * steps
    assert all(torch.equal(data.get_sample()[1][:, 0], rows) for rows in student.given)
    assert [(row["stage"], row["step"]) for row in run.log] == [("student", i) for i in tested]


def test_the_loops_train_real_agents(monkeypatch):
    """And their tests are of the agent as it is then."""
    monkeypatch.setattr(ours, "UPDATES", 2)
    data, teacher, student = Data(), SAC(), CQL()
    for agent, train, stage in ((teacher, ours.train_teacher, "teacher"),
                                (student, ours.train_student, "student")):
        before = numbers(agent)
        run = begun(stage, agent, data)
        train(agent, data, 2, run)
        after = numbers(agent)
        assert not any(same(before[name], after[name]) for name in ("model_action", *CRITICS))
        assert [row["step"] for row in run.log] == [0, 1]
        assert run.log[1]["promised"] == pytest.approx(
            evaluate(agent, run.starts(0, 10))[1].mean())
        assert run.log[0]["promised"] != run.log[1]["promised"]
    assert len(data) == 400
