"""What a critic promises for each torque and what is then delivered: measured, changed, drawn.

Pendulum can be set to any state, so that each promise can be checked. The words of this file:

promise     the smaller critic's value of a torque in a state
delivery    ours.deliver: the torque, then the agent's policy
bonus       temperature times the policy's later entropies: a promise counts it, a delivery does not
excess      promise - delivery - bonus, that is the over-estimate, like with like

All four are in the unit of the discounted sum of (reward + 8) / 8, of which no policy can deliver
more than 100. Torques are in N m. A state is (cos angle, sin angle, speed in rad/s), 0 upright.
"""
import math
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import cql_pendulum as ours  # noqa: E402
import study  # noqa: E402

TORQUES = np.linspace(-2, 2, 17)      # a quarter of a N m apart
STATES = 300                          # of a kind, in one measurement
NEAREST = 20                          # rows of the data that count as near a state
NEAR, FAR = 0.25, 0.75                # N m to the nearest of these rows' torques
WIDTH = 0.25                          # N m, the standard deviation of the density's kernel
EPISODES, EVERY = 20, 10              # of the student's own: how many, and each how many steps
CLONING = 20_000                      # updates of the clone that chooses a target's torques


# What a torque promises and delivers

@torch.no_grad()
def promise(agent, states, torques):
    """What the smaller critic promises: [n, 3], [n] -> [n]."""
    states = torch.from_numpy(states).float()
    torques = torch.from_numpy(torques).float()
    return ours.least_value(agent, states, torques[:, None])[:, 0].double().numpy()


def deliver_with_bonus(agent, states, torques):
    """What each torque and then the policy deliver, and the bonus of that policy: [n, 3], [n] ->
    [n], [n]. The same noise follows whatever the torques are."""
    entropies = []                                              # of the steps 1 to T, [n, 1] each
    hook = agent.model_action.register_forward_hook(
        lambda module, given, found: entropies.append(found[1]))
    delivered = ours.deliver(agent, states, torques)
    hook.remove()
    entropies = torch.cat(entropies, dim=1).double().numpy().T                  # [T, n]
    # that of step T is left out, as no reward follows it
    return delivered, temperature(agent) * discounted_entropies(entropies[:-1])


def discounted_entropies(entropies):
    """The entropies of the steps 1 to T - 1, [T - 1, ...] -> their discounted sum, [...], with the
    tail of ours.discounted."""
    steps = len(entropies) + 1
    tail = ours.GAMMA ** steps / (1 - ours.GAMMA) * entropies[-20:].mean(axis=0)
    return ours.GAMMA ** np.arange(1, steps) @ entropies + tail


def over_torques(agent, states, torques=TORQUES):
    """Promise, delivery and bonus of every torque in every state: [n, 3], [m] -> three [n, m]. The
    torques of a state are followed by the same noise, so that only they make a difference."""
    promised, delivered, bonus = [], [], []
    for torque in torques:
        same = np.full(len(states), torque)                                     # [n]
        paid, extra = deliver_with_bonus(agent, states, same)
        promised.append(promise(agent, states, same))
        delivered.append(paid)
        bonus.append(extra)
    return np.stack(promised, axis=1), np.stack(delivered, axis=1), np.stack(bonus, axis=1)


@torch.no_grad()
def mean_torque(agent, states):
    """The torque at the policy's mean, 2 tanh(mu): [n, 3] -> [n]."""
    mean = agent.model_action.gaussian(torch.from_numpy(states).float()).mean       # [n, 1]
    return (ours.TORQUE * mean.tanh())[:, 0].double().numpy()


def temperature(agent):
    return float(agent.alpha.detach().exp())


# The data near a state

def angles(states):
    """Radians from upright, in [-pi, pi]: [n, 3] -> [n]."""
    return np.arctan2(states[:, 1], states[:, 0])


def stands(states):
    """Whether a state is within 20 degrees of upright and slower than 1 rad/s: [n, 3] -> [n]."""
    return (abs(angles(states)) < math.radians(20)) & (abs(states[:, 2]) < 1)


def swings(states):
    """Whether a state is more than 20 degrees from upright, at any speed: [n, 3] -> [n]. A state
    near upright that is faster than 1 rad/s neither swings nor stands."""
    return abs(angles(states)) > math.radians(20)


def near_torques(rows, states):
    """The torques of the 20 rows nearest to each state, in no order: [n, 3] -> [n, 20]."""
    here = position(states)                                                     # [n, 3]
    there = position(rows[:, :3])                                               # [rows, 3]
    # |here - there|^2, without |here|^2, which orders nothing
    distance = (there ** 2).sum(axis=1) - 2 * here @ there.T                    # [n, rows]
    nearest = distance.argpartition(NEAREST - 1, axis=1)[:, :NEAREST]           # [n, 20]
    return rows[nearest, 3].astype(float)


def position(states):
    """A state as a point whose distances compare: cos, sin and speed / 8, each from -1 to 1, so
    that a radian near upright counts as much as 8 rad/s."""
    return states.astype(float) / [1, 1, 8]


def gaps(found, torques=TORQUES):
    """From each torque to the nearest of those found: [n, 20], [m] -> [n, m]."""
    return abs(torques[:, None] - found[:, None, :]).min(axis=2)


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
    gap = gaps(torques)                                                         # [n, 17]
    near = np.where(gap <= NEAR, excess, np.nan)
    far = np.where(gap > FAR, excess, np.nan)
    difference = row_means(far) - row_means(near)                               # [n]
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
    columns = []
    for direction in np.eye(2):                                   # the angle, then the speed
        after = mean_step(agent, size * direction)
        before = mean_step(agent, -size * direction)
        columns.append((after - before) / (2 * size))
    jacobian = np.stack(columns, axis=1)                          # [2, 2]
    return float(abs(np.linalg.eigvals(jacobian)).max())


def mean_step(agent, point):
    """One step from (angle, speed) under the policy's mean: [2] -> [2]."""
    angle, speed = point
    state = np.array([[math.cos(angle), math.sin(angle), speed]])
    _, following = ours.pendulum(state, mean_torque(agent, state))
    return np.array([angles(following)[0], following[0, 2]])


def own_steps(agent, rows, seed):
    """The excess along the agent's own episodes, every tenth step of 20, by what the data has:
    "both" the state's cell with the torque's bin in it, the "state only", or "neither" (the cells
    and bins of study.histogram). The share of the steps, and their mean excess."""
    seeds = ours.Run(None, seed).starts(2, EPISODES)          # 0: the tests, 1: the final episodes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        states, torques, _ = rollout(lambda state: policy_torque(agent, state), starts(seeds))
    states = states[::EVERY].reshape(-1, 3)                                     # [20 * 20, 3]
    torques = torques[::EVERY].reshape(-1)                                      # [20 * 20]
    delivered, bonus = deliver_with_bonus(agent, states, torques)
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
    counts = study.histogram(rows)                                              # [12, 8, 8]
    answers = []
    for one in np.column_stack([states, torques]):
        alone = study.histogram(one[None])                        # a one in its cell and bin
        angle, speed, torque = np.unravel_index(alone.argmax(), alone.shape)
        if counts[angle, speed, torque] > 0:
            answers.append("both")
        elif counts[angle, speed].sum() > 0:
            answers.append("state only")
        else:
            answers.append("neither")
    return np.array(answers)


def rank_correlations(first, second):
    """Spearman's correlation within each row, NaN where either is constant: [n, m] twice -> [n]."""
    first, second = ranks(first), ranks(second)
    product = (first * second).mean(axis=1)
    size = first.std(axis=1) * second.std(axis=1)
    size[size == 0] = np.nan
    return product / size


def ranks(values):
    """Each value's rank in its row minus the row's mean rank; equal ones share one. NaN in a row
    makes the row NaN. [n, m] -> [n, m]."""
    here, other = values[:, :, None], values[:, None, :]
    found = (here > other).sum(axis=2) - (here < other).sum(axis=2)
    return np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, found / 2)


def mean(values):
    """The mean of those that are not NaN, or NaN."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def row_means(values):
    """[n, m] -> [n]: `mean` of each row."""
    return np.array([mean(row) for row in values])


def rounded(value, digits=5):
    """A number for a file; None for NaN."""
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else round(value, digits)


# Episodes

def starts(seeds):
    """Pendulum's first states of these seeds: [n, 3]."""
    env = ours.MyWrapper()
    return np.stack([env.reset(seed=seed) for seed in seeds]).astype(float)


def rollout(choose, state):
    """Episodes side by side, in which choose gives torques for states, [n, 3] -> [n]. Returns the
    states [200, n, 3], torques [200, n] and rewards [200, n]."""
    states, torques, rewards = [], [], []
    for _ in range(ours.EPISODE):
        torque = choose(state)
        states.append(state)
        torques.append(torque)
        reward, state = ours.pendulum(state, torque)
        rewards.append(reward)
    return np.stack(states), np.stack(torques), np.stack(rewards)


@torch.no_grad()
def policy_torque(agent, state):
    """Torques of the policy, drawn: [n, 3] -> [n]."""
    action, _ = agent.model_action(torch.from_numpy(state).float())
    return action[:, 0].double().numpy()


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


class FixedTemperature(ours.SAC):
    """SAC whose temperature does not learn: is one that explodes a cause, or a symptom?"""

    def __init__(self, temperature=0.01):
        super().__init__()
        self.temperature = temperature
        self._set_back()

    def train(self, state, action, reward, next_state, over):
        super().train(state, action, reward, next_state, over)
        self._set_back()

    @torch.no_grad()
    def _set_back(self):
        self.alpha.fill_(math.log(self.temperature))


def changed_rows(kind, rows, seed, teacher):
    """The rows that an intervention's student learns from: as many, each the start of one step.

    uniform torques               the data's states, torques drawn uniformly from [-2, 2]
    uniform states                any angle, any speed up to 8 rad/s; the teacher's torque there
    uniform states and torques    both drawn uniformly
    all others                    the data's rows

    With uniform torques the next states leave the data, too, by one step."""
    rng = np.random.default_rng(seed)
    if kind == "uniform torques":
        return stepped(rows, rows[:, :3], rng.uniform(-2, 2, len(rows)))
    if kind == "uniform states":
        states = uniform_states(len(rows), rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return stepped(rows, states, policy_torque(teacher, states))
    if kind == "uniform states and torques":
        states = uniform_states(len(rows), rng)
        return stepped(rows, states, rng.uniform(-2, 2, len(rows)))
    return rows


def uniform_states(n, rng):
    """States of any angle and any speed from -8 to 8 rad/s: [n, 3]."""
    angle, speed = rng.uniform(-math.pi, math.pi, n), rng.uniform(-8, 8, n)
    return np.stack([np.cos(angle), np.sin(angle), speed], axis=1)


def stepped(rows, states, torques):
    """The rows with other states and torques, [n, 3] and [n], and the reward and next state that
    follow. The flags stay; no state of Pendulum is terminal."""
    changed = rows.copy()
    changed[:, :3], changed[:, 3] = states, torques                             # float32
    reward, following = ours.pendulum(changed[:, :3].astype(float), changed[:, 3].astype(float))
    changed[:, 4], changed[:, 5:8] = reward, following
    return changed


def nearest_returns(agent, rows, seeds):
    """Mean returns of two ways to choose among the torques of the 20 nearest rows, from the same
    starts: the "best" by the smaller critic, and a "random" one. Both stay with torques that the
    data has near the state; only the first asks the critic."""
    rng = np.random.default_rng(seeds[0])

    def best(state):
        torques = near_torques(rows, state)                                     # [n, 20]
        values = promise(agent, state.repeat(NEAREST, axis=0), torques.reshape(-1))
        chosen = values.reshape(-1, NEAREST).argmax(axis=1)                     # [n]
        return torques[np.arange(len(state)), chosen]

    def any_of_them(state):
        torques = near_torques(rows, state)                                     # [n, 20]
        chosen = rng.integers(NEAREST, size=len(state))                         # [n]
        return torques[np.arange(len(state)), chosen]

    found = {}
    for name, choose in (("best", best), ("random", any_of_them)):
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
        return FixedTemperature()
    clone = ours.BC()
    data = ours.Data()
    data.rows = rows
    for _ in range(CLONING):
        clone.train(*data.get_sample())
    ours.seed_everything(seed)
    return CloneTarget(clone)


# The picture

TOO_MUCH = {"color": "C3", "alpha": 0.15, "lw": 0, "label": "promised too much"}


def draw(agents, data, returns, path, title=""):
    """Write the picture of some agents, a row each, in three states of the data; agents and returns
    go by the student's name. Returns the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9 * len(agents) + 0.8), dpi=100, layout="constrained")
    every = []
    for band, (name, agent) in zip(figure.subfigures(len(agents), 1, squeeze=False)[:, 0],
                                   agents.items()):
        band.suptitle(f"{name}: return {returns[name]:,.0f}", fontsize=17, weight="bold")
        states = three_states(data.rows)
        panels = band.subplots(1, len(states), sharey=True)
        for axes, (what, state) in zip(panels, states.items()):
            panel(axes, data, agent, state)
            degrees = math.degrees(angles(state[None])[0])
            axes.set_title(f"{what} ({degrees:z.0f}°, {state[2]:z.1f} rad/s)", fontsize=13)
            axes.set_xlabel("torque now (N m), then the policy's", fontsize=12)
        panels[0].set_ylabel("discounted rewards, 100 at most", fontsize=12)
        every.extend(panels)
    low = min(axes.get_ylim()[0] for axes in every)
    high = max(axes.get_ylim()[1] for axes in every)
    for axes in every:                          # one scale, and room for what stands at the bottom
        axes.set_ylim(low - 0.17 * (high - low), high)
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=12,
                  columnspacing=1.2)
    if title:
        figure.suptitle(title, fontsize=13)
    figure.savefig(path)
    return figure


def panel(axes, data, agent, state):
    """The main job's drawing of a state, [3], larger, and shaded where more is promised than
    delivered. The bonus is not in the line of deliveries: it shows what is paid."""
    ours.draw_state(axes, data, agent, state)
    lines = {line.get_label(): line for line in axes.lines}
    torques, promised = lines["promised"].get_data()
    delivered = lines["delivered"].get_ydata()
    promised = np.reshape(promised, -1)
    axes.fill_between(torques, delivered, promised, where=promised > delivered, interpolate=True,
                      **TOO_MUCH)
    for label in ("promised", "delivered"):
        lines[label].set_linewidth(2.5)
    for label, size in (("data near here", 12), ("the policy's torque", 11)):
        lines[label].set_markersize(size)
    axes.set(xlim=(-2.1, 2.1), xticks=[-2, -1, 0, 1, 2])
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)


def three_states(rows):
    """Three states of the data, by name: the one nearest to standing upright, the fastest that
    swings up, and the one nearest to hanging still."""
    states = rows[:, :3]
    upward = swings(states) & (states[:, 1] * states[:, 2] < 0)       # the angle's size shrinks
    speed = np.where(upward, abs(states[:, 2]), -1)
    upright = position(states) - [1, 0, 0]
    hanging = position(states) - [-1, 0, 0]
    return {"upright": states[np.linalg.norm(upright, axis=1).argmin()],
            "swinging up": states[speed.argmax()],
            "hanging": states[np.linalg.norm(hanging, axis=1).argmin()]}
