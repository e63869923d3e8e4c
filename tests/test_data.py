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
from conftest import constant, filled
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
    loops = re.sub(r"range\((100|200|50000)\)", lambda n: f"range({fewer[n[1]]})", PAGE_LOOPS)
    scope = {}
    exec("from cql_pendulum import *", scope)
    exec(loops, scope)
    (epoch, teacher), (i, student) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (epoch, i) == ("0", "0") and teacher != student
    assert all(-640 < float(result) < -50 for result in (teacher, student))
    assert len(scope["data"].datas) == 128


def test_datas_is_the_pages_list_of_tuples():
    one, two = filled(Data()), filled(Data())
    two.update_data(constant(torch.tensor([0.5])))
    for k, (state, action, reward, next_state, over) in enumerate(two.datas):
        assert (type(action), type(reward), over) == (float, float, k % 200 == 199)
        row = np.float32([*state, action, reward, *next_state, False, over])
        np.testing.assert_array_equal(two.rows[k], row)
    one.datas = one.datas + two.datas[200:]
    one.datas += two.datas[:3]
    one.datas.extend([row for row in two.datas if row[2] > -1])
    rows = np.concatenate([one.rows[:200], two.rows[200:], two.rows[:3],
                           two.rows[two.rows[:, 4] > -1]])
    np.testing.assert_array_equal(one.rows, rows)
    rows[5, 8:] = 1, 1
    one.rows = rows                                             # there and back
    rows[5, 8:] = 1, 0                                          # a terminal counts for more
    np.testing.assert_array_equal(one.rows, rows)
    assert [len(found) for found in ours.episodes(one)][:3] == [6, 194, 200]
    assert sum(ours.episodes(one), []) == one.datas
    one.datas = [tuple(row) for row in two.datas]               # of the page's own update_data
    np.testing.assert_array_equal(one.rows, two.rows)
    one.datas = 64 * [tuple(two.datas[199])]
    assert not one.get_sample()[4].any()


@pytest.mark.parametrize("rows, b", [(80, 16), (64, 64)])
@pytest.mark.parametrize("as_printed", [[], ["timeout"]])
def test_sample_draws_every_row_equally_often_none_twice_and_keeps_rows_together(
        rows, b, as_printed, monkeypatch):
    monkeypatch.setattr(ours, "BATCH", b)
    ours.AS_PRINTED.update(as_printed)
    data, k = Data(), np.arange(rows)
    expected = np.random.default_rng(0).random([rows, 10], np.float32)
    expected[:, 3], expected[:, 8], expected[:, 9] = k, k % 3 == 0, k % 3 == 1
    data.rows = expected                                        # the action names its row
    if as_printed:
        expected[:, 8] += expected[:, 9]
    counts, draws = torch.zeros(rows), 500
    for _ in range(draws):
        sample = data.get_sample()
        assert [tuple(x.shape) for x in sample] == [(b, 3), (b, 1), (b, 1), (b, 3), (b, 1)]
        assert [x.dtype for x in sample] == [torch.float32] * 4 + [torch.int64]
        drawn = sample[1].flatten().long()
        assert torch.equal(torch.from_numpy(expected)[drawn][:, :9], torch.cat(sample, dim=1))
        counts[drawn.unique()] += 1
    assert counts.sum() == draws * b
    assert ((counts - draws * b / rows).abs() <= 5 * (draws * b / rows) ** 0.5).all()
    data.rows = expected[:b - 1]
    with pytest.raises(ours.UserError, match=f"a batch has {b} rows, .* has only {b - 1}"):
        data.get_sample()


def test_the_newest_rows_are_kept(monkeypatch):
    monkeypatch.setattr(ours, "CAPACITY", 3e2)
    assert filled(Data(), 2).rows[:, 3].tolist() == 100 * [0] + 200 * [0.5]


@pytest.mark.parametrize("last, n", [(0, 2), (2, 2), (None, 2), (None, 0)])
def test_random_episodes_then_the_last_ones_are_chosen(last, n):
    """Random ones are what seed_everything and an agent of uniform torques give."""
    data, expected = filled(Data(), 3), Data()
    first = data.rows[0 if last is None else 600 - 200 * last:]
    ours.seed_everything(7)
    for _ in range(n):
        expected.update_data(
            types.SimpleNamespace(get_action=lambda state: random.uniform(-2, 2)))
    ours.choose_episodes(data, types.SimpleNamespace(last=last, random=n, seed=7))
    np.testing.assert_array_equal(data.rows, np.concatenate([expected.rows, first]))


def test_frozen_data_cannot_change():
    data = filled(Data())
    free, before = copy.deepcopy(data), data.rows.tobytes()
    assert data.freeze() is data
    for frozen in (data, copy.deepcopy(data)):
        env.reset()
        with pytest.raises(RuntimeError, match="frozen"):
            frozen.update_data(constant(0))
        assert env.step_n == 0
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


@pytest.mark.parametrize("steps, gamma", [(1, 0.1), (60, 1)])
def test_what_is_delivered_by_one_step_and_without_a_discount(steps, gamma, monkeypatch):
    """A tail of fewer than 20 steps; and none where nothing finite could go on for ever."""
    monkeypatch.setattr(ours, "GAMMA", gamma)
    scaled = np.random.default_rng(steps).uniform(-1, 1, steps)
    tail = 0.1 / 0.9 * scaled[0] if gamma < 1 else 0
    assert ours.discounted(8 * scaled - 8) == pytest.approx(scaled.sum() + tail, abs=1e-9)
    assert gamma < 1 or ours.possible() == (-math.inf, math.inf)


class Drawing(SAC):
    """Every generator acts in its torques. It sees other units, and promises for these."""
    def get_action(self, state):
        noise = random.random() + np.random.random() + ours.env.unwrapped.np_random.random()
        noise += ours.env.action_space.sample().item() / 2
        return super().get_action(np.asarray(state) / [1, 1, 8]) * 0.5 + noise * 0.2

    def promise(self, state, action):
        return super().promise(np.asarray(state) / [1, 1, 8], action)


class Changed(gym.Wrapper):
    """A wrapper as the page writes it: another reward, another end, and nothing of info."""
    def __init__(self, inner, share=1, fastest=9, info=None):
        super().__init__(inner)
        self.share, self.fastest, self.info = share, fastest, info

    def step(self, action):
        state, reward, over, _ = self.env.step(action)
        return state, self.share * reward, over or abs(state[2]) > self.fastest, self.info


@pytest.mark.parametrize("last, terminated", [(5, True), (200, True), (5, False)])
def test_an_end_is_terminal_only_where_the_environment_says_so(last, terminated, monkeypatch):
    """Whatever a wrapper around makes of info."""
    steps = iter(range(1, last + 1))

    def step(action):
        ends = next(steps) == last
        return np.zeros(3), -1.0, ends and terminated, ends and not terminated, {}

    monkeypatch.setattr(env.unwrapped, "step", step)
    monkeypatch.setattr(ours, "env", Changed(env, info=None if terminated else {}))
    rows = filled(Data()).rows
    assert rows[:, 8].tolist() == [0] * (last - 1) + [terminated]
    assert rows[:, 9].tolist() == [0] * (last - 1) + [not terminated]


def test_the_pages_own_step_ends_by_the_time(monkeypatch):
    """In the place of ours, which tells the two ends apart."""
    def step(self, action):
        self.step_n += 1
        state, reward, _, _, info = self.env.step(action)
        return state, reward, self.step_n >= 200, info

    monkeypatch.setattr(ours.MyWrapper, "step", step)
    assert filled(Data()).rows[-1, 8:].tolist() == [0, 1]


def played(agent, seed, resets, monkeypatch, g=10.0, m=1.0, share=1, fastest=9, limit=100):
    """An episode in gym's own Pendulum with an edit: state, torque, reward, next state, [n, 8]."""
    world = gym.make("Pendulum-v1", disable_env_checker=True).unwrapped
    world.g, world.m = g, m
    monkeypatch.setattr(ours, "env", world)             # whose generators Drawing uses
    torch.manual_seed(seed), random.seed(seed), np.random.seed([seed, 1])
    world.action_space.seed(seed + 1)
    state, _ = world.reset(seed=seed)
    for _ in range(resets):
        state, _ = world.reset()
    rows = []
    while len(rows) < limit and abs(state[2]) <= fastest:
        torque = agent.get_action(state)
        next_state, reward, *_ = world.step([torque])
        rows.append([*state, torque, share * float(reward), *next_state])
        state = next_state
    return np.array(rows)


@pytest.mark.parametrize("edit", [
    {}, {"g": 0.0}, {"m": 2.0}, {"share": 0.5}, {"fastest": 3}, {"limit": 250}])
def test_an_edited_world_is_in_every_number(edit, monkeypatch, tmp_path):
    """Tests, returns, data, the possible, and what a dataset is checked by."""
    agent, data, file, seeds = Drawing(), Data(), tmp_path / "data.npz", np.arange(5, 7)
    with monkeypatch.context() as world:
        evaluated, recorded = ([played(agent, seed, resets, world, **edit)
                                for seed in seeds.tolist()] for resets in (0, 1))
        for attribute in {"g", "m"} & edit.keys():
            world.setattr(env.unwrapped, attribute, edit[attribute])
        wrapper = {name: edit[name] for name in {"share", "fastest"} & edit.keys()}
        world.setattr(ours, "env", Changed(env, **wrapper))
        world.setattr(ours, "EPISODE", edit.get("limit", 100))
        found = evaluate(agent, seeds)
        for k, rows in enumerate(evaluated):
            scaled = (rows[:, 4] + 8) / 8
            delivered = sum(0.99 ** t * r for t, r in enumerate(scaled))
            if "fastest" not in edit:
                delivered += 0.99 ** len(scaled) / 0.01 * scaled[-20:].mean()
            first = torch.tensor(rows[:1, :4] / [1, 1, 8, 1]).float().split([3, 1], dim=1)
            promised = min(agent.model_value1(*first).item(), agent.model_value2(*first).item())
            expected = [rows[:, 4].sum(), promised, delivered]
            assert [x[k] for x in found] == pytest.approx(expected, rel=1e-4)
        for seed, rows in zip(seeds, recorded):
            ours.seed_everything(seed)
            assert agent.test(play=False) == pytest.approx(rows[:, 4].sum())
            ours.seed_everything(seed)
            data.update_data(agent)
            np.testing.assert_allclose(data.rows[-len(rows):, :8], rows, rtol=1e-5, atol=1e-6)
        assert data.rows[:, 8].sum() == (2 if "fastest" in edit else 0)
        ours.save_dataset(file, data)
        np.testing.assert_array_equal(ours.load_dataset(file).rows, data.rows)
        least = (8 - edit.get("share", 1) * (math.pi ** 2 + 6.404)) / 8 * 100
        assert ours.possible() == pytest.approx((least, 100))
    if not edit or "limit" in edit:
        ours.load_dataset(file)
    else:
        with pytest.raises(ours.UserError, match="are not env's"):
            ours.load_dataset(file)


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
        assert row == pytest.approx({"stage": "teacher", "step": k, "return": returns.mean(),
                                     "promised": math.nan, "delivered": delivered.mean()},
                                    nan_ok=True)
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
