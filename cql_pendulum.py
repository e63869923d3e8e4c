"""The page "Offline RL" of the Simple_Reinforcement_Learning course, complete and right.

A SAC teacher learns Pendulum-v1 online, its transitions are frozen, and a CQL student learns from
them alone. Names, order and constants are the page's; what it leaves out (the update, the reward's
shift, the temperature, the learning rates) is from the course's notebook. Four of the page's
formulas are wrong (ERRATA). A comment "Page:" stands wherever the algorithm differs from the page.

Read from the top to the end of main: that is the whole program. What main calls follows after it.
`python cql_pendulum.py` takes minutes, with `--epochs 3 --steps 100` some seconds. A constant, env
or SAC is changed from outside by `import cql_pendulum as c; c.EPISODE = 400`.
SAC: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905). CQL:
Kumar et al. 2020 (2006.04779). Pardo: Pardo et al. 2018, Time Limits in RL (1712.00378).
"""
import argparse
import collections.abc
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pathlib
import random
import shlex
import sys
import time
import types
import zipfile

try:
    import tqdm             # torch imports it, too, and is prepared for its absence alone
except Exception:
    tqdm = sys.modules["tqdm"] = None
import gym
import numpy as np
import torch

__all__ = ["AS_PRINTED", "BC", "CQL", "Data", "ERRATA", "MyWrapper", "Run", "SAC", "env",
           "evaluate", "load_agent", "load_dataset", "main", "save_agent", "save_dataset",
           "seed_everything", "train_student", "train_teacher"]
# One thread: the matrices are small (more threads made an update up to nine times slower), and no
# number depends on how many cores there are. Adam's averages of dead units end below 1e-38, numbers
# on which some processors are half as fast: from here on they count as 0, in NumPy and Python, too.
torch.set_num_threads(1)
torch.set_flush_denormal(True)

BATCH = 64             # rows in a batch
CAPACITY = 100_000     # rows that update_data keeps
EPISODE = 200          # steps of an episode
UPDATES = 200          # the teacher's updates after each episode
WIDTH = 128            # units of a hidden layer
LR_VALUE = 3e-3        # Adam's learning rate for the critics
LR_ACTION = 3e-4       # Adam's learning rate for the policy and the temperature
GAMMA = 0.99           # discount for each step
TAU = 0.005            # soft update of the target critics
TEMPERATURE = 0.01     # the first; it is learned from then on
TARGET_ENTROPY = -1.0  # minus the number of actions (SAC, appendix D); per unit of torque / 2
SCALE = 8              # an update uses (reward + 8) / 8, from -1.03 to 1; Data keeps the reward
TORQUE = 2.0           # Pendulum's torque lies in [-2, 2] N m
SAMPLES = 5            # torques of each kind (random, current, next) for a state in CQL's penalty
WEIGHT = 5.0           # of CQL's penalty
ERRATA = {             # jacobian acts in SAC and CQL, sign and range in CQL alone, timeout in Data
    "jacobian": "log(1 - tanh(action)^2), where action is a tanh already; right: log(1 - action^2)",
    "sign": "the penalty has Q - entropy, where entropy is -log pi; right: Q - log pi",
    "range": "random torques from (-1, 1); right: 2 * uniform(-1, 1), as the policy's are 2 * tanh",
    "timeout": "the 200-step limit is stored as terminal; right: the target goes on past it",
}
AS_PRINTED = set()     # names of ERRATA that are restored, everywhere and at once; see --as-printed


class MyWrapper(gym.Wrapper):
    """Pendulum-v1 with the page's interface. A state is (cos angle, sin angle, speed in rad/s),
    upright at angle 0; the reward is -(angle^2 + 0.1 speed^2 + 0.001 torque^2) before the step."""

    def __init__(self):
        # unwrapped: gym's own limit would not follow EPISODE; its checker needs NumPy 1
        env = gym.make("Pendulum-v1", render_mode="rgb_array", disable_env_checker=True).unwrapped
        super().__init__(env)
        self.env = env
        self.step_n = 0

    def reset(self):
        """Start an episode: a state, float32 [3]."""
        state, _ = self.env.reset()
        self.step_n = 0
        return state

    def step(self, action):
        """Apply the torque [action] for 0.05 s. info["timeout"] is ours: done by a time limit."""
        torque = np.asarray(action).item()              # an array of one, too
        state, reward, terminated, truncated, info = self.env.step([torque])
        self.step_n += 1
        done = terminated or truncated or self.step_n >= EPISODE
        info["timeout"] = done and not terminated
        return state, reward, done, info

    def show(self):
        """Draw the pendulum as it is now in place of the last picture (window or notebook)."""
        from matplotlib import pyplot
        pyplot.clf()
        pyplot.imshow(self.env.render())
        if "ipykernel" in sys.modules:
            from IPython import display
            put = display.display if self.step_n <= 1 else display.update_display
            put(pyplot.gcf(), display_id="pendulum")
            pyplot.close()
        else:
            pyplot.pause(0.01)


env = MyWrapper()


class Data:
    """The teacher's replay buffer, then the student's dataset. Page: a list of tuples. Here `rows`,
    float32 [n, 10]: state 0:3, action 3, reward 4, next_state 5:8, terminal 8, timeout 9."""

    def __init__(self):
        self.rows = np.empty([0, 10], np.float32)
        self.frozen = False

    def __len__(self):
        return len(self.rows)

    @property
    def datas(self):
        """The page's list to read: datas[i] is (state, action, reward, next_state, over)."""
        return Tuples(self)

    def update_data(self, agent):
        """Play an episode in `env` with the agent and append it; RuntimeError when frozen."""
        if self.frozen:
            raise RuntimeError("this dataset is frozen: offline training never adds to it")
        rows = []
        state = env.reset()
        over = False
        while not over:
            action = np.asarray(agent.get_action(state)).item()     # an array of one, too
            next_state, reward, over, info = env.step([action])
            timeout = info.get("timeout", False)
            terminal = over and not timeout
            rows.append([*state, action, reward, *next_state, terminal, timeout])
            state = next_state
        self.rows = np.concatenate([self.rows, np.array(rows, np.float32)])[-CAPACITY:]

    def get_sample(self):
        """64 different rows: state, action, reward, next_state float32 [64, 3], [64, 1], [64, 1],
        [64, 3] and over int64 [64, 1]; ValueError when there are fewer rows."""
        if len(self.rows) < BATCH:
            raise UserError(f"{len(self.rows)} rows; a batch draws {BATCH} (see EPISODE, BATCH)")
        return self._columns(self.rows[random.sample(range(len(self.rows)), BATCH)])

    def _columns(self, rows):
        columns = torch.from_numpy(rows).split([3, 1, 1, 3, 1, 1], dim=1)
        state, action, reward, next_state, terminal, timeout = columns
        # Page: over at the 200-step limit too; that is no terminal state (Pardo, abstract).
        over = torch.maximum(terminal, timeout) if "timeout" in AS_PRINTED else terminal
        return state, action, reward, next_state, over.long()

    def freeze(self):
        """From here on the rows are read-only and update_data raises. Returns self."""
        self.rows = self.rows.copy()            # so that no older view of them can write, either
        self.rows.flags.writeable = False
        self.frozen = True
        return self


class SAC:
    """Soft Actor-Critic: the online teacher, and with `--student sac` a student without penalty."""

    class ModelAction(torch.nn.Module):
        """The policy: a Gaussian squashed by tanh and scaled to torques in [-2, 2]."""

        def __init__(self):
            super().__init__()
            self.fc_state = torch.nn.Sequential(torch.nn.Linear(3, WIDTH), torch.nn.ReLU())
            self.fc_mu = torch.nn.Linear(WIDTH, 1)
            self.fc_std = torch.nn.Sequential(torch.nn.Linear(WIDTH, 1), torch.nn.Softplus())

        def gaussian(self, state, n=1):
            """The Gaussian that is squashed, n times for each state: [b, 3] -> Normal of [b, n]."""
            state = self.fc_state(state)                            # [b, 3] -> [b, 128]
            mu, std = self.fc_mu(state), self.fc_std(state)         # [b, 128] -> [b, 1]
            return torch.distributions.Normal(mu.expand(-1, n), std, validate_args=False)

        def mean_action(self, state):
            """The torque at the Gaussian's mean, without chance: [b, 3] -> [b, 1]."""
            return self.gaussian(state).mean.tanh() * TORQUE

        def draw(self, state, n=1):
            """The Gaussian, n samples of it for each state, [b, n], and their tanh, [b, n]."""
            dist = self.gaussian(state, n)
            sample = dist.rsample()
            return dist, sample, torch.tanh(sample)

        def forward(self, state, n=1):
            """[b, 3] -> n torques a state (Page: 1), [b, n], and the entropy of each, [b, n]: minus
            its log density per unit of tanh, that is of torque / 2 (SAC, appendix C)."""
            dist, sample, action = self.draw(state, n)
            # Page: log(1 - tanh(action)^2 + 1e-7), but action is a tanh: that squashes twice.
            x = action if "jacobian" in AS_PRINTED else sample
            # log(1 - tanh(x)^2), rewritten: where x is above 9, float32's tanh(x) is 1, and the
            # logarithm would have no gradient left that could bring the policy back
            log_slope = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
            entropy = log_slope - dist.log_prob(sample)             # [b, n]
            return action * TORQUE, entropy

    class ModelValue(torch.nn.Module):
        """A critic, Q: the discounted sum of the scaled rewards that follow a torque in a state,
        and of temperature times entropy of all steps after it."""

        def __init__(self):
            super().__init__()
            self.sequential = torch.nn.Sequential(
                torch.nn.Linear(4, WIDTH), torch.nn.ReLU(),
                torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(),
                torch.nn.Linear(WIDTH, 1),
            )

        def forward(self, state, action):
            return self.sequential(torch.cat([state, action], dim=1))     # [b, 3 + 1] -> [b, 1]

    def __init__(self):
        self.model_action = self.ModelAction()
        self.model_value1, self.model_value2 = self.ModelValue(), self.ModelValue()
        self.model_value_next1 = copy.deepcopy(self.model_value1)
        self.model_value_next2 = copy.deepcopy(self.model_value2)
        # the course's name; it is the log of the temperature, which the SAC paper calls alpha
        self.alpha = torch.tensor(math.log(TEMPERATURE), requires_grad=True)
        # Notebook: an Adam for each. It works number by number: one for two gives the same.
        values = [*self.model_value1.parameters(), *self.model_value2.parameters()]
        actions = [*self.model_action.parameters(), self.alpha]
        self.optimizer_value = torch.optim.Adam(values, lr=LR_VALUE, fused=True)
        self.optimizer_action = torch.optim.Adam(actions, lr=LR_ACTION, fused=True)
        self.loss_fn = torch.nn.MSELoss()
        self.logged = {}        # of the last update's second critic, for log.csv

    def get_action(self, state):
        """A torque of the policy, float in [-2, 2], for three numbers; else ValueError."""
        state = torch.tensor(np.asarray(state, np.float32).reshape(1, 3))
        with torch.inference_mode():
            _, _, action = self.model_action.draw(state)            # [1, 3] -> [1, 1]
        return (action * TORQUE).item()         # without the entropy, a third of the time

    def test(self, play):
        """The return (the plain sum of rewards) of one episode from a random start; with play=True
        it is shown."""
        state, reward_sum, over = env.reset(), 0.0, False
        while not over:
            state, reward, over, _ = env.step([self.get_action(state)])
            reward_sum += float(reward)
            if play:
                env.show()
        return reward_sum

    def train(self, state, action, reward, next_state, over):
        """One update from a batch like Data.get_sample's (SAC, algorithm 1); not on the page."""
        # the critics (SAC, equation 5)
        target = self._get_target((reward + SCALE) / SCALE, next_state, over)             # [b, 1]
        loss_value1 = self._get_loss_value(self.model_value1, target, state, action, next_state)
        loss_value2 = self._get_loss_value(self.model_value2, target, state, action, next_state)
        self.optimizer_value.zero_grad()
        (loss_value1 + loss_value2).backward()
        self.optimizer_value.step()

        # the policy, and the temperature (SAC, equation 18)
        loss_action, entropy = self._get_loss_action(state)
        loss_alpha = ((entropy - TARGET_ENTROPY).detach() * self.alpha.exp()).mean()
        self.optimizer_action.zero_grad()
        # the policy's loss runs through the critics, too; `inputs` are what it gives gradients to
        learning = [*self.model_action.parameters(), self.alpha]
        (loss_action + loss_alpha).backward(inputs=[p for p in learning if p.requires_grad])
        self.optimizer_action.step()

        self._soft_update(self.model_value1, self.model_value_next1)
        self._soft_update(self.model_value2, self.model_value_next2)

    @torch.no_grad()
    def _get_target(self, reward, next_state, over):
        """What the critics are to answer, [b, 1] (SAC, equations 2, 3; two critics: section 6)."""
        action, entropy = self.model_action(next_state)                         # [b, 1]
        value1 = self.model_value_next1(next_state, action)                     # [b, 1]
        value2 = self.model_value_next2(next_state, action)                     # [b, 1]
        value = torch.min(value1, value2) + self.alpha.exp() * entropy          # [b, 1]
        return reward + GAMMA * (1 - over) * value

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """The loss of one critic, a scalar (SAC, equation 5, without its 1/2)."""
        loss_value = self.loss_fn(model_value(state, action), target)
        self.logged["squared_error"] = loss_value.detach()
        return loss_value

    def _get_loss_action(self, state):
        """The policy's loss, a scalar (SAC, equation 7), and its torques' entropies, [b, 1]."""
        action, entropy = self.model_action(state)                              # [b, 1]
        value1 = self.model_value1(state, action)                               # [b, 1]
        value2 = self.model_value2(state, action)                               # [b, 1]
        loss_action = -self.alpha.detach().exp() * entropy - torch.min(value1, value2)
        return loss_action.mean(), entropy

    @torch.no_grad()
    def _soft_update(self, _from, _to):
        """Each parameter of _to becomes 1 - TAU of itself + TAU of its like in _from."""
        for old, new in zip(_to.parameters(), _from.parameters()):
            old.lerp_(new, TAU)


class CQL(SAC):
    """Conservative Q-Learning, CQL(H): SAC and a penalty in the critics' loss. The page's weight of
    5 is large. Written as in the paper's equation 4 (half the squared error, undivided rewards) it
    is 5 * 8 / 2 = 20, and the penalty 8 logsumexp(Q / 8) - Q."""

    def __init__(self):
        super().__init__()
        self.weight = WEIGHT

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """SAC's loss of one critic, and weight times the penalty: logsumexp of Q over 15 torques
        minus Q of the data's torque, a scalar (CQL, equation 4). The logsumexp estimates the log
        of the integral of exp(Q) over all torques, plus log 15 since it sums 15: a constant."""
        # Page: (-1, 1), which leaves half of the torques out of the penalty.
        limit = 1 if "range" in AS_PRINTED else TORQUE
        rand_action = limit * torch.empty([len(state), SAMPLES]).uniform_(-1, 1)       # [b, 5]
        # No gradient: the policy has a loss of its own. Page: with one, which is thrown away.
        with torch.no_grad():
            actions, entropies = self.model_action(torch.cat([state, next_state]), SAMPLES)
        curr_action, next_action = actions.chunk(2)                             # [2 b, 5] -> [b, 5]
        curr_entropy, next_entropy = entropies.chunk(2)                         # [2 b, 5] -> [b, 5]

        # The next state's torques are tried in *this* state, as on the page and in CQL's own code:
        # to estimate the integral, torques of any known density will do (importance sampling,
        # below). Page: a pass of the critic for each kind; here one over a state's 16 torques.
        action = torch.cat([action, rand_action, curr_action, next_action], dim=1)     # [b, 16]
        state = state.unsqueeze(1).repeat(1, action.shape[1], 1)                # [b, 16, 3]
        values = model_value(state.reshape(-1, 3), action.reshape(-1, 1)).reshape(action.shape)
        value, value_rand, value_curr, value_next = values.split([1] + 3 * [SAMPLES], dim=1)
        loss_value = self.loss_fn(value, target)

        # Importance sampling (CQL, appendix F): a torque that is drawn more often counts for less,
        # exp(Q) / density in the sum, Q - log density in its exponent. Densities are per unit of
        # tanh; there a uniform torque has 0.5, one over the length of (-1, 1).
        value_rand = value_rand - math.log(0.5)                                 # [b, 5]
        # Page: minus entropy, but entropy is minus the log of the density.
        sign = -1 if "sign" in AS_PRINTED else 1
        value_curr = value_curr + sign * curr_entropy                           # [b, 5]
        value_next = value_next + sign * next_entropy                           # [b, 5]
        value_cat = torch.cat([value_rand, value_curr, value_next], dim=1)      # [b, 15]
        loss_cat = torch.logsumexp(value_cat, dim=1).mean()                     # [b, 15] -> scalar
        self.logged["squared_error"] = loss_value.detach()
        self.logged["penalty"] = loss_cat.detach() - value.detach().mean()
        return loss_value + self.weight * (loss_cat - value.mean())             # scalar


class BC(SAC):
    """Behaviour cloning, a student that imitates; ours, not the page's. Its policy learns to give
    the data's torques and knows no reward: the yardstick for what imitation alone returns."""

    class ModelValue(SAC.ModelValue):
        """No critic: it promises NaN."""

        def forward(self, state, action):
            return torch.full_like(action, math.nan)

    def train(self, state, action, reward, next_state, over):
        """One step up the log density of the data's torques."""
        sample = (action / TORQUE).clamp(-0.9999, 0.9999).atanh()       # infinite at 2 N m
        loss = -self.model_action.gaussian(state).log_prob(sample).mean()
        self.optimizer_action.zero_grad()
        loss.backward()
        self.optimizer_action.step()


def train_teacher(teacher, data, epochs, run):
    """The page's online loop. run.steps is range(epochs) behind a progress bar. run.test prints the
    mean return of 10 episodes, and beside it what the critic promised and what was delivered (see
    evaluate). Page: random starts; ours are the same 10 at every test."""
    for epoch in run.steps("teacher", teacher, epochs):
        data.update_data(teacher)
        for i in range(UPDATES):
            teacher.train(*data.get_sample())

        if epoch % 10 == 0 or epoch == epochs - 1:
            run.test(epoch)


def train_student(student, data, steps, run):
    """The page's offline loop: nothing is added to the data."""
    for i in run.steps("student", student, steps):
        student.train(*data.get_sample())

        if i % 2000 == 0 or i == steps - 1:
            run.test(i)


def evaluate(agent, seeds):
    """Play an episode in `env` for each seed: returns, promised, delivered, [episodes] each.
    Promised is the smaller critic's value of the first torque, with the entropy bonus of later
    steps; delivered is what it pays, see discounted. A seed fixes an episode's start and noise, and
    afterwards all chance is what it was before: a test changes nothing in training."""
    returns, promised, delivered = [], [], []
    with chance_kept():
        for seed in seeds:
            state = seed_everything(seed)
            action = agent.get_action(state)
            rewards, terminal = play_on(agent, action)
            returns.append(sum(rewards))
            promised.append(least_value(agent, state, action).item())
            delivered.append(discounted(rewards, terminal))
    return np.array(returns), np.array(promised), np.array(delivered)


def discounted(rewards, terminal=False):
    """What rewards, [T], deliver in the critics' unit: their discounted sum after scaling. Behind a
    time limit the mean of the last 20 goes on for ever, which counts for 0.99^200 = 13 %. Pendulum
    pays 1 at most for a step, so that no policy delivers more than 100."""
    scaled = (np.array(rewards) + SCALE) / SCALE
    delivered = GAMMA ** np.arange(len(scaled)) @ scaled
    if terminal or GAMMA == 1:                          # at 1 nothing finite could go on
        return delivered
    return delivered + GAMMA ** len(scaled) / (1 - GAMMA) * scaled[-20:].mean(axis=0)


def main(argv=()):
    """The story: a teacher learns online, its data are frozen, a student learns from them alone.
    argv is a list of options, as typed behind the script's name."""
    options = parse_options([str(word) for word in argv])
    if options.play:
        play(options.play, options.seed)
        return

    before, run = constants(), None
    try:
        if options.resume:
            options = saved_options(options.resume)
        if options.dataset:                             # no teacher: somebody's recording
            data = load_dataset(options.dataset, check=not options.resume)
            data = choose_episodes(data, options)
        run = open_run(options, argv)
        set_constants({"AS_PRINTED": options.as_printed})
        if not options.dataset:
            data = Data()
            if options.last != 0:                       # --last 0: random torques alone
                seed_everything(options.seed)
                teacher = SAC()
                train_teacher(teacher, data, options.epochs, run)
                run.finish(teacher)
            data = choose_episodes(data, options)       # all, without --last and --random
        save_dataset(run.out / "dataset.npz", data)

        data.freeze()
        seed_everything(options.seed)
        if options.student == "cql":
            student = CQL()
            student.weight = options.weight
        else:
            student = {"sac": SAC, "bc": BC}[options.student]()
        train_student(student, data, options.steps, run)
        run.finish(student)
        report(run, data, student)
    except KeyboardInterrupt:
        if run:
            say(f"stopped; to go on: {command('--resume', run.out)}")
        raise
    finally:
        set_constants(before)                           # for what else is done in a notebook


# ---- The story ends here. What main calls follows, in its order: the command line ----
def parse_options(argv):
    """The options; argparse ends the program with one line where they make no sense."""
    parser = argparse.ArgumentParser("cql_pendulum.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all chance (%(default)s)")
    add("--epochs", type=int, default=100, help="of the teacher (%(default)s)")
    add("--steps", type=int, default=50_000, help="the student's updates (%(default)s)")
    add("--student", choices=["cql", "sac", "bc"], default="cql",
        help="sac: the same without penalty; bc: clones the data's torques (%(default)s)")
    add("--weight", type=float, default=WEIGHT, help="of CQL's penalty (%(default)s)")
    add("--as-printed", nargs="*", action="extend", choices=[*ERRATA], metavar="NAME",
        help=f"restore the page's errata: {', '.join(ERRATA)}; no name: all of them (none)")
    add("--last", type=int, metavar="N", help="train on the last N episodes only (all)")
    add("--random", type=int, default=0, metavar="N",
        help="put N episodes of random torques before them (%(default)s)")
    add("--dataset", metavar="FILE", help="no teacher: use this dataset.npz")
    add("--out", metavar="DIR", help="a new folder for the results (in runs/)")
    add("--resume", metavar="DIR", help="go on with the run in this folder")
    add("--play", metavar="FILE", help="animate an episode of a saved agent")
    options = parser.parse_args(argv)

    given = {word.split("=")[0].strip("-") for word in argv if word.startswith("--")}
    if options.resume and given != {"resume"}:
        parser.error("--resume has the options of that run; leave out all others")
    if options.play and given - {"play", "seed"}:
        parser.error("--play takes --seed alone; leave out all others")
    if "epochs" in given and (options.dataset or options.last == 0):
        parser.error("--dataset and --last 0 need no teacher; leave out --epochs")
    if options.student != "cql" and "weight" in given:
        parser.error("--weight is for --student cql; leave it out")
    if options.last == 0 and (options.random == 0 or options.dataset):
        parser.error("--last 0 is for random torques alone: add --random N, leave out --dataset")
    most = CAPACITY // EPISODE
    ranges = {"seed": (0, 2 ** 32 - 1), "epochs": (1, 10 ** 9), "steps": (1, 10 ** 9),
              "weight": (0, 10 ** 9), "random": (0, most),
              "last": (0, 10 ** 9 if options.dataset else min(options.epochs, most))}
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: give a number from {least} to {most}")
    for name in ("dataset", "out", "resume", "play"):
        value = getattr(options, name)
        if value == "":
            parser.error(f"--{name} has no name behind it")
        setattr(options, name, value and pathlib.Path(os.path.expanduser(value)))
    if options.as_printed is None:
        options.as_printed = [*AS_PRINTED]              # what the file says
    elif not options.as_printed:
        options.as_printed = [*ERRATA]
    return options


def command(*words):
    """The shell's line that starts this program with these words; in a notebook Python's."""
    words = [str(word) for word in words]
    if "ipykernel" in sys.modules or hasattr(sys, "ps1"):
        return f"main({words})"
    return shlex.join([sys.executable, sys.argv[0], *words])


def play(file, seed):
    """Play an episode with a saved agent, print its return, and write the animation to FILE.gif."""
    agent = load_agent(file)
    seed_everything(seed)
    frames = []
    with optional("no animation"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")           # pygame draws without a window
        from PIL import Image
        env.render()
        env.show = lambda: frames.append(Image.fromarray(env.render()[::2, ::2]))   # half the size
    try:
        say(f"return {agent.test(play='show' in vars(env)):.1f}")
    finally:
        vars(env).pop("show", None)
    if frames:
        with whole_file(f"{file}.gif") as animation:
            frames[0].save(animation, "GIF", append_images=frames[1:], save_all=True, duration=50,
                           loop=0)
        say(f"animation: {file}.gif")


# ---- The run and its folder ----
def open_run(options, argv):
    """A Run in the folder that --resume names; or in a new one, --out or the next that is free in
    runs/, in which config.json keeps what was typed, the constants and the versions."""
    if options.resume:
        return Run(options.resume, options.seed)
    for k in itertools.count(1):
        out = options.out or pathlib.Path("runs", f"{options.student}-seed{options.seed}-{k}")
        try:
            out.mkdir(parents=True)
            break
        except OSError as error:
            if os.path.exists(out) and not options.out:
                continue                                # another run's: try the next
            advice = "give a new folder with --out"
            if os.path.exists(out / "config.json"):
                advice += f", or go on with the run in it: {command('--resume', out)}"
            raise UserError(f"{out}: {error.strerror}; {advice}") from None
    versions = {package.__name__: package.__version__ for package in (gym, np, torch)}
    config = {"argv": [*map(str, argv)], "versions": versions,
              "constants": {**constants(), "AS_PRINTED": options.as_printed}}
    with whole_file(out / "config.json") as file:
        file.write(json.dumps(config, indent=1).encode())
    return Run(out, options.seed)


def saved_options(folder):
    """The options of the run in a folder. Its constants are used, even if this file has others by
    now: a note says which."""
    with reading(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text())
        here, saved = constants(), config["constants"]
        set_constants(saved)
        options = parse_options(config["argv"])
    edited = [f"{name} {saved[name]} (here {x})" for name, x in here.items()
              if saved.get(name, x) != x and name != "AS_PRINTED"]     # that is said anyway
    if edited:
        say(f"note: this run goes on with its own {', '.join(edited)}")
    options.resume = folder
    if (folder / "dataset.npz").exists():               # the teacher is done, its episodes chosen
        options.dataset, options.last, options.random = folder / "dataset.npz", None, 0
    return options


def constants():
    """The constants at the top of this file: all numbers in capitals, and AS_PRINTED."""
    numbers = {name: x for name, x in globals().items()
               if name.isupper() and isinstance(x, (int, float))}
    return {**numbers, "AS_PRINTED": sorted(AS_PRINTED)}


def set_constants(values):
    """Put back what constants returned, or some of it."""
    AS_PRINTED.clear()
    AS_PRINTED.update(values["AS_PRINTED"])
    globals().update({name: x for name, x in values.items() if name != "AS_PRINTED"})


class Run:
    """Tests an agent while it trains, and logs the tests. In the folder `out`, if it has one
    (None: none), each test writes log.csv and a checkpoint, from which another Run of this folder
    goes on: a student from its last test; a teacher, a minute's work, starts again."""

    def __init__(self, out, seed):
        self.out, self.seed = out and pathlib.Path(out), seed
        self.log, self.returns = [], {}     # a dict for each test; of 100 final episodes by who
        self.saved, self.left = None, None  # left: whether promises have left what is possible;
                                            # None until one was possible
        if out and (self.out / "checkpoint.pt").exists():
            self.saved = read_agent(self.out / "checkpoint.pt")

    def starts(self, purpose, n):
        """Seeds of n starts for a purpose (0: tests, 1: final episodes), alike for all agents."""
        return np.random.SeedSequence([self.seed, purpose]).generate_state(n).tolist()

    def steps(self, stage, agent, total):
        """range(total) behind a progress bar, or what a resumed student has left of it: agent and
        all chance then become what they were at the last test."""
        self.stage, self.agent = stage, agent
        self.begun, done = time.monotonic(), 0
        if stage == "student" and self.saved:
            with reading(self.out / "checkpoint.pt"):
                self.log, self.returns = self.saved["log"], self.saved["returns"]
                done = self.saved["done"]               # 0: the teacher's last checkpoint
                if done:
                    restore_agent(agent, self.saved)
                    set_chance(self.saved["chance"])
                    self.begun -= self.log[-1]["seconds"]
        self.saved = None
        if AS_PRINTED:
            say(f"as printed: {', '.join(sorted(AS_PRINTED))}")
        unit = "epoch" if stage == "teacher" else "update"
        say(f"{stage}{unit:>8}    return  promised  delivered")
        todo = range(done, total)
        if tqdm is None:
            note("no progress bars: tqdm is missing or fails")
            return todo
        return tqdm.tqdm(todo, stage, total, initial=done, disable=None, leave=False)

    def test(self, step):
        """Play the test's 10 episodes; log their means, save, and print them. UserError if the
        agent has diverged: its last checkpoint stays."""
        row = {"stage": self.stage, "step": step}
        for name, x in zip(("return", "promised", "delivered"),
                           evaluate(self.agent, self.starts(0, 10))):
            row[name] = round(float(x.mean()), 3)
        row["seconds"] = round(time.monotonic() - self.begun, 1)
        row["temperature"] = round(self.agent.alpha.exp().item(), 6)
        row |= {name: round(float(x), 6) for name, x in self.agent.logged.items()}
        promises = not isinstance(self.agent, BC)
        if not math.isfinite(row["return"]) or promises and not math.isfinite(row["promised"]):
            raise UserError(f"the {self.stage} has diverged, at {step}: return {row['return']}, "
                            f"promised {row['promised']}; its last checkpoint stays. Try another "
                            f"--seed, smaller learning rates, or a lighter --weight")
        self.log.append(row)
        self.save()
        promised = f"{row['promised']:8.2f}" if promises else "       -"
        say(f"{self.stage}{step:8d}  {row['return']:8.1f}  {promised}  {row['delivered']:9.2f}")
        if promises and self.stage == "student":
            self.warn(row["promised"])

    def warn(self, promised):
        """Say once that a promise has left what is possible: that needs no episode to be seen."""
        if self.left:
            return
        least, most = possible()
        if least <= promised <= most:
            self.left = False
        elif self.left is False:
            self.left = True
            other = "bc, data with more noise in its torques or a lighter --weight"
            if promised > most:
                other = "cql or more varied data"
            say(f"note: promised {promised:.0f}, but a policy delivers {least:.0f} to {most:.0f}; "
                f"try --student {other}")

    def finish(self, agent):
        """Save an agent that has learned all it will, and the returns of its 100 final episodes."""
        self.returns[f"the {self.stage}"] = evaluate(agent, self.starts(1, 100))[0].tolist()
        self.save()
        if self.out:
            save_agent(self.out / f"{self.stage}.pt", agent)

    def save(self):
        """Write log.csv and checkpoint.pt."""
        if not self.out:
            return
        names = [*dict.fromkeys(name for row in self.log for name in row)]
        lines = [names] + [[str(row.get(name, "")) for name in names] for row in self.log]
        with whole_file(self.out / "log.csv") as file:
            file.write("".join(",".join(line) + "\n" for line in lines).encode())
        done = self.log[-1]["step"] + 1 if self.stage == "student" else 0
        save_agent(self.out / "checkpoint.pt", self.agent, done=done, log=self.log,
                   returns=self.returns, chance=get_chance())


# ---- The one world: chance, and steps of env ----
def seed_everything(seed):
    """Seed all chance, and start an episode in env: its state, float32 [3]."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed, 1])           # for your own agents; seed alone would be torch's stream
    env.unwrapped.np_random, _ = gym.utils.seeding.np_random(seed)
    return env.reset()


@contextlib.contextmanager
def chance_kept():
    """Whatever is drawn inside, afterwards all chance is what it was before."""
    kept = get_chance()
    try:
        yield
    finally:
        set_chance(kept)


def get_chance():
    """The states of all generators."""
    name, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "random": random.getstate(),
            "numpy": [name, keys.tolist(), *rest],
            "env": env.unwrapped.np_random.bit_generator.state}


def set_chance(states):
    """Put back what get_chance returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    env.unwrapped.np_random.bit_generator.state = states["env"]


def start_from(state):
    """Start an episode of env in a state (cos angle, sin angle, speed)."""
    env.reset()
    env.unwrapped.state = np.array([math.atan2(state[1], state[0]), state[2]])


def step_from(state, torque):
    """One step of env from a state, [3]: reward, next state, whether that is terminal."""
    start_from(state)
    next_state, reward, over, info = env.step([torque])
    return float(reward), next_state, over and not info.get("timeout", False)


def play_on(agent, action):
    """Apply a torque in env's present state, then the agent's, until the episode is over: the list
    of rewards, and whether the last state is terminal."""
    rewards = []
    while True:
        state, reward, over, info = env.step([action])
        rewards.append(float(reward))
        if over:
            return rewards, not info.get("timeout", False)
        action = agent.get_action(state)


def possible():
    """The least and the most that any policy can deliver: env's worst reward and its best for ever,
    of 45 states of all angles and speeds and three torques."""
    rewards = []
    with chance_kept():
        for angle in np.linspace(-math.pi, math.pi, 9):
            for speed in env.unwrapped.max_speed * np.linspace(-1, 1, 5):
                for torque in (-TORQUE, 0.0, TORQUE):
                    state = [math.cos(angle), math.sin(angle), speed]
                    rewards.append(step_from(state, torque)[0])
    for_ever = 1 / (1 - GAMMA) if GAMMA < 1 else math.inf
    return [(reward + SCALE) / SCALE * for_ever for reward in (min(rewards), max(rewards))]


@torch.no_grad()
def least_value(agent, state, action):
    """The smaller critic's value of torques in states, [b, 3], [b, 1] -> [b, 1]; NaN without
    critics."""
    state = torch.as_tensor(state, dtype=torch.float32).reshape(-1, 3)
    action = torch.as_tensor(action, dtype=torch.float32).reshape(-1, 1)
    if not hasattr(agent, "model_value1"):              # a controller of your own
        return torch.full_like(action, math.nan)
    return torch.min(agent.model_value1(state, action), agent.model_value2(state, action))


class Tuples(collections.abc.Sequence):
    """The rows of a Data as the page's tuples, each made when it is asked for."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        columns = self.data._columns(self.data.rows[[i]])
        state, action, reward, next_state, over = (column[0] for column in columns)
        return state.numpy(), action.item(), reward.item(), next_state.numpy(), bool(over)


# ---- Agents in files ----
def save_agent(file, agent, **more):
    """Write what going on with an agent needs (networks, optimizers, tensors, numbers, words), and
    `more`. A note names the attributes that are not kept."""
    state, lost = {}, []
    for name, part in vars(agent).items():
        if hasattr(part, "state_dict"):
            state[name] = part.state_dict()
        elif isinstance(part, np.number):
            state[name] = part.item()
        elif part is None or torch.is_tensor(part) or isinstance(part, (bool, int, float, str)):
            state[name] = part
        elif name != "logged":
            lost.append(f"{name} ({type(part).__name__})")
    if lost:
        note(f"{file} does not keep {', '.join(lost)}; torch.nn.ModuleList and tensors are kept")
    content = io.BytesIO()                      # torch's own writer hides what a full disk says
    torch.save({"class": type(agent).__name__, "state": state, **more}, content)
    with whole_file(file) as opened:
        opened.write(content.getvalue())


def load_agent(file):
    """The agent in a file of save_agent, of SAC or any class made of it, found by its name;
    UserError where there is none. No code in the file runs."""
    saved = read_agent(file)
    classes, known = [SAC, CQL, BC], {}
    for found in classes:
        classes += found.__subclasses__()
        known[found.__name__] = found                   # of two with one name the newer
    with reading(file):
        if saved["class"] not in known:
            raise UserError(f"holds a {saved['class']}, which is not defined here; import the file "
                            f"that defines it, and call load_agent in Python")
        agent = known[saved["class"]]()
        restore_agent(agent, saved)
    return agent


def read_agent(file):
    """The dict that save_agent wrote; UserError where there is none."""
    with reading(file):
        return torch.load(read_zip(file), weights_only=True)


def restore_agent(agent, saved):
    """Put what save_agent wrote into an agent of the same layers."""
    for name, part in saved["state"].items():
        if isinstance(part, dict):
            getattr(agent, name).load_state_dict(part)
        elif torch.is_tensor(getattr(agent, name, None)):
            getattr(agent, name).data.copy_(part)       # the optimizer holds this very tensor
        else:
            setattr(agent, name, part)


# ---- Datasets ----
def choose_episodes(data, options):
    """A new Data: --random episodes of random torques, then the --last ones; else UserError."""
    found = episodes(data)
    last = len(found) if options.last is None else options.last
    if last > len(found):
        raise UserError(f"--last {last}: the data has {len(found)} episodes")
    chosen = Data()
    random_agent = types.SimpleNamespace(get_action=lambda state: random.uniform(-TORQUE, TORQUE))
    seed_everything(options.seed)
    for _ in range(options.random):
        chosen.update_data(random_agent)
    chosen.rows = np.concatenate([chosen.rows, *found[len(found) - last:]])
    return chosen


def episodes(data):
    """The rows of a Data split into episodes, oldest first."""
    ends = np.flatnonzero(data.rows[:, 8:].any(axis=1)) + 1
    return [rows for rows in np.split(data.rows, ends) if len(rows)]


def save_dataset(file, data):
    """Write the rows as npz, with D4RL's names: states, torques in N m, rewards as Pendulum gives
    them, next states; flags: whether a state was terminal, whether the time was over."""
    columns = np.split(data.rows, [3, 4, 5, 8, 9], axis=1)
    state, action, reward, next_state, terminal, timeout = columns
    with whole_file(file) as opened:
        np.savez_compressed(opened, observations=state, actions=action, rewards=reward[:, 0],
                            next_observations=next_state, terminals=terminal[:, 0] > 0,
                            timeouts=timeout[:, 0] > 0)


def load_dataset(file, check=True):
    """The Data in an npz file like save_dataset's. Rewards and flags may have the shape [n] or
    [n, 1], flags any type of 0 and 1. UserError where the rows are not env's (see check_pendulum).
    """
    data = Data()
    widths = {"observations": 3, "actions": 1, "rewards": 1, "next_observations": 3, "terminals": 1,
              "timeouts": 1}
    with reading(file), np.errstate(over="ignore"):
        with open(file, "rb") as opened:
            if opened.read(4) == b"\x89HDF":
                raise UserError("is HDF5, not npz; tests/test_elsewhere.py converts it: read_hdf5, "
                                "and read_d3rlpy for a file of d3rlpy's own")
        found = np.load(read_zip(file), allow_pickle=False)
        missing = widths.keys() - set(found.files)
        if missing:
            raise UserError(f"lacks {', '.join(sorted(missing))}")
        columns, n = [], len(found["rewards"])
        for name, width in widths.items():
            array = found[name]                                         # each access unpacks
            if array.dtype.kind not in "biuf" or len(array) != n or array.size != n * width:
                advice = ""
                if array.ndim > 2:
                    advice = ("; from [episodes, steps, ...] by np.concatenate(x), from [steps, "
                              "environments, ...] by np.concatenate(x.swapaxes(0, 1))")
                elif len(array) > n:
                    advice = "; leave out the state after each episode's last step"
                raise UserError(f"{name} is {array.dtype} {[*array.shape]}; it must be numbers, "
                                f"[{n}, {width}]{advice}")
            if name in ("terminals", "timeouts") and not np.isin(array, (0, 1)).all():
                raise UserError(f"{name} must be 0 and 1")
            columns.append(array.reshape(n, width))
        if n < BATCH:
            raise UserError(f"{n} rows; a batch draws {BATCH} different ones")
        data.rows = np.concatenate(columns, axis=1).astype(np.float32)
    if check:
        with chance_kept():
            check_pendulum(file, data.rows)
    return data


def check_pendulum(file, rows):
    """UserError for the first row that env does not give, with its usual cause and the remedy. A
    notice where rows are not whole episodes in order, as --last needs them."""
    found = np.array([np.hstack(step_from(row[:3], row[3])) for row in rows.astype(float)])
    right = (np.isclose(rows[:, 4:9], found, atol=1e-4).all(axis=1)     # float32 rounds to 1e-5
             & np.isclose(np.hypot(rows[:, 0], rows[:, 1]), 1, atol=1e-4)
             & (abs(rows[:, 3]) <= TORQUE))
    if not right.all():
        row = right.argmin()
        raise UserError(f"{file}: row {row} is not what env gives: {cause(rows, row)}")
    ends = rows[:, 8:].any(axis=1)
    follows = (rows[:-1, 5:8] == rows[1:, :3]).all(axis=1)
    if not (follows | ends[:-1]).all() or not ends[-1]:
        say(f"note: {file}: rows are not whole episodes in order; --last and returns mean little")


def cause(rows, i):
    """The usual explanation that fits a wrong row, and what to do."""
    state, next_state = rows[i, :3].astype(float), rows[i, 5:8].astype(float)
    torque, reward = float(rows[i, 3]), float(rows[i, 4])
    reward_here, state_here, _ = step_from(state, torque)
    same_reward = np.isclose(reward, reward_here, atol=1e-4)
    *same_angle, same_speed = np.isclose(next_state, state_here, atol=1e-4)     # [3]
    same_state = all(same_angle) and same_speed
    scaled = np.hstack(step_from(state, TORQUE * torque)[:2])                   # [1 + 3]
    jump = np.hypot(*(next_state - state)[:2])              # 8 rad/s for 0.05 s are 0.4 at most
    if not state.any() or np.isnan(state).any():
        return "an unused row of a buffer; drop the rows of zeros or NaN"
    if not np.isclose(np.hypot(state[0], state[1]), 1, atol=1e-4):
        return "observations must be (cos angle, sin angle, speed in rad/s), not scaled or rounded"
    if same_reward and same_state:
        if abs(torque) > TORQUE:
            return f"a torque of {torque:.3f}; clip actions to {TORQUE:g} N m, as env does"
        if rows[i, 8]:
            return ("its state is no end here; a time limit belongs in timeouts, not in terminals, "
                    "and another end in MyWrapper, too")
        return "env ends here; put True in terminals"
    if abs(torque) <= TORQUE / 2 and np.allclose(rows[i, 4:8], scaled, atol=1e-4):
        return f"torques are divided by {TORQUE:g}; multiply actions by {TORQUE:g}, to N m"
    if same_state:
        remedy = "undo it (a scale, rounding), or change MyWrapper's"
        if rows[i, 8:].any():
            remedy = "PPO's buffers add to it at a time limit; take the environment's"
        return f"reward {reward:.4f}, here {reward_here:.4f}; {remedy}"
    if reward == 0 and not same_reward:
        return "a vector environment's row of a reset; drop the rows whose reward is 0"
    if same_reward and same_speed and abs(next_state[2]) == 8:
        return ("its angle follows the speed before that is cut at 8, as in Pendulum-v0 and "
                "envpool; use Gymnasium's v1")
    follows = np.isclose(rows[:, :3], state_here, atol=1e-4).all(axis=1)        # [n]
    if follows.any():
        return f"its next state is not what follows; the state of row {follows.argmax()} is"
    if rows[i, 8:].any() or same_reward and jump > 0.41:
        return ("its next state is not the episode's last; take that (final_obs), or drop the row "
                "and put True in timeouts of the row before")
    if same_reward:
        return ("another pendulum or torque moved it; look at the order and sign of actions, make "
                "changes (gravity, mass) in MyWrapper, too")
    return ("reward and next state do not follow from state (cos angle, sin angle, speed in rad/s) "
            "and torque (N m)")


# ---- The report: table and picture ----
def report(run, data, student):
    """Print the returns of the data, the teacher and the student; write curves.png."""
    found = episodes(data)
    returns = {"the data": [float(rows[:, 4].sum()) for rows in found], **run.returns}
    say(f"\n{'return of an episode':<22} episodes      mean  std. error     worst      best")
    for who, x in returns.items():
        error = np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        say(f"{who:<22}{len(x):>9}{np.mean(x):>10.1f}{error:>12.1f}{min(x):>10.1f}{max(x):>10.1f}")
    lengths = [len(rows) for rows in found]
    if {*lengths} != {EPISODE}:
        say(f"note: the data's episodes have {min(lengths)} to {max(lengths)} steps, the limit is "
            f"{EPISODE} here: returns of other lengths cannot be compared")
    minutes = {row["stage"]: row["seconds"] / 60 for row in run.log}    # of a stage's last test
    say("minutes: " + ", ".join(f"{stage} {x:.1f}" for stage, x in minutes.items()))

    if not run.out:
        return
    with optional("no curves.png"):
        if "matplotlib" not in sys.modules:
            os.environ.pop("MPLBACKEND", None)          # a notebook hands its own to `!python`
        from matplotlib.figure import Figure
        figure = Figure(figsize=(17, 8), layout="constrained")
        above, below = figure.subfigures(2, 1)
        draw_tests(above, run.log, np.mean(returns["the data"]))
        draw_critic(below, data, student)
        content = io.BytesIO()
        figure.savefig(content, format="png")
        with whole_file(run.out / "curves.png") as file:
            file.write(content.getvalue())
    say(f"all files: {run.out}")


def draw_tests(figure, log, data_mean):
    """Returns of teacher and student; what the student promised and delivered; its penalty."""
    teacher, student, promised, penalty = figure.subplots(1, 4)

    def curve(axes, stage, name, style, label=None):
        rows = [row for row in log if row["stage"] == stage and name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, ms=4,
                  label=label)

    curve(teacher, "teacher", "return", "o-C0")
    teacher.set(title="Teacher, online", xlabel="epoch", ylabel="return of an episode")
    curve(student, "student", "return", "o-C1", "student")
    student.axhline(data_mean, color="0.4", ls="--", label="the data")
    student.set(title="Student, offline", xlabel="update", ylabel="return of an episode")
    curve(promised, "student", "promised", "o-C3", "promised")
    curve(promised, "student", "delivered", "s-C2", "delivered")
    for limit in filter(math.isfinite, possible()):
        promised.axhline(limit, color="k", ls="-.", lw=1)
    promised.set(title="Promise, delivery; lines: what is possible", xlabel="update",
                 ylabel=f"discounted sum of (reward + {SCALE}) / {SCALE}")
    curve(penalty, "student", "penalty", "o-C4", "penalty: logsumexp minus Q of the data")
    curve(penalty, "student", "squared_error", "s-C5", "squared error")
    curve(penalty, "student", "temperature", "^-C6", "temperature")
    penalty.set(title="The second critic's last update", xlabel="update")
    penalty.set_yscale("symlog", linthresh=0.01)                    # the penalty may be negative
    for axes in (student, promised, penalty):
        axes.legend(fontsize="small")


def draw_critic(figure, data, student):
    """The policy's torque over angle and speed, the critic's promise for it, both with the data's
    states as dots; and one state, in which each torque's promise stands beside its delivery."""
    policy, critic, one_state = figure.subplots(1, 3)
    angle, speed = np.meshgrid(np.linspace(-math.pi, math.pi, 46), np.linspace(-8, 8, 41))
    states = np.stack([np.cos(angle), np.sin(angle), speed], axis=2).reshape(-1, 3)     # [b, 3]
    torque = mean_torque(student, states)                                               # [b]
    promised = least_value(student, states, torque).numpy()                             # [b, 1]
    shown = data.rows[::math.ceil(len(data.rows) / 2000)]
    for axes, values, title in ((policy, torque, "The policy's torque (N m), a mean of 5"),
                                (critic, promised, "The critic's promise for it")):
        image = axes.pcolormesh(np.degrees(angle), speed, values.reshape(angle.shape),
                                cmap="coolwarm", shading="nearest")
        figure.colorbar(image, ax=axes)
        axes.plot(np.degrees(np.arctan2(shown[:, 1], shown[:, 0])), shown[:, 2], ".k", ms=1.5)
        axes.set(title=f"{title}; dots: the data", xlabel="angle from upright (degrees)",
                 ylabel="speed (rad/s)")
    draw_state(one_state, data, student)


def mean_torque(agent, states):
    """A mean of five torques that the agent draws in each state: [b, 3] -> [b]."""
    with chance_kept():
        seed_everything(0)
        return np.array([[agent.get_action(x) for x in states] for _ in range(5)]).mean(axis=0)


def draw_state(axes, data, student):
    """In the fastest state that has 20 rows of the data near it: what the critic promises for each
    torque, and what each and then the student deliver in env, a mean of 5 episodes."""
    def near(state):
        """The rows whose cos, sin and speed are less than 0.3 from the state's."""
        return data.rows[(abs(data.rows[:, :3] - state) < 0.3).all(axis=1)]

    some = data.rows[::math.ceil(len(data.rows) / 500), :3]                     # of 500 states
    crowded = [state for state in some if len(near(state)) >= 20] or [some[0]]
    state = max(crowded, key=lambda state: abs(state[2]))
    torques = np.linspace(-TORQUE, TORQUE, 21)
    promised = least_value(student, np.tile(state, (21, 1)), torques)
    axes.plot(torques, promised, "C3", label="promised")
    axes.plot(torques, [deliver(student, state, torque) for torque in torques], "C2--",
              label="delivered")
    below = {"clip_on": False, "transform": axes.get_xaxis_transform()}         # y: 0 is the bottom
    axes.plot(near(state)[:, 3], np.full(len(near(state)), 0.03), "|k", label="the data's", **below)
    axes.plot(mean_torque(student, [state]), 0.09, "^C1", label="the policy's", **below)
    axes.set(title=f"In a state: {math.degrees(math.atan2(state[1], state[0])):.0f} degrees from "
                   f"upright, {state[2]:.1f} rad/s", xlabel="torque of this step (N m)",
             ylabel=f"discounted sum of (reward + {SCALE}) / {SCALE}")
    axes.legend(fontsize="small")


def deliver(agent, state, torque, episodes=5):
    """What a torque in a state, [3], and then the agent deliver in env, see discounted: the mean of
    some episodes. The same noise follows whatever the torque is."""
    delivered = []
    with chance_kept():
        for seed in range(episodes):
            seed_everything(seed)
            start_from(state)
            delivered.append(discounted(*play_on(agent, torque)))
    return np.mean(delivered)


# ---- What all of the above use ----
class UserError(ValueError):
    """A user's mistake: the message says in one line what was wrong, where, and what to do."""


def say(line):
    """Print a line, above the progress bar if there is one."""
    write = tqdm.tqdm.write if tqdm else print
    write(line)
    sys.stdout.flush()                          # for those who read a log file as it grows


@functools.cache
def note(line):
    """Say something once."""
    say(f"note: {line}")


@contextlib.contextmanager
def optional(without):
    """Whatever fails inside, at import or later, costs what it was for and one line of notice."""
    try:
        yield
    except Exception as error:
        say(f"note: {without} ({type(error).__name__}: {' '.join(str(error).split()):.200})")


@contextlib.contextmanager
def whole_file(file):
    """A binary file to write, which appears whole or not at all; UserError where it cannot."""
    part = f"{file}.part"
    try:
        with open(part, "wb") as opened:
            yield opened
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.isfile(part):
            os.unlink(part)


@contextlib.contextmanager
def reading(file):
    """Whatever goes wrong in reading a file becomes a UserError that names it."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:                  # zips, pickles, arrays, layers and JSON have many
        raise UserError(f"{file}: is damaged, or does not fit: {error!s:.250}") from None


def read_zip(file):
    """The content of a .npz or .pt file, which are zip files, once its checksums hold."""
    content = io.BytesIO(pathlib.Path(file).read_bytes())
    with zipfile.ZipFile(content) as members:
        if members.testzip():
            raise UserError("is damaged")
    content.seek(0)
    return content


# for `uv run cql_pendulum.py` (PEP 723)
# /// script
# requires-python = ">=3.11"
# dependencies = ["gym==0.26.2", "gym-notices==0.0.8", "numpy==2.4.6", "torch==2.13.0",
#                 "tqdm==4.70.1", "matplotlib==3.11.2", "pygame-ce==2.5.8", "pillow==13.0.0"]
# ///
if __name__ == "__main__":
    try:
        # pasted into a notebook's cell, what stands there are the notebook's own options
        main([] if "kernel_launcher" in os.path.basename(sys.argv[0]) else sys.argv[1:])
    except UserError as error:
        sys.exit(f"cql_pendulum.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
