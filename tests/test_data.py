"""The environment, the dataset, and the page's own loops on them."""
import copy
import pickle
import re

import numpy as np
import pytest
import torch

import cql_pendulum
from cql_pendulum import CQL, SAC, Data, MyWrapper, UserError, env, episodes, keep

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
        cost = angle ** 2 + 0.1 * before[2] ** 2 + 0.001 * 1.5 ** 2
        assert reward == pytest.approx(-cost, abs=1e-4)


def test_datas_has_the_pages_rows():
    data = filled(1)
    assert isinstance(data.datas, tuple) and len(data.datas) == 200
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
        states = torch.cat([sample[0], sample[3]], dim=1)
        assert len({tuple(row.tolist()) for row in states}) == 64


def test_sample_draws_every_row_equally_often_and_keeps_rows_together():
    data = filled(1)
    data.rows[:, 3] = np.arange(200)                          # the action names its row
    counts = torch.zeros(200)
    for _ in range(2000):
        state, action, reward, next_state, over = data.get_sample()
        counts[action.flatten().long()] += 1
    drawn = torch.cat([state, action, reward, next_state, over], dim=1)
    assert torch.equal(torch.from_numpy(data.rows)[action.flatten().long()][:, :9], drawn)
    expected = 2000 * 64 / 200
    spread = (expected * (1 - 64 / 200)) ** 0.5
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


def test_first_and_last_episodes():
    data = filled(3)
    for limits, torques in (({"first": 2}, [0.0, 0.5]), ({"last": 1}, [1.0]),
                            ({"first": 3}, [0.0, 0.5, 1.0]), ({"last": 3}, [0.0, 0.5, 1.0]),
                            ({}, [0.0, 0.5, 1.0])):
        kept = keep(data, **limits)
        assert kept.rows[:, 3].tolist() == [torque for torque in torques for _ in range(200)]
        assert kept.frozen
    for limits in ({"first": 4}, {"last": 4}):
        with pytest.raises(UserError, match="the data has 3 episodes"):
            keep(data, **limits)
    assert not data.frozen and len(data.rows) == 600


def test_keeping_some_episodes_keeps_the_errata():
    assert keep(filled(1, as_printed={"timeout"})).as_printed == {"timeout"}


def is_frozen(data):
    with pytest.raises(RuntimeError, match="frozen"):
        data.update_data(Constant(0))
    with pytest.raises(ValueError, match="read-only"):
        data.rows[0] = 0
    with pytest.raises(ValueError):
        data.rows.flags.writeable = True
    return data.frozen and not data.rows.flags.owndata


def test_frozen_data_cannot_change():
    data = filled(2)
    rows, before = data.rows, data.rows.tobytes()
    assert data.freeze() is data and is_frozen(data)
    rows[:] = 0                                               # the old array is not the dataset's
    data.datas[0][0][:] = 0
    assert data.rows.tobytes() == before
    for kept in (keep(data), keep(data, last=1), keep(data, first=1)):
        assert is_frozen(kept)
    assert is_frozen(data) and data.rows.tobytes() == before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy,
                                    lambda data: pickle.loads(pickle.dumps(data))])
def test_a_copy_is_frozen_as_its_original_is(copied):
    data = filled(1)
    free = copied(data)
    free.update_data(Constant(0))
    assert len(free.rows) == 400 and len(data.rows) == 200
    frozen = copied(data.freeze())
    assert is_frozen(frozen) and frozen.rows.tobytes() == data.rows.tobytes()


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
    for state in ([1, 0, 0], (1.0, 0.0, -8.0), np.array([1.0, 0, 0]), torch.tensor([0.0, 1.0, 8])):
        torque = agent.get_action(state)
        assert isinstance(torque, float) and -2 <= torque <= 2


@pytest.mark.parametrize("state", [
    [1, 0], [1, 0, 0, 0], [1, 0, float("nan")], [1, 0, float("inf")], "abc", "1 2", None,
    [[1], [2, 3]],
])
def test_anything_else_is_an_error(state):
    with pytest.raises(ValueError):
        SAC().get_action(state)


def not_a_number(x):
    return torch.where(torch.arange(len(x))[:, None] == 5, torch.nan, x)


@pytest.mark.parametrize("make", [SAC, CQL])
@pytest.mark.parametrize("wrong, error", [
    *((lambda batch, k=k: {k: torch.zeros(64, (4, 2, 2, 2, 3)[k])}, ValueError) for k in range(5)),
    *((lambda batch, k=k: {k: not_a_number(batch[k])}, ValueError) for k in range(4)),
    (lambda batch: {2: torch.full([64, 1], torch.inf)}, ValueError),
    (lambda batch: {k: x[:0] for k, x in enumerate(batch)}, ValueError),
    *((lambda batch, k=k: {k: batch[k][:63]}, RuntimeError) for k in range(5)),
    (lambda batch: {4: batch[4][:, 0]}, RuntimeError),
])
def test_a_wrong_batch_changes_nothing(make, wrong, error):
    agent, batch = make(), dict(enumerate(filled(1).get_sample()))
    before = copy.deepcopy(vars(agent))
    with pytest.raises(error):
        agent.train(*(batch | wrong([*batch.values()])).values())
    assert torch.equal(agent.alpha, before["alpha"])
    for name, old in before.items():
        if isinstance(old, torch.nn.Module):
            assert all(map(torch.equal, old.parameters(), getattr(agent, name).parameters()))
    assert not agent.optimizer_value.state and not agent.optimizer_action.state


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
        results.append(cql_pendulum.evaluate(agent, [1, 2, 3]))
        assert torch.equal(torch.get_rng_state(), before)
    for once, again in zip(*results):
        np.testing.assert_array_equal(once, again)
    other = cql_pendulum.evaluate(agent, [4, 5, 6])
    assert all((once != again).all() for once, again in zip(results[0], other))
