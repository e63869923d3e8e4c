"""The environment, the dataset, what an episode returns and pays, and the loops."""
import copy
import math
import random
import re
import types

import gym
import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import Constant, filled, pendulum
from cql_pendulum import SAC, Data, Run, env, evaluate

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
    exec(loops, scope)
    (epoch, teacher), (i, student) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (epoch, i) == ("0", "0") and teacher != student
    assert all(-640 < float(result) < -50 for result in (teacher, student))
    assert len(scope["data"].datas) == 128


@pytest.mark.parametrize("torque", [np.array([0.5]), torch.tensor([0.5]), np.float32(0.5)])
def test_a_torque_may_be_any_single_number(torque):
    data = Data()
    data.update_data(Constant(torque))
    rewards, next_states = pendulum(data.rows[:, :3], np.full(200, 0.5))
    assert (data.rows[:, 3] == 0.5).all()
    np.testing.assert_allclose(data.rows[:, 4:8], np.c_[rewards, next_states], atol=1e-4)


@pytest.mark.parametrize("last, terminated", [(5, True), (200, True), (5, False), (200, False)])
def test_an_end_is_terminal_only_where_the_environment_says_so(last, terminated, monkeypatch):
    """Whatever a wrapper around makes of info."""
    steps = iter(range(1, last + 1))

    def step(action):
        ends = next(steps) == last
        return np.zeros(3), -1.0, ends and terminated, ends and not terminated, {}

    monkeypatch.setattr(env.unwrapped, "step", step)
    monkeypatch.setattr(ours, "env", Changed(env, info=None if terminated else {}))
    data = filled(Data())
    assert data.rows[:, 8].tolist() == [0] * (last - 1) + [terminated]
    assert data.rows[:, 9].tolist() == [0] * (last - 1) + [not terminated]
    assert [row[4] for row in data.datas] == [False] * (last - 1) + [True]      # the page's over


def test_datas_is_the_pages_list_of_tuples():
    one, two = filled(Data()), filled(Data(), 2)
    for k, (state, action, reward, next_state, over) in enumerate(two.datas):
        assert (type(action), type(reward), over) == (float, float, k % 200 == 199)
        np.testing.assert_array_equal(
            np.float32([*state, action, reward, *next_state]), two.rows[k, :8])
    np.testing.assert_array_equal(two.rows[1:200, :3], two.rows[:199, 5:8])
    one.datas = one.datas + two.datas[200:]
    one.datas += two.datas[:3]
    one.datas.extend([row for row in two.datas if row[2] > -1])
    expected = [one.rows[:200], two.rows[200:], two.rows[:3], two.rows[two.rows[:, 4] > -1]]
    rows = one.rows
    np.testing.assert_array_equal(rows, np.concatenate(expected))
    rows = rows.copy()
    rows[5, 8:] = 1, 0
    one.rows = rows                                             # there and back
    np.testing.assert_array_equal(one.rows, rows)
    assert [len(found) for found in ours.episodes(one)][:3] == [6, 194, 200]
    assert sum(ours.episodes(one), []) == one.datas


@pytest.mark.parametrize("rows, b", [(80, 16), (64, 64)])
@pytest.mark.parametrize("timeout", [[], ["timeout"]])
def test_sample_draws_every_row_equally_often_none_twice_and_keeps_rows_together(
        rows, b, timeout, monkeypatch):
    monkeypatch.setattr(ours, "BATCH", b)
    ours.AS_PRINTED.update(timeout)
    data, k = Data(), np.arange(rows)
    expected = np.random.default_rng(0).random([rows, 10], np.float32)
    expected[:, 3], expected[:, 8], expected[:, 9] = k, k % 3 == 0, k % 3 == 1
    data.rows = expected                                        # the action names its row
    if timeout:
        expected[:, 8] += expected[:, 9]
    counts, draws = torch.zeros(rows), 500
    for _ in range(draws):
        sample = data.get_sample()
        assert [tuple(x.shape) for x in sample] == [(b, 3), (b, 1), (b, 1), (b, 3), (b, 1)]
        assert [x.dtype for x in sample] == [torch.float32] * 4 + [torch.int64]
        drawn = sample[1].flatten().long()
        assert len(drawn.unique()) == b
        assert torch.equal(torch.from_numpy(expected)[drawn][:, :9], torch.cat(sample, dim=1))
        counts[drawn] += 1
    assert ((counts - draws * b / rows).abs() <= 5 * (draws * b / rows) ** 0.5).all()
    data.rows = expected[:b - 1]
    with pytest.raises(ours.UserError, match=f"a batch has {b} rows, but the data has only {b - 1}"):
        data.get_sample()


def test_the_newest_rows_are_kept(monkeypatch):
    monkeypatch.setattr(ours, "CAPACITY", 3e2)
    assert filled(Data(), 2).rows[:, 3].tolist() == 100 * [0] + 200 * [0.5]


@pytest.mark.parametrize("last, n", [(0, 2), (2, 0), (2, 2), (None, 2), (None, 0)])
def test_random_episodes_then_the_last_ones_are_chosen(last, n):
    """Random ones are what seed_everything and an agent of uniform torques give."""
    data = filled(Data(), 3)
    first = data.rows[0 if last is None else 600 - 200 * last:]
    expected = Data()
    ours.seed_everything(7)
    uniform = types.SimpleNamespace(get_action=lambda state: random.uniform(-2, 2))
    for _ in range(n):
        expected.update_data(uniform)
    ours.choose_episodes(data, types.SimpleNamespace(last=last, random=n, seed=7))
    np.testing.assert_array_equal(data.rows, np.concatenate([expected.rows, first]))


def test_frozen_data_cannot_change():
    data = filled(Data())
    free, before = copy.deepcopy(data), data.rows.tobytes()
    assert data.freeze() is data
    for frozen in (data, copy.deepcopy(data)):
        env.reset()
        with pytest.raises(RuntimeError, match="frozen"):
            frozen.update_data(Constant(0))
        assert env.step_n == 0                                  # no step was played
        with pytest.raises(AttributeError):
            frozen.datas.append(frozen.datas[0])
        with pytest.raises(TypeError):
            frozen.datas[0][0][0] = 0.0
        with pytest.raises(ValueError, match="read-only"):
            frozen.rows[0] = 0
        for x in frozen.get_sample():
            x.zero_()
        assert frozen.rows.tobytes() == before
    assert len(filled(free).datas) == 400


@pytest.mark.parametrize("steps, gamma, terminal", [
    (1, 0.1, False), (20, 0.7, False), (60, 0.99, False), (60, 0.99, True), (60, 1, False)])
def test_discounted_is_the_sum_and_a_tail(steps, gamma, terminal, monkeypatch):
    """Without a discount, and behind a terminal state, nothing goes on."""
    rewards = np.random.default_rng(steps).uniform(-17, 0, steps).tolist()
    monkeypatch.setattr(ours, "GAMMA", gamma)
    scaled = [(reward + 8) / 8 for reward in rewards]
    expected = sum(gamma ** t * r for t, r in enumerate(scaled))
    if gamma < 1 and not terminal:
        expected += gamma ** steps / (1 - gamma) * sum(scaled[-20:]) / min(steps, 20)
    assert ours.discounted(rewards, terminal) == pytest.approx(expected, abs=1e-9)


class Drawing(SAC):
    """Chance of one's own: every generator acts in its torques."""
    def get_action(self, state):
        noise = random.random() + np.random.random() + ours.env.unwrapped.np_random.random()
        noise += ours.env.action_space.sample().item() / 2
        return super().get_action(state) * 0.7 + noise * 0.2


class Normalised(SAC):
    """Sees other units, and says so where it is asked for a promise."""
    def get_action(self, state):
        return super().get_action(np.asarray(state) / [1, 1, 8])

    def promise(self, state, action):
        return super().promise(np.asarray(state) / [1, 1, 8], action)


@pytest.mark.parametrize("make, steps", [(SAC, 200), (Drawing, 30), (Normalised, 30)])
def test_an_evaluation_is_gyms_own_episodes_with_the_agents_torques(make, steps, monkeypatch):
    """In gym's Pendulum-v1, with the meter's sum written out."""
    monkeypatch.setattr(ours, "EPISODE", steps)
    agent, seeds = make(), np.array([11, 12, 13])
    found = evaluate(agent, seeds)
    world = gym.make("Pendulum-v1", disable_env_checker=True).unwrapped
    monkeypatch.setattr(ours, "env", world)         # whose generators Drawing uses; it has no limit
    for k, seed in enumerate(seeds.tolist()):
        torch.manual_seed(seed), random.seed(seed), np.random.seed([seed, 1])
        world.action_space.seed(seed + 1)
        state, _ = world.reset(seed=seed)
        unit = torch.tensor([1, 1, 8 if make is Normalised else 1])
        start, torques, scaled, returned = torch.tensor(state)[None] / unit, [], [], 0
        for _ in range(steps):
            torques.append(agent.get_action(state))
            state, reward, *_ = world.step([torques[-1]])
            returned += reward
            scaled.append((reward + 8) / 8)
        first = start, torch.tensor([[torques[0]]])
        tail = 0.99 ** steps / 0.01 * sum(scaled[-20:]) / 20
        delivered = sum(0.99 ** t * r for t, r in enumerate(scaled)) + tail
        promised = min(agent.model_value1(*first).item(), agent.model_value2(*first).item())
        assert [x[k] for x in found] == pytest.approx([returned, promised, delivered], rel=1e-5)


def drawn():
    """Numbers of every generator; the last are a start of env."""
    return [torch.rand(1).item(), random.random(), np.random.random(),
            env.action_space.sample().item(), *env.reset().tolist()]


@pytest.mark.parametrize("measure", [
    lambda agent, rows: [x.tolist() for x in evaluate(agent, [1, 2])],
    lambda agent, rows: ours.possible(), lambda agent, rows: ours.check_rows("file", rows)])
def test_a_measure_is_the_same_each_time_and_leaves_all_chance_as_it_was(measure):
    agent, rows = Drawing(), filled(Data()).rows
    results, numbers = [], []
    for seed in (5, np.int64(6)):
        numbers.append([*ours.seed_everything(seed).tolist(), *drawn()])
        start = ours.seed_everything(seed).tolist()
        results.append(measure(agent, rows))
        assert [*start, *drawn()] == numbers[-1]
    assert results[0] == results[1]
    assert all(x != y for x, y in zip(*numbers))                # another seed, other numbers


class Changed(gym.Wrapper):
    """A wrapper as the page writes it: another reward, another end, and nothing of info."""
    def __init__(self, inner, share=1, fastest=9, info=None):
        super().__init__(inner)
        self.share, self.fastest, self.info = share, fastest, info

    def step(self, action):
        state, reward, over, _ = self.env.step(action)
        return state, self.share * reward, over or abs(state[2]) > self.fastest, self.info


class Pushing(SAC):
    """An own way to act: along the speed, with half of the torque."""
    def get_action(self, state):
        return 1.0 if state[2] > 0 else -1.0


def edited_rewards(state, g=10.0, m=1.0, share=1, fastest=9, limit=200):
    """Gym's own Pendulum with an edit, pushed by Pushing: the rewards from a state on."""
    world = gym.make("Pendulum-v1", disable_env_checker=True).unwrapped
    world.reset()
    world.g, world.m = g, m
    world.state = np.array([math.atan2(state[1], state[0]), state[2]])
    rewards = []
    while len(rewards) < limit and abs(state[2]) <= fastest:
        state, reward, *_ = world.step([Pushing.get_action(None, state)])
        rewards.append(share * float(reward))
    return rewards


@pytest.mark.parametrize("edit", [
    {}, {"g": 0.0}, {"m": 2.0}, {"share": 0.5}, {"fastest": 3}, {"limit": 400}])
def test_an_edited_world_is_in_every_number(edit, monkeypatch, tmp_path):
    """Tests, data, delivery, the possible, and what a dataset is checked by."""
    agent, data, file = Pushing(), Data(), tmp_path / "data.npz"
    with monkeypatch.context() as world:
        for attribute in {"g", "m"} & edit.keys():
            world.setattr(env.unwrapped, attribute, edit[attribute])
        wrapper = {name: edit[name] for name in {"share", "fastest"} & edit.keys()}
        world.setattr(ours, "env", Changed(env, **wrapper))
        world.setattr(ours, "EPISODE", edit.get("limit", 200))
        for seed in range(5, 8):
            rewards = edited_rewards(ours.seed_everything(seed), **edit)
            returned, _, delivered = evaluate(agent, [seed])
            expected = sum(rewards), ours.discounted(rewards, "fastest" in edit)
            assert (returned[0], delivered[0]) == pytest.approx(expected, rel=1e-4)
            start = env.reset()
            ours.seed_everything(seed)
            assert agent.test(play=False) == pytest.approx(
                sum(edited_rewards(start, **edit)), rel=1e-4)
        while len(data.datas) < 100:
            n = len(data.datas)
            data.update_data(agent)
            expected = edited_rewards(data.rows[n, :3], **edit)
            np.testing.assert_allclose(data.rows[n:, 4], expected, rtol=1e-3, atol=1e-4)
        ours.save_dataset(file, data)
        np.testing.assert_array_equal(ours.load_dataset(file).rows, data.rows)
        assert ours.possible() == pytest.approx(
            ((8 - edit.get("share", 1) * (math.pi ** 2 + 6.404)) / 8 * 100, 100))
    if not edit or "limit" in edit:
        ours.load_dataset(file)
    else:
        with pytest.raises(ours.UserError, match="are not env's"):
            ours.load_dataset(file)


def test_without_a_discount_all_is_possible(monkeypatch):
    monkeypatch.setattr(ours, "GAMMA", 1)
    assert ours.possible() == (-math.inf, math.inf)


def test_a_weaker_motor_still_reads_what_env_gave(tmp_path, monkeypatch):
    ours.save_dataset(tmp_path / "data.npz", filled(Data(), 5))         # up to 2 N m
    monkeypatch.setattr(ours, "TORQUE", 1)
    assert len(ours.load_dataset(tmp_path / "data.npz").datas) == 1000
    torques = [abs(SAC().get_action([1, 0, 0])) for _ in range(50)]
    assert 0.8 < max(torques) <= 1


class Counted:
    """An agent with nothing but the page's two methods. Keeps what each update was given."""
    def __init__(self, data):
        self.source, self.sizes, self.given = data, [], []

    def get_action(self, state):
        return 0.5

    def train(self, *rows):
        self.sizes.append(len(self.source.datas))
        self.given.append(rows[1][:, 0])


@pytest.mark.parametrize("epochs, steps, sizes, tested", [
    (1, 30, [90], [0]), (12, 64, [64 * k for k in range(1, 13)], [0, 10, 11])])
def test_the_teachers_loop_plays_then_trains_and_tests_every_tenth_epoch(
        epochs, steps, sizes, tested, monkeypatch, capsys):
    """At first, episodes of 30 steps, until there are 64 rows."""
    monkeypatch.setattr(ours, "EPISODE", steps)
    monkeypatch.setattr(ours, "UPDATES", 3)
    data, run = Data(), Run(None, 0)
    teacher = Counted(data)
    ours.train_teacher(teacher, data, epochs, run)
    assert teacher.sizes == np.repeat(sizes, 3).tolist()
    returns, _, delivered = evaluate(teacher, run.starts(0, 10))
    for row, k in zip(run.log, tested, strict=True):
        expected = {"stage": "teacher", "step": k, "return": returns.mean(),
                    "promised": math.nan, "delivered": delivered.mean()}
        assert row == pytest.approx(expected, nan_ok=True)
    assert f"{returns.mean():.1f}       nan  {delivered.mean():9.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("steps, tested", [(1, [0]), (2500, [0, 2000, 2499])])
def test_the_students_loop_trains_on_each_batch_and_tests_every_2000_updates(
        steps, tested, monkeypatch):
    """The data's batches, one for each update, and nothing added."""
    monkeypatch.setattr(ours, "EPISODE", 5)
    data, run = Data(), Run(None, 0)
    data.rows = np.random.default_rng(0).random([70, 10], np.float32)
    student = Counted(data)
    ours.seed_everything(5)
    ours.train_student(student, data, steps, run)
    ours.seed_everything(5)
    assert student.sizes == [70] * steps
    assert all(torch.equal(data.get_sample()[1][:, 0], rows) for rows in student.given)
    assert [(row["stage"], row["step"]) for row in run.log] == [("student", i) for i in tested]
