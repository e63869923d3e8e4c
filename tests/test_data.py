"""The environment, the dataset, what an episode returns and pays, and the page's own loops."""
import copy
import math
import random
import re
import types

import gym
import numpy as np
import pytest
import torch

import cql_pendulum
from cql_pendulum import (
    BC, CQL, SAC, Data, MyWrapper, Run, UserError, choose_episodes, deliver, discounted, env,
    episodes, evaluate, load_dataset, pendulum, save_dataset, seed_everything, train_student,
    train_teacher)

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


class Constant:
    """An agent that always applies the same torque."""

    def __init__(self, torque):
        self.torque = torque

    def get_action(self, state):
        return self.torque


def filled(episodes=1, **options):
    data = Data(**options)
    for k in range(episodes):
        data.update_data(Constant(k / 2))
    return data


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


def test_wrapper_gives_the_pages_four_values_and_ends_after_200_steps():
    wrapper = MyWrapper()
    state = wrapper.reset(seed=5)
    assert state.shape == (3,) and state.dtype == np.float32
    np.testing.assert_array_equal(state, wrapper.reset(seed=5))
    for k in range(200):
        before = state
        state, reward, done, info = wrapper.step([1.5])
        assert done == info["timeout"] == (k == 199)
        angle = np.arctan2(before[1], before[0])
        cost = angle ** 2 + 0.1 * before[2] ** 2 + 0.001 * 1.5 ** 2
        assert reward == pytest.approx(-cost, abs=1e-4)
    wrapper.reset()
    assert wrapper.step([0.0])[2] is False


def test_a_seed_fixes_this_start_and_all_later_ones():
    wrapper, other = MyWrapper(), MyWrapper()
    starts = [wrapper.reset(seed=5), wrapper.reset(), wrapper.reset()]
    np.testing.assert_array_equal(starts, [other.reset(seed=5), other.reset(), other.reset()])
    assert len({tuple(start) for start in starts}) == 3
    assert not np.array_equal(wrapper.reset(seed=6), starts[0])


@pytest.mark.parametrize("steps", [50, 230])
def test_an_episode_is_as_long_as_the_constant_says(steps, monkeypatch):
    monkeypatch.setattr(cql_pendulum, "EPISODE", steps)
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
    """Another environment below the wrapper: it ends at a step, terminally or by its own limit."""
    monkeypatch.setattr(env, "env", Ends(last, terminated))
    data = filled(1)
    assert len(data) == last
    assert data.rows[:, 8].tolist() == [0] * (last - 1) + [terminated]
    assert data.rows[:, 9].tolist() == [0] * (last - 1) + [not terminated]
    assert data.datas[-1][4] is terminated


def test_show_draws_the_pendulum_as_it_is_now(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    shown = []
    monkeypatch.setattr(pyplot, "pause",
                        lambda seconds: shown.extend(pyplot.gca().images[0].get_array()[None]))
    wrapper = MyWrapper()
    wrapper.reset(seed=1)
    wrapper.show()
    np.testing.assert_array_equal(shown[0], wrapper.env.render())
    for _ in range(20):
        wrapper.step([2.0])
    wrapper.show()
    assert (shown[0] != shown[1]).any()
    assert not pyplot.gca().images                  # no heap of old pictures, slower each time
    pyplot.close()


# ---- the data ----

def test_every_episode_starts_somewhere_else(monkeypatch):
    """Pendulum starts at any angle, at up to 1 rad/s: 200 starts in all four quadrants."""
    monkeypatch.setattr(cql_pendulum, "EPISODE", 2)
    data = filled(200)
    starts = data.rows[::2, :3]
    assert len(np.unique(starts, axis=0)) == 200
    for x_sign in (-1, 1):
        for y_sign in (-1, 1):
            assert 20 < ((starts[:, :2] * [x_sign, y_sign]) > 0).all(axis=1).sum() < 80
    assert abs(starts[:, 2]).max() <= 1 < 5 * abs(starts[:, 2]).mean()


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
    assert data.rows[:, 8].tolist() == [0] * 200
    assert data.rows[:, 9].tolist() == [0] * 199 + [1]


def test_datas_has_the_pages_rows():
    data = filled(1)
    assert isinstance(data.datas, tuple) and len(data.datas) == 200
    state, action, reward, next_state, over = data.datas[-1]
    assert state.shape == next_state.shape == (3,)
    assert (action, over) == (0.0, False) and reward < 0
    assert (type(action), type(reward), type(over)) == (float, float, bool)
    np.testing.assert_array_equal(data.datas[0][3], data.datas[1][0])
    for k, row in enumerate(data.datas):
        np.testing.assert_array_equal(np.hstack(row[:4]).astype(np.float32), data.rows[k, :8])
    assert [row[4] for row in filled(1, as_printed={"timeout"}).datas] == [False] * 199 + [True]


def test_sample_has_the_pages_shapes_and_no_row_twice():
    data = filled(1)
    for _ in range(20):
        sample = data.get_sample()
        assert [tuple(x.shape) for x in sample] == [(64, 3), (64, 1), (64, 1), (64, 3), (64, 1)]
        assert [x.dtype for x in sample] == [torch.float32] * 4 + [torch.int64]
        states = torch.cat([sample[0], sample[3]], dim=1)
        assert len({tuple(row.tolist()) for row in states}) == 64


def test_sample_draws_every_row_equally_often_and_keeps_rows_together():
    data = filled(1)
    data.rows[:, 3] = np.arange(200)                          # the action names its row
    counts = torch.zeros(200)
    for _ in range(1000):
        state, action, reward, next_state, over = data.get_sample()
        counts[action.flatten().long()] += 1
    drawn = torch.cat([state, action, reward, next_state, over], dim=1)
    assert torch.equal(torch.from_numpy(data.rows)[action.flatten().long()][:, :9], drawn)
    expected = 1000 * 64 / 200
    spread = (expected * (1 - 64 / 200)) ** 0.5
    assert ((counts - expected).abs() < 5 * spread).all()


def test_sample_draws_from_all_of_a_large_dataset():
    data = Data()
    data.rows = np.zeros([100_000, 10], np.float32)
    data.rows[:, 3] = np.arange(100_000)
    drawn = torch.cat([data.get_sample()[1] for _ in range(100)])
    tenths = torch.histc(drawn, 10, 0, 100_000)                # 640 each, give or take 24
    assert ((tenths - 640).abs() < 130).all()


@pytest.mark.parametrize("as_printed, ends", [((), 0), (("timeout",), 64)])
def test_the_time_limit_is_terminal_only_as_printed(as_printed, ends):
    data = filled(1, as_printed=as_printed)
    data.rows = np.repeat(data.rows[-1:], 64, axis=0)         # the episode's last step, 64 times
    assert data.get_sample()[4].sum() == ends


def test_a_terminal_state_is_over_either_way():
    for as_printed in ((), ("timeout",)):
        data = filled(1, as_printed=as_printed)
        data.rows[:, 8] = 1
        assert data.get_sample()[4].sum() == 64


def test_at_most_100_000_rows_are_kept_and_the_oldest_go_first():
    data = Data()
    data.rows = np.zeros([99_900, 10], np.float32)
    data.rows[:, 3] = np.arange(99_900) + 10
    data.update_data(Constant(0.5))
    assert len(data.rows) == 100_000
    assert data.rows[:, 3].tolist() == [*range(110, 99_910), *[0.5] * 200]


def test_too_few_rows_is_an_error():
    data = filled(1)
    data.rows = data.rows[:63]
    with pytest.raises(ValueError):
        data.get_sample()
    data.rows = filled(1).rows[:64]
    data.get_sample()


def test_episodes_end_at_the_time_limit_and_at_terminal_states():
    data = filled(2)
    assert [len(rows) for rows in episodes(data)] == [200, 200]
    data.rows[49, 8] = 1
    assert [len(rows) for rows in episodes(data)] == [50, 150, 200]
    data.rows = data.rows[:220]                               # the last episode has no end
    assert [len(rows) for rows in episodes(data)] == [50, 150, 20]
    np.testing.assert_array_equal(np.concatenate(episodes(data)), data.rows)


def options(last=None, random=0, seed=0):
    return types.SimpleNamespace(last=last, random=random, seed=seed)


@pytest.mark.parametrize("last, torques", [
    (1, [1.0]), (2, [0.5, 1.0]), (3, [0.0, 0.5, 1.0]), (None, [0.0, 0.5, 1.0])])
def test_the_last_episodes_are_chosen_in_their_order(last, torques):
    data = filled(3, as_printed={"timeout"})
    before = data.rows.tobytes()
    chosen = choose_episodes(data.freeze(), options(last))
    assert chosen.rows[:, 3].tolist() == [torque for torque in torques for _ in range(200)]
    np.testing.assert_array_equal(chosen.rows, data.rows[-200 * len(torques):])
    assert chosen.as_printed == {"timeout"} and not chosen.frozen
    assert data.rows.tobytes() == before


@pytest.mark.parametrize("last", [0, 1, None])
def test_random_episodes_stand_before_the_chosen_ones(last):
    """They are what seed_everything and an agent of uniform torques give."""
    data = filled(2)
    chosen = choose_episodes(data, options(last, random=2, seed=7))

    class Uniform:
        def get_action(self, state):
            return random.uniform(-2, 2)

    seed_everything(7)
    drawn = Data()
    drawn.update_data(Uniform())
    drawn.update_data(Uniform())
    rest = {0: data.rows[:0], 1: data.rows[200:], None: data.rows}[last]
    np.testing.assert_array_equal(chosen.rows, np.concatenate([drawn.rows, rest]))
    torques = drawn.rows[:, 3]
    assert torques.min() < -1.9 and torques.max() > 1.9 and abs(torques.mean()) < 0.3
    other = choose_episodes(data, options(last, random=2, seed=8))
    assert (other.rows[:400, 3] != torques).all()
    assert len(choose_episodes(data, options(last, random=1))) == 200 + len(rest)


def test_more_episodes_than_there_are_is_an_error():
    with pytest.raises(UserError, match="--last 4: the data has 3 episodes"):
        choose_episodes(filled(3), options(last=4))


def test_saved_data_is_read_as_it_was_and_may_grow(tmp_path):
    data = filled(1)
    data.rows[:, 8] = np.arange(200) % 7 == 0
    save_dataset(tmp_path / "data.npz", data.freeze())
    loaded = load_dataset(tmp_path / "data.npz")
    assert loaded.rows.dtype == np.float32 and loaded.rows.tobytes() == data.rows.tobytes()
    loaded.update_data(Constant(0))
    assert len(loaded) == 400 and loaded.as_printed == frozenset()
    printed = load_dataset(str(tmp_path / "data.npz"), {"timeout"})
    assert printed.as_printed == {"timeout"} and printed.datas[-1][4] is True


def test_frozen_data_cannot_change():
    data = filled(2)
    rows, before = data.rows, data.rows.tobytes()
    assert data.freeze() is data and data.frozen
    start = env.reset(seed=3)
    with pytest.raises(RuntimeError, match="frozen"):
        data.update_data(Constant(0))
    angle, speed = env.unwrapped.state                        # no step of an episode was played
    np.testing.assert_allclose([math.cos(angle), math.sin(angle), speed], start, rtol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        data.rows[0] = 0
    rows[:] = 0                                               # the old array is not the dataset's
    data.datas[0][0][:] = 0
    for x in data.get_sample():
        x.zero_()
    assert data.rows.tobytes() == before and len(data) == 400


def test_a_copy_is_frozen_as_its_original_is():
    data = filled(1)
    free = copy.deepcopy(data)
    free.update_data(Constant(0))
    assert len(free) == 400 and len(data) == 200 and not data.frozen
    frozen = copy.deepcopy(data.freeze())
    with pytest.raises(RuntimeError, match="frozen"):
        frozen.update_data(Constant(0))
    assert frozen.rows.tobytes() == data.rows.tobytes()


def test_the_pages_list_methods_fail_loudly():
    data = filled(1)
    with pytest.raises(AttributeError):
        data.datas.pop(0)
    with pytest.raises(AttributeError):
        data.datas.append(data.datas[0])
    with pytest.raises(AttributeError):
        data.datas = []


@pytest.mark.parametrize("make", [CQL, SAC])
def test_offline_training_leaves_every_byte_of_the_data(make):
    data = filled(2).freeze()
    before = data.rows.tobytes()
    student = make()
    for _ in range(30):
        batch = data.get_sample()
        student.train(*batch)
        for x in batch:
            x.zero_()                           # even a caller that writes into its batch
    assert data.rows.tobytes() == before


def test_same_seed_same_updates():
    def train():
        torch.manual_seed(7)
        random.seed(7)
        env.reset(seed=7)
        agent, data = CQL(), Data()
        data.update_data(agent)
        for _ in range(20):
            agent.train(*data.get_sample())
        return torch.cat([p.flatten() for p in agent.model_action.parameters()])
    assert torch.equal(train(), train())


def test_a_seed_fixes_all_chance():
    def drawn(seed):
        seed_everything(seed)
        return torch.rand(1).item(), random.random(), *env.reset().tolist()

    assert drawn(3) == drawn(3)
    assert all(x != y for x, y in zip(drawn(3), drawn(4)))


def test_a_runs_starts_are_its_seeds_and_its_purposes():
    starts = Run(None, 7).starts(0, 10)
    assert starts == Run(None, 7).starts(0, 10) and len(set(starts)) == 10
    assert not set(starts) & set(Run(None, 8).starts(0, 10))
    assert not set(starts) & set(Run(None, 7).starts(1, 100))


# ---- what an agent does in an episode ----

def test_a_torque_for_any_sequence_of_three():
    agent = SAC()
    for state in ([1, 0, 0], (1.0, 0.0, -8.0), np.array([1.0, 0, 0]), torch.tensor([0.0, 1.0, 8])):
        torque = agent.get_action(state)
        assert isinstance(torque, float) and -2 <= torque <= 2


def test_an_agent_explores():
    """300 torques of one state: they differ as much as the policy's Gaussian says."""
    agent, state = SAC(), [1.0, 0.0, 0.5]
    torques = torch.tensor([agent.get_action(state) for _ in range(300)])
    assert len(torques.unique()) > 290
    hidden = agent.model_action.fc_state(torch.tensor(state))
    mu, std = agent.model_action.fc_mu(hidden).item(), agent.model_action.fc_std(hidden).item()
    samples = torch.atanh((torques / 2).clamp(-0.99999, 0.99999))
    assert samples.mean().item() == pytest.approx(mu, abs=0.2)
    assert samples.std().item() == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize("state", [[1, 0], [1, 0, 0, 0], 1.0, "abc", None, [[1], [2, 3]]])
def test_a_state_that_is_not_three_numbers_is_an_error(state):
    with pytest.raises(ValueError):
        SAC().get_action(state)


def test_a_test_is_one_episode_of_the_agent_from_a_random_start(monkeypatch):
    """Played again with the same seeds; it is shown step by step where that is asked for."""
    agent, shown = SAC(), []
    monkeypatch.setattr(env, "show", lambda: shown.append(env.step_n))
    seed_everything(3)
    returns = [agent.test(play=False)]
    assert shown == []
    returns.append(agent.test(play=True))
    assert shown == [*range(1, 201)]
    seed_everything(3)
    for expected in returns:
        state, total, over = env.reset(), 0.0, False
        while not over:
            state, reward, over, _ = env.step([agent.get_action(state)])
            total += reward
        assert type(expected) is float and expected == pytest.approx(total)
    assert returns[0] != returns[1]


def in_gym(state, torque):
    """One step of gym's own Pendulum-v1: reward, next state, in double precision."""
    plain = in_gym.env.unwrapped
    plain.state = np.array([math.atan2(state[1], state[0]), state[2]])
    _, reward, *_ = plain.step([torque])
    angle, speed = plain.state
    return float(reward), [math.cos(angle), math.sin(angle), speed]


in_gym.env = gym.make("Pendulum-v1", disable_env_checker=True)
in_gym.env.reset()


def test_pendulum_is_gyms_step():
    """Random states and torques, both sides of hanging straight down, and speeds at the limit."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(-np.pi, np.pi, 500)
    angle[:40] = np.tile([np.pi - 1e-3, 1e-3 - np.pi], 20)
    speed = rng.uniform(-8, 8, 500)
    speed[20:60] = np.tile([8, -8, 7.9, -7.9], 10)
    torque = rng.uniform(-2, 2, 500)
    state = np.stack([np.cos(angle), np.sin(angle), speed], axis=1)
    reward, next_state = pendulum(state, torque)
    assert reward.shape == (500,) and next_state.shape == (500, 3)
    assert (abs(next_state[:, 2]) == 8).sum() > 5
    for k in range(500):
        expected_reward, expected_state = in_gym(state[k], torque[k])
        assert reward[k] == pytest.approx(expected_reward, abs=1e-6)
        np.testing.assert_allclose(next_state[k], expected_state, atol=1e-6)


@pytest.mark.parametrize("gamma, scale, steps", [(0.99, 8, 200), (0.9, 4, 30), (0.5, 2, 3)])
def test_discounted_by_hand(gamma, scale, steps, monkeypatch):
    monkeypatch.setattr(cql_pendulum, "GAMMA", gamma)
    monkeypatch.setattr(cql_pendulum, "SCALE", scale)
    rewards = np.random.default_rng(0).uniform(-16, 0, [steps, 4])
    found = discounted(rewards)
    assert found.shape == (4,)
    for k in range(4):
        scaled = [(reward + scale) / scale for reward in rewards[:, k]]
        expected = sum(gamma ** t * r for t, r in enumerate(scaled))
        end = scaled[-20:]
        expected += gamma ** steps / (1 - gamma) * sum(end) / len(end)
        assert found[k] == pytest.approx(expected)


def test_no_policy_can_deliver_more_than_a_hundred():
    assert discounted(np.zeros([200, 1])) == pytest.approx(100)
    assert discounted(np.full([200, 1], -8.0)) == pytest.approx(0)


def balancing():
    """An agent that does something sensible, so that 200 steps do not magnify rounding."""
    agent = SAC()
    with torch.no_grad():
        agent.model_action.fc_std[0].bias.fill_(-1.0)
    return agent


@pytest.mark.parametrize("steps", [40, 200])
def test_delivery_is_the_torque_and_then_the_policy_in_gyms_pendulum(steps, monkeypatch):
    """Three states and torques, the policy with its noise, step by step in gym; the last two
    differ in the torque alone."""
    monkeypatch.setattr(cql_pendulum, "EPISODE", steps)
    agent = balancing()
    states = np.array([[1.0, 0, 0.3], [-1, 0, -6], [-1, 0, -6]])
    torques = np.array([-2.0, 0.5, 1.5])
    before = torch.get_rng_state()
    found = deliver(agent, states, torques)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    rewards, state, torque = [], states, torques
    for _ in range(steps):
        played = [in_gym(s, u) for s, u in zip(state, torque)]
        rewards.append([reward for reward, _ in played])
        state = np.array([next_state for _, next_state in played])
        with torch.no_grad():
            torque = agent.model_action(torch.tensor(state, dtype=torch.float32))[0][:, 0].tolist()
    np.testing.assert_allclose(found, discounted(np.array(rewards)), atol=1e-3)
    assert abs(found[1] - found[2]) > 1e-3


@pytest.mark.parametrize("steps", [40, 200])
def test_an_evaluation_plays_the_agent_with_its_noise(steps, monkeypatch):
    """Episodes side by side, the noise of a batch from the first seed, written out."""
    monkeypatch.setattr(cql_pendulum, "EPISODE", steps)
    agent, seeds = SAC(), [11, 12, 13]
    returns, promised, delivered = evaluate(agent, seeds)
    torch.manual_seed(11)
    wrappers = [MyWrapper() for _ in seeds]
    state = np.array([wrapper.reset(seed=seed) for wrapper, seed in zip(wrappers, seeds)])
    rewards = []
    for _ in range(steps):
        with torch.no_grad():
            torque = agent.model_action(torch.tensor(state))[0][:, 0].tolist()
        played = [wrapper.step([u]) for wrapper, u in zip(wrappers, torque)]
        state = np.array([step[0] for step in played])
        rewards.append([step[1] for step in played])
    np.testing.assert_allclose(returns, np.sum(rewards, axis=0), rtol=1e-5)
    np.testing.assert_allclose(delivered, discounted(np.array(rewards)), rtol=1e-5)
    assert all(step[2] for step in played) and promised.shape == (3,)


def test_promise_and_delivery_by_hand():
    """One agent's episodes played again one by one, and the meter's sum written out."""
    agent = SAC()
    with torch.no_grad():
        agent.model_action.fc_std[0].bias.fill_(-40)           # no noise: the policy is its mean
        agent.model_action.fc_std[0].weight.zero_()
    seeds = [11, 12]
    returns, promised, delivered = evaluate(agent, seeds)
    for k, seed in enumerate(seeds):
        wrapper, rewards, done = MyWrapper(), [], False
        state = wrapper.reset(seed=seed)
        first = torch.tensor(state)[None], torch.tensor([[agent.get_action(state)]])
        while not done:
            state, reward, done, _ = wrapper.step([agent.get_action(state)])
            rewards.append(float(reward))
        scaled = [(reward + 8) / 8 for reward in rewards]
        tail = 0.99 ** 200 / 0.01 * sum(scaled[-20:]) / 20
        assert returns[k] == pytest.approx(sum(rewards), abs=1e-2)
        expected = sum(0.99 ** t * r for t, r in enumerate(scaled)) + tail
        assert delivered[k] == pytest.approx(expected, abs=1e-2)
        values = agent.model_value1(*first).item(), agent.model_value2(*first).item()
        assert promised[k] == pytest.approx(min(values), abs=1e-5)


def test_a_test_is_the_same_every_time_and_leaves_training_alone():
    """Whatever torch's random state is before."""
    agent, results = SAC(), []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(evaluate(agent, [1, 2, 3]))
        assert torch.equal(torch.get_rng_state(), before)
    for once, again in zip(*results):
        np.testing.assert_array_equal(once, again)
    other = evaluate(agent, [4, 5, 6])
    assert all((once != again).all() for once, again in zip(results[0], other))


def test_an_evaluation_leaves_the_training_environment_alone():
    starts = []
    for seeds in ([1, 2], [3]):
        env.reset(seed=5)
        env.step([1.0])
        evaluate(SAC(), seeds)
        starts.append([*env.unwrapped.state, env.step_n, *env.reset()])
    assert starts[0] == starts[1] and starts[0][2] == 1


# ---- the two loops ----

class Counted(BC):
    """Counts its updates and the rows that each was drawn from."""

    def __init__(self, data):
        super().__init__()
        self.seen, self.source = [], data

    def train(self, *batch):
        assert [len(x) for x in batch] == [cql_pendulum.BATCH] * 5
        self.seen.append(len(self.source))


def begun(stage, agent, data):
    run = Run(None, 0)
    run.begin(stage, agent, data)
    return run


@pytest.mark.parametrize("epochs, tested", [(1, [0]), (11, [0, 10]), (12, [0, 10, 11])])
def test_the_teachers_loop_plays_then_trains_and_tests_every_tenth_epoch(
        epochs, tested, monkeypatch, capsys):
    monkeypatch.setattr(cql_pendulum, "EPISODE", 64)
    monkeypatch.setattr(cql_pendulum, "UPDATES", 3)
    data = Data()
    teacher = Counted(data)
    run = begun("teacher", teacher, data)
    train_teacher(teacher, data, epochs, run)
    assert teacher.seen == [64 * (epoch + 1) for epoch in range(epochs) for _ in range(3)]
    assert [(row["stage"], row["step"]) for row in run.log] == [("teacher", k) for k in tested]
    returns, _, delivered = evaluate(teacher, run.starts(0, 10))
    for row in run.log:
        assert row["return"] == pytest.approx(returns.mean())
        assert row["delivered"] == pytest.approx(delivered.mean())
    assert f"{returns.mean():.1f}" in capsys.readouterr().out


def test_two_hundred_updates_follow_each_episode():
    data = Data()
    teacher = Counted(data)
    train_teacher(teacher, data, 1, begun("teacher", teacher, data))
    assert teacher.seen == [200] * 200


@pytest.mark.parametrize("steps, tested", [(1, [0]), (2500, [0, 2000, 2499]), (2001, [0, 2000])])
def test_the_students_loop_trains_alone_and_tests_every_2000_updates(steps, tested, monkeypatch):
    monkeypatch.setattr(cql_pendulum, "EPISODE", 5)
    data = Data()
    data.rows = np.random.default_rng(0).random([70, 10], np.float32)
    student = Counted(data)
    run = begun("student", student, data)
    train_student(student, data, steps, run)
    assert student.seen == [70] * steps
    assert [(row["stage"], row["step"]) for row in run.log] == [("student", i) for i in tested]


def test_the_loops_train_real_agents(monkeypatch):
    monkeypatch.setattr(cql_pendulum, "UPDATES", 2)
    data, teacher, student = Data(), SAC(), CQL()
    for agent, train, stage in ((teacher, train_teacher, "teacher"),
                                (student, train_student, "student")):
        before = copy.deepcopy(agent.model_action)
        run = begun(stage, agent, data)
        train(agent, data, 2, run)
        assert not any(map(torch.equal, before.parameters(), agent.model_action.parameters()))
        assert [row["step"] for row in run.log] == [0, 1]
        assert run.log[0]["promised"] != run.log[1]["promised"]
    assert len(data) == 400
