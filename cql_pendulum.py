"""The page "Offline RL" of the Simple_Reinforcement_Learning course, complete and right.

A SAC teacher learns Pendulum-v1 online, its transitions are frozen, and a CQL student learns from
them alone. Names, order and constants are the page's; what it leaves out (the update, the reward's
shift, the temperature, the learning rates) is from the course's notebook. Four of the page's
formulas are wrong (ERRATA). A comment "Page:" stands wherever the algorithm differs from the page.

Read from the top to the end of main: that is the whole program. What main calls follows after it.
`python cql_pendulum.py` takes minutes, with `--epochs 3 --steps 100` seconds.
SAC: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905). CQL:
Kumar et al. 2020 (2006.04779). Pardo: Pardo et al. 2018, Time Limits in RL (1712.00378).
"""
import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import math
import os
import pathlib
import random
import sys
import time
import types
import zipfile

import gym
import numpy as np
import torch

__all__ = ["CQL", "Data", "ERRATA", "MyWrapper", "SAC", "env"]
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


class MyWrapper(gym.Wrapper):
    """Pendulum-v1 with the page's interface. A state is (cos angle, sin angle, speed in rad/s),
    upright at angle 0; the reward is -(angle^2 + 0.1 speed^2 + 0.001 torque^2) before the step."""

    def __init__(self):
        # gym's own limit follows EPISODE; its checker uses np.bool8, which NumPy 2 lacks
        env = gym.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=EPISODE,
                       disable_env_checker=True)
        super().__init__(env)
        self.env = env
        self.step_n = 0

    def reset(self, seed=None):
        """Start an episode: a state, float32 [3]. A seed fixes this start and all later ones."""
        state, _ = self.env.reset(seed=seed)
        self.step_n = 0
        return state

    def step(self, action):
        """Apply the torque [action] for 0.05 s. info["timeout"] is ours: done by a time limit."""
        state, reward, terminated, truncated, info = self.env.step(action)
        self.step_n += 1
        done = terminated or truncated or self.step_n >= EPISODE
        info["timeout"] = done and not terminated
        return state, reward, done, info

    def show(self):
        """Draw the pendulum as it is now, in a window or a notebook's output."""
        from matplotlib import pyplot
        pyplot.imshow(self.env.render())
        pyplot.pause(0.01)
        pyplot.clf()


env = MyWrapper()


class Data:
    """The teacher's replay buffer, then the student's dataset. Page: a list of tuples. Here `rows`,
    float32 [n, 10]: state 0:3, action 3, reward 4, next_state 5:8, terminal 8, timeout 9."""

    def __init__(self, as_printed=()):
        self.as_printed = check_errata(as_printed)
        self.rows = np.empty([0, 10], np.float32)
        self.frozen = False

    def __len__(self):
        return len(self.rows)

    @property
    def datas(self):
        """(state, action, reward, next_state, over) of each row, a tuple made anew: keep it."""
        columns = [column.numpy() for column in self._columns(self.rows.copy())]
        return tuple((s, a.item(), r.item(), n, bool(o)) for s, a, r, n, o in zip(*columns))

    def update_data(self, agent):
        """Play an episode in `env` with the agent and append it; RuntimeError when frozen."""
        if self.frozen:
            raise RuntimeError("this dataset is frozen: offline training never adds to it")
        rows = []
        state = env.reset()
        over = False
        while not over:
            action = agent.get_action(state)
            next_state, reward, over, info = env.step([action])
            terminal = over and not info["timeout"]
            rows.append([*state, action, reward, *next_state, terminal, info["timeout"]])
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
        over = torch.maximum(terminal, timeout) if "timeout" in self.as_printed else terminal
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
        as_printed = frozenset()

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

        def forward(self, state, n=1):
            """[b, 3] -> n torques a state (Page: 1), [b, n], and the entropy of each, [b, n]: minus
            the log density of its tanh, that is of torque / 2 (SAC, appendix C)."""
            dist = self.gaussian(state, n)
            sample = dist.rsample()                                 # [b, n]
            action = torch.tanh(sample)                             # [b, n]
            # Page: log(1 - tanh(action)^2 + 1e-7), but action is a tanh: that squashes twice.
            x = action if "jacobian" in self.as_printed else sample
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

    def __init__(self, as_printed=()):
        self.model_action = self.ModelAction()
        self.model_value1, self.model_value2 = self.ModelValue(), self.ModelValue()
        self.model_value_next1 = copy.deepcopy(self.model_value1)
        self.model_value_next2 = copy.deepcopy(self.model_value2)
        self.alpha = torch.tensor(math.log(TEMPERATURE), requires_grad=True)    # the log
        # Notebook: an Adam for each. It works number by number: one for two gives the same.
        values = [*self.model_value1.parameters(), *self.model_value2.parameters()]
        actions = [*self.model_action.parameters(), self.alpha]
        self.optimizer_value = torch.optim.Adam(values, lr=LR_VALUE, fused=True)
        self.optimizer_action = torch.optim.Adam(actions, lr=LR_ACTION, fused=True)
        self.loss_fn = torch.nn.MSELoss()
        self.as_printed = as_printed

    @property
    def as_printed(self):
        """The errata that are restored, a frozenset. Setting it acts from the next update on."""
        return self._as_printed

    @as_printed.setter
    def as_printed(self, names):
        self._as_printed = check_errata(names)
        self.model_action.as_printed = self._as_printed             # where jacobian acts

    def get_action(self, state):
        """A torque of the policy, float in [-2, 2], for three numbers; else ValueError."""
        state = torch.from_numpy(np.asarray(state, np.float32).reshape(1, 3))
        with torch.no_grad():
            action, _ = self.model_action(state)                    # [1, 3] -> [1, 1]
        return action.item()

    def test(self, play):
        """The return of one episode from a random start; with play=True it is shown."""
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
        return self.loss_fn(model_value(state, action), target)

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

    def __init__(self, as_printed=(), weight=None):
        super().__init__(as_printed)
        self.weight = WEIGHT if weight is None else weight

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """SAC's loss of one critic, and weight times the penalty: logsumexp of Q over 15 torques
        minus Q of the data's torque, a scalar (CQL, equation 4). The logsumexp estimates the log
        of the integral of exp(Q) over all torques, plus log 15 since it sums 15: a constant."""
        # Page: (-1, 1), which leaves half of the torques out of the penalty.
        limit = 1 if "range" in self.as_printed else TORQUE
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
        sign = -1 if "sign" in self.as_printed else 1
        value_curr = value_curr + sign * curr_entropy                           # [b, 5]
        value_next = value_next + sign * next_entropy                           # [b, 5]
        value_cat = torch.cat([value_rand, value_curr, value_next], dim=1)      # [b, 15]
        loss_cat = torch.logsumexp(value_cat, dim=1).mean()                     # [b, 15] -> scalar
        return loss_value + self.weight * (loss_cat - value.mean())             # scalar


def train_teacher(teacher, data, epochs, run):
    """The page's online loop. run.remaining is range(epochs), or what a resumed run has left of it;
    run.test prints the mean return of 10 episodes, beside it what the critic promised and what was
    delivered (see evaluate), and saves. Page: random starts; ours are the same 10 at every test."""
    for epoch in run.remaining(epochs):
        data.update_data(teacher)
        for i in range(UPDATES):
            teacher.train(*data.get_sample())

        if epoch % 10 == 0 or epoch == epochs - 1:
            run.test(epoch)


def train_student(student, data, steps, run):
    """The page's offline loop: nothing is added to the data."""
    for i in run.remaining(steps):
        student.train(*data.get_sample())

        if i % 2000 == 0 or i == steps - 1:
            run.test(i)


def main(argv):
    """The story: a teacher learns online, its data are frozen, a student learns from them alone."""
    options = parse_options(argv)
    torch.set_num_threads(1)          # small matrices; and no number depends on how many cores
    torch.set_flush_denormal(True)    # Adam's averages of dead units end below 1e-38: half as fast
    if options.play:
        play(options.play, options.seed)
        return

    run, options = open_run(options, argv)
    try:
        if run.stage == "teacher":
            seed_everything(options.seed)
            teacher = SAC(options.as_printed)
            data = Data(options.as_printed)
            run.begin("teacher", teacher, data)
            train_teacher(teacher, data, options.epochs, run)
            save_agent(run.out / "teacher.pt", teacher)
            save_dataset(run.out / "dataset.npz", choose_episodes(data, options))

        data = load_dataset(run.out / "dataset.npz", options.as_printed)
        data.freeze()
        seed_everything(options.seed)
        if options.student == "cql":
            student = CQL(options.as_printed, options.weight)
        elif options.student == "sac":
            student = SAC(options.as_printed)
        else:
            student = BC(options.as_printed)                # behaviour cloning
        run.begin("student", student, data)
        train_student(student, data, options.steps, run)
        save_agent(run.out / "student.pt", student)
        report(run, data, student)
    except KeyboardInterrupt:
        raise UserError(f"stopped. Go on: python {sys.argv[0]} --resume \"{run.out}\"") from None


# ---- The story ends here. What main calls follows, in its order: the command line ----
def parse_options(argv):
    """The options; argparse ends the program with one line where they make no sense."""
    parser = argparse.ArgumentParser("cql_pendulum.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="of all chance (%(default)s)")
    add("--epochs", type=number(int, 1), default=100, help="of the teacher (%(default)s)")
    add("--steps", type=number(int, 1), default=50_000, help="the student's updates (%(default)s)")
    add("--student", choices=["cql", "sac", "bc"], default="cql",
        help="sac: the same without penalty; bc: clones the data's torques (%(default)s)")
    add("--weight", type=number(float, 0), help=f"of CQL's penalty ({WEIGHT})")
    add("--as-printed", nargs="*", action="extend", choices=[*ERRATA], metavar="NAME",
        help=f"restore the page's errata: {', '.join(ERRATA)}; no name: all of them (none)")
    add("--last", type=number(int, 0), metavar="N", help="train on the last N episodes only (all)")
    add("--random", type=number(int, 0, CAPACITY // EPISODE), default=0, metavar="N",
        help="put N episodes of random torques before them (%(default)s)")
    add("--dataset", type=pathlib.Path, metavar="FILE", help="no teacher: use this dataset.npz")
    add("--out", type=pathlib.Path, metavar="DIR", help="a new folder for the results (in runs/)")
    add("--resume", type=pathlib.Path, metavar="DIR", help="go on with the run in this folder")
    add("--play", type=pathlib.Path, metavar="FILE", help="animate an episode of a saved agent")
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
    if options.last == 0 and options.random == 0:
        parser.error("--last 0 leaves no data; add --random N")
    most = math.inf if options.dataset else min(options.epochs, CAPACITY // EPISODE)
    if options.last and options.last > most:
        parser.error(f"--last {options.last}: the teacher's data will have {most} episodes")
    if options.as_printed == []:
        options.as_printed = [*ERRATA]
    return options


def number(kind, least, most=10 ** 9):
    """A type for argparse: an int or a float from least to most."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: give a number from {least} to {most}")
        return value
    convert.__name__ = kind.__name__                    # argparse says "invalid int value"
    return convert


def play(path, seed):
    """Play an episode with a saved agent, print its return, and write the animation to FILE.gif."""
    agent = load_agent(path)
    os.environ["SDL_VIDEODRIVER"] = "dummy"             # pygame draws without a window
    pygame = optional("pygame", "no animation")
    pillow = optional("PIL.Image", "no animation")
    can_draw = bool(pygame and pillow)
    frames = []
    env.show = lambda: frames.append(pillow.fromarray(env.render()[::2, ::2]))      # half the size
    seed_everything(seed)
    say(f"return {agent.test(play=can_draw):.1f}")
    if can_draw:
        with whole_file(f"{path}.gif") as file:
            frames[0].save(file, "GIF", append_images=frames[1:], save_all=True, duration=50,
                           loop=0)
        say(f"animation: {path}.gif")


# ---- The run and its folder ----
def open_run(options, argv):
    """A Run in a new folder, or the one that --resume names, and its options (config.json)."""
    if options.resume:
        file = options.resume / "config.json"
        with reading(file):
            options = parse_options(json.loads(file.read_text())["argv"])
        return Run(file.parent, options.seed), options

    data = Data()
    if options.dataset:
        data = load_dataset(options.dataset)
        check_pendulum(options.dataset, data)
    teacher_needed = not options.dataset and options.last != 0
    if not teacher_needed:
        data = choose_episodes(data, options)
    out, k = options.out, 1
    while not options.out and (out is None or out.exists()):
        out = pathlib.Path("runs", f"{options.student}-seed{options.seed}-{k}")
        k += 1
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a new folder, or go on with the run "
                        f"in it: --resume {out}") from None
    if not teacher_needed:
        save_dataset(out / "dataset.npz", data)
    versions = {package.__name__: package.__version__ for package in (gym, np, torch)}
    with whole_file(out / "config.json") as file:
        file.write(json.dumps({"argv": argv, "versions": versions}).encode())
    return Run(out, options.seed), options


class Run:
    """A run's place in the story: its stage, how many epochs or updates of it are done, and the log
    of its tests. Each test saves them in the folder `out`; without one (None) nothing is saved."""

    def __init__(self, out, seed):
        self.out, self.seed = out, seed
        self.stage = "teacher"
        self.saved, self.log = {}, []   # the checkpoint; a dict for each test
        if out and (out / "checkpoint.pt").exists():
            self.saved = read_agent(out / "checkpoint.pt")
            with reading(out / "checkpoint.pt"):
                self.log, self.stage = self.saved["log"], self.saved["stage"]
        if out and (out / "dataset.npz").exists():
            self.stage = "student"                                  # the teacher is done

    def begin(self, stage, agent, data):
        """Start a stage with a new agent, or go on with it: agent, data and all chance then become
        what they were at the last test."""
        self.stage, self.agent, self.data = stage, agent, data
        self.done = 0
        self.begun = time.monotonic()
        if self.saved.get("stage") == stage:
            with reading(self.out / "checkpoint.pt"):
                restore_agent(agent, self.saved)
                self.done = self.saved["done"]
                self.begun -= self.log[-1]["seconds"]
                torch.set_rng_state(self.saved["torch"])
                random.setstate(self.saved["random"])
                env.unwrapped.np_random.bit_generator.state = self.saved["env"]
                if stage == "teacher":
                    data.rows = self.saved["rows"].numpy()
            self.save()                                             # log.csv may be gone or ahead

    def starts(self, purpose, n):
        """Seeds of n starts for a purpose (0: tests, 1: final episodes), alike for all agents."""
        return np.random.SeedSequence([self.seed, purpose]).generate_state(n).tolist()

    def remaining(self, total):
        """The stage's epochs or updates that are still to do, behind a progress bar."""
        todo = range(self.done, total)
        if not todo:
            say(f"the {self.stage} was finished")
        tqdm = optional("tqdm", "no progress bars")
        if tqdm:
            todo = tqdm.tqdm(todo, self.stage, total, initial=self.done, disable=None, leave=False)
        return todo

    def test(self, step):
        """Play the test's 10 episodes; log their means, save, and print them."""
        returns, promised, delivered = evaluate(self.agent, self.starts(0, 10))
        self.log.append({"stage": self.stage, "step": step, "return": float(returns.mean()),
                         "promised": float(promised.mean()), "delivered": float(delivered.mean()),
                         "seconds": time.monotonic() - self.begun})
        self.done = step + 1
        if self.out:
            self.save()
        promise = "       -" if isinstance(self.agent, BC) else f"{promised.mean():8.2f}"
        say(f"{self.stage} {step:6d}   return {returns.mean():8.1f}   promised {promise}"
            f"   delivered {delivered.mean():6.2f}")

    def save(self):
        """Write log.csv, then checkpoint.pt: a kill between the two loses no test."""
        lines = ["stage,step,return,promised,delivered,seconds\n"]
        lines += ["{},{},{:.3f},{:.3f},{:.3f},{:.1f}\n".format(*row.values()) for row in self.log]
        with whole_file(self.out / "log.csv") as file:
            file.write("".join(lines).encode())
        rows = self.data.rows if self.stage == "teacher" else np.empty([0, 10], np.float32)
        save_agent(self.out / "checkpoint.pt", self.agent, stage=self.stage, done=self.done,
                   log=self.log, rows=torch.from_numpy(rows), torch=torch.get_rng_state(),
                   random=random.getstate(), env=env.unwrapped.np_random.bit_generator.state)


def seed_everything(seed):
    """Seed torch, random and the environment, as each stage does when it begins."""
    torch.manual_seed(seed)
    random.seed(seed)
    env.reset(seed=seed)


# ---- A test: what an agent returns, what it promised, what it delivered ----
@torch.no_grad()
def evaluate(agent, seeds):
    """One episode for each seed, side by side: returns, promised, delivered, [episodes] each.
    Promised is the smaller critic's value of the first torque, with the entropy bonus of later
    steps; delivered is what it pays, see discounted. The same seeds, the same starts and noise."""
    envs = [MyWrapper() for _ in seeds]
    state = torch.tensor(np.stack([env.reset(seed=seed) for env, seed in zip(envs, seeds)]))
    rewards = np.empty([EPISODE, len(envs)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        for t in range(EPISODE):
            action, _ = agent.model_action(state)                               # [episodes, 1]
            if t == 0:
                promised = least_value(agent, state, action)[:, 0].numpy()
            steps = [env.step([torque]) for env, torque in zip(envs, action[:, 0].tolist())]
            state = torch.from_numpy(np.stack([step[0] for step in steps]))
            rewards[t] = [step[1] for step in steps]
    return rewards.sum(axis=0), promised, discounted(rewards)


def discounted(rewards):
    """What rewards, [T, n], deliver in the critics' unit, [n]: their discounted sum after scaling,
    with a tail as if the mean of the last 20 went on for ever; at most 1 / (1 - 0.99) = 100."""
    scaled = (rewards + SCALE) / SCALE
    tail = GAMMA ** len(rewards) / (1 - GAMMA) * scaled[-20:].mean(axis=0)
    return GAMMA ** np.arange(len(rewards)) @ scaled + tail


def least_value(agent, state, action):
    """The smaller critic's value, [b, 3], [b, 1] -> [b, 1]."""
    return torch.min(agent.model_value1(state, action), agent.model_value2(state, action))


# ---- Agents in files ----
def save_agent(path, agent, **more):
    """Write all that going on with an agent needs, and `more`; UserError if it has diverged."""
    state = {}                          # state_dicts, tensors and numbers, by attribute
    learned = [agent.alpha]
    for name, part in vars(agent).items():
        if isinstance(part, torch.nn.Module):
            learned += part.parameters()
        if hasattr(part, "state_dict"):
            state[name] = part.state_dict()
        elif torch.is_tensor(part) or isinstance(part, (int, float, bool, str, np.number)):
            state[name] = part.item() if isinstance(part, np.number) else part
    if not all(x.isfinite().all() for x in learned):
        raise UserError(f"{path}: not written, the agent is NaN or infinite; an earlier one stays. "
                        f"Try another --seed or a smaller --weight")
    content = io.BytesIO()                      # torch's own writer hides what a full disk says
    torch.save({"class": type(agent).__name__, "as_printed": sorted(agent.as_printed),
                "state": state, **more}, content)
    with whole_file(path) as file:
        file.write(content.getvalue())


def load_agent(path):
    """The agent in a file of save_agent; UserError where there is none. No code in the file runs.
    For a class of your own, make an agent and call restore_agent(agent, read_agent(path))."""
    saved = read_agent(path)
    with reading(path):
        agent = {"SAC": SAC, "CQL": CQL, "BC": BC}[saved["class"]]()
        restore_agent(agent, saved)
    return agent


def read_agent(path):
    """The dict that save_agent wrote; UserError where there is none."""
    with reading(path):
        return torch.load(read_zip(path), weights_only=True)


def restore_agent(agent, saved):
    """Put what save_agent wrote into an agent of the same layers."""
    for name, part in saved["state"].items():
        if isinstance(part, dict):
            getattr(agent, name).load_state_dict(part)
        elif torch.is_tensor(part) and hasattr(agent, name):
            getattr(agent, name).data.copy_(part)
        else:
            setattr(agent, name, part)
    agent.as_printed = saved["as_printed"]


# ---- Datasets ----
def choose_episodes(data, options):
    """A new Data: --random episodes of random torques, then the --last ones; else UserError."""
    found = episodes(data)
    last = len(found) if options.last is None else options.last
    if last > len(found):
        raise UserError(f"--last {last}: the data has {len(found)} episodes")
    chosen = Data(data.as_printed)
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


def arrays_of(rows):
    """Rows, [n, 10], as the arrays of a file, with D4RL's names: states, torque in N m, rewards as
    Pendulum gives them, next states; whether a state was terminal; whether time was over."""
    state, action, reward, next_state, terminal, timeout = np.split(rows, [3, 4, 5, 8, 9], axis=1)
    return {"observations": state, "actions": action, "rewards": reward[:, 0],
            "next_observations": next_state, "terminals": terminal[:, 0] > 0,
            "timeouts": timeout[:, 0] > 0}


def save_dataset(path, data):
    """Write the rows as npz."""
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays_of(data.rows))


def load_dataset(path, as_printed=()):
    """The Data in an npz file like save_dataset's; UserError where it is not of this Pendulum."""
    data = Data(as_printed)
    with reading(path), np.errstate(over="ignore"):
        file = np.load(read_zip(path), allow_pickle=False)
        if any(name.endswith("data.pkl") for name in file.files):
            raise UserError("is an agent, not a dataset")
        missing = arrays_of(data.rows).keys() - set(file.files)
        if missing:
            raise UserError(f"lacks {', '.join(sorted(missing))}")
        n = file["rewards"].size
        arrays = arrays_of(np.empty([n, 10], np.float32))
        for name, wanted in arrays.items():
            found = file[name]                                          # each access unpacks
            if (found.shape, found.dtype.kind) != (wanted.shape, wanted.dtype.kind):
                raise UserError(f"{name} is {found.dtype} {[*found.shape]}; "
                                f"it must be {wanted.dtype} {[*wanted.shape]}")
            arrays[name] = found
        if n < BATCH:
            raise UserError(f"{n} rows; a batch draws {BATCH} different ones")
        data.rows = np.column_stack([*arrays.values()]).astype(np.float32)
    return data


def check_pendulum(path, data):
    """UserError for the first row that Pendulum cannot give: reward and next state follow from
    state and torque. A notice where rows are not whole episodes in order, as --last needs them."""
    arrays = arrays_of(data.rows)
    state, torque = data.rows[:, :3].astype(float), data.rows[:, 3].astype(float)
    reward, next_state = pendulum(state, torque)
    right = np.column_stack([                           # [n, 5]; float32 rounds to 1e-5
        np.isclose(np.hypot(state[:, 0], state[:, 1]), 1, atol=1e-4) & (abs(state[:, 2]) <= 8),
        abs(torque) <= 2,
        np.isclose(arrays["rewards"], reward, atol=1e-4),
        np.isclose(arrays["next_observations"], next_state, atol=1e-4).all(axis=1),
        ~arrays["terminals"]])                          # a time limit belongs in timeouts
    if not right.all():
        row = right.all(axis=1).argmin()
        name = [*arrays][right[row].argmin()]
        raise UserError(f"{path}: row {row} of {name}, {arrays[name][row]}, is not what Pendulum "
                        f"gives for its state and torque (N m)")
    ends = arrays["terminals"] | arrays["timeouts"]
    follows = (data.rows[:-1, 5:8] == data.rows[1:, :3]).all(axis=1)
    if not (follows | ends[:-1]).all() or not ends[-1]:
        say(f"note: {path}: rows are not whole episodes in order; --last and returns mean little")


def pendulum(state, torque):
    """Pendulum-v1's formulas for many states: [n, 3], [n] -> reward [n], next_state [n, 3]. (If you
    change MyWrapper's, change them here, too.)"""
    angle = np.arctan2(state[:, 1], state[:, 0])
    speed = state[:, 2]
    reward = -(angle ** 2 + 0.1 * speed ** 2 + 0.001 * torque ** 2)
    # gravity 10 m/s^2, length 1 m, mass 1 kg, a step of 0.05 s
    speed = np.clip(speed + (15 * np.sin(angle) + 3 * torque) * 0.05, -8, 8)
    angle = angle + 0.05 * speed
    return reward, np.stack([np.cos(angle), np.sin(angle), speed], axis=1)


# ---- Behaviour cloning ----
class BC(SAC):
    """A student that imitates; ours, not the page's. Its policy learns to give the data's torques
    and knows no reward: the yardstick for what imitation alone returns."""

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


# ---- The report: table and picture ----
def report(run, data, student):
    """Print the returns of the data, the teacher and the student; write curves.png."""
    seeds = run.starts(1, 100)
    returns = {"the data": [float(rows[:, 4].sum()) for rows in episodes(data)]}
    if (run.out / "teacher.pt").exists():
        returns["the teacher"] = evaluate(load_agent(run.out / "teacher.pt"), seeds)[0]
    returns["the student"] = evaluate(student, seeds)[0]
    say(f"\n{'return of an episode':<22} episodes      mean  std. error     worst      best")
    for who, x in returns.items():
        error = np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        say(f"{who:<22}{len(x):>9}{np.mean(x):>10.1f}{error:>12.1f}{min(x):>10.1f}{max(x):>10.1f}")
    minutes = {row["stage"]: row["seconds"] / 60 for row in run.log}    # of a stage's last test
    say("minutes: " + ", ".join(f"{stage} {x:.1f}" for stage, x in minutes.items()))

    if optional("matplotlib", "no curves.png"):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(13, 7.5), layout="constrained")
        tests, torques = figure.subfigures(2, 1)
        draw_tests(tests, run.log, np.mean(returns["the data"]))
        draw_torques(torques, data, student)
        with whole_file(run.out / "curves.png") as file:
            figure.savefig(file, format="png")
    say(f"all files: {run.out}")


def draw_tests(figure, log, data_mean):
    """Returns of teacher and student, and what the student promised and delivered."""
    teacher, student, promise = figure.subplots(1, 3)
    taught = [row for row in log if row["stage"] == "teacher"]
    learned = [row for row in log if row["stage"] == "student"]
    updates = [row["step"] for row in learned]
    teacher.plot([row["step"] for row in taught], [row["return"] for row in taught], "o-C0", ms=4)
    teacher.set(title="Teacher, online", xlabel="epoch", ylabel="return of an episode")
    student.plot(updates, [row["return"] for row in learned], "o-C1", ms=4, label="student")
    student.axhline(data_mean, color="0.4", ls="--", label="the data")
    if taught:                                                          # from the same 10 starts
        student.axhline(taught[-1]["return"], color="C0", ls="--", label="the teacher's last test")
    student.set(title="Student, offline", xlabel="update", ylabel="return of an episode")
    promise.plot(updates, [row["promised"] for row in learned], "o-C3", ms=4, label="promised")
    promise.plot(updates, [row["delivered"] for row in learned], "s-C2", ms=4, label="delivered")
    promise.axhline(1 / (1 - GAMMA), color="k", ls="-.", label="the most possible")
    promise.set(title="Promised and delivered", xlabel="update",
                ylabel=f"discounted sum of (reward + {SCALE}) / {SCALE}")
    student.legend(fontsize="small")
    promise.legend(fontsize="small")


def draw_torques(figure, data, student):
    """Three states of the data, and in each what every torque promises and delivers."""
    angle = np.arctan2(data.rows[:, 1], data.rows[:, 0])
    speed = data.rows[:, 2]
    upright = np.argmin(angle ** 2 + (speed / 8) ** 2)
    swinging = np.argmax(abs(speed))
    hanging = np.argmin((math.pi - abs(angle)) ** 2 + (speed / 8) ** 2)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, row in zip(panels, (upright, swinging, hanging)):
        draw_state(axes, data, student, data.rows[row, :3])
        axes.set(title=f"{np.degrees(angle[row]):.0f} degrees from upright, {speed[row]:.1f} rad/s",
                 xlabel="torque of this step (N m); then the policy's")
    panels[0].set_ylabel(f"discounted sum of (reward + {SCALE}) / {SCALE}")
    panels[0].legend(fontsize="small")


@torch.no_grad()
def draw_state(axes, data, student, state):
    """Over 41 torques in a state, [3]: what the critic promises, and what each torque and then the
    student's policy deliver, a mean of 20 episodes; below them the data's torques near here."""
    torques = np.linspace(-TORQUE, TORQUE, 41)
    states = torch.tensor(state).expand(41, 3)
    promised = least_value(student, states, torch.from_numpy(torques).float()[:, None])
    delivered = [deliver(student, np.tile(state, (20, 1)), np.full(20, x)).mean() for x in torques]
    near = (abs(data.rows[:, :3] - state) < 0.3).all(axis=1)
    own = TORQUE * student.model_action.gaussian(states[:1]).mean.tanh()
    axes.plot(torques, promised, "C3", label="promised")
    axes.plot(torques, delivered, "C2--", label="delivered")
    below = {"clip_on": False, "transform": axes.get_xaxis_transform()}         # y: 0 is the bottom
    axes.plot(data.rows[near, 3], np.full(near.sum(), 0.03), "|k", label="data near here", **below)
    axes.plot(own, 0.09, "^C1", label="the policy's torque", **below)


@torch.no_grad()
def deliver(agent, state, torque):
    """What torques and then the agent's policy deliver in states, [n, 3], [n] -> [n], see
    discounted. The same noise follows whatever the torques are."""
    rewards = np.empty([EPISODE, len(state)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for t in range(EPISODE):
            rewards[t], state = pendulum(state, torque)
            torque = agent.model_action(torch.from_numpy(state).float())[0][:, 0].numpy()
    return discounted(rewards)


# ---- What all of the above use ----
class UserError(ValueError):
    """A user's mistake: the message says in one line what was wrong, where, and what to do."""


def check_errata(names):
    """The errata to restore, as a frozenset; ValueError for a name that is not in ERRATA."""
    names = frozenset([names] if isinstance(names, str) else names or [])
    unknown = names - ERRATA.keys()
    if unknown:
        raise ValueError(f"no erratum is called {min(unknown)}; there are {', '.join(ERRATA)}")
    return names


def say(line):
    """Print a line, above the progress bar if there is one."""
    tqdm = sys.modules.get("tqdm")
    write = tqdm.tqdm.write if tqdm else print
    write(line)
    sys.stdout.flush()                          # for those who read a log file as it grows


@functools.cache
def optional(name, without):
    """An optional package's module; None, after one line of notice, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        say(f"note: {without} ({error})")


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write, which appears whole or not at all; UserError where it cannot."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.isfile(part):
            os.unlink(part)


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong in reading a file becomes a UserError that names it."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it") from None
    except Exception as error:                  # zips, pickles, arrays, layers and JSON have many
        raise UserError(f"{path}: is damaged, or does not fit: {error!s:.250}") from None


def read_zip(path):
    """The content of a .npz or .pt file, which are zip files, once its checksums hold."""
    content = io.BytesIO(pathlib.Path(path).read_bytes())
    with zipfile.ZipFile(content) as members:
        # no checksum covers a member's folder flag; torch reads a folder as uninitialised memory
        folders = any(member.external_attr & 16 for member in members.infolist())
        if folders or members.testzip():
            raise UserError("damaged")
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
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"cql_pendulum.py: {' '.join(str(error).split())}")
