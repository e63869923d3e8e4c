"""Students that must learn, in seconds: larger steps and a shorter discount than the page's.

Balance: 5,000 random torques in random states within a radian of upright, one step each, and
LR_ACTION 3e-3, TAU 0.05, GAMMA 0.95. Returns of 100 steps, the mean of 40 starts at rest within
0.4 radians of upright. Measured with seeds 0, 1, 2 on one thread: before -425, -654, -598; after
500 updates SAC -33, -11, -21 and CQL with a weight of 0.1 -36, -21, -33. Broken on purpose: target
critics that never move -539, -620, -494; a policy without steps stays; one that goes the other
way is NaN. The line is drawn at -100.
"""
import math
import types

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import pendulum


def cql(weight):
    """A CQL with a weight of its own."""
    student = ours.CQL()
    student.weight = weight
    return student


@pytest.fixture
def quick(monkeypatch):
    """The constants of a student that learns in hundreds of updates."""
    monkeypatch.setattr(ours, "LR_ACTION", 3e-3)
    monkeypatch.setattr(ours, "TAU", 0.05)
    monkeypatch.setattr(ours, "GAMMA", 0.95)


def near_upright():
    """Frozen data of single steps with random torques, by Pendulum's own formulas."""
    rng = np.random.default_rng(0)
    n = 5000
    angle, speed, torque = (rng.uniform(-most, most, n) for most in (1, 4, 2))
    state = np.stack([np.cos(angle), np.sin(angle), speed], axis=1)
    reward, next_state = pendulum(state, torque)
    data = ours.Data()
    ends = np.zeros([n, 2])
    data.rows = np.column_stack([state, torque, reward, next_state, ends]).astype(np.float32)
    return data.freeze()


@torch.no_grad()
def balance(agent):
    """The mean return of 100 steps from 40 starts near upright."""
    angle = np.linspace(-0.4, 0.4, 40)
    state = np.stack([np.cos(angle), np.sin(angle), np.zeros(40)], axis=1)
    total = 0
    torch.manual_seed(0)
    for _ in range(100):
        torque = agent.model_action(torch.from_numpy(state).float())[0][:, 0].numpy()
        reward, state = pendulum(state, torque)
        total += reward.mean()
    return total


def learn(make, data, updates, measure):
    """A new student's measure before and after so many updates."""
    ours.seed_everything(0)
    student = make()
    before = measure(student)
    ours.seed_everything(0)
    for _ in range(updates):
        student.train(*data.get_sample())
    return before, measure(student)


@pytest.mark.parametrize("make", [ours.SAC, lambda: cql(0.1)])
def test_a_student_learns_to_balance_from_random_torques_alone(make, quick):
    before, after = learn(make, near_upright(), 500, balance)
    assert before < -350
    assert after > -100


class NoSteps(ours.SAC):
    """A broken student: its policy's loss is nothing."""

    def _get_loss_action(self, state):
        loss, entropy = super()._get_loss_action(state)
        return loss * 0, entropy


class StillTargets(ours.SAC):
    """A broken student: its target critics never follow."""

    def _soft_update(self, _from, _to):
        pass


@pytest.mark.parametrize("make, updates", [(NoSteps, 50), (StillTargets, 500)])
def test_a_broken_student_does_not(make, updates, quick):
    """The same measure: the test above can fail."""
    _, after = learn(make, near_upright(), updates, balance)
    assert after < -300


@torch.no_grad()
def preference(student, data):
    """How much more the critic promises for the data's torques than for random ones."""
    rows = torch.tensor(data.rows[::10])
    random_torques = torch.empty(len(rows), 1).uniform_(-2, 2)
    value = student.model_value1(rows[:, :3], rows[:, 3:4])
    return (value - student.model_value1(rows[:, :3], random_torques)).mean().item()


def test_cql_prefers_the_datas_torques_and_sac_does_not():
    """The page's claim, on five episodes in which every torque is the same function of the state.

    Measured after 80 updates of the page's constants, seeds 0, 1, 2, in the critic's unit: CQL
    30, 22, 21 and SAC 0.2, 0.2, 0.3."""
    ours.seed_everything(0)
    data = ours.Data()
    pump = types.SimpleNamespace(get_action=lambda state: math.copysign(2.0, state[2]))
    for _ in range(5):
        data.update_data(pump)
    data.freeze()
    _, cql = learn(ours.CQL, data, 80, lambda student: preference(student, data))
    _, sac = learn(ours.SAC, data, 80, lambda student: preference(student, data))
    assert cql > 10
    assert abs(sac) < 1


def test_the_critics_find_q_where_it_is_known(quick, monkeypatch):
    """Three states, one after another. The first pays 2 (scaled) and the third 1, which is its end;
    the second pays 1 and its time is over there, so that the third still counts.

    Without entropy Q is 2 + 0.95 + 0.95^2, 1 + 0.95 and 1, whatever the torque."""
    monkeypatch.setattr(ours, "WIDTH", 32)
    monkeypatch.setattr(ours, "TEMPERATURE", 1e-9)
    rng = np.random.default_rng(0)
    states = np.eye(3)[[0, 1, 2] * 100]
    rewards = np.array([8.0, 0.0, 0.0] * 100)
    data = ours.Data()
    data.rows = np.column_stack([
        states, rng.uniform(-2, 2, 300), rewards, np.roll(states, -1, axis=0),
        states[:, 2], states[:, 1]])
    ours.seed_everything(0)
    agent = ours.SAC()
    for _ in range(600):
        agent.train(*data.get_sample())
    expected = np.array([2 + 0.95 + 0.95 ** 2, 1 + 0.95, 1])
    for torque in (-1.5, 0.0, 1.5):
        assert agent.promise(np.eye(3), [torque] * 3) == pytest.approx(expected, abs=0.2)
