"""The environment, the dataset, and the page's own loops on them."""
import re

import numpy as np
import pytest
import torch

import cql_pendulum
from cql_pendulum import CQL, SAC, Data, MyWrapper, env

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
    loops = re.sub(r"range\((100|200|50000)\)", lambda match: f"range({fewer[match[1]]})", PAGE_LOOPS)
    scope = {}
    exec("from cql_pendulum import *", scope)
    exec(loops, scope)
    (epoch, teacher), (i, student) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (epoch, i) == ("0", "0")
    assert all(-2000 < float(result) < -50 for result in (teacher, student))
    assert len(scope["data"].datas) == 400


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
        assert reward == pytest.approx(-(angle ** 2 + 0.1 * before[2] ** 2 + 0.001 * 1.5 ** 2), abs=1e-4)


def test_datas_is_the_pages_list():
    data = filled(1)
    assert len(data.datas) == 200
    state, action, reward, next_state, over = data.datas[-1]
    assert state.shape == next_state.shape == (3,)
    assert (action, over) == (0.0, False) and reward < 0
    np.testing.assert_array_equal(data.datas[0][3], data.datas[1][0])
    assert [row[4] for row in filled(1, as_printed={"timeout"}).datas] == [False] * 199 + [True]


def test_sample_has_the_pages_shapes_and_no_row_twice():
    data = filled(1)
    for _ in range(20):
        sample = data.get_sample()
        assert [tuple(x.shape) for x in sample] == [(64, 3), (64, 1), (64, 1), (64, 3), (64, 1)]
        assert [x.dtype for x in sample] == [torch.float32] * 4 + [torch.int64]
        assert len({tuple(row.tolist()) for row in torch.cat(sample[:1] + sample[3:4], dim=1)}) == 64


def test_sample_draws_every_row_equally_often_and_keeps_rows_together():
    data = filled(1)
    data.rows[:, 3] = np.arange(200)                          # the action names its row
    counts = torch.zeros(200)
    for _ in range(2000):
        state, action, reward, next_state, over = data.get_sample()
        counts[action.flatten().long()] += 1
    rows = torch.from_numpy(data.rows)[action.flatten().long()]
    assert torch.equal(rows[:, :9], torch.cat([state, action, reward, next_state, over], dim=1))
    expected, spread = 2000 * 64 / 200, (2000 * 64 / 200 * (1 - 64 / 200)) ** 0.5
    assert ((counts - expected).abs() < 5 * spread).all()


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


def test_oldest_rows_are_dropped_first(monkeypatch):
    monkeypatch.setattr(cql_pendulum, "CAPACITY", 500)
    data = filled(4)
    assert len(data.rows) == 500
    assert data.rows[:, 3].tolist() == [0.5] * 100 + [1.0] * 200 + [1.5] * 200


def test_too_few_rows_is_an_error():
    data = filled(1)
    data.rows = data.rows[:63]
    with pytest.raises(ValueError, match="64 different rows, and this dataset has 63"):
        data.get_sample()
    data.rows = filled(1).rows[:64]
    data.get_sample()


def test_first_and_last_episodes():
    assert set(filled(3).keep(first=2).rows[:, 3]) == {0.0, 0.5}
    assert set(filled(3).keep(last=1).rows[:, 3]) == {1.0}
    assert len(filled(3).keep().rows) == 600
    with pytest.raises(cql_pendulum.UserError, match="--last 4: the data has 3 episodes"):
        filled(3).keep(last=4)


def test_frozen_data_cannot_change():
    data = filled(1).freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        data.update_data(Constant(0))
    with pytest.raises(ValueError, match="read-only"):
        data.rows[0] = 0


@pytest.mark.parametrize("make", [CQL, SAC])
def test_offline_training_leaves_every_byte_of_the_data(make):
    data = filled(2).freeze()
    before = data.rows.tobytes()
    student = make()
    for _ in range(30):
        batch = data.get_sample()
        student.train(*batch)
        for x in batch:
            x.zero_()                                        # even a caller that writes into its batch
    assert data.rows.tobytes() == before


def test_same_seed_same_updates():
    def train():
        torch.manual_seed(7)
        cql_pendulum.random.seed(7)
        env.reset(seed=7)
        agent, data = CQL(), Data()
        data.update_data(agent)
        for _ in range(20):
            agent.train(*data.get_sample())
        return torch.cat([p.flatten() for p in agent.model_action.parameters()])
    assert torch.equal(train(), train())


def test_a_torque_for_any_sequence_of_three():
    agent = SAC()
    for state in ([1, 0, 0], (1.0, 0.0, -8.0), np.array([1.0, 0, 0]), torch.tensor([0.0, 1.0, 8.0])):
        torque = agent.get_action(state)
        assert isinstance(torque, float) and -2 <= torque <= 2


@pytest.mark.parametrize("state", [
    [1, 0], [1, 0, 0, 0], [1, 0, float("nan")], [1, 0, float("inf")], "abc", "1 2", None, [[1], [2, 3]],
])
def test_anything_else_is_an_error(state):
    with pytest.raises(ValueError, match="three finite numbers"):
        SAC().get_action(state)


@pytest.mark.parametrize("k, shape", [(0, (64, 2)), (1, (64,)), (2, (63, 1)), (3, (64, 4)), (4, (64,))])
@pytest.mark.parametrize("make", [SAC, CQL])
def test_a_batch_of_other_shapes_changes_nothing(make, k, shape):
    agent = make()
    before = [p.clone() for p in agent.model_action.parameters()]
    batch = list(filled(1).get_sample())
    batch[k] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"state \[b, 3\], action \[b, 1\]"):
        agent.train(*batch)
    assert all(torch.equal(old, new) for old, new in zip(before, agent.model_action.parameters()))


def test_promise_and_delivery_by_hand():
    """One agent's episodes played again one by one, and the meter's sum written out."""
    agent = SAC()
    with torch.no_grad():
        agent.model_action.fc_std[0].bias.fill_(-40)           # no noise: the policy is its mean
        agent.model_action.fc_std[0].weight.zero_()
    seeds = [11, 12]
    returns, promised, delivered = cql_pendulum.evaluate(agent, seeds)
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
        assert delivered[k] == pytest.approx(sum(0.99 ** t * r for t, r in enumerate(scaled)) + tail, abs=1e-2)
        values = agent.model_value1(*first).item(), agent.model_value2(*first).item()
        assert promised[k] == pytest.approx(min(values), abs=1e-5)


def test_a_test_is_the_same_every_time_and_leaves_training_alone():
    agent = SAC()
    state = torch.get_rng_state()
    once, again = cql_pendulum.evaluate(agent, [1, 2, 3]), cql_pendulum.evaluate(agent, [1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(once, again):
        np.testing.assert_array_equal(a, b)
