"""The page "Offline RL" of the Simple_Reinforcement_Learning course, complete and right.

A SAC teacher learns Pendulum-v1 online, its transitions are frozen, and a CQL student learns from
them alone. Order (both loops last), names, shapes and constants are the page's; what it leaves out
(the update, the reward's shift, temperature, learning rates) is from the course's notebook. Four
things on it are wrong (ERRATA): a comment "Page:" stands where ours differs.

SAC: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905). CQL:
Kumar et al. 2020 (2006.04779). Pardo: Pardo et al. 2018, Time Limits in RL (1712.00378).
"""
import copy
import math
import os
import random
import signal

if __name__ == "__main__" and os.name == "posix":     # signals wait until main can answer them
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
if "OMP_WAIT_POLICY" not in os.environ:               # before torch: its idle threads soon give
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")   # their processor to others

import gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

BATCH = 64             # rows in a batch
CAPACITY = 100_000     # rows that a Data keeps
EPISODE = 200          # steps of an episode
UPDATES = 200          # the teacher's updates after each episode
SAMPLES = 5            # torques of each kind (random, current, next) for a state in CQL's penalty
WEIGHT = 5.0           # of CQL's penalty
TORQUE = 2.0           # Pendulum's torque lies in [-2, 2] N m
GAMMA = 0.99           # discount for each step
TAU = 0.005            # soft update of the target critics
TARGET_ENTROPY = -1.0  # minus the number of action dimensions (SAC, appendix D)
SCALE = 8              # an update uses (reward + 8) / 8, from -1.03 to 1; Data keeps the reward
ERRATA = {             # jacobian acts in SAC and CQL, sign and range in CQL alone, timeout in Data
    "jacobian": "log(1 - tanh(action)^2), where action is a tanh already; right: log(1 - action^2)",
    "sign": "the penalty has Q - entropy, where entropy is -log pi; right: Q - log pi",
    "range": "random torques from (-1, 1); right: 2 * uniform(-1, 1), as the policy's are 2 * tanh",
    "timeout": "the 200-step limit is stored as terminal; right: the target goes on past it",
}


def check_errata(names):
    """The errata to restore, as a frozenset; raises ValueError for a name that is not in ERRATA."""
    names = frozenset([names] if isinstance(names, str) else names)
    if unknown := names - ERRATA.keys():
        raise ValueError(f"no erratum is called {min(unknown)}; there are {', '.join(ERRATA)}")
    return names


class MyWrapper(gym.Wrapper):
    """Pendulum-v1 with the page's interface. A state is (cos angle, sin angle, speed in rad/s),
    upright at angle 0; a step's reward is -(angle^2 + 0.1 speed^2 + 0.001 torque^2) before it."""

    def __init__(self):
        # gym's checker uses np.bool8, which NumPy 2 no longer has
        env = gym.make("Pendulum-v1", render_mode="rgb_array", disable_env_checker=True)
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


env = MyWrapper()


class Data:
    """The teacher's replay buffer, then the student's dataset. Page: a list of tuples. Here `rows`,
    float32 [n, 10]: state 0:3, action 3, reward 4, next_state 5:8, terminal 8, timeout 9."""

    def __init__(self, as_printed=()):
        self.as_printed = check_errata(as_printed)
        self.rows = np.empty([0, 10], np.float32)
        self.frozen = False

    @property
    def datas(self):
        """(state, action, reward, next_state, over) of each row, as a tuple made anew."""
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
        return self._columns(self.rows[random.sample(range(len(self.rows)), BATCH)])

    def _columns(self, rows):
        columns = torch.from_numpy(rows).split([3, 1, 1, 3, 1, 1], dim=1)
        state, action, reward, next_state, terminal, timeout = columns
        # Page: over at the 200-step limit too; that is no terminal state (Pardo, abstract).
        over = torch.maximum(terminal, timeout) if "timeout" in self.as_printed else terminal
        return state, action, reward, next_state, over.long()

    def freeze(self):
        """From here on nothing can write to the rows and update_data raises. Returns self."""
        self.rows = np.frombuffer(self.rows.tobytes(), np.float32).reshape(-1, 10)
        self.frozen = True
        return self

    def __setstate__(self, state):                 # a copy of a frozen dataset is frozen
        self.__dict__ |= state
        if self.frozen:
            self.freeze()


class SAC:
    """Soft Actor-Critic: the online teacher, and with `--student sac` a student without penalty."""

    class ModelAction(torch.nn.Module):
        """The policy: a Gaussian squashed by tanh and scaled to torques in [-2, 2]."""
        as_printed = frozenset()

        def __init__(self):
            super().__init__()
            self.fc_state = torch.nn.Sequential(torch.nn.Linear(3, 128), torch.nn.ReLU())
            self.fc_mu = torch.nn.Linear(128, 1)
            self.fc_std = torch.nn.Sequential(torch.nn.Linear(128, 1), torch.nn.Softplus())

        def forward(self, state, n=1):
            """[b, 3] -> n torques a state (page: 1; CQL: 5), [b, n], and the entropy of each,
            [b, n]: minus the log density of its tanh, that is of torque / 2 (SAC, appendix C)."""
            state = self.fc_state(state)                            # [b, 3] -> [b, 128]
            mu, std = self.fc_mu(state), self.fc_std(state)         # [b, 128] -> [b, 1]
            dist = torch.distributions.Normal(mu.expand(-1, n), std, validate_args=False)
            sample = dist.rsample()                                 # [b, n]
            action = torch.tanh(sample)                             # [b, n]
            # Page: log(1 - tanh(action)^2 + 1e-7), but action is a tanh: that squashes twice.
            x = action if "jacobian" in self.as_printed else sample
            # log(1 - tanh(x)^2), in a form that keeps its gradient where float32's tanh is 1
            log_slope = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
            entropy = log_slope - dist.log_prob(sample)             # [b, n]
            return action * TORQUE, entropy

    class ModelValue(torch.nn.Module):
        """A critic: the discounted scaled rewards and, from the next step on, temperature times
        entropy that follow a torque in a state."""

        def __init__(self):
            super().__init__()
            self.sequential = torch.nn.Sequential(
                torch.nn.Linear(4, 128), torch.nn.ReLU(),
                torch.nn.Linear(128, 128), torch.nn.ReLU(),
                torch.nn.Linear(128, 1),
            )

        def forward(self, state, action):
            return self.sequential(torch.cat([state, action], dim=1))     # [b, 3 + 1] -> [b, 1]

    def __init__(self, as_printed=()):
        self.model_action = self.ModelAction()
        self.model_value1, self.model_value2 = self.ModelValue(), self.ModelValue()
        self.model_value_next1 = copy.deepcopy(self.model_value1)
        self.model_value_next2 = copy.deepcopy(self.model_value2)
        self.alpha = torch.tensor(math.log(0.01), requires_grad=True)     # log of the temperature
        values = [*self.model_value1.parameters(), *self.model_value2.parameters()]
        self.optimizer_value = torch.optim.Adam(values, lr=3e-3, fused=True)
        actions = [*self.model_action.parameters(), self.alpha]
        self.optimizer_action = torch.optim.Adam(actions, lr=3e-4, fused=True)
        self.loss_fn = torch.nn.MSELoss()
        self.as_printed = as_printed

    def _restore(self, names):
        self._as_printed = self.model_action.as_printed = check_errata(names)

    as_printed = property(lambda self: self._as_printed, _restore)

    def get_action(self, state):
        """A torque of the policy, float in [-2, 2]; ValueError unless given 3 finite numbers."""
        state = torch.from_numpy(np.asarray(state, np.float32).reshape(1, 3))
        if not state.isfinite().all():
            raise ValueError(f"a state is three finite numbers, not {state.tolist()[0]}")
        with torch.no_grad():
            return self.model_action(state)[0].item()               # [1, 3] -> [1, 1] -> float

    def test(self, play):
        """The return of one episode from a random start; with play=True it is shown."""
        state, reward_sum, over = env.reset(), 0.0, False
        while not over:
            state, reward, over, _ = env.step([self.get_action(state)])
            reward_sum += float(reward)
            if play:
                show(env)
        return reward_sum

    def train(self, state, action, reward, next_state, over):
        """One update (SAC, algorithm 1) from a batch like Data.get_sample's, else ValueError, or
        RuntimeError where its columns differ in length."""
        rows = torch.cat([state, action, reward, next_state, over], dim=1)      # [b, 9]
        if rows.shape[1] != 9 or not len(rows) or not rows.sum().isfinite():
            raise ValueError("a batch is finite, has 3, 1, 1, 3 and 1 columns, and is not empty")
        self._backward_value(state, action, reward, next_state, over)
        self.optimizer_value.step()

        self._backward_action(state)
        self.optimizer_action.step()

        self._soft_update(self.model_value1, self.model_value_next1)
        self._soft_update(self.model_value2, self.model_value_next2)

    def _backward_value(self, state, action, reward, next_state, over):
        """Set the gradients of the critics' losses (a method, so that accelerate can record it)."""
        target = self._get_target((reward + SCALE) / SCALE, next_state, over)             # [b, 1]
        loss_value1 = self._get_loss_value(self.model_value1, target, state, action, next_state)
        loss_value2 = self._get_loss_value(self.model_value2, target, state, action, next_state)
        self.optimizer_value.zero_grad()
        (loss_value1 + loss_value2).backward()

    def _backward_action(self, state):
        """Set the gradients of the policy's loss and of the temperature's (SAC, equation 18)."""
        loss_action, entropy = self._get_loss_action(state)
        loss_alpha = ((entropy - TARGET_ENTROPY).detach() * self.alpha.exp()).mean()
        self.optimizer_action.zero_grad()
        learning = [p for p in (*self.model_action.parameters(), self.alpha) if p.requires_grad]
        (loss_action + loss_alpha).backward(inputs=learning)                    # not the critics

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
        value1, value2 = self.model_value1(state, action), self.model_value2(state, action)
        loss_action = -self.alpha.detach().exp() * entropy - torch.min(value1, value2)
        return loss_action.mean(), entropy

    @torch.no_grad()
    def _soft_update(self, _from, _to):
        """Each parameter of _to becomes 0.995 of itself + 0.005 of its like in _from."""
        torch._foreach_lerp_([*_to.parameters()], [*_from.parameters()], TAU)


class CQL(SAC):
    """Conservative Q-Learning, CQL(H): SAC and a penalty in the critics' loss. The page's weight of
    5 is large: on undivided rewards, beside the halved squared error of the paper's equation 4,
    the same loss has 5 * 8 / 2 = 20 times (8 logsumexp(Q / 8) - Q)."""

    def __init__(self, as_printed=(), weight=WEIGHT):
        super().__init__(as_printed)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight {weight}: give a number of at least 0")
        self.weight = weight

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """SAC's loss of one critic plus weight * (log of the integral of exp Q over tanh's (-1, 1),
        estimated from 15 torques, plus log 15, minus Q of the data's torque), a scalar."""
        # Page: (-1, 1), which leaves half of the torques out of the penalty.
        limit = 1 if "range" in self.as_printed else TORQUE
        rand_action = limit * torch.empty([len(state), SAMPLES]).uniform_(-1, 1)       # [b, 5]
        with torch.no_grad():                     # Page: with a gradient, which nothing uses.
            actions, entropies = self.model_action(torch.cat([state, next_state]), SAMPLES)
        curr_action, next_action = actions.chunk(2)                             # [2 b, 5] -> [b, 5]
        curr_entropy, next_entropy = entropies.chunk(2)                         # [2 b, 5] -> [b, 5]

        # one pass of the critic over 16 torques for each state: the data's and 5 of each kind
        action = torch.cat([action, rand_action, curr_action, next_action], dim=1)     # [b, 16]
        state = state.unsqueeze(1).repeat(1, action.shape[1], 1)                # [b, 16, 3]
        values = model_value(state.reshape(-1, 3), action.reshape(-1, 1)).reshape(action.shape)
        value, value_rand, value_curr, value_next = values.split([1] + 3 * [SAMPLES], dim=1)
        loss_value = self.loss_fn(value, target)

        # Q minus the log of the torque's density per unit of tanh (CQL, appendix F)
        value_rand = value_rand - math.log(0.5)                                 # [b, 5]
        # Page: minus entropy, but entropy is minus the log of the density.
        sign = -1 if "sign" in self.as_printed else 1
        value_curr = value_curr + sign * curr_entropy                           # [b, 5]
        value_next = value_next + sign * next_entropy                           # [b, 5]
        value_cat = torch.cat([value_rand, value_curr, value_next], dim=1)      # [b, 15]
        loss_cat = torch.logsumexp(value_cat, dim=1).mean()                     # [b, 15] -> scalar
        return loss_value + self.weight * (loss_cat - value.mean())            # scalar


def train_teacher(teacher, data, epochs, run, train):
    """The page's online loop, flat: `run` can stop and go on at every step. run.test is test_result
    from 10 fixed starts, also at the end. `train` is teacher.train or accelerate(teacher)."""
    for step in run.steps("teacher", teacher, epochs * UPDATES, data):
        epoch, i = divmod(step, UPDATES)
        if i == 0:
            data.update_data(teacher)
        train(*data.get_sample())
        if i == UPDATES - 1 and (epoch % 10 == 0 or epoch == epochs - 1):
            run.test(epoch)


def train_student(student, data, steps, run, train):
    """The page's offline loop: no new data. `train` is student.train or accelerate(student)."""
    for i in run.steps("student", student, steps, data):
        train(*data.get_sample())
        if i % 2000 == 0 or i == steps - 1:
            run.test(i)


# The page ends here. The rest is ours: speed, the promise meter, files, pictures, the command line.

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
import time
import warnings
import zipfile

__all__ = ["CQL", "Data", "ERRATA", "MyWrapper", "SAC", "accelerate", "env"]
STATE = "float", [-1, -1, -8], [1, 1, 8]            # kind, and any Pendulum's least and most
COLUMNS = {"observations": STATE, "actions": ("float", [-2], [2]), "rewards": ("float", -16.3, 0),
           "next_observations": STATE, "terminals": ("bool", 0, 1), "timeouts": ("bool", 0, 1)}
LARGEST = 1 << 30                # bytes of a file that is read, packed or unpacked
PROGRAM = pathlib.Path(__file__).read_text(encoding="utf-8")


class UserError(ValueError):
    """A user's mistake: the message says in one line what was wrong, where, and what to do."""


def accelerate(agent):
    """A function with train's arguments that makes the same updates to the same agent, to the last
    bit and faster: train, with records of _backward_value and _backward_action in their place.
    Python in these two (a print, a hook, a breakpoint) runs a few times in the first call, then no
    more. Updates run plain, after a notice, where they cannot be recorded (.item(), an if on a
    tensor, a normalization), and with none for other batch sizes and once an attribute (weight, a
    network) is replaced. After a change inside a network or the code, accelerate again."""
    records = None

    def train(*batch):
        nonlocal records
        vars(agent).update(records or {})
        try:
            agent.train(*batch)
        finally:
            for name in records or {}:
                vars(agent).pop(name, None)
        if records is None:                                  # a bad batch has raised by now
            records = checked_records(agent, batch)

    return train


def checked_records(agent, batch):
    """record(agent, batch), if three updates of two copies show that it changes no bit, else {}."""
    drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            plain, fast = copy.deepcopy(agent), copy.deepcopy(agent)
            before = [*vars(plain).values()]
            vars(fast).update(record(fast, batch))
            for copied in 3 * [plain, fast]:
                torch.manual_seed(0)
                copied.train(*batch)
            same = all(map(torch.equal, tensors(parts(plain)), tensors(parts(fast))))
            if not same or [*map(id, before)] != [*map(id, vars(plain).values())]:
                raise ValueError("replayed, they give other numbers")
            return record(agent, batch)
    except Exception as error:
        say(f"note: updates cannot be recorded and run plain, slower ({error!r:.90})", "stderr")
        return {}
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


def record(agent, batch):
    """{name: a function that sets the gradients that the agent's method sets}: its operations,
    autograd's among them (make_fx), replayed by TorchScript without Python."""
    from torch.fx.experimental.proxy_tensor import make_fx
    optimizers = [x for x in vars(agent).values() if isinstance(x, torch.optim.Optimizer)]
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    attributes = [*vars(agent).values()]

    def one(method, *batch):
        def gradients(*inputs):
            for p in parameters:
                p.grad = None
            with torch.enable_grad():
                method(*inputs)
            learning[:] = [p for p in parameters if p.grad is not None]
            return tuple(p.grad for p in learning)

        def replay(*inputs):
            now = [*vars(agent).values()][:-2]                          # without the two records
            if [*map(id, now)] != [*map(id, attributes)] or any(
                    x.shape != y.shape or x.dtype != y.dtype for x, y in zip(inputs, batch)):
                return method(*inputs)
            with torch.no_grad(), torch.jit.optimized_execution(False):
                for p, gradient in zip(learning, traced(*inputs)):
                    p.grad = gradient

        learning = []
        with torch.no_grad(), torch.jit.optimized_execution(False):     # optimised, bits may differ
            traced = torch.jit.trace(make_fx(gradients)(*batch), batch, check_trace=False)
        for tidy in ("constant_propagation", "peephole", "cse", "dce"):         # a tenth less time
            getattr(torch._C, f"_jit_pass_{tidy}")(traced.graph)
        return replay

    return {"_backward_value": one(agent._backward_value, *batch),
            "_backward_action": one(agent._backward_action, batch[0])}


@torch.no_grad()
def evaluate(agent, seeds):
    """One episode for each seed, all side by side: returns, promised, delivered, [episodes] each.
    Promised is the smaller critic's value of the first torque, with later steps' entropy bonus;
    delivered is what the episode then pays in that unit, without entropy: the sum of 0.99^t times
    (reward + 8) / 8 over its T steps, and 0.99^T / (1 - 0.99) times the mean of the last 20, as if
    its end lasted; 100 at most. The same seeds give the same starts and the same noise."""
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
    scaled = (rewards + SCALE) / SCALE
    tail = GAMMA ** EPISODE / (1 - GAMMA) * scaled[-20:].mean(axis=0)
    return rewards.sum(axis=0), promised, GAMMA ** np.arange(EPISODE) @ scaled + tail


def least_value(agent, state, action):
    """The smaller critic's value, [b, 3], [b, 1] -> [b, 1]."""
    return torch.min(agent.model_value1(state, action), agent.model_value2(state, action))


def show(env):
    """Draw the pendulum as it is now, in a window or a notebook's output."""
    from matplotlib import pyplot
    pyplot.imshow(env.render())
    pyplot.pause(0.01)
    pyplot.clf()


def episodes(data):
    """The rows of a Data split into episodes, oldest first."""
    ends = np.flatnonzero(data.rows[:, 8:].any(axis=1)) + 1
    return [rows for rows in np.split(data.rows, ends) if len(rows)]


def keep(data, first=None, last=None):
    """A frozen Data of the first or the last episodes alone; UserError when there are fewer."""
    kept, found = Data(data.as_printed), episodes(data)
    if max(first or 0, last or 0) > len(found):
        raise UserError(f"--first, --last: the data has {len(found)} episodes; give at most that")
    kept.rows = np.concatenate(found[:first] if first else found[-(last or 0):])
    return kept.freeze()


def seed_everything(seed):
    """Seed torch, random and the environment, as every stage does when it begins."""
    torch.manual_seed(seed)
    random.seed(seed)
    env.reset(seed=seed)


def say(line, name="stdout"):
    """Print a line beside the progress bar, or nothing where that fails (a closed pipe)."""
    stream, bar = getattr(sys, name), sys.modules.get("tqdm")
    try:
        bar.tqdm.write(line, file=stream) if bar else print(line, file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@functools.cache
def optional(name, without):
    """An optional package's module; None, after one line of notice, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:                       # a broken matplotlibrc is no ImportError
        say(f"note: {without} ({error!r:.90})", "stderr")


def write_whole(path, content):
    """Write a file that appears whole or not at all, even when the power fails; or UserError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":
            os.fsync(folder := os.open(path.parent, os.O_RDONLY))
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def using(path):
    """Any error in the use of a file (zips, pickles, arrays) becomes a UserError that names it."""
    try:
        yield
    except Exception as error:
        why = error if isinstance(error, UserError) else getattr(error, "strerror", None)
        why = why or f"damaged, or not of these classes and networks ({error!r:.90})"
        raise UserError(f"{path}: {why}") from None


def save_dataset(data, path):
    """Write the rows as npz with D4RL's names, see COLUMNS."""
    state, action, reward, following, *flags = np.split(data.rows, [3, 4, 5, 8, 9], axis=1)
    arrays = [state, action, reward[:, 0], following, *(flag[:, 0] > 0 for flag in flags)]
    np.savez_compressed(buffer := io.BytesIO(), **dict(zip(COLUMNS, arrays)))
    write_whole(path, buffer.getvalue())


def load_dataset(path, as_printed=()):
    """A frozen Data from an npz file; UserError where it is not one of Pendulum, see COLUMNS."""
    data = Data(as_printed)
    with using(path), open(path, "rb") as file:
        with zipfile.ZipFile(zipped := io.BytesIO(file.read(LARGEST))) as members:
            if sum(member.file_size for member in members.infolist()) > LARGEST:
                raise UserError("unpacks to more than a gigabyte")
        found = np.load(zipped, allow_pickle=False)
        if missing := COLUMNS.keys() - set(found.files):
            raise UserError(f"lacks {', '.join(sorted(missing))} of {', '.join(COLUMNS)}")
        arrays = {name: found[name] for name in COLUMNS}                        # unpacked once
        n = arrays["rewards"].size
        for name, (kind, least, most) in COLUMNS.items():
            x, shape = arrays[name], [n, *np.shape(least)]
            if [*x.shape] != shape or x.dtype.kind != kind[0]:
                raise UserError(f"{name} is {x.dtype} {[*x.shape]}; it must be {kind} {shape}")
            radius = np.hypot(x[:, 0], x[:, 1]) if shape == [n, 3] else np.ones(n)      # cos, sin
            if not ((x >= least) & (x <= most)).all() or (abs(radius - 1) > 1e-3).any():
                raise UserError(f"{name} has NaN or numbers that are not Pendulum's")
        if n < BATCH:
            raise UserError(f"{n} rows; a batch draws {BATCH} different ones")
        data.rows = np.column_stack([*arrays.values()]).astype(np.float32)
    return data.freeze()


def parts(agent):
    """An agent's state_dicts, tensors and numbers, by attribute: the live ones, not copies."""
    found = {k: x.state_dict() if hasattr(x, "state_dict") else x for k, x in vars(agent).items()}
    return {k: x for k, x in found.items() if isinstance(x, (dict, int, float, torch.Tensor))}


def tensors(found):
    """The tensors in nested dicts and lists."""
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [found] if torch.is_tensor(found) else [x for part in inner for x in tensors(part)]


def save_agent(path, agent, **more):
    """Write all that going on with an agent needs, and `more`; UserError if it has diverged."""
    if not all(x.isfinite().all() for x in tensors(parts(agent))):
        raise UserError(f"{path}: not written, the agent is NaN or infinite; an earlier one stays. "
                        f"Try another --seed or a smaller --weight")
    more |= {"class": type(agent).__name__, "as_printed": sorted(agent.as_printed)}
    torch.save(more | {"parts": parts(agent)}, buffer := io.BytesIO())
    plain = buffer.getvalue()                                # a zip file, its comment of length 0
    write_whole(path, plain[:-2] + b"@\0" + hashlib.sha256(plain).hexdigest().encode())


def load_agent(path):
    """The agent in a file of save_agent (else UserError), and all its content. Runs no code from
    it, so a subclass of SAC must be defined already."""
    with using(path), open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
        content = file.read(LARGEST)
        plain = content[:-66] + b"\0\0"
        if hashlib.sha256(plain).hexdigest().encode() != content[-64:]:
            raise UserError("damaged, or written by something else than this cql_pendulum.py")
        saved, classes = torch.load(io.BytesIO(plain), weights_only=True), [SAC]
        for cls in classes:
            classes += cls.__subclasses__()
        if saved["class"] not in (known := {cls.__name__: cls for cls in classes}):
            raise UserError(f"holds a {saved['class']}; define or import that class first")
        agent = known[saved["class"]]()
        agent.as_printed = saved["as_printed"]
        for name, part in parts(agent).items():
            if isinstance(part, dict):
                getattr(agent, name).load_state_dict(saved["parts"][name])
            elif torch.is_tensor(part):
                part.data.copy_(saved["parts"][name].reshape(part.shape))
            else:
                setattr(agent, name, type(part)(saved["parts"][name]))
        return agent, saved


class Run:
    """One run in the folder `out` (None: no files): its place in the two stages, log, checkpoint.
    A signal waits for the next safe point: the end of an update, or of a step of the main job."""

    SAVED = "seed", "argv", "stage", "step", "log", "seconds", "table"

    def __init__(self, out=None, seed=0):
        self.out, self.seed, self.argv, self.stage, self.step = out, seed, [], "start", 0
        self.log, self.seconds, self.table, self.signals, self.lock = [], {}, {}, [], None

    def rest(self):
        """A safe point: if a signal has come, say how to go on and exit with 128 + its number."""
        if self.signals:
            say("stopped; nothing was saved yet" if self.stage == "start" else
                f"stopped in stage {self.stage} after update {self.step}; {self.out} has it all. "
                f"Go on with: {go_on(self.out)}", "stderr")
            sys.exit(128 + self.signals[0])

    def take(self, out):
        """Make a folder the run's own while it lives; UserError where another process has it."""
        self.out = out
        try:
            if fcntl := optional("fcntl", "a second run in the same folder would go unnoticed"):
                self.lock = os.open(out, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = "another run is at work in it" * isinstance(error, BlockingIOError)
            raise UserError(f"{out}: {busy or error.strerror}") from None

    def starts(self, purpose, n):
        """n seeds of starts for a purpose (0: the tests, 1: the final episodes), for all agents."""
        return np.random.SeedSequence([self.seed, purpose]).generate_state(n).tolist()

    def steps(self, stage, agent, total, data):
        """The steps of a stage that are still to do, behind a progress bar."""
        if stage != self.stage:
            self.stage, self.step = stage, 0
        self.agent, self.data = agent, data
        self.begun = time.monotonic() - self.seconds.get(stage, 0.0)
        if self.step == 0:
            self.save()
        todo = range(self.step, total)
        if tqdm := optional("tqdm", "no progress bars"):
            todo = tqdm.tqdm(todo, stage, total, initial=self.step, disable=None, leave=False)
        for step in todo:
            self.step = step + 1
            yield step
            if self.signals:
                self.save()
                self.rest()

    def test(self, at):
        """Play the test's 10 episodes, log their means, save, print."""
        result = [float(x.mean()) for x in evaluate(self.agent, self.starts(0, 10))]
        self.log.append([self.stage, at, *result, time.monotonic() - self.begun])
        self.save()
        line = "{} {:6d}   return {:8.1f}   promised {:8.2f}   delivered {:6.2f}"
        say(line.format(*self.log[-1]))

    def save(self):
        """Write checkpoint.pt, which alone holds all that going on needs, and log.csv."""
        self.seconds[self.stage] = time.monotonic() - self.begun
        if self.out:
            save_agent(self.out / "checkpoint.pt", self.agent, program=PROGRAM,
                       rows=torch.from_numpy(self.data.rows.copy()),
                       run={name: getattr(self, name) for name in self.SAVED},
                       random=(torch.get_rng_state(), random.getstate(),
                               env.unwrapped.np_random.bit_generator.state))
            lines = ["{},{},{:.3f},{:.3f},{:.3f},{:.1f}\n".format(*row) for row in self.log]
            head = "stage,step,return,promised,delivered,seconds\n"
            write_whole(self.out / "log.csv", "".join([head, *lines]).encode())

    def restore(self, saved):
        """Take up what save wrote; returns the rows of the data."""
        vars(self).update({name: saved["run"][name] for name in self.SAVED})
        torch.set_rng_state(saved["random"][0])
        random.setstate(saved["random"][1])
        env.unwrapped.np_random.bit_generator.state = saved["random"][2]
        if saved["program"] != PROGRAM:
            say("note: another version of cql_pendulum.py began this run", "stderr")
        return saved["rows"].numpy().reshape(-1, 10)


def go_on(out):
    """The command that goes on with a run, as this one was typed, quoted for the system's shell."""
    typed = sys.orig_argv[:len(sys.orig_argv) - len(sys.argv) + 1]
    words = [*(typed if __name__ == "__main__" else [sys.executable, __file__]), f"--resume={out}"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def draw_curves(run, student):
    """The run's picture, a matplotlib Figure: curves, the student's policy and critic over all
    states, its critic over all torques in three states of the data."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    paid, plane = "return of an episode", ("angle (degrees, 0 is up)", "speed (rad/s)")
    teacher, learner, promise, policy, critic, slices = (
        figure.add_subplot(2, 3, k, title=title, xlabel=x, ylabel=y) for k, title, x, y in (
            (1, "Teacher, online", "epoch", paid), (2, "Student, offline", "update", paid),
            (3, "Promise and delivery", "update", "discounted sum of (reward + 8) / 8"),
            (4, "Student's policy; the data", *plane), (5, "Student's critic", *plane),
            (6, "Critic over all torques, | the data's", "torque (N m)", "value")))
    for axes, label, column, style in (
            (teacher, "teacher", 2, "o-C0"), (learner, "student", 2, "o-C1"),
            (promise, "promised", 3, "o-C3"), (promise, "delivered", 4, "s-C2")):
        rows = [row for row in run.log if row[0] == ("teacher" if axes is teacher else "student")]
        axes.plot([x[1] for x in rows], [x[column] for x in rows], style, label=label, ms=4)
    last = [row[2] for row in run.log if row[0] == "teacher"][-1:]      # from the same starts
    for label, values, colour in (("the data", run.table["the data"], "0.4"),
                                  ("the teacher's last test", last, "C0")):
        if values:
            learner.axhline(np.mean(values), color=colour, ls="--", label=label)
    learner.margins(y=0.1)
    promise.axhline(100, color="k", ls="-.", label="the most possible")
    angle, speed = np.meshgrid(np.linspace(-math.pi, math.pi, 121), np.linspace(-8, 8, 121))
    grid = torch.tensor(np.dstack([np.cos(angle), np.sin(angle), speed])).float().reshape(-1, 3)
    data, torque = torch.tensor(run.data.rows), torch.linspace(-TORQUE, TORQUE, 81)[:, None]
    with torch.no_grad():
        mean = TORQUE * student.model_action.fc_mu(student.model_action.fc_state(grid)).tanh()
        value = least_value(student, grid, mean)
        low, high = np.percentile(least_value(student, data[:, :3], data[:, 3:4]), [1, 99])
        for axes, picture, label, style in (
                (policy, mean, "torque at the policy's mean (N m)", {"cmap": "coolwarm"}),
                (critic, value, "its value, clipped to the data's", {"vmin": low, "vmax": high})):
            image = axes.pcolormesh(np.degrees(angle), speed, picture.reshape(angle.shape), **style)
            figure.colorbar(image, ax=axes, label=label)
        policy.plot(data[:, 1].atan2(data[:, 0]).rad2deg(), data[:, 2], ",k", alpha=0.5)
        for k, row in enumerate(data[[len(data) * quarter // 4 for quarter in (1, 2, 3)]]):
            near = data[(data[:, :3] - row[:3]).abs().amax(dim=1) < 0.3, 3:4]
            label = f"{row[1].atan2(row[0]).rad2deg():.0f} degrees, {row[2]:.1f} rad/s"
            for u, style in ((torque, {"label": label}), (near, {"ls": "", "marker": "|"})):
                slices.plot(u, least_value(student, row[:3].expand(len(u), 3), u), f"C{k}", **style)
    for axes in (teacher, learner, promise, slices):
        axes.legend(fontsize="small")
        axes.locator_params(axis="x", nbins=4)
    return figure


def play(path, seed, run):
    """Play an episode with a saved agent from the seed's start, print its return, and write the
    animation to a new file beside the agent's."""
    agent, _ = load_agent(path)
    seed_everything(seed)
    os.environ |= {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy"}      # draw unseen
    image = optional("pygame", "no animation") and optional("PIL.Image", "no animation")
    state, total, over, frames = env.reset(seed=seed), 0.0, False, []
    while not over:
        run.rest()
        state, reward, over, _ = env.step([agent.get_action(state)])
        total += float(reward)
        frames += [image.fromarray(env.render()[::2, ::2])] if image else []
    say(f"return {total:.1f}")
    if frames:
        frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:],
                       duration=50, loop=0)                                     # a step is 50 ms
        names = (path.with_name(f"{path.name}-{k}.gif") for k in range(1, 10 ** 6))
        write_whole(file := next(name for name in names if not name.exists()), buffer.getvalue())
        say(f"animation: {file}")


def parse_options(argv):
    parser = argparse.ArgumentParser("cql_pendulum.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add, path = parser.add_argument, pathlib.Path
    add("--seed", default=0, type=int, help="of everything random (%(default)s)")
    add("--epochs", default=100, type=int, help="of the teacher, 200 updates each (%(default)s)")
    add("--steps", default=50_000, type=int, help="the student's updates (%(default)s)")
    add("--student", default="cql", choices=["cql", "sac"], help="sac: no penalty (%(default)s)")
    add("--weight", default=WEIGHT, type=float, help="of CQL's penalty (%(default)s)")
    add("--as-printed", nargs="*", metavar="NAME", action="extend", choices=[*ERRATA],
        help=f"restore the page's errata: {', '.join(ERRATA)}; no name: all (none)")
    add("--last", type=int, metavar="N", help="show the student the last N episodes only (all)")
    add("--first", type=int, metavar="N", help="show the student the first N episodes only (all)")
    add("--dataset", type=path, metavar="FILE", help="train on this dataset.npz (a teacher's)")
    add("--plain", action="store_true", help="run each update as it is written, slower, with the "
        "same numbers: the way to see prints, breakpoints and hooks in the losses act each time")
    add("--out", type=path, metavar="DIR", help="new folder for the results (a new name in runs/)")
    add("--resume", type=path, metavar="DIR", help="go on with the interrupted run in this folder")
    add("--play", type=path, metavar="FILE", help="play an episode with a saved agent, animated")
    options = parser.parse_args(argv)
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    kept = 10 ** 6 if options.dataset else min(options.epochs, CAPACITY // EPISODE)
    for name, least, most in (
            ("epochs", 1, CAPACITY // EPISODE if options.first else 10 ** 6), ("steps", 1, 1e9),
            ("seed", 0, 2 ** 32 - 1), ("weight", 0, 1e6), ("last", 1, kept), ("first", 1, kept)):
        if (value := getattr(options, name)) is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: give a number from {least} to {most}")
    for name, useless in (("resume", given - {"resume", "plain"}), ("first", {"last"}),
                          ("play", given - {"play", "seed"}), ("dataset", {"epochs"}),
                          ("student", {"weight"} if options.student == "sac" else set())):
        if name in given and (wrong := given & useless):
            parser.error(f"--{name} has no use for --{min(wrong).replace('_', '-')}; leave it out")
    options.as_printed = [*ERRATA] if options.as_printed == [] else options.as_printed or []
    return options


def begin(options, argv, run):
    """Make and take the run's folder and write its config.json; UserError where that cannot be."""
    for k in range(1, 10 ** 6):
        out = options.out or pathlib.Path("runs", f"{options.student}-seed{options.seed}-{k}")
        try:
            out.mkdir(parents=True, exist_ok=bool(options.out))
            break
        except OSError as error:
            if options.out or not isinstance(error, FileExistsError):
                raise UserError(f"--out {out}: {error.strerror}; give a new folder") from None
    run.take(out)
    if any(out.iterdir()):
        more = f", or go on with the run there: {go_on(out)}" * (out / "checkpoint.pt").exists()
        raise UserError(f"--out {out}: has files in it; give a new folder{more}")
    run.argv, run.seed = argv, options.seed
    versions = {x.__name__: x.__version__ for x in (gym, np, torch)} | {"python": sys.version}
    pins = re.findall(r'"(gym|numpy|torch)==([0-9.]+)"', PROGRAM)
    other = [f"{name} {versions[name]} (tested: {pinned})" for name, pinned in pins
             if versions.get(name, pinned).split("+")[0] != pinned]
    if other:
        say(f"note: {', '.join(other)}; the numbers may differ from README's", "stderr")
    config = {"options": vars(options), "versions": versions}
    write_whole(out / "config.json", json.dumps(config, indent=2, default=str).encode())


def work(options, argv, run):
    """The main job, or what is left of it: teacher, dataset, student, table, picture."""
    agent, data, plain, threads = None, None, options.plain, torch.get_num_threads()
    if options.resume:
        run.take(options.resume.parent if options.resume.is_file() else options.resume)
        agent, saved = load_agent(run.out / "checkpoint.pt")
        with using(run.out / "checkpoint.pt"):
            rows, options = run.restore(saved), parse_options(run.argv)
            data = Data(options.as_printed)
            data.rows = rows
    elif options.dataset:
        data = keep(load_dataset(options.dataset, options.as_printed), options.first, options.last)
    if run.stage == "start":
        begin(options, argv, run)

    def trainer(agent):
        torch.set_num_threads(threads if isinstance(agent, CQL) else 1)     # 64 rows: as fast
        return agent.train if plain or options.plain else accelerate(agent)

    if run.stage != "student" and not options.dataset:
        if not agent:
            seed_everything(run.seed)
            agent, data = SAC(options.as_printed), Data(options.as_printed)
        train_teacher(agent, data, options.epochs, run, trainer(agent))
        save_agent(run.out / "teacher.pt", agent)
        run.table["the teacher"] = evaluate(agent, run.starts(1, 100))[0].tolist()
        data, agent = keep(data, options.first, options.last), None
    if not agent:
        save_dataset(data, run.out / "dataset.npz")
        run.table = {"the data": [float(x[:, 4].sum()) for x in episodes(data)]} | run.table
        seed_everything(run.seed)
        cql = options.student == "cql"
        agent = CQL(options.as_printed, options.weight) if cql else SAC(options.as_printed)
    train_student(agent, data.freeze(), options.steps, run, trainer(agent))
    save_agent(run.out / "student.pt", agent)
    run.table["the student"] = evaluate(agent, run.starts(1, 100))[0].tolist()

    say(f"\n{'return of an episode':<22} episodes      mean  std. error     worst      best")
    for who, x in run.table.items():
        error = np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        say(f"{who:<22}{len(x):>9}{np.mean(x):>10.1f}{error:>12.1f}{min(x):>10.1f}{max(x):>10.1f}")
    say("minutes: " + ", ".join(f"{stage} {x / 60:.1f}" for stage, x in run.seconds.items()))
    run.rest()
    try:
        if figure := draw_curves(run, agent):
            figure.savefig(buffer := io.BytesIO(), format="png")
            write_whole(run.out / "curves.png", buffer.getvalue())
    except Exception as error:                                      # fonts, TeX, a matplotlibrc
        say(f"note: no curves.png ({error!r:.90})", "stderr")
    say(f"all files: {run.out}")


def settle_process(groups="/sys/fs/cgroup"):
    """What an update's speed rests on, for the whole process. OMP_NUM_THREADS, where set, wins over
    the processors that the control group (Linux, version 2 or 1) grants."""
    torch.empty(30 << 18)            # freed once: glibc keeps 30 MB, and no page is faulted in anew
    torch.set_flush_denormal(True)   # Adam's averages of dead units end below 1e-38: twice the time
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        with contextlib.suppress(OSError, ValueError):                          # "max": no limit
            limit = " ".join(pathlib.Path(groups, name).read_text() for name in names)
            quota, period = map(int, limit.split())
            if quota > 0 and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, min(torch.get_num_threads(), quota // period)))


def main(argv):
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                                      # not a notebook's
            stream.reconfigure(errors="backslashreplace")
    settle_process()
    run, signums = Run(), {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}

    def heard(signum, _):
        run.signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)               # a second one ends even an endless loop

    handlers = {signum: signal.signal(signum, heard) for signum in signums
                if signal.getsignal(signum) != signal.SIG_IGN}                          # nohup
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signums)
    try:
        options = parse_options(argv)
        play(options.play, options.seed, run) if options.play else work(options, argv, run)
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        say(f"cql_pendulum.py: {str(error) or 'out of memory'}".splitlines()[0], "stderr")
        return 2
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if run.lock:
            os.close(run.lock)
    return 0


# /// script
# requires-python = ">=3.11"
# dependencies = ["gym==0.26.2", "gym-notices==0.0.8", "numpy==2.4.6", "torch==2.13.0",
#                 "tqdm==4.70.1", "matplotlib==3.11.2", "pygame-ce==2.5.8", "pillow==13.0.0"]
# ///
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
