"""How fast are the updates? Run: python study/benchmark.py [--peers] [--rounds N] [--json FILE]

Everything is timed in one run, on one thread: each round times every row once, the table shows the
median over the rounds, and a ratio is the median of the rounds' ratios, so that a noisy moment
falls on all rows alike. --peers adds an update of other libraries at the same sizes: batches of 64
from a buffer of 20,000 rows, hidden layers of 128 (policy) and 128, 128 (two critics), in CQL five
torques of each kind; each with the drawing of its batch, as in our rows. All else is theirs.

d3rlpy 2.8.1 is for gymnasium 1.0.0 and tianshou 2.0.1 for pandas 2; a peer that cannot be imported
gets a line that says so.
"""
import argparse
import json
import pathlib
import platform
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import cql_pendulum as ours  # noqa: E402


class Network(nn.Sequential):
    """Inputs side by side -> hidden layers -> outputs; tianshou gives numpy arrays."""
    def __init__(self, inputs, hidden, outputs):
        sizes = [inputs, *hidden]
        layers = [part for pair in zip(sizes, sizes[1:]) for part in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*layers, nn.Linear(sizes[-1], outputs))

    def forward(self, *parts):
        return super().forward(torch.cat([torch.as_tensor(part) for part in parts], dim=-1))


# Each is given a Data, and returns functions of no argument by name

def d3rlpy(data):
    import d3rlpy
    import peers
    buffer, found = peers.make_buffer(data), {}
    for name in ("SAC", "CQL"):
        algorithm = peers.make_algorithm(f"d3rlpy {name.lower()}")
        algorithm.build_with_dataset(buffer)
        found[f"{name}, d3rlpy {d3rlpy.__version__}"] = lambda algorithm=algorithm: (
            algorithm.update(buffer.sample_transition_batch(64)))
    return found


def stable_baselines3(data):
    import gymnasium
    import stable_baselines3
    from stable_baselines3.common.logger import configure
    model = stable_baselines3.SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), batch_size=64,
                                  buffer_size=20_000, policy_kwargs={
                                      "net_arch": {"pi": [128], "qf": [128, 128]}}, device="cpu")
    model.set_logger(configure(format_strings=[]))
    for x in data.rows:
        model.replay_buffer.add(x[:3], x[5:8], x[3:4], x[4:5], x[8:9], [{}])
    return {f"SAC, Stable-Baselines3 {stable_baselines3.__version__}": (
        lambda: model.train(gradient_steps=1, batch_size=64))}


def skrl(data):
    import gymnasium
    import skrl
    from skrl.agents.torch.sac import SAC, SAC_CFG
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    skrl.logger.setLevel("ERROR")
    env = gymnasium.make("Pendulum-v1")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}

    class Policy(GaussianMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces, device="cpu")
            GaussianMixin.__init__(self)
            self.net = Network(3, [128], 2)

        def compute(self, inputs, role=""):
            mean, log_std = self.net(inputs["observations"]).chunk(2, dim=1)
            return mean, {"log_std": log_std}

    class Critic(DeterministicMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces, device="cpu")
            DeterministicMixin.__init__(self)
            self.net = Network(4, [128, 128], 1)

        def compute(self, inputs, role=""):
            return self.net(inputs["observations"], inputs["taken_actions"]), {}

    models = {name: Critic() for name in ("critic_1", "critic_2", "target_critic_1",
                                          "target_critic_2")}
    agent = SAC(models={"policy": Policy(), **models}, cfg=SAC_CFG(batch_size=64), device="cpu",
                memory=RandomMemory(memory_size=20_000, num_envs=1, device="cpu"), **spaces)
    agent.init()
    for x in torch.tensor(data.rows):
        agent.memory.add_samples(
            observations=x[None, :3], actions=x[None, 3:4], rewards=x[None, 4:5],
            next_observations=x[None, 5:8], terminated=x[None, 8:9] > 0,
            truncated=x[None, 9:] > 0)
    return {f"SAC, skrl {skrl.__version__}": lambda: agent.update(timestep=0, timesteps=1)}


def torchrl(data):
    import tensordict
    import torchrl
    from torchrl import data as storage, modules, objectives
    spec = storage.Bounded(-2.0, 2.0, (1,))
    net = nn.Sequential(Network(3, [128], 2), modules.NormalParamExtractor())
    actor = modules.ProbabilisticActor(
        tensordict.nn.TensorDictModule(net, ["observation"], ["loc", "scale"]), spec=spec,
        in_keys=["loc", "scale"], distribution_class=modules.TanhNormal,
        distribution_kwargs={"low": -2.0, "high": 2.0})
    critic = modules.ValueOperator(Network(4, [128, 128], 1), ["observation", "action"])
    loss = objectives.CQLLoss(actor, critic, action_spec=spec, num_random=5, min_q_weight=5.0)
    loss.make_value_estimator(gamma=0.99)
    target = objectives.SoftUpdate(loss, tau=0.005)
    adam = torch.optim.Adam(loss.parameters(), lr=3e-4)
    x = torch.tensor(data.rows)
    rows = tensordict.TensorDict({
        "observation": x[:, :3], "action": x[:, 3:4],
        "next": {"observation": x[:, 5:8], "reward": x[:, 4:5], "done": x[:, 8:9] > 0,
                 "terminated": x[:, 8:9] > 0}}, [len(x)])
    buffer = storage.TensorDictReplayBuffer(storage=storage.LazyTensorStorage(20_000),
                                            batch_size=64)
    buffer.extend(rows)

    def update():
        losses = loss(buffer.sample())
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        adam.zero_grad()
        total.backward()
        adam.step()
        target.step()

    return {f"CQL, TorchRL {torchrl.__version__}": update}


def tianshou(data):
    import gymnasium
    import tianshou
    from tianshou.algorithm import CQL
    from tianshou.algorithm.algorithm_base import policy_within_training_step
    from tianshou.algorithm.modelfree.sac import SACPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Batch, ReplayBuffer

    class Actor(Network):
        def forward(self, obs, state=None, info=None):
            mean, log_std = super().forward(obs).chunk(2, dim=1)
            return (mean, log_std.clamp(-20, 2).exp()), state

    adam = AdamOptimizerFactory(lr=3e-4)
    policy = SACPolicy(actor=Actor(3, [128], 2), action_space=gymnasium.spaces.Box(-2, 2, (1,)))
    agent = CQL(policy=policy, policy_optim=adam, critic=Network(4, [128, 128], 1),
                critic2=Network(4, [128, 128], 1), critic_optim=adam, num_repeat_actions=5,
                cql_weight=5.0, with_lagrange=False, calibrated=False)
    buffer = ReplayBuffer(len(data.datas))
    for x in data.rows:
        buffer.add(Batch(obs=x[:3], obs_next=x[5:8], act=x[3:4] / 2, rew=float(x[4]), info={},
                         terminated=bool(x[8]), truncated=bool(x[9])))

    def update():
        with policy_within_training_step(agent.policy):
            agent.update(buffer=buffer, sample_size=64)

    return {f"CQL, tianshou {tianshou.__version__}": update}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--peers", action="store_true", help="time other libraries' updates, too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    ours.seed_everything(0)
    data, sac, cql = ours.Data(), ours.SAC(), ours.CQL()
    for _ in range(100):
        data.update_data(sac)
    data.freeze()
    rows = {"SAC, ours": lambda: sac.train(*data.get_sample()),
            "CQL, ours": lambda: cql.train(*data.get_sample())}
    usual = {"a test of 10 episodes": lambda: ours.evaluate(cql, range(10)),
             "an episode for the data": lambda: ours.Data().update_data(sac)}
    for peer in (d3rlpy, stable_baselines3, skrl, torchrl, tianshou) if options.peers else ():
        try:
            rows |= peer(data)
        except ImportError as error:
            print(f"{peer.__name__}: not here ({error})")
    times = {name: [] for name in [*rows, *usual]}              # ms, one number for each round
    torch.set_num_threads(1)                                    # whatever an import has set
    for k in range(-2, options.rounds):                         # two rounds to warm up
        for name, function in (rows | usual).items():
            repeats = 20 if name in rows else 1
            begun = time.perf_counter()
            for _ in range(repeats):
                function()
            if k >= 0:
                times[name].append((time.perf_counter() - begun) / repeats * 1000)
    ms = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: statistics.median(np.divide(times[name], times[f"{name[:3]}, ours"]))
              for name in rows}
    minutes = (100 * ms["an episode for the data"] + 20_000 * ms["SAC, ours"]
               + 50_000 * ms["CQL, ours"] + 57 * ms["a test of 10 episodes"]) / 60_000
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    for name, value in ms.items():
        ratio = f"{ratios[name]:>9.2f} of ours" if name in ratios else ""
        print(f"{name:<34}{value:>9.3f} ms{ratio}")
    print(f"main job, estimated: {minutes:.1f} minutes")        # with 200 final episodes
    if options.json:
        options.json.write_text(json.dumps({
            "ms": ms, "ratios": ratios, "estimated minutes": minutes, "rounds": options.rounds,
            "torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()
