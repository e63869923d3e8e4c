"""Does it depend on our code? d3rlpy's SAC and CQL, on the same data with the same settings.

python study/peers.py             run what is missing, two processes of one thread; stop at any time

Teachers are those of run.py, which makes one that study/kept lacks.
A run is a line of results/cells.jsonl. Six things stay d3rlpy's: its policy's layer gives the log
of the standard deviation (ours gives it through softplus); its critics see torque / 2, and share
the torques of a penalty (ours draw their own); its batches are drawn with replacement; its policy's
loss has the temperature after that update's step, not before; and an episode that the time limit
ends loses its last row, whose next state d3rlpy does not record.
"""
import argparse
import contextlib
import hashlib
import os
import pathlib
import platform
import statistics
import sys
import time

import d3rlpy
import gym
import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cql_pendulum as ours  # noqa: E402
import measure  # noqa: E402
import recordings  # noqa: E402
import run  # noqa: E402

KINDS = ["d3rlpy sac", "d3rlpy cql"]
DATA = ["last 10", "all", "random 20", "controller"]
UPDATES, EVERY = 30_000, 2_000          # of a run, and from one test to the next


def make_algorithm(kind):
    """d3rlpy's SAC or CQL with the page's sizes and rates; not yet built."""
    encoder = d3rlpy.models.encoders.VectorEncoderFactory
    options = dict(
        batch_size=ours.BATCH, gamma=ours.GAMMA, tau=ours.TAU,
        critic_learning_rate=ours.LR_VALUE, actor_learning_rate=ours.LR_ACTION,
        temp_learning_rate=ours.LR_ACTION, initial_temperature=ours.TEMPERATURE,
        actor_encoder_factory=encoder([ours.WIDTH]),
        critic_encoder_factory=encoder([ours.WIDTH, ours.WIDTH]),
        action_scaler=d3rlpy.preprocessing.MinMaxActionScaler(minimum=[-ours.TORQUE],
                                                              maximum=[ours.TORQUE]))
    if kind == "d3rlpy sac":
        return d3rlpy.algos.SACConfig(**options).create(device="cpu")
    # Without alpha_learning_rate=0 the penalty's own weight, alpha, is learned, and fades wherever
    # the penalty is below alpha_threshold. Without soft_q_backup the target has no entropy and the
    # mean torque: CQL's deterministic variant.
    return d3rlpy.algos.CQLConfig(
        conservative_weight=ours.WEIGHT, n_action_samples=ours.SAMPLES, initial_alpha=1.0,
        alpha_learning_rate=0.0, alpha_threshold=0.0, soft_q_backup=True, **options,
    ).create(device="cpu")


def make_buffer(data):
    """A Data as d3rlpy's dataset: whole episodes in order, rewards as our update uses them."""
    state, action, reward, _, terminal, timeout = np.split(data.rows, [3, 4, 5, 8, 9], axis=1)
    return d3rlpy.dataset.MDPDataset(
        state, action, (reward + ours.SCALE) / ours.SCALE, terminal[:, 0] > 0, timeout[:, 0] > 0,
        action_space=d3rlpy.ActionSpace.CONTINUOUS)


def evaluate(algorithm, seeds):
    """An episode for each seed, its torques drawn by the policy: returns, promised, delivered,
    [episodes] each, as in ours.evaluate and from the same starts."""
    envs = [ours.MyWrapper() for _ in seeds]
    for env, seed in zip(envs, seeds):
        env.unwrapped.np_random, _ = gym.utils.seeding.np_random(seed)
    states = np.stack([env.reset() for env in envs])                        # [episodes, 3]
    promised = None
    rewards = np.empty([ours.EPISODE, len(envs)])
    for t in range(ours.EPISODE):
        torques = algorithm.sample_action(states)                           # [episodes, 1]
        if promised is None:
            promised = promise(algorithm, states, torques)
        steps = [env.step(torque) for env, torque in zip(envs, torques)]
        states = np.stack([step[0] for step in steps])
        rewards[t] = [step[1] for step in steps]
    delivered = [ours.discounted(episode) for episode in rewards.T]
    return rewards.sum(axis=0), promised, np.array(delivered)


@torch.no_grad()
def promise(algorithm, states, torques):
    """The smaller critic's value, [n, 3], [n, 1] -> [n]. (predict_value gives their mean.)"""
    states = torch.from_numpy(states)
    scaled = torch.from_numpy(torques) / ours.TORQUE
    values = [critic(states, scaled).q_value for critic in algorithm.impl.q_function]
    return torch.min(*values)[:, 0].numpy()


def run_cell(cell):
    """Train and test in this process; the run's line."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        teacher = ours.load_agent(run.KEPT / f"{cell['seed']}.pt")
        data = run.make_data(cell["data"], cell["seed"], teacher)
        buffer = make_buffer(data)
        d3rlpy.seed(cell["student"])
        algorithm = make_algorithm(cell["kind"])
        algorithm.build_with_dataset(buffer)

        test, final = measure.seeds_of(cell["seed"], 0, 10), measure.seeds_of(cell["seed"], 1, 100)
        tests = []
        begun = time.process_time()
        for step in range(UPDATES):
            algorithm.update(buffer.sample_transition_batch(ours.BATCH))
            if step % EVERY == 0 or step == UPDATES - 1:
                means = [float(x.mean()) for x in evaluate(algorithm, test)]
                tests.append([step, *(round(x, 3) for x in means), None])
        minutes = (time.process_time() - begun) / 60
        returns, promised, delivered = evaluate(algorithm, final)
        log_temperature = d3rlpy.models.torch.get_parameter(algorithm.impl.modules.log_temp)
        theirs, mine = time_updates(cell["kind"], buffer, data)
    return cell | {
        "cpu": run.cpu(), "commit": run.commit(), "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__, "d3rlpy": d3rlpy.__version__,
        "minutes": round(minutes, 2), "seconds per update": round(theirs, 6),
        "our seconds per update": round(mine, 6),
        "dataset": hashlib.sha256(data.rows.tobytes()).hexdigest(), "rows": len(data.rows),
        "data mean": round(float(ours.EPISODE * data.rows[:, 4].mean()), 2),
        "return": round(float(returns.mean()), 2), "promised": round(float(promised.mean()), 3),
        "delivered": round(float(delivered.mean()), 3),
        "temperature": round(log_temperature.exp().item(), 5), "tests": tests}


def time_updates(kind, buffer, data, rounds=15, repeats=20):
    """Seconds of one update of d3rlpy's and of ours, of new agents on a batch that is drawn
    already: medians of rounds that alternate, so that a slow moment falls on both alike. Seconds
    are the process's own, so that what else the machine does counts little."""
    algorithm, batch = make_algorithm(kind), buffer.sample_transition_batch(ours.BATCH)
    algorithm.build_with_dataset(buffer)
    student = ours.SAC() if kind == "d3rlpy sac" else ours.CQL()
    sample = data.get_sample()
    seconds = [], []
    for _ in range(rounds):
        for update, found in zip((lambda: algorithm.update(batch), lambda: student.train(*sample)),
                                 seconds):
            begun = time.process_time()
            for _ in range(repeats):
                update()
            found.append((time.process_time() - begun) / repeats)
    return [statistics.median(found[2:]) for found in seconds]          # two rounds to warm up


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
        target = critic(state, torque)                                  # so that its error is 0
        for k in range(draws):
            loss = algorithm.impl._compute_conservative_loss(state, torque / ours.TORQUE,
                                                             next_state, None)      # [2]
            loss_of_ours = student._get_loss_value(critic, target, state, torque, next_state)
            found[k] = loss[0], loss_of_ours
    theirs, mine = found.mean(axis=0) / ours.WEIGHT
    error = found.std(axis=0, ddof=1) / draws ** 0.5 / ours.WEIGHT
    return theirs, mine, float(np.hypot(*error))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", nargs="+", choices=[*run.DATA, *recordings.NAMES], default=DATA,
                        metavar="NAME", help="of run.py or recordings.py (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--penalty", action="store_true", help="compare the penalties, run nothing")
    options = parser.parse_args()
    if options.penalty:
        print("penalty by d3rlpy {:.3f}, by ours {:.3f}, standard error of the difference {:.3f}"
              .format(*penalties()))
        return

    weights = {"d3rlpy sac": None, "d3rlpy cql": ours.WEIGHT}
    cells = [run.cell(kind, seed, data) | {"weight": weights[kind]}
             for seed in options.seeds for data in options.data for kind in options.kinds]
    have = run.lines()
    run.work([cell for cell in cells if run.key(cell) not in have], options.processes, run_cell)


if __name__ == "__main__":
    main()
