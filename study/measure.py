"""What a critic promises for each torque and what is then delivered: measured, and changed.

Pendulum can be set to any state, so that each promise can be checked. The words of this file:

promise     the smaller critic's value of a torque in a state
delivery    what the torque, and then the agent's policy, are paid
bonus       temperature times the policy's later entropies: a promise counts it, a delivery does not
excess      promise - delivery - bonus, that is the over-estimate, like with like

All four are in the unit of the discounted sum of (reward + 8) / 8, of which no policy can deliver
more than 100. Torques are in N m. A state is (cos angle, sin angle, speed in rad/s), 0 upright.
Many episodes are played side by side, by formulas of Pendulum that a test holds to gym's.
"""
import math
import pathlib
import sys

import numpy as np
import torch
from scipy import spatial, stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import cql_pendulum as ours  # noqa: E402

TORQUES = np.linspace(-2, 2, 17)      # a quarter of a N m apart
STATES = 300                          # of a kind, in one measurement
NEAREST = 20                          # rows of the data that count as near a state
NEAR, FAR = 0.25, 0.75                # N m to the nearest of these rows' torques
WIDTH = 0.25                          # N m, the standard deviation of the density's kernel
EPISODES, EVERY = 20, 10              # of the student's own: how many, and each how many steps
CELLS, BINS = (12, 8), 8              # of angle and speed, 30 degrees by 2 rad/s; torque, 0.5 N m
CLONING = 20_000                      # updates of the clone that chooses a target's torques
INTERVENTIONS = ("clone target", "uniform torques", "uniform states", "uniform states and torques",
                 "fixed temperature")


# Pendulum, many at a time

def pendulum(states, torques):
    """One step of Pendulum-v1 in many states: [n, 3], [n] -> rewards [n], next states [n, 3]."""
    angle, speed = angles(states), states[:, 2]
    rewards = -(angle ** 2 + 0.1 * speed ** 2 + 0.001 * torques ** 2)
    # gravity 10 m/s^2, length 1 m, mass 1 kg, a step of 0.05 s
    speed = np.clip(speed + (15 * np.sin(angle) + 3 * torques) * 0.05, -8, 8)
    return rewards, states_of(angle + 0.05 * speed, speed)


def states_of(angle, speed):
    """Radians from upright and rad/s, [n] each -> [n, 3]."""
    return np.stack([np.cos(angle), np.sin(angle), speed], axis=1)


def angles(states):
    """Radians from upright, in [-pi, pi]: [n, 3] -> [n]."""
    return np.arctan2(states[:, 1], states[:, 0])


def seeds_of(seed, purpose, n):
    """Seeds of n starts for a purpose (0: tests, 1: final episodes, 2: own_steps), the same for all
    students of a seed; those of the program."""
    return ours.Run(None, seed).starts(purpose, n)


def starts(seeds):
    """Pendulum's first states of these seeds, not rounded to float32: [n, 3]."""
    env = ours.MyWrapper()
    points = []
    for seed in seeds:
        env.unwrapped.reset(seed=seed)
        points.append(env.unwrapped.state)
    return states_of(*np.array(points).T)


def rollout(choose, states):
    """Episodes side by side, in which choose gives torques for states, [n, 3] -> [n]. Returns the
    states [200, n, 3], torques [200, n] and rewards [200, n]."""
    steps = []
    for _ in range(ours.EPISODE):
        torques = choose(states)
        rewards, following = pendulum(states, torques)
        steps.append((states, torques, rewards))
        states = following
    return tuple(np.stack(column) for column in zip(*steps))


@torch.no_grad()
def draw(agent, states):
    """Torques of the policy and their entropies: [n, 3] -> [n], [n]."""
    action, entropy = agent.model_action(torch.from_numpy(states).float())      # [n, 1] each
    return action[:, 0].double().numpy(), entropy[:, 0].double().numpy()


def play(agent, seeds):
    """The program's test of an agent, an episode for each seed: a dict of returns, promised (of the
    first torque), delivered and bonus, [n] each, and the states [200, n, 3] and torques [200, n].
    The same seeds, the same starts and noise."""
    entropies = []

    def choose(states):
        torques, found = draw(agent, states)
        entropies.append(found)
        return torques

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        states, torques, rewards = rollout(choose, starts(seeds))
    return {"return": rewards.sum(axis=0), "promised": promise(agent, states[0], torques[0]),
            "delivered": ours.discounted(rewards),
            "bonus": temperature(agent) * discounted_entropies(np.stack(entropies[1:])),
            "states": states, "torques": torques}


# What a torque promises and delivers

@torch.no_grad()
def promise(agent, states, torques):
    """What the smaller critic promises: [n, 3], [n] -> [n]."""
    states = torch.from_numpy(states).float()
    torques = torch.from_numpy(torques).float()[:, None]                        # [n, 1]
    values = agent.model_value1(states, torques), agent.model_value2(states, torques)
    return torch.min(*values)[:, 0].double().numpy()


def deliver(agent, states, torques):
    """What each torque and then the policy deliver, and the bonus of that policy: [n, 3], [n] ->
    [n], [n]. The same noise follows whatever the torques are."""
    rewards, entropies = [], []                                 # [n] a step
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(ours.EPISODE):
            reward, states = pendulum(states, torques)
            torques, entropy = draw(agent, states)
            rewards.append(reward)
            entropies.append(entropy)
    # the entropy of step T is left out, as no reward follows it
    bonus = temperature(agent) * discounted_entropies(np.stack(entropies[:-1]))
    return ours.discounted(np.stack(rewards)), bonus


def discounted_entropies(entropies):
    """The entropies of the steps 1 to T - 1, [T - 1, ...] -> their discounted sum, [...], with the
    tail of ours.discounted."""
    steps = len(entropies) + 1
    tail = ours.GAMMA ** steps / (1 - ours.GAMMA) * entropies[-20:].mean(axis=0)
    return ours.GAMMA ** np.arange(1, steps) @ entropies + tail


def over_torques(agent, states, torques=TORQUES):
    """Promise, delivery and bonus of every torque in every state: [n, 3], [m] -> three [n, m]. The
    torques of a state are followed by the same noise, so that only they make a difference."""
    columns = []
    for torque in torques:
        same = np.full(len(states), torque)                                     # [n]
        columns.append((promise(agent, states, same), *deliver(agent, states, same)))
    return tuple(np.stack(column, axis=1) for column in zip(*columns))


@torch.no_grad()
def mean_torque(agent, states):
    """The torque at the policy's mean, 2 tanh(mu): [n, 3] -> [n]."""
    policy = agent.model_action
    mu = policy.fc_mu(policy.fc_state(torch.tensor(states).float()))                # [n, 1]
    return (ours.TORQUE * mu.tanh())[:, 0].double().numpy()


def temperature(agent):
    return float(agent.alpha.detach().exp())


# The data near a state

def stands(states):
    """Whether a state is within 20 degrees of upright and slower than 1 rad/s: [n, 3] -> [n]."""
    return (abs(angles(states)) < math.radians(20)) & (abs(states[:, 2]) < 1)


def swings(states):
    """Whether a state is more than 20 degrees from upright, at any speed: [n, 3] -> [n]. A state
    near upright that is faster than 1 rad/s neither swings nor stands."""
    return abs(angles(states)) > math.radians(20)


def near_torques(rows, states):
    """The torques of the 20 rows nearest to each state, [n, 3] -> [n, 20], by cos, sin, speed / 8:
    a radian near upright counts as much as 8 rad/s."""
    tree = spatial.KDTree(rows[:, :3] / [1, 1, 8])
    _, nearest = tree.query(states / [1, 1, 8], NEAREST)                        # [n, 20]
    return rows[nearest, 3].astype(float)


def densities(found, torques=TORQUES):
    """A Gaussian kernel density of the torques found, up to a factor: [n, 20], [m] -> [n, m]. What
    the kernel puts beyond -2 and 2 is reflected: many torques of an expert lie at the limits."""
    total = np.zeros([len(found), len(torques)])
    for centres in (found, -2 * ours.TORQUE - found, 2 * ours.TORQUE - found):
        distance = (torques[:, None] - centres[:, None, :]) / WIDTH             # [n, m, 20]
        total += np.exp(-distance ** 2 / 2).mean(axis=2)
    return total


# The measure

def measure(agent, rows, seed, good=None):
    """What a critic promises too much, where, and what it orders torques by: a flat dict of rounded
    numbers (None where nothing is to be measured), the same for every critic.

    300 states of the rows that swing and 300 that stand (all where there are fewer), drawn by the
    seed, times 17 torques: see `summary`. Then the policy's `spectral_radius` and the agent's
    `own_steps`. `good` is an agent whose deliveries say what torque is good: a teacher's, or an
    expert's clone. Random numbers elsewhere are not disturbed."""
    rng = np.random.default_rng(seed)
    found = {}
    for kind, chosen in (("swing", swings(rows)), ("stand", stands(rows))):
        states = draw_states(rows[chosen], rng)
        for name, value in summary(agent, rows, states, good).items():
            found[f"{kind} {name}"] = value
    found["radius"] = spectral_radius(agent)
    found.update(own_steps(agent, rows, seed))
    return {name: rounded(value) for name, value in found.items()}


def draw_states(rows, rng):
    """At most 300 different states of the rows: [n, 3]."""
    chosen = rng.permutation(len(rows))[:STATES]
    return rows[chosen, :3].astype(float)


def summary(agent, rows, states, good=None):
    """The numbers of some states. A mean over torques and states, unless something else is said.

    states; promised, delivered, bonus, excess
    excess near, excess far    of torques within 0.25 and beyond 0.75 N m of the data's near a state
    states with both           how many have near and far torques
    far minus near             mean excess of a state's far torques minus its near ones', over these
    range promised, delivered  the most of a state's torques minus the least, mean over states
    rank ...                   Spearman's correlation of a state's promises with its deliveries,
                               deliveries and bonus, density of the data's torques, and the good
                               agent's deliveries; mean over states"""
    promised, delivered, bonus = over_torques(agent, states)                    # [n, 17] each
    excess = promised - delivered - bonus
    torques = near_torques(rows, states)                                        # [n, 20]
    distance = abs(TORQUES[:, None] - torques[:, None, :]).min(axis=2)          # [n, 17]
    near = np.where(distance <= NEAR, excess, np.nan)
    far = np.where(distance > FAR, excess, np.nan)
    difference = np.array([mean(x) - mean(y) for x, y in zip(far, near)])       # [n]
    found = {
        "states": len(states),
        "promised": mean(promised),
        "delivered": mean(delivered),
        "bonus": mean(bonus),
        "excess": mean(excess),
        "excess near": mean(near),
        "excess far": mean(far),
        "states with both": int((~np.isnan(difference)).sum()),
        "far minus near": mean(difference),
        "range promised": mean(np.ptp(promised, axis=1)),
        "range delivered": mean(np.ptp(delivered, axis=1)),
        "rank delivered": mean(rank_correlations(promised, delivered)),
        "rank delivered and bonus": mean(rank_correlations(promised, delivered + bonus)),
        "rank density": mean(rank_correlations(promised, densities(torques))),
    }
    if good is not None:
        _, best, _ = over_torques(good, states)
        found["rank good"] = mean(rank_correlations(promised, best))
    return found


def spectral_radius(agent):
    """The largest size of an eigenvalue of one step around upright under the policy's mean: above 1
    the pendulum leaves upright, below 1 it comes back."""
    size = 0.01                                                   # rad and rad/s
    states = states_of(*size * np.array([[1, -1, 0, 0], [0, 0, 1, -1]]))        # [4, 3]
    _, following = pendulum(states, mean_torque(agent, states))
    after = np.stack([angles(following), following[:, 2]])                      # [2, 4]
    jacobian = (after[:, ::2] - after[:, 1::2]) / (2 * size)                    # [2, 2]
    return float(abs(np.linalg.eigvals(jacobian)).max())


def own_steps(agent, rows, seed):
    """The excess along the agent's own episodes, every tenth step of 20, by what the data has:
    "both" the state's cell with the torque's bin in it, the "state only", or "neither" (the cells
    and bins of histogram). The share of the steps, and their mean excess."""
    played = play(agent, seeds_of(seed, 2, EPISODES))
    states = played["states"][::EVERY].reshape(-1, 3)                           # [20 * 20, 3]
    torques = played["torques"][::EVERY].reshape(-1)                            # [20 * 20]
    delivered, bonus = deliver(agent, states, torques)
    excess = promise(agent, states, torques) - delivered - bonus
    known = data_has(rows, states, torques)
    found = {}
    for kind in ("both", "state only", "neither"):
        found[f"own {kind} share"] = float((known == kind).mean())
        found[f"own {kind} excess"] = mean(excess[known == kind])
    found["own excess"] = mean(excess)
    return found


def data_has(rows, states, torques):
    """What the rows have of each state and torque, "both", "state only" or "neither": [n]."""
    counts = histogram(rows[:, :3], rows[:, 3])                                 # [12, 8, 8]
    angle, speed, torque = bins(states, torques)
    both, state = counts[angle, speed, torque] > 0, counts[angle, speed].sum(axis=1) > 0
    return np.select([both, state], ["both", "state only"], "neither")


def bins(states, torques):
    """In which cell of angle and speed each state lies and in which bin its torque: three [n]."""
    found = []
    for value, most, n in ((angles(states), math.pi, CELLS[0]), (states[:, 2], 8, CELLS[1]),
                           (torques, 2, BINS)):
        edges = np.linspace(-most, most, n + 1)[1:-1]
        found.append(np.digitize(value, edges))
    return tuple(found)


def histogram(states, torques):
    """How many of the states and torques lie in each cell and bin: [n, 3], [n] -> [12, 8, 8]."""
    counts = np.zeros([*CELLS, BINS])
    np.add.at(counts, bins(states, torques), 1)
    return counts


def coverage(rows):
    """The mean number of torque bins of 8 that the rows occupy in a state cell that they visit."""
    occupied = (histogram(rows[:, :3], rows[:, 3]) > 0).sum(axis=2)
    return occupied[occupied > 0].mean()


def outside(rows, states, torques):
    """The share of visited states and torques, [n, 3] and [n], that are not "both" in the rows."""
    return (data_has(rows, states, torques) != "both").mean()


def contrast_and_gap(agent, rows):
    """Two numbers that need no environment, means over 500 states of the data. Q is the smaller
    critic, m its mean over 41 torques from -2 to 2 N m.

    contrast   Q(state, the data's torque) - m of Q(state, torque)
    gap        log(4 N m * m of exp(Q(state, torque))) - Q(state, the data's torque)

    The gap is CQL's penalty, with the integral over all torques for its estimate: log 4 where Q is
    flat, and least where Q is the log of the density of the data's torques, per N m, plus a
    constant. Then it is the entropy of these torques, which has no bound below."""
    rows = rows[np.linspace(0, len(rows) - 1, 500).astype(int)]
    torques = np.linspace(-2, 2, 41)
    mine = promise(agent, rows[:, :3], rows[:, 3])
    every = promise(agent, rows[:, :3].repeat(41, axis=0), np.tile(torques, 500)).reshape(500, 41)
    most = every.max(axis=1)                                    # or exp overflows
    integral = np.log(4 * np.exp(every - most[:, None]).mean(axis=1)) + most
    return (mine - every.mean(axis=1)).mean(), (integral - mine).mean()


def rank_correlations(first, second):
    """Spearman's correlation within each row, NaN where either is constant: [n, m] twice -> [n]."""
    first, second = (stats.rankdata(x, axis=1) - (x.shape[1] + 1) / 2 for x in (first, second))
    with np.errstate(invalid="ignore"):                                         # 0 / 0
        return (first * second).mean(axis=1) / (first.std(axis=1) * second.std(axis=1))


def mean(values):
    """The mean of those that are not NaN, or NaN."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def rounded(value, digits=5):
    """A number for a file; None for NaN."""
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else round(value, digits)


# The interventions

class CloneTarget(ours.SAC):
    """SAC whose target follows a frozen clone of the data's policy, in torque and entropy. It never
    bootstraps through torques of its own; all else is SAC."""

    def __init__(self, clone):
        super().__init__()
        self.clone = clone

    @torch.no_grad()
    def _get_target(self, reward, next_state, over):
        action, entropy = self.clone.model_action(next_state)                   # [b, 1]
        value1 = self.model_value_next1(next_state, action)                     # [b, 1]
        value2 = self.model_value_next2(next_state, action)                     # [b, 1]
        value = torch.min(value1, value2) + self.alpha.exp() * entropy          # [b, 1]
        return reward + ours.GAMMA * (1 - over) * value


def fixed_temperature(agent):
    """The agent, whose temperature stays 0.01: is one that explodes a cause, or a symptom?"""
    agent.alpha.requires_grad_(False)
    return agent


def changed_rows(kind, rows, seed, teacher):
    """The rows that an intervention's student learns from: as many, each the start of one step.

    uniform torques               the data's states, torques drawn uniformly from [-2, 2]
    uniform states                any angle, any speed up to 8 rad/s; the teacher's torque there
    uniform states and torques    both drawn uniformly
    all others                    the data's rows

    With uniform torques the next states leave the data, too, by one step."""
    if not kind.startswith("uniform"):
        return rows
    rng, n = np.random.default_rng(seed), len(rows)
    states = rows[:, :3]
    if "states" in kind:
        states = states_of(rng.uniform(-math.pi, math.pi, n), rng.uniform(-8, 8, n))
    if "torques" in kind:
        torques = rng.uniform(-2, 2, n)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torques, _ = draw(teacher, states)
    changed = rows.copy()                                       # the flags stay: none is terminal
    changed[:, :3], changed[:, 3] = states, torques                             # float32
    reward, following = pendulum(changed[:, :3].astype(float), changed[:, 3].astype(float))
    changed[:, 4], changed[:, 5:8] = reward, following
    return changed


def nearest_returns(agent, rows, seeds):
    """Mean returns of two ways to choose among the torques of the 20 nearest rows, from the same
    starts: the "best" by the smaller critic, and a "random" one. Both stay with torques that the
    data has near the state; only the first asks the critic."""
    rng = np.random.default_rng(seeds[0])

    def best(states, torques):
        values = promise(agent, states.repeat(NEAREST, axis=0), torques.reshape(-1))
        return values.reshape(-1, NEAREST).argmax(axis=1)                       # [n]

    def anyone(states, torques):
        return rng.integers(NEAREST, size=len(states))                          # [n]

    found = {}
    for name, pick in (("best", best), ("random", anyone)):
        def choose(states, pick=pick):
            torques = near_torques(rows, states)                                # [n, 20]
            return torques[np.arange(len(states)), pick(states, torques)]
        _, _, rewards = rollout(choose, starts(seeds))
        found[f"{name} of the nearest"] = rounded(float(rewards.sum(axis=0).mean()))
    return found


def make_student(kind, rows, seed):
    """The student of an intervention, seeded as the main job's student is.

    clone target         a clone of the data, trained first, chooses the target's torques
    fixed temperature    SAC whose temperature stays 0.01
    all others           SAC; what changes are its rows, see changed_rows"""
    ours.seed_everything(seed)
    if kind.startswith("uniform"):
        return ours.SAC()
    if kind == "fixed temperature":
        return fixed_temperature(ours.SAC())
    clone = ours.BC()
    data = ours.Data()
    data.rows = rows
    for _ in range(CLONING):
        clone.train(*data.get_sample())
    ours.seed_everything(seed)
    return CloneTarget(clone)
