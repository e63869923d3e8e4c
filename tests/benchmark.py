"""How fast are the updates? Run: python tests/benchmark.py [--against DIR] [--vs-d3rlpy]

Everything is timed in one run: each round times every row once, and the table shows medians over
the rounds, so that a noisy moment falls on all rows alike. "plain" is agent.train, the program that
one reads; the others are what the main job calls, accelerate(agent). "busy" has one other process
at work. The floor is the six products of the hidden layers of the student's two critics, forward
and backward, (1024, 128) by (128, 128), on all cores. --against takes a checkout of another commit.
"""
import argparse
import importlib.util
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

TOP = pathlib.Path(__file__).parents[1]


def module_in(folder, name):
    """The cql_pendulum.py of a folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(folder, "cql_pendulum.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def d3rlpy_updates():
    """d3rlpy's updates at the page's sizes, functions of no argument: {"SAC": f, "CQL": f}."""
    import d3rlpy
    import numpy as np
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
    parser.add_argument("--against", metavar="DIR", help="a checkout of another commit to time too")
    parser.add_argument("--vs-d3rlpy", action="store_true", help="time d3rlpy's updates too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()

    ours = module_in(TOP, "ours")                       # before torch: it sets GOMP_SPINCOUNT
    import torch

    ours.settle_process()
    threads = torch.get_num_threads()
    ours.seed_everything(0)
    data, teacher, student = ours.Data(), ours.SAC(), ours.CQL()
    for _ in range(100):
        data.update_data(teacher)
    data.freeze()
    starts = list(range(10))
    x, w, g = torch.randn(1024, 128), torch.randn(128, 128), torch.randn(1024, 128)

    def floor():
        for _ in range(2):
            x @ w, g @ w.T, x.T @ g

    def update(train):
        return lambda: train(*batch)

    fast_teacher, fast_student = ours.accelerate(teacher), ours.accelerate(student)
    rows = {                              # name: what is timed, how often in a round, threads
        "floor": (floor, 60, threads),
        "teacher update": (update(fast_teacher), 60, 1),
        "student update": (update(fast_student), 60, threads),
        "plain: teacher update": (update(ours.SAC().train), 30, 1),
        "plain: student update": (update(ours.CQL().train), 30, threads),
        "draw a batch": (data.get_sample, 100, 1),
        "test of 10 episodes": (lambda: ours.evaluate(student, starts), 2, 1),
        "collect an episode": (lambda: ours.Data().update_data(teacher), 1, 1),
    }
    if options.against:
        other = module_in(options.against, "other")
        rows |= {"against: teacher update": (update(other.SAC().train), 60, threads),
                 "against: student update": (update(other.CQL().train), 60, threads)}
    if options.vs_d3rlpy:
        rows |= {f"d3rlpy: {name} update": (f, 10, threads) for name, f in d3rlpy_updates().items()}
    busy = {f"busy: {name}": rows[name] for name in ("teacher update", "student update")}

    times = {name: [] for name in rows | busy}

    def time_all(some, keep):
        for name, (function, repeats, n) in some.items():
            torch.set_num_threads(n)
            function()
            begun = time.perf_counter()
            for _ in range(repeats):
                function()
            if keep:
                times[name].append((time.perf_counter() - begun) / repeats * 1000)

    for k in range(-2, options.rounds):                 # two rounds to warm up
        batch = data.get_sample()
        time_all(rows, k >= 0)
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time_all(busy, k >= 0)
        finally:
            neighbour.kill()
            neighbour.wait()
    ms = {name: statistics.median(values) for name, values in times.items()}

    def ratio(name, other):
        return statistics.median(a / b for a, b in zip(times[name], times[other]))

    drawn, tested = ms["draw a batch"], 37 * ms["test of 10 episodes"]
    minutes = {name: (20_000 * (ms[f"{kind}teacher update"] + drawn)
                      + 100 * ms["collect an episode"]
                      + 50_000 * (ms[f"{kind}student update"] + drawn) + tested) / 60_000
               for name, kind in (("ours", ""), ("plain", "plain: "))}
    ratios = {f"{stage}, busy / alone": ratio(f"busy: {stage} update", f"{stage} update")
              for stage in ("teacher", "student")}
    for other in ("plain", "against"):
        if f"{other}: teacher update" in times:
            ratios |= {f"{stage} / {other}": ratio(f"{stage} update", f"{other}: {stage} update")
                       for stage in ("teacher", "student")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}, "
          f"medians of {options.rounds} rounds")
    print(f"{'':<28}{'ms':>10}{'x floor':>10}")
    for name, value in ms.items():
        print(f"{name:<28}{value:>10.3f}{value / ms['floor']:>10.2f}")
    for name, value in ratios.items():
        print(f"{name:<28}{value:>10.2f}")
    print(f"main job, estimated: {minutes['ours']:.1f} minutes, plain {minutes['plain']:.1f}")
    print(f"peak memory: {memory:.0f} MB")
    if options.json:
        figures = {"ms": ms, "ratios": ratios, "estimated minutes": minutes, "peak MB": memory,
                   "threads": threads, "torch": torch.__version__, "rounds": options.rounds}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
