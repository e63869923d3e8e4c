"""The measure of promise and delivery, the interventions and the picture, on cases that can be told
by hand."""
import copy
import json
import math

import numpy as np
import pytest
import torch

import cql_pendulum as ours
import torques

# a state in each cell of study.histogram, and some that stand
EVERY_ANGLE, EVERY_SPEED = np.meshgrid(np.radians(np.arange(-172.5, 180, 15)),
                                       [-7, -5, -3, -0.9, 0.9, 3, 5, 7])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", 21)
    monkeypatch.setattr(torques, "STATES", 40)


def rows_of(angle, speed, torque):
    """Rows of a dataset, by angle in radians, speed and torque; the rest is 0."""
    angle, speed, torque = np.broadcast_arrays(angle, speed, torque)
    rows = np.zeros([angle.size, 10], np.float32)
    rows[:, 0], rows[:, 1] = np.cos(angle).ravel(), np.sin(angle).ravel()
    rows[:, 2], rows[:, 3] = speed.ravel(), torque.ravel()
    return rows


def rows_everywhere(*choices):
    """Each of the torques, 20 rows in all, in states all over the plane."""
    repeats = 20 // len(choices)
    parts = [rows_of(EVERY_ANGLE, EVERY_SPEED, torque) for torque in choices]
    return np.concatenate(parts * repeats)


class Policy(torch.nn.Module):
    """A policy that always gives the same torque and entropy."""

    def __init__(self, torque, entropy):
        super().__init__()
        self.torque, self.entropy = torque, entropy
        self.fc_state = torch.nn.Identity()
        self.fc_mu = lambda state: torch.full([len(state), 1], math.atanh(torque / 2.0001))

    def gaussian(self, state):
        return torch.distributions.Normal(self.fc_mu(state), 1.0)

    def forward(self, state):
        same = torch.ones([len(state), 1])
        return self.torque * same, self.entropy * same


def steady(torque=0.0, entropy=0.0):
    agent = ours.SAC()
    agent.model_action = Policy(torque, entropy)
    return agent


def critic(agent, function):
    """Let both critics answer function(states [n, 3], torques [n]) in numpy; the second a bit more,
    so that the smaller one is the first."""
    def forward(more):
        def answer(state, action):
            found = function(state.double().numpy(), action[:, 0].double().numpy())
            return torch.tensor(found + more)[:, None]
        return answer
    agent.model_value1.forward, agent.model_value2.forward = forward(0), forward(1)
    return agent


def honest(agent, more=lambda torque: 0 * torque):
    """An agent whose critic promises what follows, and something more of the torque."""
    def exact(states, u):
        delivered, bonus = torques.deliver_with_bonus(agent, states, u)
        return delivered + bonus + more(u)
    return critic(agent, exact)


# The module's pendulum

def test_pendulum_is_gyms():
    rng = np.random.default_rng(0)
    angle = np.concatenate([rng.uniform(-math.pi, math.pi, 300), [math.pi, -math.pi, 3.1415, 0]])
    angle[:50] = np.radians(180 - rng.uniform(-1e-3, 1e-3, 50))
    speed, torque = rng.uniform(-8, 8, len(angle)), rng.uniform(-2, 2, len(angle))
    speed[50:100] = rng.choice([-8, 8, 7.99, -7.99], 50)
    torque[80:120] = rng.choice([-2, 2], 40)
    state = np.stack([np.cos(angle), np.sin(angle), speed], axis=1)
    reward, following = ours.pendulum(state, torque)
    env = ours.MyWrapper().unwrapped
    env.reset()
    assert (abs(following[:, 2]) == 8).sum() > 10                   # some speeds are clipped
    for k in range(len(angle)):
        env.state = np.array([angle[k], speed[k]])
        wanted, wanted_reward, *_ = env.step([torque[k]])
        np.testing.assert_allclose(following[k], wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(reward[k], wanted_reward, rtol=0, atol=1e-6)


# Promise, delivery, bonus

def test_delivery_and_bonus_of_a_pendulum_at_rest():
    hanging = np.array([[-1.0, 0, 0]])
    agent = steady(entropy=1.5)
    delivered, bonus = torques.deliver_with_bonus(agent, hanging, np.zeros(1))
    assert delivered == pytest.approx(100 * (8 - math.pi ** 2) / 8, abs=1e-6)
    assert bonus == pytest.approx(0.01 * 1.5 * 0.99 / (1 - 0.99))   # from step 1 on, without an end
    assert not agent.model_action._forward_hooks


def test_the_bonus_counts_the_steps_that_a_reward_follows():
    alone = torques.discounted_entropies(np.eye(29))        # column k: only step k + 1 has entropy
    assert alone.shape == (29,)
    assert alone[0] == pytest.approx(0.99)
    assert alone[8] == pytest.approx(0.99 ** 9)
    assert alone[9] == pytest.approx(0.99 ** 10 + 0.99 ** 30 / 0.01 / 20)       # of the last 20
    assert alone[28] == pytest.approx(0.99 ** 29 + 0.99 ** 30 / 0.01 / 20)
    forever = torques.discounted_entropies(np.ones(199))
    assert forever == pytest.approx(0.99 / (1 - 0.99))


def test_only_the_torque_differs_within_a_state():
    twice = np.array([[1.0, 0, 0], [1, 0, 0]])
    promised, delivered, bonus = torques.over_torques(ours.SAC(), twice, np.array([0.5, 0.5, -2]))
    for found in (delivered, bonus):
        assert (found[:, 0] == found[:, 1]).all()           # the same noise
        assert (found[:, 0] != found[:, 2]).all()
        assert found[0, 0] != found[1, 0]                   # another state, other noise
    assert promised[0, 0] == promised[1, 1] != promised[0, 2]


def test_measure_of_a_critic_that_is_right():
    agent = honest(ours.SAC())
    found = torques.measure(agent, rows_everywhere(-1.0, 1.0), 0)
    for name in ("swing", "stand", "own"):
        assert found[f"{name} excess"] == 0
    for kind in ("swing", "stand"):
        assert found[f"{kind} rank delivered and bonus"] == 1
        total = found[f"{kind} delivered"] + found[f"{kind} bonus"]
        assert found[f"{kind} promised"] == pytest.approx(total, abs=2e-4)
        assert found[f"{kind} bonus"] != 0
        assert found[f"{kind} far minus near"] == 0


def test_ranges_and_ranks_of_a_critic_that_is_upside_down():
    rows = rows_everywhere(-1.0)
    found = torques.measure(critic(steady(), lambda s, u: 0.0 * u), rows, 0)
    assert found["swing rank delivered"] is None            # a flat critic orders nothing
    assert found["swing range promised"] == 0 < found["swing range delivered"]
    agent = steady(1.0)
    upside_down = critic(agent, lambda s, u: -2 * ours.deliver(agent, s, u))
    found = torques.measure(upside_down, rows, 0)
    assert found["swing rank delivered"] == -1
    assert found["swing range promised"] == pytest.approx(2 * found["swing range delivered"],
                                                          abs=2e-4)


def test_rank_with_the_data_and_with_a_good_agent():
    good = steady(1.0)
    agent = critic(steady(-2.0), lambda s, u: -abs(u - 0.6))
    found = torques.measure(agent, rows_everywhere(0.6), 0)
    assert found["swing rank density"] == found["stand rank density"] == 1
    assert "swing rank good" not in found
    found = torques.measure(critic(agent, lambda s, u: ours.deliver(good, s, u)),
                            rows_everywhere(0.6), 0, good)
    assert found["swing rank good"] == found["stand rank good"] == 1
    assert found["swing rank delivered"] < 1


def test_near_and_far_torques_of_the_data():
    def more(u):             # at -1: 7; a quarter N m away: 10; over three quarters: -3; else 100
        distance = abs(u + 1)
        between = np.where(distance > 0.75, -3, 100)
        return np.select([distance == 0, distance == 0.25], [7, 10], between)

    agent = honest(steady(0.2, 0.7), more)
    found = torques.measure(agent, rows_everywhere(-1.0), 0)
    for kind in ("swing", "stand"):
        assert found[f"{kind} excess near"] == 9                             # -1.25, -1, -0.75
        assert found[f"{kind} excess far"] == -3
        assert found[f"{kind} far minus near"] == -12
        assert found[f"{kind} states with both"] == found[f"{kind} states"]
        every = 7 + 2 * 10 - 10 * 3 + 4 * 100
        assert found[f"{kind} excess"] == pytest.approx(every / 17, abs=1e-4)
    rows = rows_everywhere(-1.8, -0.9, 0.0, 0.9, 1.8)
    found = torques.summary(agent, rows, rows[:9, :3].astype(float))
    assert math.isnan(found["excess far"]) and math.isnan(found["far minus near"])
    assert found["states with both"] == 0


def test_far_minus_near_compares_within_a_state():
    # left: near and far torques; right: near ones alone, in states that are promised 50 more
    left = rows_of(np.full(100, -1.5), 0.0, -1.0)
    right_angles, right_torques = np.meshgrid([1.0, 1.2, 1.4, 1.6, 1.8], np.linspace(-2, 2, 20))
    right = rows_of(right_angles, 0.0, right_torques)
    agent = steady()

    def exact(states, u):
        delivered, bonus = torques.deliver_with_bonus(agent, states, u)
        return delivered + bonus + np.where(states[:, 1] > 0, 50, 0)

    found = torques.measure(critic(agent, exact), np.concatenate([left, right]), 0)
    assert found["swing far minus near"] == 0
    assert found["swing excess far"] < found["swing excess near"]
    assert 0 < found["swing states with both"] < found["swing states"] == 40


def test_states_that_are_fewer_or_none():
    standing = steady(0.2)
    rows = rows_of(np.radians(np.full(64, 3.0)), 0.5, 1.0)
    rows[:4] = rows_of(np.radians(np.full(4, 90.0)), 0.5, 1.0)
    found = torques.measure(standing, rows, 0)
    assert found["swing states"] == 4
    assert found["stand states"] == 40
    found = torques.measure(standing, rows[4:], 0)
    assert found["swing states"] == found["swing states with both"] == 0
    assert found["swing excess"] is found["swing rank density"] is None
    assert found["stand excess"] is not None


def test_measure_is_flat_and_repeats_and_disturbs_nothing():
    agent, rows = ours.SAC(), rows_everywhere(0.5)
    before = torch.get_rng_state()
    found = torques.measure(agent, rows, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {type(value) for value in found.values()} <= {int, float, type(None)}
    assert (found["swing states"], found["stand states"]) == (40, 40)
    assert torques.measure(agent, rows, 3) == found
    three, four = (torques.draw_states(rows, np.random.default_rng(seed)) for seed in (3, 4))
    assert (three != four).any()


# The data near a state

def test_what_stands_and_what_swings():
    states = rows_of(np.radians([19, -19, 19, 21, -21, 180]), [0.9, -0.9, 1.1, 0, 5, 0], 0)[:, :3]
    assert torques.stands(states).tolist() == [True, True, False, False, False, False]
    assert torques.swings(states).tolist() == [False, False, False, True, True, True]


def test_the_nearest_rows_torques():
    half_turn_faster = rows_of(np.zeros(20), 1.0, -1.0)             # 1 / 8 = 7 degrees away
    ten_degrees = rows_of(np.radians(np.full(20, 10.0)), 0.0, 1.0)
    rows = np.concatenate([ten_degrees, half_turn_faster])
    assert (torques.near_torques(rows, np.array([[1.0, 0, 0]])) == -1).all()
    over_the_edge = rows_of([3.1], 0.0, 0.0)[:, :3]
    rows = np.concatenate([rows_of(np.full(20, -3.1), 0.0, 2.0), rows_of(np.full(20, 2.9), 0, -2)])
    assert (torques.near_torques(rows, over_the_edge) == 2).all()   # angles go round
    rng = np.random.default_rng(0)
    rows = rows_of(rng.uniform(-3, 3, 500), rng.uniform(-8, 8, 500), rng.uniform(-2, 2, 500))
    distance = np.linalg.norm((rows[:, :3] - rows[7, :3]) / [1, 1, 8], axis=1)
    wanted = rows[distance.argsort()[:20], 3]
    np.testing.assert_array_equal(np.sort(torques.near_torques(rows, rows[7:8, :3])[0]),
                                  np.sort(wanted))


def test_densities_reflect_at_the_limits():
    uniform = np.linspace(-2, 2, 2001)[None]
    found = torques.densities(uniform)
    np.testing.assert_allclose(found, found.mean(), rtol=5e-3)
    assert torques.densities(np.array([[0.5]])).argmax() == 10
    one = torques.densities(np.array([[0.5]]), np.array([0.5, 0.75, 0.25]))[0]
    np.testing.assert_allclose(one, [1, math.exp(-0.5), math.exp(-0.5)], rtol=1e-3)


def test_rank_correlation_by_hand():
    first = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3], [5, 5, 5, 5]])
    second = np.array([[10.0, 30, 20, 40], [4, 3, 2, -9], [1, 2, 3, 4], [1, 2, 3, 4]])
    found = torques.rank_correlations(first, second)
    np.testing.assert_allclose(found, [0.8, -1, math.sqrt(0.9), math.nan])


# The policy

def linear(per_radian, per_speed):
    """A policy whose mean torque is near upright -(per_radian angle + per_speed speed)."""
    agent = ours.SAC()
    agent.model_action.fc_state = torch.nn.Linear(3, 128)                   # no ReLU
    with torch.no_grad():
        agent.model_action.fc_state.weight[:] = torch.eye(128, 3)           # the state and zeros
        agent.model_action.fc_state.bias[:] = 0
        agent.model_action.fc_mu.weight[0, :3] = -torch.tensor([0, per_radian, per_speed]) / 2
        agent.model_action.fc_mu.bias[:] = 0
    return agent


@pytest.mark.parametrize("gains", [(0.0, 0.0), (8.0, 2.0), (20.0, 0.0), (1.0, -3.0)])
def test_spectral_radius_of_a_linear_policy(gains):
    # speed' = speed + 0.05 (15 angle + 3 torque); angle' = angle + 0.05 speed'
    speed = np.array([0.75 - 0.15 * gains[0], 1 - 0.15 * gains[1]])
    matrix = np.array([np.array([1, 0]) + 0.05 * speed, speed])
    wanted = abs(np.linalg.eigvals(matrix)).max()
    assert torques.spectral_radius(linear(*gains)) == pytest.approx(wanted, abs=3e-3)


def test_spectral_radius_tells_falling_from_standing():
    assert torques.measure(linear(0.0, 0.0), rows_everywhere(0.5), 0)["radius"] == pytest.approx(
        1.2133, abs=1e-3)                       # the larger root of x^2 - 2.0375 x + 1
    assert torques.spectral_radius(linear(8.0, 2.0)) < 1


# The student's own episodes

def test_what_the_data_has():
    rows = rows_of([0.1, 0.1], 0.5, [-1.9, 0.1])
    states = rows_of([0.1, 0.2, 0.1, 3.0, 0.1], [0.5, 1.9, 0.5, 0.5, -0.5], 0)[:, :3].astype(float)
    found = torques.data_has(rows, states, np.array([-1.6, 0.4, 1.9, 0.1, 0.1]))
    assert found.tolist() == ["both", "both", "state only", "neither", "neither"]


@pytest.mark.parametrize("rows, kind", [
    (rows_everywhere(0.1), "both"), (rows_everywhere(-1.9), "state only"),
    (rows_of(np.full(64, 0.1), 7.5, 0.1), "neither")])            # too fast for its own starts
def test_own_steps_by_what_the_data_has(rows, kind):
    agent = honest(steady(0.1, 0.7), lambda u: 5 + 0 * u)
    found = torques.own_steps(agent, rows, 0)
    for name in ("both", "state only", "neither"):
        assert found[f"own {name} share"] == (name == kind)
    assert found[f"own {kind} excess"] == found["own excess"] == pytest.approx(5, abs=1e-4)


def test_own_steps_begin_at_the_starts():
    seen = []
    agent = critic(steady(0.1), lambda states, u: seen.append((states, u)) or 0.0 * u)
    torques.own_steps(agent, rows_everywhere(0.1), 0)
    states, u = seen[0]
    assert states.shape == (20 * 3, 3)                              # every tenth of 21 steps
    first = torques.starts(ours.Run(None, 0).starts(2, 20))
    np.testing.assert_allclose(states[:20], first, atol=1e-6)
    _, after, _ = torques.rollout(lambda state: np.full(20, 0.1), first)[0][[0, 10, 20]]
    np.testing.assert_allclose(states[20:40], after, atol=1e-5)
    np.testing.assert_allclose(u, 0.1, atol=1e-6)


def test_own_steps_are_split():
    data = rows_everywhere(0.1)
    right = data[data[:, 1] > 0]
    agent = steady(0.1)

    def exact(states, u):
        return ours.deliver(agent, states, u) + np.where(states[:, 1] > 0, 1, -1)

    found = torques.measure(critic(agent, exact), right, 0)
    assert found["own both excess"] == 1
    assert found["own neither excess"] == -1
    assert found["own both share"] + found["own neither share"] == pytest.approx(1)
    assert 0.1 < found["own both share"] < 0.9


# The interventions

def batch(n=8):
    state = torch.tensor(rows_of(np.linspace(-3, 3, n), 0.5, 0)[:, :3])
    over = torch.arange(n)[:, None] % 2
    return state, torch.full([n, 1], 0.5), torch.full([n, 1], -4.0), state.flip(0), over


def test_clone_target_follows_the_clone():
    state, action, reward, next_state, over = batch()
    student = torques.CloneTarget(steady(1.5, 4.0))
    student.model_value_next1.forward = lambda s, a: 3 * a + s[:, 2:]
    student.model_value_next2.forward = lambda s, a: 2 * a + s[:, 2:]
    target = student._get_target(reward, next_state, over)
    wanted = -4 + 0.99 * (1 - over) * (2 * 1.5 + 0.5 + 0.01 * 4)
    np.testing.assert_allclose(target, wanted, rtol=1e-6)


def test_clone_target_is_sac_in_all_else():
    torch.manual_seed(1)
    plain = ours.SAC()
    torch.manual_seed(1)
    student = torques.CloneTarget(None)
    student.clone = student                                 # its own policy: then it is SAC
    for agent in (plain, student):
        torch.manual_seed(2)
        agent.train(*batch())
        agent.train(*batch())
    for name in ("model_action", "model_value1", "model_value_next2"):
        for x, y in zip(getattr(plain, name).parameters(), getattr(student, name).parameters()):
            assert torch.equal(x, y)
    frozen = ours.BC()
    before = copy.deepcopy(frozen.model_action.state_dict())
    other = torques.CloneTarget(frozen)
    mine = copy.deepcopy(other.model_action.state_dict())
    other.train(*batch())
    assert all(torch.equal(x, before[k]) for k, x in frozen.model_action.state_dict().items())
    assert not all(torch.equal(x, mine[k]) for k, x in other.model_action.state_dict().items())


def test_fixed_temperature_stays_and_is_used():
    torch.manual_seed(1)
    plain = ours.SAC()
    torch.manual_seed(1)
    student = torques.FixedTemperature()
    for agent in (plain, student):
        torch.manual_seed(2)
        agent.train(*batch())
    assert torques.temperature(student) == pytest.approx(0.01)
    assert torques.temperature(plain) != pytest.approx(0.01, rel=1e-5)
    for x, y in zip(plain.model_action.parameters(), student.model_action.parameters()):
        assert torch.equal(x, y)
    hot = torques.FixedTemperature(0.3)
    for _ in range(5):
        hot.train(*batch())
    assert torques.temperature(hot) == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["uniform torques", "uniform states",
                                  "uniform states and torques"])
def test_changed_rows_are_steps_of_gym(kind):
    rows = rows_everywhere(1.0)
    before = rows.copy()
    teacher = steady(0.7)
    changed = torques.changed_rows(kind, rows, 5, teacher)
    assert changed.dtype == np.float32 and len(changed) == len(rows)
    np.testing.assert_array_equal(rows, before)
    env = ours.MyWrapper().unwrapped
    env.reset()
    for row in changed[:50].astype(float):
        env.state = np.array([math.atan2(row[1], row[0]), row[2]])
        following, reward, *_ = env.step([row[3]])
        np.testing.assert_allclose(row[5:8], following, atol=1e-5)
        assert row[4] == pytest.approx(reward, abs=1e-5)
    np.testing.assert_array_equal(torques.changed_rows(kind, rows, 5, teacher), changed)
    assert (torques.changed_rows(kind, rows, 6, teacher) != changed).any()


def even(values, limit):
    share = np.histogram(values, 8, (-limit, limit))[0] / len(values)
    np.testing.assert_allclose(share, 1 / 8, atol=0.02)


def test_what_changed_rows_change():
    rows, teacher = rows_everywhere(1.0), steady(0.7)
    rows[::10, 9] = 1
    rows[::7, 8] = 1
    changed = torques.changed_rows("uniform torques", rows, 5, teacher)
    np.testing.assert_array_equal(changed[:, [0, 1, 2, 8, 9]], rows[:, [0, 1, 2, 8, 9]])
    even(changed[:, 3], 2)
    for kind in ("uniform states", "uniform states and torques"):
        changed = torques.changed_rows(kind, rows, 5, teacher)
        np.testing.assert_array_equal(changed[:, 8:], rows[:, 8:])
        even(torques.angles(changed), math.pi)
        even(changed[:, 2], 8)
        if kind == "uniform states":
            np.testing.assert_allclose(changed[:, 3], 0.7, rtol=1e-6)
        else:
            even(changed[:, 3], 2)
    for kind in ("clone target", "fixed temperature"):
        assert torques.changed_rows(kind, rows, 5, teacher) is rows


def test_changed_rows_leave_the_random_numbers_alone():
    teacher = ours.SAC()
    before = torch.get_rng_state()
    torques.changed_rows("uniform states", rows_everywhere(1.0), 5, teacher)
    assert torch.equal(torch.get_rng_state(), before)


def constant_return(seeds, torque):
    """The mean return of one torque throughout, in gym itself."""
    total = 0.0
    for seed in seeds:
        env = ours.MyWrapper()
        env.reset(seed=seed)
        over = False
        while not over:
            _, reward, over, _ = env.step([torque])
            total += reward
    return total / len(seeds)


def test_returns_of_the_nearest_rows_torques():
    seeds = [5, 6, 7]
    agent = critic(ours.SAC(), lambda s, u: -(u - 0.1) ** 2)
    found = torques.nearest_returns(agent, rows_everywhere(1.2), seeds)
    assert found["best of the nearest"] == pytest.approx(constant_return(seeds, 1.2), abs=1e-3)
    assert found["random of the nearest"] == pytest.approx(found["best of the nearest"], abs=1e-9)
    found = torques.nearest_returns(agent, rows_everywhere(-1.5, 0.0, 0.5, 2.0), seeds)
    assert found["best of the nearest"] == pytest.approx(constant_return(seeds, 0.0), abs=1e-3)
    assert found["random of the nearest"] != pytest.approx(found["best of the nearest"], abs=1)


def test_the_random_choice_is_uniform(monkeypatch):
    chosen, rollout = [], torques.rollout

    def spy(choose, state):
        chosen.append(choose(np.repeat(state[:1], 1000, axis=0)))
        return rollout(choose, state)

    monkeypatch.setattr(torques, "rollout", spy)
    rows = rows_everywhere(-1.5, 0.0, 0.5, 2.0)
    torques.nearest_returns(critic(ours.SAC(), lambda s, u: u), rows, [5])
    best, random = chosen
    assert (best == 2).all()
    found, counts = np.unique(random, return_counts=True)
    assert found.tolist() == [-1.5, 0, 0.5, 2]
    np.testing.assert_allclose(counts, 250, atol=60)


@pytest.mark.parametrize("kind, student", [
    ("uniform torques", ours.SAC), ("uniform states", ours.SAC),
    ("uniform states and torques", ours.SAC), ("clone target", torques.CloneTarget),
    ("fixed temperature", torques.FixedTemperature)])
def test_students_of_the_interventions(kind, student, monkeypatch):
    monkeypatch.setattr(torques, "CLONING", 2)
    agent = torques.make_student(kind, rows_everywhere(1.0), 4)
    assert type(agent) is student
    following = torch.rand(1)
    ours.seed_everything(4)
    plain = ours.SAC()
    for mine, other in ((agent.model_action, plain.model_action),
                        (agent.model_value1, plain.model_value1)):
        for x, y in zip(mine.parameters(), other.parameters()):
            assert torch.equal(x, y)                        # it begins as the main job's does
    assert torch.equal(following, torch.rand(1))
    if kind == "clone target":
        ours.seed_everything(4)
        assert type(agent.clone) is ours.BC
        untrained = ours.BC().model_action.state_dict()
        assert not all(torch.equal(x, untrained[name])
                       for name, x in agent.clone.model_action.state_dict().items())


# The picture

def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def data_of(rows):
    data = ours.Data()
    data.rows = rows
    return data


def test_a_panel_is_the_main_jobs_drawing_with_a_shade():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure

    agent = critic(steady(0.4), lambda s, u: 60 + 30 * u + s[:, 2])
    data = data_of(np.concatenate([rows_of(np.full(20, 0.1), 0.5, np.linspace(-1, 0.9, 20)),
                                   rows_of(np.full(20, 3.0), 0.5, 2.0)]))
    state = data.rows[3, :3]
    mine, plain = Figure().subplots(1, 2)
    torques.panel(mine, data, agent, state)
    ours.draw_state(plain, data, agent, state)
    found, wanted = lines(mine), lines(plain)
    assert [*found] == [*wanted]
    for label in wanted:
        np.testing.assert_array_equal(np.array(found[label].get_xydata()),
                                      np.array(wanted[label].get_xydata()))
    np.testing.assert_allclose(np.ravel(found["promised"].get_ydata()),
                               60 + 30 * np.linspace(-2, 2, 41) + 0.5, rtol=1e-5)
    delivered = found["delivered"].get_ydata()
    corners = np.concatenate([path.vertices for path in mine.collections[0].get_paths()])
    assert mine.collections[0].get_label() == "promised too much"
    assert corners[:, 1].max() == pytest.approx(120.5, abs=0.01)
    shaded = corners[:, 0].min()                            # from where the promise is higher on
    promised = 60 + 30 * shaded + 0.5
    assert promised == pytest.approx(np.interp(shaded, np.linspace(-2, 2, 41), delivered), abs=0.1)


def test_the_three_states():
    angle = np.radians([1, 5, 170, -120, 100, -60, 178, 10])
    speed = [0.1, 0.0, 0.0, 6.0, 7.9, 2.0, 0.1, -7.95]
    rows = rows_of(angle, speed, 0)
    found = torques.three_states(rows)
    assert [*found] == ["upright", "swinging up", "hanging"]
    for state, k in zip(found.values(), (0, 3, 6)):         # 7.9 rad/s at 100 degrees goes down
        np.testing.assert_array_equal(state, rows[k, :3])


def test_the_picture_has_a_row_for_each_agent(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    agents = {"sac": critic(steady(-0.5), lambda s, u: 60 + u), "cql": steady(0.5)}
    path = tmp_path / "torques.png"
    figure = torques.draw(agents, data_of(rows_everywhere(1.0)), {"sac": -1516.6, "cql": -157},
                          path, "Why")
    assert path.stat().st_size > 10_000
    titles = [band._suptitle.get_text() for band in figure.subfigs]
    assert titles == ["sac: return -1,517", "cql: return -157"]
    panels = [axes for band in figure.subfigs for axes in band.axes]
    assert len(panels) == 6 and len({axes.get_ylim() for axes in panels}) == 1
    for axes in panels[:3]:
        np.testing.assert_allclose(np.ravel(lines(axes)["promised"].get_ydata()),
                                   np.linspace(58, 62, 41))
    assert len(figure.legends) == 1
    assert "promised too much" in [text.get_text() for text in figure.legends[0].texts]
