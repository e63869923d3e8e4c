"""Offline reinforcement learning on Pendulum: a SAC teacher, its frozen data, a CQL student.

The program of the page "Offline RL" of the Simple_Reinforcement_Learning course, completed and
corrected. Names and constants are the page's; what it leaves out (the update, the reward's scale,
the temperature, the rates) is from the course's notebook. Four formulas are wrong, see ERRATA; a
comment "Page:" says what the page has. Read to the end of main; what main calls comes after it.

SAC: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, arXiv 1812.05905. CQL:
Kumar et al. 2020, arXiv 2006.04779. Pardo: Pardo et al. 2018, Time Limits in RL, arXiv 1712.00378.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import pathlib
import random
import sys
import time

import gym
import numpy as np
import torch

try:
    import tqdm
except ImportError:
    tqdm = None

torch.set_num_threads(1)        # fastest here, and no number depends on how many cores there are
torch.set_flush_denormal(True)  # Adam's averages shrink below 1e-38, where processors are slow

BATCH = 64             # rows in a batch
CAPACITY = 100_000     # rows that update_data keeps
EPISODE = 200          # steps in an episode
UPDATES = 200          # the teacher's updates after each episode
WIDTH = 128            # units in a hidden layer
LR_VALUE = 3e-3        # learning rate of the critics
LR_ACTION = 3e-4       # learning rate of the policy and of the temperature
GAMMA = 0.99           # discount for each step
TAU = 0.005            # how far a target critic moves toward its critic in each update
TEMPERATURE = 0.01     # weight of the entropy at the start; it is learned from then on
TARGET_ENTROPY = -1.0  # the entropy that the temperature aims at (SAC, appendix D)
SCALE = 8              # an update learns from (reward + 8) / 8; Data keeps the reward itself
TORQUE = 2.0           # the policy's torques are from -2 to 2 N m, as Pendulum's are
SAMPLES = 5            # torques of each kind that CQL's penalty tries in each state
WEIGHT = 5.0           # of CQL's penalty; 20 in the paper's form (half the error, rewards not / 8)

# The page's wrong formulas: the slope of tanh, the entropy's sign, the range of random torques, the
# time limit. "Page:" stands at each; those in AS_PRINTED are the page's again (--as-printed).
ERRATA = "jacobian", "sign", "range", "timeout"
AS_PRINTED = set()


class MyWrapper(gym.Wrapper):
    """Pendulum-v1 with the page's reset and step. A state is (cos angle, sin angle, speed in
    rad/s), upright at angle 0; the reward is -(angle^2 + 0.1 speed^2 + 0.001 torque^2)."""
    def __init__(self):
        # unwrapped: gym's own limit would not follow EPISODE; its checker does not know NumPy 2
        env = gym.make("Pendulum-v1", render_mode="rgb_array", disable_env_checker=True).unwrapped
        super().__init__(env)
        self.env = env
        self.step_n, self.film = 0, []

    def reset(self):
        """Start an episode. Returns its first state, float32 [3]."""
        state, _ = self.env.reset()
        self.step_n, self.unwrapped.timeout = 0, True           # for a step that does not tell
        return state

    def step(self, action):
        """Apply the torque [action], in N m, for 0.05 s: state, reward, done, info."""
        state, reward, terminated, truncated, info = self.env.step([np.asarray(action).item()])
        self.step_n += 1
        done = terminated or truncated or self.step_n >= EPISODE
        # Ours: was it only the time? Kept on the innermost env: a wrapper may give another info.
        self.unwrapped.timeout = (truncated or self.step_n >= EPISODE) and not terminated
        return state, reward, done, info

    def show(self, over):
        """In a notebook show the pendulum; elsewhere save the episode, once over, as a GIF."""
        from PIL import Image
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")           # pygame needs no window
        self.film = self.film[:self.step_n - 1] + [Image.fromarray(self.env.render()[::2, ::2])]
        if "ipykernel" in sys.modules:
            from IPython import display
            display.clear_output(wait=True)             # else the pictures would pile up
            display.display(self.film[-1])
        elif over:
            self.film[0].save("pendulum.gif", append_images=self.film[1:], save_all=True,
                              duration=50, loop=0)
            say("animation: pendulum.gif")


env = MyWrapper()


class Row(tuple):
    """The page's (state, action, reward, next_state, over). Ours: timeout, over by time alone."""
    timeout = False


class Data:
    """The teacher's replay buffer while it learns; frozen, the student's dataset."""
    def __init__(self):
        self.datas = []
        self.frozen = False

    def update_data(self, agent):
        """Play an episode with the agent and append its steps; RuntimeError when frozen."""
        if self.frozen:
            raise RuntimeError("this dataset is frozen: offline training never adds to it")
        state, over = env.reset(), False
        while not over:
            action = agent.get_action(state)
            next_state, reward, over, _ = env.step([action])
            # states as tuples of three floats, which nobody can change once the data is frozen
            self.datas.append(Row((tuple(map(float, state)), np.asarray(action).item(),
                                   float(reward), tuple(map(float, next_state)), bool(over))))
            self.datas[-1].timeout = bool(over and env.unwrapped.timeout)
            state = next_state
        while len(self.datas) > CAPACITY:
            self.datas.pop(0)

    def get_sample(self):
        """64 different rows: state [64, 3], action [64, 1], reward [64, 1], next_state [64, 3] and,
        as int64, over [64, 1]. UserError if the data has fewer rows."""
        if len(self.datas) < BATCH:
            raise UserError(f"a batch has {BATCH} rows, but the data has only {len(self.datas)}")
        samples = random.sample(self.datas, BATCH)
        state = torch.FloatTensor([i[0] for i in samples]).reshape(-1, 3)
        action = torch.FloatTensor([i[1] for i in samples]).reshape(-1, 1)
        reward = torch.FloatTensor([i[2] for i in samples]).reshape(-1, 1)
        next_state = torch.FloatTensor([i[3] for i in samples]).reshape(-1, 3)
        # Page: over at the 200-step limit, too. But there only the time is over: the pendulum would
        # go on, and what it would earn still counts (Pardo). A plain tuple counts as over by time.
        over = [i[4] and ("timeout" in AS_PRINTED or not getattr(i, "timeout", 1)) for i in samples]
        return state, action, reward, next_state, torch.LongTensor(over).reshape(-1, 1)

    @property
    def rows(self):
        """All as an array, float32 [n, 10]: state (columns 0 to 2), action (3), reward (4),
        next_state (5 to 7), terminal (8), timeout (9). To change the data, assign a new one."""
        rows = [[*i[0], i[1], i[2], *i[3], i[4], getattr(i, "timeout", i[4])] for i in self.datas]
        rows = np.array(rows, np.float32).reshape(-1, 10)
        rows[:, 8] -= rows[:, 9]                        # over, and not by time
        rows.flags.writeable = False                    # else a change would be lost
        return rows

    @rows.setter
    def rows(self, rows):
        self.datas = []
        for x in np.float32(rows).reshape(len(rows), 10).tolist():      # the columns above
            self.datas.append(Row((tuple(x[:3]), x[3], x[4], tuple(x[5:8]), x[8] + x[9] > 0)))
            self.datas[-1].timeout = x[9] > x[8]

    def freeze(self):
        """From now on no row changes in place, and update_data raises. Returns self."""
        self.datas, self.frozen = tuple(self.datas), True
        return self


class SAC:
    """Soft Actor-Critic: the teacher; with `--student sac` also a student without the penalty."""
    class ModelAction(torch.nn.Module):
        """The policy. It draws from a Gaussian; tanh squashes what is drawn into [-2, 2] N m."""
        def __init__(self):
            super().__init__()
            self.fc_state = torch.nn.Sequential(torch.nn.Linear(3, WIDTH), torch.nn.ReLU())
            self.fc_mu = torch.nn.Linear(WIDTH, 1)
            self.fc_std = torch.nn.Sequential(torch.nn.Linear(WIDTH, 1), torch.nn.Softplus())

        def forward(self, state, n=1):
            """[b, 3] -> n torques for each state (Page: one), [b, n], and their entropies, [b, n]:
            minus the log of their density per unit of tanh, that is per 2 N m (SAC, appendix C)."""
            state = self.fc_state(state)                            # [b, 3] -> [b, 128]
            mu = self.fc_mu(state)                                  # [b, 128] -> [b, 1]
            std = self.fc_std(state)                                # [b, 128] -> [b, 1]
            # validate_args: NaN does not raise here; Run.test reports an agent that has diverged
            dist = torch.distributions.Normal(mu.expand(-1, n), std, validate_args=False)
            sample = dist.rsample()                                 # [b, n]
            action = torch.tanh(sample)
            # Squashing divides the density by the slope of tanh, which is 1 - tanh(sample)^2.
            # Page: log(1 - tanh(action)^2 + 1e-7); but action is a tanh: that squashes twice.
            x = action if "jacobian" in AS_PRINTED else sample
            # log(1 - tanh(x)^2), in a form that has a gradient beyond x = 9, too, where float32's
            # tanh is 1: else a policy that has gone so far could never come back.
            log_slope = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
            entropy = log_slope - dist.log_prob(sample)             # [b, n]
            return action * TORQUE, entropy

    class ModelValue(torch.nn.Module):
        """A critic. Q is the expected discounted sum of the scaled rewards that follow a torque in
        a state, and of temperature times entropy in all later steps."""
        def __init__(self):
            super().__init__()
            self.sequential = torch.nn.Sequential(
                torch.nn.Linear(4, WIDTH), torch.nn.ReLU(),
                torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(),
                torch.nn.Linear(WIDTH, 1),
            )

        def forward(self, state, action):
            return self.sequential(torch.cat([state, action], dim=1))   # [b, 3 + 1] -> [b, 1]

    def __init__(self):
        self.model_action = self.ModelAction()
        self.model_value1 = self.ModelValue()
        self.model_value2 = self.ModelValue()
        self.model_value_next1 = copy.deepcopy(self.model_value1)
        self.model_value_next2 = copy.deepcopy(self.model_value2)
        # the LOG of the temperature, the course's name; the SAC paper's alpha is the temperature
        self.alpha = torch.tensor(math.log(TEMPERATURE), requires_grad=True)
        # Notebook: four Adams. An Adam handles each weight alone, so that two do the same.
        values = [*self.model_value1.parameters(), *self.model_value2.parameters()]
        actions = [*self.model_action.parameters(), self.alpha]
        self.optimizer_value = torch.optim.Adam(values, lr=LR_VALUE, fused=True)
        self.optimizer_action = torch.optim.Adam(actions, lr=LR_ACTION, fused=True)
        self.loss_fn = torch.nn.MSELoss()
        self.logged = {}        # for log.csv: numbers of the last update, of critic 2 where two

    def get_action(self, state):
        """Draw a torque for a state, any three numbers: a float in [-2, 2]."""
        state = torch.tensor(np.asarray(state, np.float32).reshape(1, 3))
        with torch.inference_mode():
            return self.model_action(state)[0].item()               # [1, 3] -> [1, 1]

    @torch.no_grad()
    def promise(self, state, action):
        """The smaller Q of the two critics for torques in states, [n, 3], [n] -> array [n]. If your
        train gives the critics other inputs (scaled states, say), override this to match."""
        state = torch.tensor(np.asarray(state, np.float32).reshape(-1, 3))
        action = torch.tensor(np.asarray(action, np.float32).reshape(-1, 1))
        value = torch.min(self.model_value1(state, action), self.model_value2(state, action))
        return value[:, 0].numpy()

    def test(self, play):
        """The return of one episode: the plain sum of its rewards. play: see MyWrapper.show."""
        state, reward_sum, over = env.reset(), 0.0, False
        while not over:
            state, reward, over, _ = env.step([self.get_action(state)])
            reward_sum += float(reward)
            if play:
                env.show(over)
        return reward_sum

    def train(self, state, action, reward, next_state, over):
        """One update from a batch of Data.get_sample (SAC, algorithm 1). It is not on the page."""
        # the critics (SAC, equation 5)
        target = self._get_target(scaled(reward), next_state, over)                     # [b, 1]
        loss_value1 = self._get_loss_value(self.model_value1, target, state, action, next_state)
        loss_value2 = self._get_loss_value(self.model_value2, target, state, action, next_state)
        self.optimizer_value.zero_grad()
        (loss_value1 + loss_value2).backward()
        self.optimizer_value.step()

        # the policy (SAC, equation 7) and the temperature (SAC, equation 18)
        loss_action, entropy = self._get_loss_action(state)
        loss_alpha = ((entropy - TARGET_ENTROPY).detach() * self.alpha.exp()).mean()
        self.optimizer_action.zero_grad()
        # inputs: the loss runs through the critics, but trains the policy, where it is not frozen
        learning = [*self.model_action.parameters(), self.alpha]
        (loss_action + loss_alpha).backward(inputs=[x for x in learning if x.requires_grad])
        self.optimizer_action.step()

        self._soft_update(self.model_value1, self.model_value_next1)
        self._soft_update(self.model_value2, self.model_value_next2)
        self.logged["temperature"] = self.alpha.exp().item()

    @torch.no_grad()
    def _get_target(self, reward, next_state, over):
        """What the critics should answer, [b, 1] (SAC, equations 2 and 3)."""
        action, entropy = self.model_action(next_state)                         # [b, 1]
        value1 = self.model_value_next1(next_state, action)                     # [b, 1]
        value2 = self.model_value_next2(next_state, action)                     # [b, 1]
        value = torch.min(value1, value2) + self.alpha.exp() * entropy          # [b, 1]
        return reward + GAMMA * (1 - over) * value

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """The loss of one critic, a scalar (SAC, equation 5, without its factor 1/2)."""
        loss_value = self.loss_fn(model_value(state, action), target)
        self.logged["squared_error"] = loss_value.item()
        return loss_value

    def _get_loss_action(self, state):
        """The policy's loss (SAC, equation 7), a scalar, and its torques' entropies, [b, 1]."""
        action, entropy = self.model_action(state)                              # [b, 1]
        value1 = self.model_value1(state, action)                               # [b, 1]
        value2 = self.model_value2(state, action)                               # [b, 1]
        loss_action = -self.alpha.detach().exp() * entropy - torch.min(value1, value2)
        return loss_action.mean(), entropy

    @torch.no_grad()
    def _soft_update(self, _from, _to):
        """Move each weight of _to the fraction TAU of the way to the same weight of _from."""
        for old, new in zip(_to.parameters(), _from.parameters()):
            old.lerp_(new, TAU)


class CQL(SAC):
    """Conservative Q-Learning: SAC with a penalty in the critics' loss (CQL, equation 4)."""
    def __init__(self):
        super().__init__()
        self.weight = WEIGHT

    def _get_loss_value(self, model_value, target, state, action, next_state):
        """SAC's loss of one critic plus weight * penalty, a scalar. The penalty is logsumexp(Q) of
        15 torques, a soft maximum, minus Q of the data's torque: a critic makes it small by valuing
        the data's torques above all others. The logsumexp estimates the log of the integral of
        exp(Q) over all torques, plus log 15, a constant, as 15 samples are added."""
        # Page: (-1, 1). But torques go from -2 to 2, and the penalty must try all of them.
        limit = 1 if "range" in AS_PRINTED else TORQUE
        rand_action = limit * torch.empty([len(state), SAMPLES]).uniform_(-1, 1)    # [b, 5]
        # The policy does not learn from this loss. (Page: a gradient for it, which is thrown away.)
        with torch.no_grad():
            actions, entropies = self.model_action(torch.cat([state, next_state]), SAMPLES)
        curr_action, next_action = actions.chunk(2)                         # [2 b, 5] -> [b, 5]
        curr_entropy, next_entropy = entropies.chunk(2)                     # [2 b, 5] -> [b, 5]
        # The NEXT state's torques are tried in THIS state, on the page as in the authors' code: no
        # mistake, as samples of any known density can estimate the integral.
        # Page: the critic is called once for each kind of torque; here once for all 1 + 15.
        tried = torch.cat([action, rand_action, curr_action, next_action], dim=1)   # [b, 16]
        states = state.unsqueeze(1).repeat(1, tried.shape[1], 1)            # [b, 3] -> [b, 16, 3]
        values = model_value(states.reshape(-1, 3), tried.reshape(-1, 1)).reshape(tried.shape)
        value, value_rand, value_curr, value_next = values.split([1] + 3 * [SAMPLES], dim=1)
        loss_value = self.loss_fn(value, target)
        # Importance sampling (CQL, appendix F): a torque that is drawn often must count for less,
        # so exp(Q) is divided by its density; in the exponent that is Q - log density. A random
        # torque has the density 1/2 per unit of tanh, because tanh goes from -1 to 1.
        value_rand = value_rand - math.log(0.5)                             # [b, 5]
        # Page: minus the entropy. But the entropy is minus the log of the density.
        sign = -1 if "sign" in AS_PRINTED else 1
        value_curr = value_curr + sign * curr_entropy                       # [b, 5]
        value_next = value_next + sign * next_entropy                       # [b, 5]
        value_cat = torch.cat([value_rand, value_curr, value_next], dim=1)  # [b, 15]
        loss_cat = torch.logsumexp(value_cat, dim=1).mean()                 # [b, 15] -> scalar
        penalty = loss_cat - value.mean()
        self.logged.update(squared_error=loss_value.item(), penalty=penalty.item())
        return loss_value + self.weight * penalty


class BC(SAC):
    """Behaviour cloning, not on the page: a student that learns to give the data's torques, and
    never looks at a reward. It shows how far imitation comes. Its critics stay unused."""
    def train(self, state, action, reward, next_state, over):
        """One update: the squared error between drawn torques and the data's, N m^2."""
        drawn, _ = self.model_action(state)                                     # [b, 1]
        loss = self.loss_fn(drawn, action)
        self.optimizer_action.zero_grad()
        loss.backward()
        self.optimizer_action.step()

    def promise(self, state, action):
        """Nothing: NaN, [n]."""
        return np.full(np.asarray(action).size, math.nan)


def train_teacher(teacher, data, epochs, run):
    """The page's online loop. Page: tests start anywhere; ours at the same ten, and at the end."""
    for epoch in progress(range(epochs), "teacher"):
        data.update_data(teacher)
        while len(data.datas) < BATCH:                  # short episodes, see EPISODE
            data.update_data(teacher)
        for i in range(UPDATES):
            teacher.train(*data.get_sample())
        if epoch % 10 == 0 or epoch == epochs - 1:
            run.test("teacher", epoch, teacher)


def train_student(student, data, steps, run):
    """The page's offline loop. Nothing is added to the data."""
    for i in progress(range(steps), "student"):
        student.train(*data.get_sample())
        if i % 2000 == 0 or i == steps - 1:
            run.test("student", i, student)


def evaluate(agent, seeds):
    """Play an episode for each seed. Three arrays, [episodes]: returns, promised, delivered.
    `promised` is what the critics expect at the start: the smaller Q of the agent's first torque.
    `delivered` is what the episode then brings in the same unit, see discounted. A promise far
    above it is the over-estimation that the page warns of. A seed fixes an episode's start and
    noise; afterwards torch, random, NumPy and env draw on as before (not an agent's own)."""
    returns, promised, delivered = [], [], []
    promise = getattr(agent, "promise", lambda state, action: [math.nan])   # a controller of yours
    with chance_kept():
        for seed in seeds:
            state, rewards, over = seed_everything(seed), [], False
            while not over:
                action = agent.get_action(state)
                if not rewards:                         # the first step
                    promised.append(promise(state, action)[0])
                state, reward, over, _ = env.step([action])
                rewards.append(float(reward))
            returns.append(sum(rewards))
            delivered.append(discounted(rewards, terminal=not env.unwrapped.timeout))
    return np.array(returns), np.array(promised), np.array(delivered)


def main(argv=()):
    """The story: a teacher learns online, its data is frozen, a student learns from it alone. argv
    has options as on the command line. Returns the data, the teacher (or None) and the student."""
    options = parse_options([str(word) for word in argv])
    AS_PRINTED.clear()                                  # parse_options has read it
    AS_PRINTED.update(options.as_printed)
    if options.play:
        agent = load_agent(options.play)
        seed_everything(options.seed)
        return say(f"return {agent.test(play=True):.1f}")
    data, teacher = Data(), None
    if options.dataset:                                 # a recording instead of a teacher
        data.datas = load_dataset(options.dataset, check=not options.unchecked).datas
    options.out.mkdir(parents=True)
    (options.out / "config.json").write_text(json.dumps(vars(options), indent=1, default=str))
    run = Run(options.out, options.seed)
    if not options.dataset and options.last != 0:       # --last 0: only random torques
        seed_everything(options.seed)
        teacher = SAC()
        train_teacher(teacher, data, options.epochs, run)
    choose_episodes(data, options)                      # all of them, without --last and --random
    save_dataset(options.out / "dataset.npz", data)
    if teacher:
        run.finish("teacher", teacher)

    data.freeze()
    seed_everything(options.seed)
    if options.student == "cql":
        student = CQL()
        student.weight = options.weight
    else:
        student = {"sac": SAC, "bc": BC}[options.student]()
    train_student(student, data, options.steps, run)
    run.finish("student", student)
    report(run, data, student)
    return data, teacher, student


# ---- The story ends here. What main calls follows, in its order; first the command line ----
def parse_options(argv):
    """The options. argparse ends the program with one line where they make no sense."""
    parser = argparse.ArgumentParser("cql_pendulum.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all random numbers (default %(default)s)")
    add("--epochs", type=int, default=100, help="the teacher's episodes (default %(default)s)")
    add("--steps", type=int, default=50_000, help="the student's updates (default %(default)s)")
    add("--student", choices=["cql", "sac", "bc"], default="cql", help="bc imitates (cql)")
    add("--weight", type=float, default=WEIGHT, help="of CQL's penalty (default %(default)s)")
    add("--as-printed", nargs="*", choices=ERRATA, help="the page's wrong formulas, some or all")
    add("--dataset", type=pathlib.Path, metavar="FILE", help="no teacher: use this dataset.npz")
    add("--unchecked", action="store_true", help="also a --dataset that is not env's")
    add("--last", type=int, metavar="N", help="train on the last N episodes alone")
    add("--random", type=int, default=0, metavar="N", help="N of random torques before them (0)")
    add("--out", type=pathlib.Path, metavar="DIR", help="a new folder for the results (in runs/)")
    add("--play", type=pathlib.Path, metavar="FILE", help="only show an episode of this agent")
    options = parser.parse_args(argv)
    typed = [word.split("=")[0] for word in argv]
    if "--epochs" in typed and (options.dataset or options.last == 0):
        parser.error("--dataset and --last 0 need no teacher; leave out --epochs")
    if options.out and options.out.exists():
        parser.error(f"{options.out} is there already; --out needs a new folder")
    if min(options.epochs, options.steps) < 1 or not 0 <= options.seed < 2 ** 32 or not (
            0 <= options.weight < math.inf and min(options.random, options.last or 0) >= 0):
        parser.error("--epochs and --steps start at 1, other numbers at 0; --seed ends below 2^32")
    most = math.inf if options.dataset else min(options.epochs, CAPACITY // EPISODE)
    if options.last == 0 == options.random or (options.last or 0) > most:
        parser.error(f"--last {options.last}: --last 0 needs --random, and {most} is the most")
    if not options.as_printed:                          # None: as somebody set it; []: all
        options.as_printed = sorted(AS_PRINTED) if options.as_printed is None else ERRATA
    if not set(options.as_printed) <= set(ERRATA):
        raise UserError(f"AS_PRINTED is {AS_PRINTED}; there are {', '.join(ERRATA)}")
    name = f"runs/{options.student}-seed{options.seed}-{time.strftime('%m%d-%H%M%S')}"
    options.out = options.out or pathlib.Path(name)
    return options


# ---- A run ----
class Run:
    """The tests of a run, and what they leave in its folder (None: they leave nothing)."""
    def __init__(self, folder, seed):
        self.folder, self.seed = folder and pathlib.Path(folder), seed
        self.log, self.agents, self.returns = [], {}, {}    # a dict for each test; by stage, both
        if AS_PRINTED:
            say(f"as printed: {', '.join(sorted(AS_PRINTED))}")
        if tqdm is None:
            say("note: no progress bars (tqdm is not installed)")
        say("stage      step    return  promised  delivered")

    def starts(self, purpose, n):
        """Seeds of n episodes for a purpose (0: tests, 1: final episodes), alike for all agents."""
        return np.random.SeedSequence([self.seed, purpose]).generate_state(n).tolist()

    def test(self, stage, step, agent):
        """Play ten episodes, log what comes out, save the agent as it is now, and print a line.
        UserError where it has diverged (its file stays), or another agent has its stage."""
        if self.agents.setdefault(stage, agent) is not agent:
            raise UserError(f"this run has a {stage} already; give this one a Run of its own")
        returned, promised, delivered = (x.mean() for x in evaluate(agent, self.starts(0, 10)))
        # When the critics become NaN, so does the policy in the same update, and then the rewards.
        if math.isnan(returned):
            raise UserError(f"the {stage} has diverged (NaN at {step}): rewards, learning rates?")
        row = {"stage": stage, "step": step, "return": returned, "promised": promised,
               "delivered": delivered}
        for name, value in getattr(agent, "logged", {}).items():
            row[f"logged {name}" if name in row else name] = value
        self.log.append(row)
        if self.folder:
            save_agent(self.folder / f"{stage}.pt", agent)
            names = dict.fromkeys(name for row in self.log for name in row)         # each once
            with whole_file(self.folder / "log.csv", "w") as opened:
                for line in [dict(zip(names, names)), *self.log]:
                    print(*(line.get(name, "") for name in names), sep=",", file=opened)
        line = f"{stage}{step:8d}  {returned:8.1f}  {promised:8.2f}  {delivered:9.2f}"
        least, most = possible()
        if promised < least or promised > most:
            line += f"  impossible: policies deliver {least:.0f} to {most:.0f}"
        say(line)

    def finish(self, stage, agent):
        """Play the 100 final episodes of an agent that has learned all it will."""
        self.returns[stage], _, _ = evaluate(agent, progress(self.starts(1, 100), f"{stage} done"))


def progress(steps, name):
    """The steps, behind a progress bar where there is a terminal and tqdm."""
    return tqdm.tqdm(steps, name, disable=None, leave=False) if tqdm else steps


# ---- One world: what a reward counts, random numbers, and steps of env ----
def scaled(reward):
    """What a reward counts in an update, and so in a promise and in a delivery: -1.03 to 1."""
    return (reward + SCALE) / SCALE


def discounted(rewards, terminal=False):
    """The discounted sum of an episode's scaled rewards, [T]: what Q predicts, without the entropy.
    Behind a time limit the mean of the last 20 goes on for ever; this tail counts for 13 %
    (0.99^200). Pendulum pays at most 1 for a step, so that no sum is above 100."""
    rewards, tail = scaled(np.array(rewards)), 0
    if not terminal and GAMMA < 1:                      # at 1 nothing finite could go on for ever
        tail = GAMMA ** len(rewards) / (1 - GAMMA) * rewards[-20:].mean(axis=0)
    return GAMMA ** np.arange(len(rewards)) @ rewards + tail


def seed_everything(seed):
    """Seed all random numbers and start an episode. Returns its first state, float32 [3]."""
    seed = int(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed, 1])       # for agents of your own; seed alone would give torch's numbers
    env.unwrapped.np_random, _ = gym.utils.seeding.np_random(seed)
    env.action_space.seed(seed + 1)     # with seed itself it would give env's own numbers
    return env.reset()


@contextlib.contextmanager
def chance_kept():
    """Whatever is drawn inside, afterwards all random numbers go on as if nothing had been."""
    random_state, numpy_state = random.getstate(), np.random.get_state()
    env_state = env.unwrapped.np_random.bit_generator.state
    space_state = env.action_space.np_random.bit_generator.state
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(random_state)
    np.random.set_state(numpy_state)
    env.unwrapped.np_random.bit_generator.state = env_state
    env.action_space.np_random.bit_generator.state = space_state


def step_from(state, torque):
    """One step of env from a state, [3]. Returns reward, next state, and whether it is terminal."""
    env.reset()
    env.unwrapped.state = np.array([math.atan2(state[1], state[0]), state[2]])
    next_state, reward, over, _ = env.step([torque])
    return float(reward), next_state, over and not env.unwrapped.timeout


def possible():
    """The least and most that a policy delivers: env's worst, best reward for ever, or no step."""
    speeds = np.linspace(-env.unwrapped.max_speed, env.unwrapped.max_speed, 5)
    with chance_kept():
        rewards = [step_from([math.cos(angle), math.sin(angle), speed], torque)[0]
                   for angle in np.linspace(-math.pi, math.pi, 9) for speed in speeds
                   for torque in (-TORQUE, 0.0, TORQUE)]
    for_ever = 1 / (1 - GAMMA) if GAMMA < 1 else math.inf
    return min(0, scaled(min(rewards)) * for_ever), max(0, scaled(max(rewards)) * for_ever)


# ---- Files: agents and datasets ----
def save_agent(file, agent):
    """Write an agent's networks, optimizers, tensors, numbers and words: what can be read back
    without running code. A note names what else there is, once, when the file is new."""
    state, lost = {}, []
    for name, part in vars(agent).items():
        if isinstance(part, (torch.nn.Module, torch.optim.Optimizer)):
            state[name] = part.state_dict()
        elif torch.is_tensor(part) or type(part) in (bool, int, float, str):
            state[name] = part
        elif name != "logged":
            lost.append(name)
    if lost and not os.path.exists(file):
        say(f"note: {file} does not keep {', '.join(lost)}; a torch.nn.ModuleList is kept")
    with whole_file(file) as opened:
        torch.save({"class": type(agent).__name__, "state": state}, opened)


def load_agent(file):
    """The agent in a file of save_agent, of SAC or of any class made of it, found by its name. No
    code from the file runs. UserError where the file is none, or does not fit the class."""
    with reading(file, "a saved agent that fits its class"):
        saved = torch.load(file, weights_only=True)
        classes = [SAC]
        classes.extend(kind for found in classes for kind in found.__subclasses__())
        known = {found.__name__: found for found in classes}        # of two namesakes the newer
        if saved["class"] not in known:
            raise UserError(f"holds a {saved['class']}; import the file that defines this class")
        agent, state = known[saved["class"]](), saved["state"]
        for name in [*(state.keys() - vars(agent).keys()), *vars(agent)]:
            mine, part = getattr(agent, name, None), state.get(name, {})
            learns = isinstance(mine, torch.nn.Module) or getattr(mine, "requires_grad", False)
            if learns and layout(mine) != layout(part):
                raise UserError(f"{name} is {layout(part)}, but in a new agent {layout(mine)}")
            if name != "logged" and (name not in state or name not in vars(agent)):
                say(f"note: {file}: only one of the saved agent and a new one has {name}")
            elif hasattr(mine, "load_state_dict"):
                mine.load_state_dict(part)
            elif learns:
                mine.data.copy_(part)                       # the optimizer holds this very tensor
            else:
                setattr(agent, name, part)
    return agent


def layout(part):
    """Names, shapes and types of the tensors in a network, in its state_dict, or of a tensor."""
    part = part.state_dict() if isinstance(part, torch.nn.Module) else part
    tensors = part if isinstance(part, dict) else {"": part}
    return {name: f"{[*x.shape]} {x.dtype}" for name, x in tensors.items()}


def choose_episodes(data, options):
    """Keep only the --last episodes of the data, behind --random episodes of random torques."""
    found = episodes(data)
    last = len(found) if options.last is None else options.last
    if last > len(found):
        raise UserError(f"--last {last}: the data has {len(found)} episodes")
    data.datas = []
    anything = argparse.Namespace(get_action=lambda state: random.uniform(-TORQUE, TORQUE))
    seed_everything(options.seed)
    for _ in range(options.random):
        data.update_data(anything)
    data.datas += [row for rows in found[len(found) - last:] for row in rows]


def episodes(data):
    """The rows of a Data as a list of episodes, the oldest first."""
    ends = [k for k, row in enumerate(data.datas, 1) if row[4] or k == len(data.datas)]
    return [data.datas[begin:end] for begin, end in zip([0, *ends], ends)]


def save_dataset(file, data):
    """Write the rows as an npz file with D4RL's names: torques in N m, Pendulum's own rewards."""
    rows = data.rows
    with whole_file(file) as opened:
        np.savez_compressed(opened, observations=rows[:, :3], actions=rows[:, 3:4],
                            rewards=rows[:, 4], next_observations=rows[:, 5:8],
                            terminals=rows[:, 8] > 0, timeouts=rows[:, 9] > 0)


def load_dataset(file, check=True):
    """The Data in a file like save_dataset's. UserError if it is none or, with check, not env's."""
    names = "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    data = Data()
    with reading(file, "an npz file of six arrays as in dataset.npz"), np.load(file) as arrays:
        lacking = set(names) - set(arrays)
        if lacking:
            raise UserError(f"lacks {', '.join(sorted(lacking))}")
        rows = np.column_stack([arrays[name] for name in names]).astype(np.float32)
        wrong = ~np.isfinite(rows).all(axis=1)
        if wrong.any():
            raise UserError(f"{wrong.sum()} rows have NaN, the first is row {wrong.argmax()}")
        data.rows = rows
    if check and len(rows):         # behind `reading`: what your own step raises is told as it is
        check_rows(file, rows)
    return data


def check_rows(file, rows, sample=2000):
    """UserError where rows, [n, 10], each episode's last and a sample, are not what env gives."""
    ends = rows[:, 8:].any(axis=1)
    odd = ((abs(np.hypot(rows[:, 0], rows[:, 1]) - 1) > 1e-4)           # no cos and sin
           | (abs(rows[:, 3]) > env.unwrapped.max_torque + 1e-4))
    taken = np.union1d(np.nonzero(ends | odd), np.linspace(0, len(rows) - 1, sample).astype(int))
    if len(taken) < len(rows):
        say(f"{file}: checking {len(taken):,} of {len(rows):,} rows, each episode's end with them")
    with chance_kept():
        outcomes = [np.hstack(step_from(x[:3], x[3])) for x in rows[taken].astype(float)]
    wrong = ~np.isclose(rows[taken, 4:9], outcomes, atol=1e-4)          # float32 rounds to 1e-5
    if odd.any() or wrong.any():
        raise UserError(
            f"{file}: of {len(taken)} rows {wrong[:, 0].sum()} rewards, "
            f"{wrong[:, 1:4].any(1).sum()} next states, {wrong[:, 4].sum()} terminals are not "
            f"env's, {odd.sum()} states or torques are impossible; the first in row "
            f"{taken[(odd[taken] | wrong.any(1)).argmax()]}. Usual causes: actions not from -2 to "
            f"2 N m; scaled rewards or states; empty rows; a new episode's state; a time limit in "
            f"terminals; another env. A measured one: --unchecked")
    if (~ends[:-1] & (rows[:-1, 5:8] != rows[1:, :3]).any(axis=1)).any():
        say(f"note: {file}: no whole episodes in order; --last and the data's returns mean little")


# ---- The report: a table and a picture ----
def report(run, data, student):
    """Print the returns of the data and of the agents; draw curves.png."""
    returns = {"data": np.array([sum(row[2] for row in rows) for rows in episodes(data)])}
    say("\nreturn of an episode   episodes      mean  std. error     worst      best")
    for who, x in (returns | run.returns).items():
        error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        say(f"the {who:<18}{len(x):9}{x.mean():10.1f}{error:12.1f}{x.min():10.1f}{x.max():10.1f}")
    try:
        draw(run, data.rows, student, returns["data"].mean())
    except Exception as error:                      # whatever it is, the results are there already
        say(f"note: no curves.png ({type(error).__name__}: {error})")
    say(f"all files: {run.folder}")


def draw(run, rows, student, data_mean):
    """Draw curves.png: returns, promises, and those of all torques in the most hanging state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(17, 5), layout="constrained")
    returns, promises, one_state = figure.subplots(1, 3)
    def column(stage, name):
        return [row[name] for row in run.log if row["stage"] == stage]
    updates = [UPDATES * (epoch + 1) for epoch in column("teacher", "step")]
    returns.plot(updates, column("teacher", "return"), "o-C0", label="teacher" if updates else "")
    updates = [step + 1 for step in column("student", "step")]
    returns.plot(updates, column("student", "return"), "o-C1", label="student")
    returns.axhline(data_mean, color="0.4", ls="--", label="mean of the student's data")
    promises.plot(updates, column("student", "promised"), "o-C3", label="promised")
    promises.plot(updates, column("student", "delivered"), "s-C2", label="delivered")
    promises.hlines(possible(), 0, max(updates, default=1), "k", "-.", lw=1)
    state = rows[np.linalg.norm(rows[:, :3] - [-1, 0, 0], axis=1).argmin(), :3]
    near = rows[(abs(rows[:, :3] - state) < 0.3).all(axis=1), 3]
    with chance_kept():
        drawn = [student.get_action(state) for _ in range(50)]
    torques = np.linspace(-TORQUE, TORQUE, 41)
    promised = student.promise(np.tile(state, (41, 1)), torques)
    one_state.plot(torques, promised, "C3", label="promised")
    height = one_state.get_xaxis_transform()                # from 0 to 1
    one_state.vlines(near, 0, 0.05, "k", transform=height, label="the data's torques")
    one_state.vlines(drawn, 0.06, 0.11, "C1", transform=height, label="50 of the student's")
    degrees = math.degrees(math.atan2(state[1], state[0]))
    one_state.set(title=f"Angle {degrees:.0f}°, {state[2]:.1f} rad/s", xlabel="torque (N m)")
    returns.set(title="Return of an episode", xlabel="updates")
    promises.set(title="Promises (black: least and most possible)", xlabel="updates")
    for axes in (returns, promises, one_state):
        axes.legend()
    with whole_file(run.folder / "curves.png") as opened:
        figure.savefig(opened, format="png")
    if "ipykernel" in sys.modules:
        from IPython import display
        display.display(display.Image(run.folder / "curves.png"))


# ---- Lines, files and mistakes ----
class UserError(ValueError):
    """A user's mistake. The message says in one line what is wrong, where, and what to do."""


def say(line):
    """Print a line at once, above the progress bar if there is one."""
    tqdm.tqdm.write(line) if tqdm else print(line)
    sys.stdout.flush()


@contextlib.contextmanager
def whole_file(file, mode="wb"):
    """Open a file for writing. Under its name it appears only when all of it is written."""
    with open(f"{file}.part", mode) as opened:
        yield opened
    os.replace(f"{file}.part", file)


@contextlib.contextmanager
def reading(file, what):
    """What fails inside becomes a UserError that names the file."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    except Exception:                       # zip files, pickles and arrays fail in many ways
        raise UserError(f"{file}: is not {what}") from None


if __name__ == "__main__":
    try:                            # in a notebook's cell the options are the notebook's own
        main([] if "kernel_launcher" in sys.argv[0] else sys.argv[1:])
    except (UserError, OSError, ImportError, gym.error.DependencyNotInstalled) as error:
        sys.exit(f"cql_pendulum.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; where the run's folder has dataset.npz, --dataset skips the teacher")
