"""How fast are the updates? Run: python study/benchmark.py [--vs-d3rlpy] [--json FILE]

Everything is timed in one run, on one thread: each round times every row once, the table shows the
median over the rounds, and a ratio is the median of the rounds' ratios, so that a noisy moment
falls on all rows alike. "Products" are the six matrix products of the hidden layers of the
student's two critics alone, forward and backward, (1024, 128) by (128, 128): what no program that
trains these networks in torch can do without.
"""
import argparse
import json
import pathlib
import platform
import statistics
import sys
import time

TOP = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(TOP))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import cql_pendulum as ours  # noqa: E402


def products():
    """A function that computes the six products."""
    x, w, g = torch.randn(1024, 128), torch.randn(128, 128), torch.randn(1024, 128)

    def compute():
        for _ in range(2):
            x @ w                   # forward
            g @ w.T                 # the gradient of the input
            x.T @ g                 # the gradient of the weights

    return compute


def d3rlpy_updates():
    """d3rlpy's updates at the page's sizes, functions of no argument: {"SAC": f, "CQL": f}."""
    import d3rlpy
    from d3rlpy.models.encoders import VectorEncoderFactory

    rng = np.random.default_rng(0)
    observations = rng.normal(size=(200, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, (200, 1)).astype(np.float32)
    rewards = rng.normal(size=(200, 1)).astype(np.float32)
    episode = d3rlpy.dataset.Episode(observations, actions, rewards, False)
    buffer = d3rlpy.dataset.create_infinite_replay_buffer([episode] * 10)
    batch = buffer.sample_transition_batch(64)
    sizes = dict(batch_size=64, actor_encoder_factory=VectorEncoderFactory([128]),
                 critic_encoder_factory=VectorEncoderFactory([128, 128]))
    configs = {"SAC": d3rlpy.algos.SACConfig(**sizes),
               "CQL": d3rlpy.algos.CQLConfig(n_action_samples=5, **sizes)}
    updates = {}
    for name, config in configs.items():
        algorithm = config.create(device="cpu")
        algorithm.build_with_dataset(buffer)
        updates[name] = lambda algorithm=algorithm: algorithm.update(batch)
    return updates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--vs-d3rlpy", action="store_true", help="time d3rlpy's updates too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()

    ours.seed_everything(0)
    data, teacher, student = ours.Data(), ours.SAC(), ours.CQL()
    for _ in range(100):
        data.update_data(teacher)
    batch = data.freeze().get_sample()
    rows = {                                        # what is timed, and how often in a round
        "products": (products(), 60),
        "teacher's update": (lambda: teacher.train(*batch), 60),
        "student's update": (lambda: student.train(*batch), 60),
        "a batch": (data.get_sample, 100),
        "a test of 10 episodes": (lambda: ours.evaluate(student, range(10)), 2),
        "an episode for the data": (lambda: ours.Data().update_data(teacher), 1),
    }
    if options.vs_d3rlpy:
        for name, update in d3rlpy_updates().items():
            rows[f"d3rlpy's {name} update"] = update, 20

    times = {name: [] for name in rows}             # ms, one number for each round
    for k in range(-2, options.rounds):             # two rounds to warm up
        for name, (function, repeats) in rows.items():
            function()
            begun = time.perf_counter()
            for _ in range(repeats):
                function()
            if k >= 0:
                times[name].append((time.perf_counter() - begun) / repeats * 1000)
    ms = {name: statistics.median(values) for name, values in times.items()}

    def ratio(name, other):
        return statistics.median(a / b for a, b in zip(times[name], times[other]))

    ratios = {}
    for name in ("teacher's update", "student's update"):
        ratios[f"{name} / products"] = ratio(name, "products")
    if options.vs_d3rlpy:
        ratios["d3rlpy's SAC update / teacher's"] = ratio("d3rlpy's SAC update", "teacher's update")
        ratios["d3rlpy's CQL update / student's"] = ratio("d3rlpy's CQL update", "student's update")
    # 100 epochs of an episode and 200 updates, 50,000 updates, 37 tests
    minutes = (100 * ms["an episode for the data"]
               + 20_000 * (ms["teacher's update"] + ms["a batch"])
               + 50_000 * (ms["student's update"] + ms["a batch"])
               + 37 * ms["a test of 10 episodes"]) / 60_000

    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    for name, value in ms.items():
        print(f"{name:<34}{value:>9.3f} ms")
    for name, value in ratios.items():
        print(f"{name:<34}{value:>9.2f}")
    print(f"main job, estimated: {minutes:.1f} minutes")
    if options.json:
        figures = {"ms": ms, "ratios": ratios, "estimated minutes": minutes,
                   "torch": torch.__version__, "rounds": options.rounds}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
