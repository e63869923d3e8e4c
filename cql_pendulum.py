"""Conservative Q-Learning on Pendulum: the page "Offline RL" of the Simple_Reinforcement_Learning course, complete and right.

A SAC teacher learns Pendulum-v1 online; its transitions are frozen into a dataset; a CQL student learns from that dataset
alone. Read this file beside the page: names, shapes and constants are the page's. Four of the page's formulas are wrong and a
fifth fails in float32 (ERRATA below); each is corrected here, and a comment that begins with "Page:" stands where ours differs.

    python cql_pendulum.py                  # the main job: teacher, dataset, student, pictures
    python cql_pendulum.py --help           # the options

Papers: SAC = Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications" (arXiv 1812.05905);
CQL = Kumar et al. 2020, "Conservative Q-Learning for Offline Reinforcement Learning" (arXiv 2006.04779);
Pardo et al. 2018, "Time Limits in Reinforcement Learning" (arXiv 1712.00378).
"""
import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import random
import shlex
import signal
import sys
import time
import warnings

import gym
import numpy as np
import torch

__all__ = ["CQL", "Data", "ERRATA", "MyWrapper", "SAC", "env"]

# The page's constants.
BATCH = 64            # rows in a batch
CAPACITY = 100_000    # rows that a Data keeps
EPISODE = 200         # steps of an episode, and the teacher's updates after each
SAMPLES = 5           # torques of each kind (random, current, next) for each state in CQL's penalty
WEIGHT = 5.0          # of CQL's penalty
TORQUE = 2.0          # Pendulum's torque lies in [-2, 2] N m
GAMMA = 0.99          # discount for each step
TAU = 0.005           # soft update of the target critics
TARGET_ENTROPY = -1.0  # minus the number of action dimensions (SAC, section 5)

ERRATA = {
    "jacobian": "log(1 - tanh(action)^2) where action is already a tanh; right: log(1 - action^2)",
    "sign": "the penalty subtracts the entropy of the policy's torques; right: it subtracts log pi, that is, adds the entropy",
    "range": "random torques from (-1, 1) and log pi per unit of tanh; right: (-2, 2), and all densities per unit of torque",
    "timeout": "the 200-step limit is stored as a terminal state; right: the target goes on past it",
    "epsilon": "log(1 - tanh(x)^2 + 1e-7) has no slope where tanh rounds to 1; right: 2 (log 2 - x - softplus(-2 x))",
}


class UserError(ValueError):
    """A mistake of the user's: the message says in one line what was wrong, where, and what to do."""


def check_errata(as_printed):
    """The names of the errata to restore, as a frozenset; raises UserError for a name that is not in ERRATA."""
    names = frozenset([as_printed] if isinstance(as_printed, str) else as_printed)
    if unknown := sorted(names - ERRATA.keys()):
        raise UserError(f"as-printed: no erratum is called {', '.join(unknown)}; there are {', '.join(ERRATA)}")
    return names


class MyWrapper(gym.Wrapper):
    """Pendulum-v1 with the page's interface. A state is (cos angle, sin angle, speed in rad/s), upright at angle 0; a reward
    is -(angle^2 + 0.1 speed^2 + 0.001 torque^2), between -16.3 and 0."""

    def __init__(self):
        # gym's checker uses np.bool8, which NumPy 2 no longer has
        env = gym.make("Pendulum-v1", render_mode="rgb_array", disable_env_checker=True)
        super().__init__(env)
        self.env = env
        self.step_n = 0

    def reset(self, seed=None):
        """Start an episode; a seed fixes this start and all later ones. Returns the state, float32 [3]."""
        state, _ = self.env.reset(seed=seed)
        self.step_n = 0
        return state

    def step(self, action):
        """Apply the torque [action] for 0.05 s. Returns state, reward, done, info; info["timeout"] tells a time limit."""
        state, reward, terminated, truncated, info = self.env.step(action)
        self.step_n += 1
        done = terminated or truncated or self.step_n >= EPISODE
        info["timeout"] = done and not terminated
        return state, reward, done, info

    def show(self):
        """Draw the pendulum as it is now, in a window or a notebook's output."""
        from matplotlib import pyplot
        pyplot.imshow(self.env.render())
        pyplot.axis("off")
        pyplot.pause(0.01)
        pyplot.clf()


env = MyWrapper()


class Data:
    """Transitions in the order in which they were collected: the teacher's replay buffer, then the student's dataset.

    `rows` is float32 [n, 10], n at most 100,000: state 0:3, action 3, reward 4, next_state 5:8, terminal 8, timeout 9.
    """

    def __init__(self, as_printed=()):
        self.as_printed = check_errata(as_printed)
        self.rows = np.empty([0, 10], np.float32)
        self.frozen = False

    @property
    def datas(self):
        """The page's list of (state, action, reward, next_state, over), built anew at each call."""
        over = self.rows[:, 8:].any(axis=1) if "timeout" in self.as_printed else self.rows[:, 8] > 0
        return [(row[:3], float(row[3]), float(row[4]), row[5:8], bool(end)) for row, end in zip(self.rows, over)]

    def update_data(self, agent):
        """Play one episode in `env` with the agent's actions and append it; raises RuntimeError on a frozen dataset."""
        if self.frozen:
            raise RuntimeError("this dataset is frozen: offline training never adds to it. Collect into a new Data()")
        rows = []
        state = env.reset()
        over = False
        while not over:
            action = agent.get_action(state)
            next_state, reward, over, info = env.step([action])
            rows.append([*state, action, reward, *next_state, over and not info["timeout"], info["timeout"]])
            state = next_state
        self.rows = np.concatenate([self.rows, np.array(rows, np.float32)])[-CAPACITY:]

    def get_sample(self):
        """64 rows drawn without replacement: state, action, reward, next_state, over.

        float32 [64, 3], [64, 1], [64, 1], [64, 3] and int64 [64, 1]; raises ValueError when there are fewer than 64 rows.
        """
        if len(self.rows) < BATCH:
            raise ValueError(f"a sample is {BATCH} different rows, and this dataset has {len(self.rows)}")
        batch = torch.from_numpy(self.rows[random.sample(range(len(self.rows)), BATCH)])
        state, action, reward, next_state, terminal, timeout = batch.split([3, 1, 1, 3, 1, 1], dim=1)
        # Page: over is set at the 200-step limit too. A time limit is no terminal state (Pardo et al. 2018, section 3).
        over = torch.maximum(terminal, timeout) if "timeout" in self.as_printed else terminal
        return state, action, reward, next_state, over.long()

    def freeze(self):
        """From here on the rows cannot change: NumPy refuses to write to them, update_data raises. Returns self."""
        self.rows = self.rows.copy()
        self.rows.setflags(write=False)
        self.frozen = True
        return self

    def episodes(self):
        """The rows split into episodes, oldest first."""
        ends = np.flatnonzero(self.rows[:, 8:].any(axis=1)) + 1
        return [rows for rows in np.split(self.rows, ends) if len(rows)]

    def returns(self):
        """The undiscounted return of each episode, [episodes]."""
        return np.array([rows[:, 4].sum(dtype=np.float64) for rows in self.episodes()])

    def keep(self, first=None, last=None):
        """Keep the first (weak) or the last (expert) episodes alone; raises UserError when there are fewer. Returns self."""
        episodes = self.episodes()
        if max(first or 0, last or 0) > len(episodes):
            option, count = ("--first", first) if first else ("--last", last)
            raise UserError(f"{option} {count}: the data has {len(episodes)} episodes; choose at most that many")
        self.rows = np.concatenate(episodes[:first] if first else episodes[-last:] if last else episodes)
        return self


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) as one call of PyTorch's fused kernel.

    torch.optim.Adam(fused=True) runs the same kernel behind 0.1 ms of Python for each step.
    """

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr
        self.exp_avgs = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros(())] * len(self.parameters)         # one counter for all

    @torch.no_grad()
    def step(self, gradients):
        self.steps[0].add_(1)
        torch._fused_adam_(self.parameters, gradients, self.exp_avgs, self.exp_avg_sqs, [], self.steps, lr=self.lr,
                           beta1=0.9, beta2=0.999, weight_decay=0, eps=1e-8, amsgrad=False, maximize=False)


class SAC:
    """Soft Actor-Critic: the online teacher, and (with `--student sac`) the student without a penalty."""

    class ModelAction(torch.nn.Module):
        """The policy: a Gaussian squashed by tanh and scaled to torques in [-2, 2]."""

        def __init__(self, as_printed=()):
            super().__init__()
            self.as_printed = as_printed
            self.fc_state = torch.nn.Sequential(torch.nn.Linear(3, 128), torch.nn.ReLU(inplace=True))
            self.fc_mu = torch.nn.Linear(128, 1)
            self.fc_std = torch.nn.Sequential(torch.nn.Linear(128, 1), torch.nn.Softplus())

        def forward(self, state):
            """[b, 3] -> a torque [b, 1] and its entropy [b, 1] = -log density per unit of tanh (SAC, appendix C)."""
            return self.sample(state, 1)

        def sample(self, state, n):
            """[b, 3] -> n torques for each state, [b, n], and their entropies, [b, n]."""
            hidden = self.fc_state(state)                             # [b, 3] -> [b, 128]
            mu, std = self.fc_mu(hidden), self.fc_std(hidden)         # [b, 128] -> [b, 1]
            noise = torch.randn(len(state), n)
            sample = torch.addcmul(mu, std, noise)                    # mu + std noise, [b, n]
            action = sample.tanh()
            # -log pi = -log Gaussian + log(1 - tanh(x)^2) by the change of variables (SAC, appendix C).
            # Page: x is the action, which is a tanh already.
            x = action if "jacobian" in self.as_printed else sample
            if "epsilon" in self.as_printed:
                # Page: where tanh rounds to 1 this has no gradient, and a policy that is there cannot return.
                log_slope = (1 - x.tanh().square() + 1e-7).log()
            else:
                # the same, with its gradient of -2 tanh(x) everywhere, as in torch.distributions.TanhTransform
                log_slope = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
            entropy = 0.5 * (noise * noise + math.log(2 * math.pi)) + std.log() + log_slope
            return action * TORQUE, entropy

    class ModelValue(torch.nn.Module):
        """A critic: the soft value of a torque in a state, in units of the scaled reward (reward + 8) / 8."""

        def __init__(self):
            super().__init__()
            self.sequential = torch.nn.Sequential(
                torch.nn.Linear(4, 128), torch.nn.ReLU(inplace=True),
                torch.nn.Linear(128, 128), torch.nn.ReLU(inplace=True),
                torch.nn.Linear(128, 1),
            )

        def forward(self, state, action):
            """[b, 3], [b, 1] -> [b, 1]."""
            return self.sequential(torch.cat([state, action], dim=1))

    class Pair:
        """Two critics as one, [b, 3], [b, 1] -> [2, b, 1]: one batched product a layer, so that autograd, the optimiser and
        both cores handle one network instead of two. The critics' own weights become views of the pair's."""

        def __init__(self, *models):
            self.layers = []                                                      # (bias [2, 1, out], weight [2, in, out])
            for linears in zip(*(model.sequential[::2] for model in models)):
                bias = torch.stack([linear.bias.detach()[None] for linear in linears])
                weight = torch.stack([linear.weight.detach().T for linear in linears])
                self.layers.append((bias.requires_grad_(), weight.requires_grad_()))
            self.tie(*models)

        def tie(self, *models):
            for k, model in enumerate(models):
                for (bias, weight), linear in zip(self.layers, model.sequential[::2]):
                    linear.bias.data, linear.weight.data = bias.data[k, 0], weight.data[k].T

        def parameters(self):
            return itertools.chain(*self.layers)

        def __call__(self, state, action):
            value = torch.cat([state, action], dim=1).expand(2, -1, -1)       # [2, b, 4]
            *hidden, (bias_out, weight_out) = self.layers
            for bias, weight in hidden:
                value = torch.baddbmm(bias, value, weight).relu_()            # [2, b, 128]
            return torch.baddbmm(bias_out, value, weight_out)                 # [2, b, 1]

    def __init__(self, as_printed=()):
        self.as_printed = check_errata(as_printed)
        settle_process()
        self.model_action = self.ModelAction(self.as_printed)
        self.model_value1, self.model_value2 = self.ModelValue(), self.ModelValue()
        self.model_value_next1, self.model_value_next2 = self.ModelValue(), self.ModelValue()
        self.model_value_next1.load_state_dict(self.model_value1.state_dict())
        self.model_value_next2.load_state_dict(self.model_value2.state_dict())
        self.values = self.Pair(self.model_value1, self.model_value2)
        self.values_next = self.Pair(self.model_value_next1, self.model_value_next2)
        self.alpha = torch.tensor(math.log(0.01), requires_grad=True)         # log of the temperature
        self.optimizer_value = Adam(self.values.parameters(), lr=3e-3)
        self.optimizer_action = Adam([*self.model_action.parameters(), self.alpha], lr=3e-4)
        self.records = {}

    def get_action(self, state):
        """A torque drawn from the policy, float in [-2, 2]; raises ValueError unless the state is three finite numbers."""
        state = torch.from_numpy(check_state(state))
        with torch.no_grad():
            action, _ = self.model_action(state.reshape(1, 3))
        return action.item()

    def test(self, play):
        """The return of one episode from a random start; with play=True it is shown."""
        state = env.reset()
        reward_sum, over = 0.0, False
        while not over:
            state, reward, over, _ = env.step([self.get_action(state)])
            reward_sum += float(reward)
            if play:
                env.show()
        return reward_sum

    def train(self, state, action, reward, next_state, over):
        """One update from a batch with the shapes of Data.get_sample (SAC, algorithm 1); raises ValueError for others."""
        check_batch(state, action, reward, next_state, over)
        self.optimizer_value.step(self._replay(self._get_gradients_value, state, action, reward, next_state, over))
        self.optimizer_action.step(self._replay(self._get_gradients_action, state))
        self._soft_update(self.values, self.values_next)

    def _get_gradients_value(self, state, action, reward, next_state, over):
        """The gradients of both critics' losses in their parameters."""
        reward = (reward + 8) / 8
        target = self._get_target(reward, next_state, over)
        loss_value = self._get_loss_value(self.values, target, state, action, next_state)
        return torch.autograd.grad(loss_value.sum(), self.optimizer_value.parameters)

    def _get_gradients_action(self, state):
        """The gradients of the actor's and the temperature's loss (SAC, equation 18), neither of which enters the other's."""
        loss_action, entropy = self._get_loss_action(state)
        loss_alpha = (entropy.detach().mean() - TARGET_ENTROPY) * self.alpha.exp()
        return torch.autograd.grad(loss_action + loss_alpha, self.optimizer_action.parameters)

    def _replay(self, gradients, *batch):
        """gradients(*batch), from a record of its operations: autograd's own, in the same order, to the last bit.

        The first call for a batch size records every operation, forward and backward (1 s once, then 0.1 s); later calls
        replay them without Python and without building autograd's graph, which takes half of a teacher's update. The record
        keeps what is fixed at that time: as_printed, the weight, the networks' shapes; parameters may change in place.
        """
        key = gradients.__name__, len(batch[0])
        if key not in self.records:
            self.records[key] = record(gradients, batch)
        with torch.no_grad():
            return self.records[key](*batch)

    def __getstate__(self):
        return self.__dict__ | {"records": {}}        # a copy records its own operations, and its critics are its own pair's

    def __setstate__(self, state):
        self.__dict__ |= state
        self.values.tie(self.model_value1, self.model_value2)
        self.values_next.tie(self.model_value_next1, self.model_value_next2)

    @torch.no_grad()
    def _get_target(self, reward, next_state, over):
        """What the critics are to answer, [b, 1]: reward + 0.99 (1 - over) (value + temperature * entropy) of the next state
        and a fresh torque there (SAC, equations 2 and 3); the reward is the scaled one."""
        action, entropy = self.model_action(next_state)
        value = self.values_next(next_state, action).amin(dim=0)
        return torch.addcmul(reward, 1 - over, torch.addcmul(value, self.alpha.exp(), entropy), value=GAMMA)

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """The critic's loss (SAC, equation 5): a scalar for one critic, [2] for a pair."""
        return self.loss_fn(model_value(state, action), target)

    def _get_loss_action(self, state):
        """The actor's loss, a scalar (SAC, equation 7), and the entropy of the torques it drew, [b, 1]."""
        action, entropy = self.model_action(state)
        value = self.values(state, action).amin(dim=0)
        return -torch.addcmul(value, self.alpha.detach().exp(), entropy).mean(), entropy

    @staticmethod
    def loss_fn(value, target):
        """Mean squared error over the batch, [..., b, 1] -> [...]."""
        return (value - target).square().mean(dim=(-2, -1))

    @staticmethod
    @torch.no_grad()
    def _soft_update(_from, _to):
        """_to becomes 0.995 _to + 0.005 _from."""
        torch._foreach_lerp_([*_to.parameters()], [*_from.parameters()], TAU)


class CQL(SAC):
    """Conservative Q-Learning, the variant CQL(H) (CQL, equation 4): SAC with a penalty in the critics' loss."""

    def __init__(self, as_printed=(), weight=WEIGHT):
        super().__init__(as_printed)
        self.weight = weight

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """SAC's loss plus weight * (log of the integral of exp Q over all torques - Q of the data's torque)."""
        torques, log_weights = self._get_torques(state, next_state, SAMPLES)  # [b, 15]
        # the data's torque and the fifteen others in one pass: a state has 16 rows
        actions = torch.cat([action, torques], dim=1)
        states = state.unsqueeze(1).expand(-1, actions.shape[1], -1)
        values = model_value(states.reshape(-1, 3), actions.reshape(-1, 1))   # [..., b * 16, 1]
        value, value_cat = values.view(*values.shape[:-2], *actions.shape).split([1, torques.shape[1]], dim=-1)

        loss_value = self.loss_fn(value, target)
        loss_cat = torch.logsumexp(value_cat + log_weights, dim=-1, keepdim=True)     # [..., b, 1]
        return loss_value + self.weight * (loss_cat - value).mean(dim=(-2, -1))

    @torch.no_grad()
    def _get_torques(self, state, next_state, n):
        """n random torques, n of the policy in `state` and n of the policy in `next_state`, [b, 3 n], and log (1 / density) of
        each, [b, 3 n]: the mean of exp(Q + that) estimates the integral of exp Q over the torques without bias (CQL,
        appendix F). Both critics are asked about the same torques, as in the authors' code."""
        b = len(state)
        # Page: (-1, 1), density 0.5, which leaves half of the torques out of the penalty.
        limit = 1.0 if "range" in self.as_printed else TORQUE
        rand_action = torch.empty(b, n).uniform_(-limit, limit)
        rand_weight = torch.full([b, n], math.log(2 * limit))
        # the policy's mean and deviation depend on the state alone: one pass over 2 b rows serves all 10 samples
        action, entropy = self.model_action.sample(torch.cat([state, next_state]), n)
        # Page: per unit of tanh. The torque is 2 tanh, so its density is half of that.
        log_weight = entropy if "range" in self.as_printed else entropy + math.log(TORQUE)
        # Page: Q - entropy, but entropy = -log pi, and the weight is 1 / pi (CQL, appendix F).
        log_weight = -log_weight if "sign" in self.as_printed else log_weight
        return torch.cat([rand_action, *action.split(b)], dim=1), torch.cat([rand_weight, *log_weight.split(b)], dim=1)


@torch.no_grad()
def evaluate(agent, seeds):
    """One episode for each seed, all side by side: returns, promised and delivered, [episodes] each.

    The same seeds give the same starts and the same noise of the policy. Promised is the smaller critic's value of the first
    torque; delivered is what the episode then paid in that unit: the sum of 0.99^t (reward + 8) / 8, and after its T steps
    0.99^T / (1 - 0.99) times the mean of the last 20, as if its end lasted. No policy can deliver more than 100.
    """
    envs = [MyWrapper() for _ in seeds]
    state = np.stack([env.reset(seed=seed) for env, seed in zip(envs, seeds)])
    rewards = np.empty([EPISODE, len(envs)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        for t in range(EPISODE):
            state = torch.from_numpy(state)
            action, _ = agent.model_action(state)
            if t == 0:
                promised = agent.values(state, action).amin(dim=0).flatten().numpy()
            steps = [env.step([torque]) for env, torque in zip(envs, action.flatten().tolist())]
            state = np.stack([step[0] for step in steps])
            rewards[t] = [step[1] for step in steps]
    scaled = (rewards + 8) / 8
    delivered = GAMMA ** np.arange(EPISODE) @ scaled + GAMMA ** EPISODE / (1 - GAMMA) * scaled[-20:].mean(axis=0)
    return rewards.sum(axis=0), promised, delivered


def train_teacher(teacher, data, epochs, run):
    """The page's online loop: an epoch is one episode and 200 updates; a test every 10 epochs and after the last."""
    for step in run.steps("teacher", teacher, epochs * EPISODE, data):
        epoch, i = divmod(step, EPISODE)
        if i == 0:
            data.update_data(teacher)
        teacher.train(*data.get_sample())
        if i == EPISODE - 1 and (epoch % 10 == 0 or epoch == epochs - 1):
            run.test(epoch)


def train_student(student, data, steps, run):
    """The page's offline loop: no environment, no new data; a test every 2,000 updates and after the last."""
    for i in run.steps("student", student, steps):
        student.train(*data.get_sample())
        if i % 2000 == 0 or i == steps - 1:
            run.test(i)


# From here on: checks, files, a run's records and pictures, and the command line.

MODELS = ("model_action", "model_value1", "model_value2", "model_value_next1", "model_value_next2")
COLUMNS = {"observations": 3, "actions": 1, "rewards": 0, "next_observations": 3, "terminals": 0, "timeouts": 0}   # 0: [n]


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM: its number, and the line that says how to go on; not an error, so `except Exception` lets it pass."""


def settle_process():
    """Two settings of the process that an update's speed rests on."""
    torch.empty(30 << 18)             # 30 MB freed once: glibc keeps freed megabytes from then on and faults no pages in anew
    torch.set_flush_denormal(True)    # a dead unit's averages decay below 1e-38, where Adam's step takes twice as long


def record(function, inputs):
    """function(*inputs) as a TorchScript module that runs the same operations on new inputs and the parameters of the time."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):     # recording draws random numbers too
        graph = make_fx(lambda *inputs: function(*inputs))(*inputs)      # a method would be counted with its self
        with torch.no_grad():
            return torch.jit.trace(graph, inputs, check_trace=False)


def seed_everything(seed):
    """Seed torch, random and the environment; each stage begins with it, so a saved dataset gives the same student."""
    torch.manual_seed(seed)
    random.seed(seed)
    env.reset(seed=seed)


def check_state(state):
    """A state as float32 [3]; raises ValueError for anything but three finite numbers."""
    try:
        array = np.asarray(state, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.size != 3 or not np.isfinite(array).all():
        raise ValueError(f"a state is three finite numbers (cos angle, sin angle, speed), not {state!r}")
    return array


def check_batch(*batch):
    """Raises ValueError unless the five tensors have the shapes [b, 3], [b, 1], [b, 1], [b, 3], [b, 1]."""
    shapes, b = [tuple(x.shape) for x in batch], len(batch[0])
    if shapes != [(b, 3), (b, 1), (b, 1), (b, 3), (b, 1)]:
        raise ValueError(f"a batch is state [b, 3], action [b, 1], reward [b, 1], next_state [b, 3], over [b, 1], not {shapes}")


def write_whole(path, content):
    """Write bytes to a file that appears whole or not at all; raises UserError when it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or choose another --out. Earlier files are "
                        f"whole") from None


@contextlib.contextmanager
def reading(path, what):
    """Turn whatever goes wrong in reading a file into a UserError; damaged zips, pickles and arrays have no common class."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}; give {what} that a run left") from None
    except Exception as error:
        raise UserError(f"{path}: damaged, or not {what} ({type(error).__name__}); give {what} that a run left") from None


def save_dataset(data, path):
    """Write the rows as npz with D4RL's names: float32 [n, 3], [n, 1], [n], [n, 3] and bool [n], [n]."""
    buffer, columns = io.BytesIO(), np.split(data.rows, [3, 4, 5, 8, 9], axis=1)
    arrays = [column if width else column[:, 0] for width, column in zip(COLUMNS.values(), columns)]
    np.savez_compressed(buffer, **dict(zip(COLUMNS, arrays[:4] + [flag > 0 for flag in arrays[4:]])))
    write_whole(path, buffer.getvalue())


def load_dataset(path, as_printed=()):
    """A frozen Data from an npz file with D4RL's names; raises UserError for any other file."""
    with reading(path, "a dataset.npz"), np.load(path, allow_pickle=False) as file:
        if missing := COLUMNS.keys() - set(file.files):
            raise UserError(f"lacks {', '.join(sorted(missing))}; a dataset has {', '.join(COLUMNS)}")
        arrays = {name: np.asarray(file[name]) for name in COLUMNS}
        n = arrays["rewards"].size
        for (name, array), width in zip(arrays.items(), COLUMNS.values()):
            kind, shape = "bool" if name in ("terminals", "timeouts") else "float", (n, width) if width else (n,)
            if array.shape != shape or not array.dtype.name.startswith(kind):
                raise UserError(f"{name} is {array.dtype} {list(array.shape)}; it must be {kind} {list(shape)}")
            with np.errstate(over="ignore"):
                arrays[name] = array.astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise UserError(f"{name} holds NaN or infinite values; remove those rows")
        if n < BATCH:
            raise UserError(f"{n} rows; a batch draws {BATCH} different ones")
        if np.abs(arrays["actions"]).max() > TORQUE:
            raise UserError("actions lie outside [-2, 2]; they must be Pendulum's torques in N m")
    data = Data(as_printed)
    data.rows = np.column_stack(list(arrays.values()))
    return data.freeze()


def agent_tensors(agent):
    """Every tensor of an agent and of its optimisers by name: the live ones, not copies."""
    tensors = {"alpha": agent.alpha.detach()}
    for model in MODELS:
        tensors |= {f"{model}.{name}": tensor for name, tensor in getattr(agent, model).state_dict().items()}
    for name, optimizer in (("optimizer_value", agent.optimizer_value), ("optimizer_action", agent.optimizer_action)):
        for kind in ("exp_avgs", "exp_avg_sqs", "steps"):
            tensors |= {f"{name}.{kind}.{k}": tensor for k, tensor in enumerate(getattr(optimizer, kind))}
    return tensors


def save_agent(path, agent, **more):
    """Write all that going on with an agent needs, and whatever else is given."""
    buffer, tensors = io.BytesIO(), {name: tensor.clone() for name, tensor in agent_tensors(agent).items()}
    torch.save({"class": type(agent).__name__, "as_printed": sorted(agent.as_printed), "weight": getattr(agent, "weight", None),
                "tensors": tensors, **more}, buffer)
    write_whole(path, buffer.getvalue())


def load_agent(path):
    """The agent in a .pt file, and the file's whole content; raises UserError for a file that has none. Runs no code in it."""
    with reading(path, "a .pt file"), warnings.catch_warnings(action="ignore"):
        saved = torch.load(path, weights_only=True)
        agent = {"CQL": CQL, "SAC": SAC}[saved["class"]](saved["as_printed"])
        agent.weight = saved["weight"] if saved["weight"] is None else float(saved["weight"])
        tensors = agent_tensors(agent)
        if saved["tensors"].keys() != tensors.keys():
            raise ValueError("other tensors")
        for name, tensor in tensors.items():
            other = saved["tensors"][name]
            if other.shape != tensor.shape or other.dtype != tensor.dtype or not other.isfinite().all():
                raise UserError(f"{name} has another shape or type, or is not finite; give a .pt file that a run left")
            tensor.copy_(other)
        return agent, saved


class Run:
    """One run in the folder `out` (None: no files): its place in the two stages, its log, its checkpoint.

    A signal that comes while a stage trains waits until the update at hand is whole, so that the checkpoint is.
    """

    def __init__(self, out=None, seed=0, argv=()):
        self.out, self.seed, self.argv = out, seed, list(argv)
        self.stage, self.step, self.log, self.seconds = "start", 0, [], {}
        self.signal, self.training = None, False

    def __enter__(self):
        self.handlers = {signum: signal.signal(signum, self.stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def stop(self, signum=None, frame=None):
        """The signals' handler; without arguments: raise what it has put off."""
        self.signal = signum or self.signal
        if self.signal and not (signum and self.training):
            line = "stopped; nothing was saved yet"
            if self.out and (self.out / "checkpoint.pt").exists():
                line = (f"stopped in stage {self.stage} after update {self.step}; {self.out} holds all of it. Go on with: "
                        f"python cql_pendulum.py --resume {shlex.quote(str(self.out))}")
            raise Interrupted(self.signal, line)

    def starts(self, purpose, n):
        """n seeds of start states for a purpose (0: the tests, 1: the final episodes), the same for every agent."""
        return np.random.SeedSequence([self.seed, purpose]).generate_state(n).tolist()

    def steps(self, stage, agent, total, data=None):
        """The steps of a stage that are still to do, behind a progress bar; raises Interrupted between two of them."""
        if stage != self.stage:
            self.stage, self.step = stage, 0
        self.agent, self.data, self.training = agent, data, True
        self.begun = time.monotonic() - self.seconds.get(stage, 0.0)
        if self.step == 0:
            self.save()
        tqdm = optional("tqdm", "no progress bars")
        todo = range(self.step, total)
        for step in tqdm.tqdm(todo, stage, total, initial=self.step, disable=None, leave=False) if tqdm else todo:
            self.step = step + 1
            yield step
            if self.signal:
                self.save()
                self.stop()
        self.training = False
        self.stop()

    def test(self, at):
        """Play the test's 10 episodes, print and log their means, and save; raises UserError when the agent has diverged."""
        self.check()
        result = [float(x.mean()) for x in evaluate(self.agent, self.starts(0, 10))]
        self.log.append([self.stage, at, *(f"{x:.3f}" for x in result), f"{time.monotonic() - self.begun:.1f}"])
        say("{} {:6d}   return {:8.1f}   promised {:8.2f}   delivered {:6.2f}".format(self.stage, at, *result))
        self.save()

    def check(self):
        """Raises UserError when the agent has diverged."""
        if bad := [name for name, tensor in agent_tensors(self.agent).items() if not tensor.isfinite().all()]:
            raise UserError(f"{self.stage} update {self.step}: {bad[0]} is NaN or infinite. The last good checkpoint stays; try "
                            f"another --seed or a smaller --weight")

    def save(self):
        """Write checkpoint.pt, which with dataset.npz holds all that going on needs, and then log.csv from the same rows."""
        self.check()
        self.seconds[self.stage] = time.monotonic() - self.begun
        if self.out:
            states = torch.get_rng_state(), random.getstate(), env.unwrapped.np_random.bit_generator.state
            rows = None if self.data is None else torch.from_numpy(self.data.rows)
            save_agent(self.out / "checkpoint.pt", self.agent, argv=self.argv, stage=self.stage, step=self.step, log=self.log,
                       seconds=self.seconds, random=states, rows=rows)
            self.save_log()

    def save_log(self):
        lines = [["stage", "step", "return", "promised", "delivered", "seconds"], *self.log]
        write_whole(self.out / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())

    def restore(self, saved, data=None):
        """Take up the place, the log and the random states of a checkpoint, and the teacher's data in the teacher's stage."""
        with reading(self.out / "checkpoint.pt", "a checkpoint.pt"):
            self.stage, self.step, self.log, self.seconds = (saved[name] for name in ("stage", "step", "log", "seconds"))
            seed_everything(self.seed)
            torch.set_rng_state(saved["random"][0])
            random.setstate(saved["random"][1])
            env.unwrapped.np_random.bit_generator.state = saved["random"][2]
            if data:
                data.rows = saved["rows"].numpy().reshape(-1, 10)
        self.save_log()


@functools.cache
def optional(name, without):
    """An optional package's module; None, after one line of notice, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"note: {name.split('.')[0]} is not installed: {without}", file=sys.stderr)


def say(line):
    """Print a line without tearing the progress bar apart."""
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.write(line)
    else:
        print(line)
    sys.stdout.flush()


def report(run, data, teacher, student):
    """Print the closing table and return {who: returns}; teacher and student play the same 100 fresh episodes."""
    agents = {"the teacher": teacher, "the student": student}
    table = {who: evaluate(agent, run.starts(1, 100))[0] for who, agent in agents.items() if agent}
    table = {"the data": data.returns()} | table
    say(f"\n{'return of an episode':<22}{'episodes':>9}{'mean':>10}{'std. error':>12}{'worst':>10}{'best':>10}")
    for who, returns in table.items():
        error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.nan
        say(f"{who:<22}{len(returns):>9}{returns.mean():>10.1f}{error:>12.1f}{returns.min():>10.1f}{returns.max():>10.1f}")
    say("minutes: " + ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in run.seconds.items()))
    return table


def draw_curves(run, table, student, path):
    """Draw the run's curves, and the student's policy and critic over all states."""
    if not (matplotlib := optional("matplotlib.figure", "no curves.png")):
        return
    figure = matplotlib.Figure(figsize=(12, 7), dpi=100, layout="constrained")
    (teacher, learner, promise), (policy, critic, legend) = figure.subplots(2, 3)

    def curve(axes, stage, column, style, label):
        rows = [row for row in run.log if row[0] == stage]
        axes.plot([row[1] for row in rows], [float(row[column]) for row in rows], style, label=label, ms=4)

    curve(teacher, "teacher", 2, "o-C0", "teacher, mean of 10 episodes")
    teacher.set(title="Teacher, online" if teacher.lines[0].get_xdata().size else "No teacher: the dataset was given",
                xlabel="epoch", ylabel="return of an episode")
    curve(learner, "student", 2, "o-C1", "student, mean of 10 episodes")
    learner.axhline(table["the data"].mean(), color="0.4", ls="--", label="mean of the data's episodes")
    if "the teacher" in table:
        learner.axhline(table["the teacher"].mean(), color="C0", ls=":", label="teacher, mean of 100 episodes")
    learner.set(title="Student, offline", xlabel="update", ylabel="return of an episode")
    curve(promise, "student", 3, "o-C3", "promised by the student's critics")
    curve(promise, "student", 4, "s-C2", "delivered by the student")
    promise.axhline(100, color="k", ls="-.", label="the most that can be delivered")
    promise.set(title="Student, promise and delivery", xlabel="update", ylabel="discounted sum of (reward + 8) / 8")

    angle, speed = np.meshgrid(np.linspace(-math.pi, math.pi, 121), np.linspace(-8, 8, 121))
    state = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle), speed], -1).reshape(-1, 3).astype(np.float32))
    with torch.no_grad():
        torque = TORQUE * student.model_action.fc_mu(student.model_action.fc_state(state)).tanh()
        value = student.values(state, torque).amin(dim=0)
    for axes, picture, title, unit, colours in ((policy, torque, "Student's policy", "torque at the mean (N m)", "coolwarm"),
                                                (critic, value, "Student's critic", "value of that torque", "viridis")):
        image = axes.pcolormesh(np.degrees(angle), speed, picture.reshape(angle.shape).numpy(), cmap=colours)
        figure.colorbar(image, ax=axes, label=unit)
        axes.set(title=title, xlabel="angle (degrees, 0 is upright)", ylabel="speed (rad/s)", xticks=range(-180, 181, 90))
    legend.axis("off")
    legend.legend(handles=[line for axes in (teacher, learner, promise) for line in axes.lines], loc="center", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def play(path, seed):
    """Play one episode with a saved agent from the seed's start, print its return, write the animation beside the file."""
    agent, _ = load_agent(path)
    seed_everything(seed)
    state, total, over, frames = env.reset(seed=seed), 0.0, False, []
    os.environ |= {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}    # draw unseen
    image = optional("pygame", "no animation") and optional("PIL.Image", "no animation")
    while not over:
        state, reward, over, _ = env.step([agent.get_action(state)])
        total += float(reward)
        if image:
            frames.append(image.fromarray(env.render()[::2, ::2]))
    print(f"return {total:.1f}")
    if frames:
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)      # ms: a step is 0.05 s
        write_whole(path.with_suffix(".gif"), buffer.getvalue())
        print(f"animation: {path.with_suffix('.gif')}")


def number(kind, least, advice):
    """An argparse type: a finite number of a kind, at least or (for a float) above `least`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value < math.inf) or kind is float and value == least:
            raise argparse.ArgumentTypeError(f"{text!r}: {advice}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_options(argv):
    parser = Parser(prog="cql_pendulum.py", allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter, description=
                    "Train a SAC teacher on Pendulum-v1, freeze its transitions, train a student on them alone.")
    count, path = number(int, 1, "give a whole number of at least 1"), pathlib.Path

    def add(name, default, said, **more):
        parser.add_argument(name, default=default, help=f"{said} (default: {more.pop('shown', default)})", **more)

    add("--seed", 0, "of everything random", type=number(int, 0, "give a whole number of at least 0"))
    add("--epochs", 100, "of the teacher, each one episode and 200 updates", type=count)
    add("--steps", 50_000, "the student's updates", type=count)
    add("--student", "cql", "sac: the same student without the penalty", choices=["cql", "sac"])
    add("--weight", WEIGHT, "of CQL's penalty", type=number(float, 0, "give a number above 0; for no penalty, --student sac"))
    add("--as-printed", None, f"restore the page's errata: {', '.join(ERRATA)}; no name: all", shown="none", nargs="*",
        metavar="NAME")
    add("--last", None, "show the student the last N episodes only", shown="all", type=count, metavar="N")
    add("--first", None, "show the student the first N episodes only", shown="all", type=count, metavar="N")
    add("--dataset", None, "train the student on this dataset.npz", shown="a new teacher's", type=path, metavar="FILE")
    add("--out", None, "new folder for the results", shown="runs/ and a name that no run has", type=path, metavar="DIR")
    add("--resume", None, "go on with the interrupted run in this folder", shown="a new run", type=path, metavar="DIR")
    add("--play", None, "play an episode with a saved agent, write the animation", shown="train", type=path,
        metavar="CHECKPOINT")
    options = parser.parse_args(argv)
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    for name, beside in (("resume", {"resume"}), ("play", {"play", "seed"})):
        if name in given and given - beside:
            parser.error(f"--{name} has no use for --{min(given - beside).replace('_', '-')}; leave it out")
    if options.first and options.last:
        parser.error("--first and --last exclude each other; give one")
    if not options.dataset and max(options.first or 0, options.last or 0) > options.epochs:
        option = "first" if options.first else "last"
        parser.error(f"--{option}: the teacher plays {options.epochs} episodes; give at most that")
    try:
        options.as_printed = sorted(check_errata(ERRATA if options.as_printed == [] else options.as_printed or ()))
    except UserError as error:
        parser.error(f"--{error}")
    return options


def new_folder(options):
    """Make the run's folder; raises UserError when it cannot be made, or has something in it already."""
    free = (pathlib.Path("runs", f"{options.student}-seed{options.seed}-{k}") for k in itertools.count(1))
    out = options.out or next(name for name in free if not name.exists())
    try:
        out.mkdir(parents=True, exist_ok=bool(options.out))
        if any(out.iterdir()):
            raise UserError(f"--out {out}: has files in it; choose a new folder, or go on with the run there: --resume {out}")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be a new folder ({error.strerror}); choose another") from None
    return out


def work(options, argv, run):
    """The main job, or what is left of it: teacher, dataset, student, table, picture."""
    saved = None
    if options.resume:
        run.out = out = options.resume
        agent, saved = load_agent(out / "checkpoint.pt")
        with reading(out / "checkpoint.pt", "a checkpoint.pt"):
            argv = saved["argv"]
            options = parse_options(argv)
    else:
        if options.dataset:
            data = load_dataset(options.dataset, options.as_printed).keep(options.first, options.last).freeze()
        out = new_folder(options)
        versions = {"python": platform.python_version()} | {module.__name__: module.__version__ for module in (gym, np, torch)}
        config = {"options": vars(options), "argv": argv, "versions": versions, "seed": options.seed}
        write_whole(out / "config.json", json.dumps(config, indent=2, default=str).encode())
    run.out, run.seed, run.argv = out, options.seed, argv

    if options.dataset:
        teacher = None
    elif saved and saved["stage"] == "student":
        teacher, _ = load_agent(out / "teacher.pt")
    else:
        seed_everything(options.seed)
        teacher, data = SAC(options.as_printed), Data(options.as_printed)
        if saved:
            teacher, saved = agent, run.restore(saved, data)
        train_teacher(teacher, data, options.epochs, run)
        save_agent(out / "teacher.pt", teacher)
        data.keep(options.first, options.last).freeze()

    if saved:
        student, data = agent, load_dataset(out / "dataset.npz", options.as_printed)
        run.restore(saved)
    else:
        save_dataset(data, out / "dataset.npz")
        seed_everything(options.seed)
        student = CQL(options.as_printed, options.weight) if options.student == "cql" else SAC(options.as_printed)
    train_student(student, data, options.steps, run)
    save_agent(out / "student.pt", student)
    draw_curves(run, report(run, data, teacher, student), student, out / "curves.png")
    say(f"all files: {out}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    try:
        with Run() as run:
            play(options.play, options.seed) if options.play else work(options, argv, run)
    except UserError as error:
        print(f"cql_pendulum.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop.args[1], file=sys.stderr)
        return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
