"""Does it depend on our code? d3rlpy's SAC and CQL, on the same data with the same settings; and
its TD3+BC, IQL and BC beside them.

python study/peers.py             run what is missing, two processes; stop at any time

SAC and CQL are made equal to the page's in sizes, rates, first temperature, weight, target and
reward. Six things stay d3rlpy's: its policy's layer gives the log of the standard deviation (ours
gives it through softplus); its critics see torque / 2, and share the torques of a penalty (ours
draw their own); its batches are drawn with replacement; its policy's loss has the temperature after
that update's step, not before; and an episode that the time limit ends loses its last row, whose
next state d3rlpy does not record. TD3+BC, IQL and BC keep d3rlpy's own defaults, rates among them;
equal are the batch of 64, the torques' scale, the rewards (r + 8) / 8, and the hidden layers,
unless the kind says "own layers": then they are d3rlpy's, two of 256.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cql_pendulum as ours  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402

OWN = ", own layers"
KINDS = [f"d3rlpy {name}" for name in ("sac", "cql", "td3+bc", "iql", "bc")]
KINDS += [f"{kind}{OWN}" for kind in KINDS[2:]]
DATA = ["last 10", "all", "random 20", "20 mean", "controller"]
UPDATES, EVERY = 30_000, 2_000          # of a run, and from one test to the next


def make_algorithm(kind):
    """One of d3rlpy's algorithms; not yet built."""
    import d3rlpy
    encoder = d3rlpy.models.encoders.VectorEncoderFactory
    actor, critic = encoder([ours.WIDTH]), encoder([ours.WIDTH, ours.WIDTH])
    common = dict(batch_size=ours.BATCH, action_scaler=d3rlpy.preprocessing.MinMaxActionScaler(
        minimum=[-ours.TORQUE], maximum=[ours.TORQUE]))
    layers = dict(actor_encoder_factory=actor, critic_encoder_factory=critic)
    if kind.endswith(OWN):
        kind, layers, actor, critic = kind.removesuffix(OWN), {}, encoder(), encoder()
    same = dict(
        gamma=ours.GAMMA, tau=ours.TAU, critic_learning_rate=ours.LR_VALUE,
        actor_learning_rate=ours.LR_ACTION, temp_learning_rate=ours.LR_ACTION,
        initial_temperature=ours.TEMPERATURE)
    if kind == "d3rlpy sac":
        config = d3rlpy.algos.SACConfig(**common, **layers, **same)
    elif kind == "d3rlpy cql":
        # Without alpha_learning_rate=0 the penalty's own weight, alpha, is learned, and fades
        # wherever the penalty is below alpha_threshold. Without soft_q_backup the target has no
        # entropy and the mean torque: CQL's deterministic variant.
        config = d3rlpy.algos.CQLConfig(
            conservative_weight=ours.WEIGHT, n_action_samples=ours.SAMPLES, initial_alpha=1.0,
            alpha_learning_rate=0.0, alpha_threshold=0.0, soft_q_backup=True, **common, **layers,
            **same)
    elif kind == "d3rlpy td3+bc":
        config = d3rlpy.algos.TD3PlusBCConfig(**common, **layers)
    elif kind == "d3rlpy iql":
        config = d3rlpy.algos.IQLConfig(**common, **layers, value_encoder_factory=critic)
    else:
        config = d3rlpy.algos.BCConfig(**common, encoder_factory=actor)
    return config.create(device="cpu")


def make_buffer(data):
    """A Data as d3rlpy's dataset: whole episodes in order, rewards as our update uses them."""
    import d3rlpy
    state, action, reward, _, terminal, timeout = np.split(data.rows, [3, 4, 5, 8, 9], axis=1)
    return d3rlpy.dataset.MDPDataset(
        state, action, ours.scaled(reward), terminal[:, 0] > 0, timeout[:, 0] > 0,
        action_space=d3rlpy.ActionSpace.CONTINUOUS)


class Player:
    """A d3rlpy algorithm as an agent of the program. SAC's, CQL's and IQL's torques are drawn;
    TD3+BC and BC know only one."""
    def __init__(self, algorithm, kind):
        self.algorithm = algorithm
        draws = kind.removesuffix(OWN) in ("d3rlpy sac", "d3rlpy cql", "d3rlpy iql")
        self.choose = algorithm.sample_action if draws else algorithm.predict
        if kind.startswith("d3rlpy bc"):                        # it has no critic
            self.promise = lambda states, torques: np.full(np.size(torques), np.nan)

    def get_action(self, state):
        return self.choose(np.float32(state).reshape(1, 3)).item()

    @torch.no_grad()
    def promise(self, states, torques):
        """The smaller critic's value, [n, 3], [n] -> [n]. (predict_value gives their mean.)"""
        states = torch.tensor(np.float32(states).reshape(-1, 3))
        scaled = torch.tensor(np.float32(torques).reshape(-1, 1)) / ours.TORQUE
        values = [critic(states, scaled).q_value for critic in self.algorithm.impl.q_function]
        return torch.min(*values)[:, 0].numpy()


def run_cell(one):
    """Train and test in this process; the run's line."""
    import d3rlpy
    options = ours.parse_options(run.with_files(one))           # as for a student of ours
    data = ours.Data()
    if options.dataset:
        data.datas = ours.load_dataset(options.dataset, check=False).datas
    ours.choose_episodes(data, options)
    buffer, tests = make_buffer(data), []
    d3rlpy.seed(one["student"])
    algorithm = make_algorithm(one["kind"])
    algorithm.build_with_dataset(buffer)
    player, begun = Player(algorithm, one["kind"]), time.process_time()
    for step in range(one["steps"]):
        algorithm.update(buffer.sample_transition_batch(ours.BATCH))
        if step % EVERY == 0 or step == one["steps"] - 1:
            found = ours.evaluate(player, measure.seeds_of(one["seed"], 0, 10))
            tests.append([step, *(round(float(x.mean()), 3) for x in found)])
    minutes = (time.process_time() - begun) / 60
    final = ours.evaluate(player, measure.seeds_of(one["seed"], 1, 100))
    final = [round(float(x.mean()), 3) for x in final]
    line = dict(zip(("return", "promised", "delivered"), final))
    line |= {"tests": {name: [*column] for name, column in zip(
        ("step", "return", "promised", "delivered"), zip(*tests))}}
    if one["kind"].startswith("d3rlpy bc"):
        del line["promised"], line["tests"]["promised"]
    return one | {"commit": run.commit(), "cpu": run.cpu(), "d3rlpy": d3rlpy.__version__,
                  "minutes": round(minutes, 2), "rows": len(data.rows),
                  "data mean": round(float(ours.EPISODE * data.rows[:, 4].mean()), 2)} | line


def run_apart(one):
    """run_cell in a process of its own, as run.run_apart."""
    command = [sys.executable, __file__, "--cell", json.dumps(one)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])             # d3rlpy prints, too


def penalties(draws=1000):
    """CQL's penalty by d3rlpy and by ours for the same critic, policy and batch: two means over as
    many draws of torques, and the standard error of their difference. The policy's standard
    deviation is 0.5 in every state, which both can express; the untrained critic's values are taken
    times 100, and the means times 20, so that torques and densities differ from state to state."""
    torch.manual_seed(0)
    student = ours.CQL()
    policy, critic = student.model_action, student.model_value1
    critic.sequential[-1].weight.data *= 100
    policy.fc_mu.weight.data *= 20
    policy.fc_std[0].weight.data.zero_()
    policy.fc_std[0].bias.data.fill_(np.log(np.expm1(0.5)))             # softplus of it is 0.5
    algorithm = make_algorithm("d3rlpy cql")
    algorithm.create_impl((3,), 1)

    def linear(module):
        return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]

    modules = algorithm.impl.modules
    for q in modules.q_funcs:
        for new, old in zip(linear(q), linear(critic), strict=True):
            new.load_state_dict(old.state_dict())
        linear(q)[0].weight.data[:, 3] *= ours.TORQUE                   # it sees torque / 2
    hidden, mean, log_std = linear(modules.policy)
    hidden.load_state_dict(policy.fc_state[0].state_dict())
    mean.load_state_dict(policy.fc_mu.state_dict())
    log_std.weight.data.zero_()
    log_std.bias.data.fill_(np.log(0.5))

    state, next_state = torch.randn(2, ours.BATCH, 3)
    torque = 4 * torch.rand(ours.BATCH, 1) - 2
    found = np.empty([draws, 2])
    with torch.no_grad():
        for k in range(draws):
            loss = algorithm.impl._compute_conservative_loss(state, torque / ours.TORQUE,
                                                             next_state, None)      # [2]
            student._get_loss_value(critic, torch.zeros(ours.BATCH, 1), state, torque, next_state)
            found[k] = loss[0] / ours.WEIGHT, student.logged["penalty"]
    return *found.mean(axis=0), float(np.hypot(*found.std(axis=0, ddof=1) / draws ** 0.5))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)])
    parser.add_argument("--data", nargs="+", default=DATA, metavar="NAME", help="(%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--penalty", action="store_true", help="compare the penalties, run nothing")
    parser.add_argument("--cell", type=json.loads, help="print the line of this cell, in JSON")
    options = parser.parse_args()
    if options.cell:
        return print(json.dumps(run_cell(options.cell), allow_nan=False))
    if options.penalty:
        return print("penalty by d3rlpy {:.3f}, by ours {:.3f}, standard error of the difference "
                     "{:.3f}".format(*penalties()))
    cells = [run.cell(kind, seed, data, steps=UPDATES)
             for seed in options.seeds for data in options.data for kind in options.kinds]
    have = run.lines()
    run.work([one for one in cells if run.key(one) not in have], options.processes,
             run_one=run_apart)


if __name__ == "__main__":
    main()
