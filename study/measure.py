"""What a critic promises for each torque and what is then delivered: measured, and changed.

promise     the smaller critic's value of a torque in a state
delivery    what the torque, and then the agent's policy, are paid
bonus       temperature times the policy's later entropies: a promise counts it, a delivery does not
excess      promise - delivery - bonus, that is the over-estimate, like with like

All are discounted sums of (reward + 8) / 8, 100 at most. Torques are in N m; a state is (cos angle,
sin angle, speed in rad/s), 0 upright. Returns are played in the program's own `env`; what needs
5,100 episodes at once, by `pendulum`.
"""
import argparse
import math
import pathlib
import sys

import numpy as np
import torch
from scipy import spatial, stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import cql_pendulum as ours  # noqa: E402

TORQUES = np.linspace(-2, 2, 17)      # a quarter of a N m apart
CHOICES = torch.linspace(-2, 2, 41).numpy()     # of which the greedy way takes the best
STATES = 300                          # of a kind, in one measurement
NEAREST = 20                          # rows of the data that count as near a state
NEAR, FAR = 0.25, 0.75                # N m to the nearest of these rows' torques
WIDTH = 0.25                          # N m, the standard deviation of the density's kernel
BINS = 8                              # of torques, 0.5 N m each
CLONING = 20_000                      # updates of the clone that chooses a target's torques
INTERVENTIONS = ("clone target", "uniform torques", "uniform states", "uniform states and torques",
                 "fixed temperature")
DIGITS = {"return": 2, "mean": 2, "greedy": 2, "promised": 3, "delivered": 3, "temperature": 5,
          "outside": 4, "contrast": 3, "gap": 3}        # what final gives


# Final episodes, in three ways

def final(agent, rows, seed):
    """100 final episodes of an agent, the same starts for all of a seed: a dict of rounded means.

    return       by torques as the policy draws them; with it promised and delivered
    mean         the return by the policy's mean torque
    greedy       the return by the torque of 41 that the smaller critic likes best
    outside      how many of the drawn steps are new to the rows; then see contrast_and_gap

    A late policy and a right critic: greedy is good, the others are not."""
    seeds, steps = seeds_of(seed, 1, 100), []

    def drawn(state):
        steps.append([*state, agent.get_action(state)])
        return steps[-1][3]

    def greedy(state):
        return CHOICES[agent.promise(np.tile(state, (41, 1)), CHOICES).argmax()].item()

    def play(choose):
        return ours.evaluate(argparse.Namespace(get_action=choose, promise=agent.promise), seeds)

    found = dict(zip(("return", "promised", "delivered"), map(np.mean, play(drawn))))
    found["mean"] = play(lambda state: mean_torque(agent, state[None])[0])[0].mean()
    steps = np.array(steps, float)
    found["outside"] = outside(rows, steps[:, :3], steps[:, 3])
    if not isinstance(agent, ours.BC):                  # whose critics are untrained
        found["greedy"] = play(greedy)[0].mean()
        found["temperature"] = temperature(agent)
        found["contrast"], found["gap"] = contrast_and_gap(agent, rows)
    return {name: round(float(found[name]), digits) for name, digits in DIGITS.items()
            if name in found and not np.isnan(found[name])}


@torch.no_grad()
def mean_torque(agent, states):
    """The torque at the policy's mean, 2 tanh(mu): [n, 3] -> [n]."""
    mu = gaussian(agent, torch.tensor(states).float()).mean                     # [n, 1]
    return (mu.tanh() * ours.TORQUE)[:, 0].double().numpy()


def temperature(agent):
    return float(agent.alpha.detach().exp())


def seeds_of(seed, purpose, n):
    """The program's seeds of n starts (0: tests, 1: final episodes), alike for all students."""
    return ours.Run.starts(argparse.Namespace(seed=seed), purpose, n)


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


@torch.no_grad()
def draw(agent, states):
    """Torques of the policy and their entropies: [n, 3] -> [n], [n]."""
    action, entropy = agent.model_action(torch.from_numpy(states).float())      # [n, 1] each
    return action[:, 0].double().numpy(), entropy[:, 0].double().numpy()


# What a torque promises and delivers

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
    """Promise, delivery and bonus of every torque in every state: [n, 3], [m] -> three [n, m]."""
    columns = []
    for torque in torques:
        same = np.full(len(states), torque)                                     # [n]
        columns.append((agent.promise(states, same), *deliver(agent, states, same)))
    return tuple(np.stack(column, axis=1) for column in zip(*columns))


# The data near a state

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


def places(states, torques):
    """A number for the cell of angle and speed, and in it the bin of the torque: [n, 3], [n] ->
    [n]. Cells are 30 degrees by 2 rad/s, bins 0.5 N m."""
    number = 0
    for value, most, n in ((angles(states), math.pi, 12), (states[:, 2], 8, 8), (torques, 2, BINS)):
        number = number * n + np.digitize(value, np.linspace(-most, most, n + 1)[1:-1])
    return number


def coverage(rows):
    """The mean number of torque bins of 8 that the rows occupy in a state cell that they visit."""
    found = places(rows[:, :3], rows[:, 3])
    return len(np.unique(found)) / len(np.unique(found // BINS))


def outside(rows, states, torques):
    """The share of states and torques, [n, 3] and [n], whose cell and bin the rows do not hold."""
    return 1 - np.isin(places(states, torques), places(rows[:, :3], rows[:, 3])).mean()


def contrast_and_gap(agent, rows):
    """Means over 500 states of the data. Contrast: Q of the data's torque minus the mean over 41
    torques. Gap: the log of the integral of exp(Q) over all torques minus Q of the data's torque,
    CQL's penalty without its noise: log 4 where Q is flat, and least, the entropy of the data's
    torques, where Q is the log of their density plus a constant."""
    rows = rows[np.linspace(0, len(rows) - 1, 500).astype(int)]
    mine = agent.promise(rows[:, :3], rows[:, 3]).astype(float)
    every = agent.promise(rows[:, :3].repeat(41, axis=0), np.tile(CHOICES, 500))
    every = every.astype(float).reshape(500, 41)
    most = every.max(axis=1)                                    # or exp overflows
    integral = np.log(4 * np.exp(every - most[:, None]).mean(axis=1)) + most
    return (mine - every.mean(axis=1)).mean(), (integral - mine).mean()


# The measure over torques

def measure(agent, rows, seed, good):
    """What a critic promises too much, where, and what it orders torques by: a flat dict of rounded
    numbers (None where nothing is to be measured). 17 torques in 300 states of the rows that swing
    (more than 20 degrees from upright) and 300 that stand (within, slower than 1 rad/s), drawn by
    the seed. Means over torques and states, each behind "swing" or "stand":

    promised, delivered, bonus, excess
    excess near, excess far    of torques within 0.25 and beyond 0.75 N m of the data's near a state
    far minus near             the same, state by state, where a state has both
    rank ...                   Spearman's correlation of a state's promises with its deliveries,
                               deliveries and bonus, density of the data's torques, and the
                               deliveries of `good`, the teacher"""
    rng = np.random.default_rng(seed)
    upright, slow = abs(angles(rows)) <= math.radians(20), abs(rows[:, 2]) < 1
    found = {}
    for kind, chosen in (("swing", ~upright), ("stand", upright & slow)):
        some = rows[chosen]
        states = some[rng.permutation(len(some))[:STATES], :3].astype(float)    # [300, 3]
        promised, delivered, bonus = over_torques(agent, states)                # [300, 17] each
        _, best, _ = over_torques(good, states)
        excess, torques = promised - delivered - bonus, near_torques(rows, states)
        distance = abs(TORQUES[:, None] - torques[:, None, :]).min(axis=2)      # [300, 17]
        near = np.where(distance <= NEAR, excess, np.nan)
        far = np.where(distance > FAR, excess, np.nan)
        for name, values in (("promised", promised), ("delivered", delivered), ("bonus", bonus),
                             ("excess", excess), ("excess near", near), ("excess far", far)):
            found[f"{kind} {name}"] = mean(values)
        gaps = np.array([mean(x) - mean(y) for x, y in zip(far, near)])         # [300]
        found[f"{kind} far minus near"] = mean(gaps)
        for name, values in (("delivered", delivered), ("delivered and bonus", delivered + bonus),
                             ("density", densities(torques)), ("good", best)):
            found[f"{kind} rank {name}"] = mean(rank_correlations(promised, values))
    return {name: None if math.isnan(value) else round(value, 5) for name, value in found.items()}


def rank_correlations(first, second):
    """Spearman's correlation within each row, NaN where either is constant: [n, m] twice -> [n]."""
    first, second = (stats.rankdata(x, axis=1) - (x.shape[1] + 1) / 2 for x in (first, second))
    with np.errstate(invalid="ignore"):                                         # 0 / 0
        return (first * second).mean(axis=1) / (first.std(axis=1) * second.std(axis=1))


def mean(values):
    """The mean of those that are not NaN, or NaN."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


# The interventions

class CloneTarget(ours.SAC):
    """SAC whose target follows a frozen clone of the data's policy, in torque and entropy."""
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


def clone_target(rows, seed):
    """A CloneTarget; the clone is trained here, and all random numbers seeded again behind it."""
    clone, data = ours.BC(), ours.Data()
    data.rows = rows
    for _ in range(CLONING):
        clone.train(*data.get_sample())
    ours.seed_everything(seed)
    return CloneTarget(clone)


def deeper(kind):
    """A class of the program whose policy has a second hidden layer: is the page's too small?"""
    class ModelAction(ours.SAC.ModelAction):
        def __init__(self):
            super().__init__()
            self.fc_state.extend([torch.nn.Linear(ours.WIDTH, ours.WIDTH), torch.nn.ReLU()])

    return type(kind.__name__, (kind,), {"ModelAction": ModelAction})


class OtherBC(ours.BC):
    """BC by the loss of a class made of it."""
    def train(self, state, action, reward, next_state, over):
        loss = self.loss(state, action)
        self.optimizer_action.zero_grad()
        loss.backward()
        self.optimizer_action.step()


class LikelyBC(OtherBC):
    """By the likelihood: the policy's Gaussian should explain what tanh makes the torques of. That
    is infinite for 2 N m, so that torques count as 1.98 N m at most."""
    def loss(self, state, action):
        sample = (action / ours.TORQUE).clamp(-0.99, 0.99).atanh()              # [b, 1]
        return -gaussian(self, state).log_prob(sample).mean()


class MeanBC(OtherBC):
    """By the squared error of the mean torque, which leaves the spread as it began."""
    def loss(self, state, action):
        return self.loss_fn(gaussian(self, state).mean.tanh() * ours.TORQUE, action)


LOSSES = {"bc, likelihood": LikelyBC, "bc, mean torque": MeanBC}


def gaussian(agent, states):
    """What the policy draws from before tanh, a distribution over [b, 1]."""
    policy = agent.model_action
    hidden = policy.fc_state(states)                                            # [b, 128]
    return torch.distributions.Normal(policy.fc_mu(hidden), policy.fc_std(hidden))


def fixed_temperature(agent):
    """The agent, whose temperature stays 0.01: is one that explodes a cause, or a symptom?"""
    agent.alpha.requires_grad_(False)
    return agent


def changed_rows(kind, rows, seed, teacher):
    """The rows that an intervention's student learns from: as many, each the start of one step.

    uniform torques               the data's states, torques drawn uniformly from [-2, 2]
    uniform states                any angle, any speed up to 8 rad/s; the teacher's torque there
    uniform states and torques    both drawn uniformly

    With uniform torques the next states leave the data, too, by one step."""
    rng, n = np.random.default_rng(seed), len(rows)
    states = rows[:, :3]
    if "states" in kind:
        states = states_of(rng.uniform(-math.pi, math.pi, n), rng.uniform(-8, 8, n))
    if "torques" in kind:
        torques = rng.uniform(-2, 2, n)
    else:
        torch.manual_seed(seed)
        torques, _ = draw(teacher, states)
    changed = rows.copy()                                       # the flags stay: none is terminal
    changed[:, :3], changed[:, 3] = states, torques                             # float32
    reward, following = pendulum(changed[:, :3].astype(float), changed[:, 3].astype(float))
    changed[:, 4], changed[:, 5:8] = reward, following
    return changed
