"""How fast are the updates, and how far from the machine's floor? Run: python tests/benchmark.py [--vs-d3rlpy] [--json FILE]

Everything is timed in one run: each round times every row of the table once, and the table shows medians over the rounds, so
that a noisy moment falls on all rows alike. The floor is what no PyTorch program can beat: the six products of the hidden
layers of the student's two critics, forward and backward, (1024, 128) by (128, 128), on all cores.
"""
import argparse
import json
import math
import pathlib
import platform
import random
import resource
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import cql_pendulum as ours  # noqa: E402


class PageData:
    """The page's dataset: a list of tuples, turned into tensors one by one."""

    def __init__(self, data):
        self.datas = data.datas

    def get_sample(self):
        samples = random.sample(self.datas, 64)
        columns = [torch.FloatTensor([sample[k].tolist() if k in (0, 3) else sample[k] for sample in samples]) for k in range(4)]
        over = torch.LongTensor([sample[4] for sample in samples])
        return *(column.reshape(64, -1) for column in columns), over.reshape(-1, 1)


class PageSAC:
    """The algorithm done the page's way: torch.distributions with validation, one critic at a time, unfused optimisers."""

    def __init__(self):
        agent = ours.SAC()
        self.model_action, self.alpha = agent.model_action, agent.alpha
        self.models = agent.model_value1, agent.model_value2
        self.models_next = agent.model_value_next1, agent.model_value_next2
        self.optimizers_value = [torch.optim.Adam(model.parameters(), lr=3e-3) for model in self.models]
        self.optimizer_action = torch.optim.Adam(self.model_action.parameters(), lr=3e-4)
        self.optimizer_alpha = torch.optim.Adam([self.alpha], lr=3e-4)

    def policy(self, state):
        hidden = self.model_action.fc_state(state)
        dist = torch.distributions.Normal(self.model_action.fc_mu(hidden), self.model_action.fc_std(hidden), validate_args=True)
        sample = dist.rsample()
        action = torch.tanh(sample)
        slope = 2 * (math.log(2) - sample - torch.nn.functional.softplus(-2 * sample))
        return action * 2, -(dist.log_prob(sample) - slope)

    def get_action(self, state):
        return self.policy(torch.FloatTensor(state.tolist()).reshape(1, 3))[0].item()

    test = ours.SAC.test                        # the page's: one episode, one state at a time

    def loss_value(self, model, target, state, action, next_state):
        return torch.nn.functional.mse_loss(model(state, action), target)

    def train(self, state, action, reward, next_state, over):
        reward = (reward + 8) / 8
        with torch.no_grad():
            next_action, entropy = self.policy(next_state)
            value = torch.min(*(model(next_state, next_action) for model in self.models_next))
            target = reward + 0.99 * (1 - over) * (value + self.alpha.exp() * entropy)
        for model, optimizer in zip(self.models, self.optimizers_value):
            loss = self.loss_value(model, target, state, action, next_state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        new_action, entropy = self.policy(state)
        loss = (-self.alpha.exp() * entropy - torch.min(*(model(state, new_action) for model in self.models))).mean()
        self.optimizer_action.zero_grad()
        loss.backward()
        self.optimizer_action.step()
        loss = ((entropy + 1).detach() * self.alpha.exp()).mean()
        self.optimizer_alpha.zero_grad()
        loss.backward()
        self.optimizer_alpha.step()
        for model, model_next in zip(self.models, self.models_next):
            for new, old in zip(model.parameters(), model_next.parameters()):
                old.data.copy_(old.data * 0.995 + new.data * 0.005)


class PageCQL(PageSAC):
    def loss_value(self, model, target, state, action, next_state):
        value = model(state, action)
        loss = torch.nn.functional.mse_loss(value, target)
        state = state.unsqueeze(1).repeat(1, 5, 1).reshape(-1, 3)
        next_state = next_state.unsqueeze(1).repeat(1, 5, 1).reshape(-1, 3)
        rand_action = torch.empty([len(state), 1]).uniform_(-2, 2)
        curr_action, curr_entropy = self.policy(state)
        next_action, next_entropy = self.policy(next_state)
        value_rand = model(state, rand_action).reshape(-1, 5, 1) - math.log(0.25)
        value_curr = model(state, curr_action).reshape(-1, 5, 1) + curr_entropy.detach().reshape(-1, 5, 1) + math.log(2)
        value_next = model(state, next_action).reshape(-1, 5, 1) + next_entropy.detach().reshape(-1, 5, 1) + math.log(2)
        loss_cat = torch.logsumexp(torch.cat([value_rand, value_curr, value_next], dim=1), dim=1).mean()
        return loss + 5.0 * (loss_cat - value.mean())


def d3rlpy_updates():
    """d3rlpy's updates at the page's sizes, each as a function that makes one of 64 rows: {"SAC": f, "CQL": f}."""
    import d3rlpy
    import numpy as np
    from d3rlpy.models.encoders import VectorEncoderFactory

    d3rlpy.seed(0)
    rng = np.random.default_rng(0)
    observations, actions = rng.normal(size=(200, 3)).astype(np.float32), rng.uniform(-1, 1, (200, 1)).astype(np.float32)
    episode = d3rlpy.dataset.Episode(observations, actions, rng.normal(size=(200, 1)).astype(np.float32), False)
    buffer = d3rlpy.dataset.create_infinite_replay_buffer([episode] * 10)
    batch = buffer.sample_transition_batch(64)
    actor, critic = VectorEncoderFactory([128]), VectorEncoderFactory([128, 128])
    sizes = dict(batch_size=64, actor_encoder_factory=actor, critic_encoder_factory=critic)
    algorithms = {"SAC": d3rlpy.algos.SACConfig(**sizes), "CQL": d3rlpy.algos.CQLConfig(n_action_samples=5, **sizes)}
    updates = {}
    for name, config in algorithms.items():
        algorithm = config.create(device="cpu")
        algorithm.build_with_dataset(buffer)
        updates[name] = lambda algorithm=algorithm: algorithm.update(batch)
    return updates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="times that each row is timed (default: %(default)s)")
    parser.add_argument("--vs-d3rlpy", action="store_true", help="time d3rlpy's SAC and CQL at the same sizes too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures to this file")
    options = parser.parse_args()

    ours.seed_everything(0)
    teacher, student, page_teacher, page_student = ours.SAC(), ours.CQL(), PageSAC(), PageCQL()
    data = ours.Data()
    for _ in range(100):
        data.update_data(teacher)
    data.freeze()
    page_data = PageData(data)
    starts = list(range(10))
    x, w, g = torch.randn(1024, 128), torch.randn(128, 128), torch.randn(1024, 128)

    def floor():
        for _ in range(2):
            x @ w, g @ w.T, x.T @ g

    rows = {                                                  # name: what is timed, and how often in a round
        "floor": (floor, 100),
        "teacher update": (lambda: teacher.train(*batch), 60),
        "student update": (lambda: student.train(*batch), 60),
        "draw a batch": (data.get_sample, 100),
        "test of 10 episodes": (lambda: ours.evaluate(student, starts), 2),
        "collect an episode": (lambda: ours.Data().update_data(teacher), 1),
        "page: teacher update": (lambda: page_teacher.train(*batch), 10),
        "page: student update": (lambda: page_student.train(*batch), 10),
        "page: draw a batch": (page_data.get_sample, 20),
        "page: test of 10 episodes": (lambda: [page_student.test(play=False) for _ in range(10)], 1),
    }
    if options.vs_d3rlpy:
        rows |= {f"d3rlpy: {name} update": (update, 10) for name, update in d3rlpy_updates().items()}

    times = {name: [] for name in rows}
    for k in range(-2, options.rounds):                       # two rounds to warm up
        batch = data.get_sample()
        for name, (function, repeats) in rows.items():
            function()
            begun = time.perf_counter()
            for _ in range(repeats):
                function()
            if k >= 0:
                times[name].append((time.perf_counter() - begun) / repeats * 1000)
    ms = {name: statistics.median(values) for name, values in times.items()}

    def job(prefix):
        """Minutes of the main job: 20,000 teacher updates, 100 episodes, 50,000 student updates, 37 tests."""
        drawn, tested = ms[prefix + "draw a batch"], ms[prefix + "test of 10 episodes"]
        episode = ms["collect an episode"] if not prefix else tested / 10
        return (20_000 * (ms[prefix + "teacher update"] + drawn) + 100 * episode
                + 50_000 * (ms[prefix + "student update"] + drawn) + 37 * tested) / 60_000

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"medians of {options.rounds} rounds")
    print(f"{'':<28}{'ms':>10}{'x floor':>10}")
    for name, value in ms.items():
        print(f"{name:<28}{value:>10.3f}{value / ms['floor']:>10.2f}")
    print(f"main job, estimated: {job(''):.1f} minutes; the page's way: {job('page: '):.1f} minutes")
    print(f"peak memory: {memory:.0f} MB")
    if options.json:
        figures = {"ms": ms, "minutes": {"ours": job(""), "page": job("page: ")}, "peak MB": memory,
                   "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": options.rounds}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
