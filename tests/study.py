"""Does CQL do what the page says? Data, students, seeds, weights and errata, measured.

python tests/study.py             run what is missing, two processes of one thread; stop at any time
python tests/study.py --report    write results/study.md and three figures from results/study.jsonl

A cell is one training run with its final 100 episodes, and a line of results/study.jsonl. It counts
as long as `program` is the same: a hash of the code, without comments, that the numbers follow
from (the page's part and NUMBERS below). Each line says on which machine and commit it was made.
"""
import argparse
import ast
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import subprocess
import sys
import time
import types

import numpy as np

TOP = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
RESULTS, DATASETS = TOP / "results", TOP / "runs" / "study"
ERRATA = ("jacobian", "sign", "range", "timeout")
NUMBERS = "evaluate", "least_value", "seed_everything"             # beside the page's
LASTS = [f"last {n}" for n in (5, 10, 20, 40, 70, 85)]
MIXTURES = ["random 20", "random 10 + last 10", "2,000 rows"]
DATA = [*LASTS, "all", *MIXTURES]
CELLS = 12, 8                # of the states' angle and speed, 30 degrees by 2 rad/s, for coverage
BINS = 8                     # of the torques, 0.5 N m each


def program():
    """The hash of the code that the numbers follow from, without comments and docstrings."""
    source = (TOP / "cql_pendulum.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    end = source[:source.index("\n# The page ends here")].count("\n")
    kept = [x for x in tree.body if x.lineno <= end or getattr(x, "name", None) in NUMBERS]
    for part in kept:
        for inner in ast.walk(part):
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
                inner.body = inner.body[1:]
    bare = [x for x in kept if not isinstance(x, (ast.Import, ast.ImportFrom, ast.Expr))]
    return hashlib.sha256("\n".join(map(ast.unparse, bare)).encode()).hexdigest()


def cell(kind, seed, data=None, as_printed=(), weight=5.0, student=None):
    """One run: a teacher of a seed, or a student (sac, cql, bc) of that teacher's data, which has
    the seed of its teacher unless another is given."""
    return {"kind": kind, "seed": seed, "data": data, "as_printed": list(as_printed),
            "weight": weight if kind == "cql" else None,
            "student": seed if student is None else student}


def grid():
    """All cells, the most important first."""
    ten = range(10)
    cells = [cell("teacher", seed) for seed in ten]

    def regimes(seeds, datas):
        return [cell(kind, seed, data) for seed in seeds for data in datas
                for kind in ("cql", "sac", "bc")]

    cells += regimes(range(2), DATA)
    cells += regimes(range(2, 10), ["last 10", "all"])
    cells += [cell("cql", seed, "all", ERRATA) for seed in ten]
    cells += [cell("teacher", seed, as_printed=ERRATA) for seed in ten]
    cells += regimes(range(2, 5), [data for data in DATA if data not in ("last 10", "all")])
    cells += [cell("cql", seed, data, weight=weight)
              for seed in range(5) for data in ("all", "last 10") for weight in (0.2, 1.0)]
    cells += [cell("cql", seed, "all", [name]) for seed in range(2) for name in ERRATA]
    return cells


def key(line):
    names = "kind", "seed", "data", "as_printed", "weight", "student"
    return json.dumps({name: line[name] for name in names})


def finished():
    """{key: line} of the lines that count."""
    file, now = RESULTS / "study.jsonl", program()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {key(line): line for line in lines if line.get("program") == now}


def machine():
    """What the numbers may depend on beside the program."""
    import gym
    import torch

    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else [platform.processor()]
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=TOP,
                            capture_output=True, text=True, check=True).stdout.strip()
    return {"cpu": names[0], "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "gym": gym.__version__, "commit": commit}


def coverage(rows):
    """The mean number of torque bins of 8 that the rows occupy in a state cell that they visit."""
    angle, speed = np.arctan2(rows[:, 1], rows[:, 0]), rows[:, 2]
    parts = (angle / math.pi, speed / 8, rows[:, 3] / 2)                # each from -1 to 1
    counts, _ = np.histogramdd(np.stack(parts, 1), [*CELLS, BINS], range=3 * [(-1, 1)])
    occupied = (counts > 0).sum(axis=2)
    return float(occupied[occupied > 0].mean())


def contrast(ours, agent, rows):
    """The smaller critic's value of the data's torque minus its mean over all torques, averaged
    over 500 states of the data."""
    import torch

    rows = torch.from_numpy(rows[np.linspace(0, len(rows) - 1, 500).astype(int)])
    torques = torch.linspace(-2, 2, 41).repeat(len(rows))[:, None]
    with torch.no_grad():
        mine = ours.least_value(agent, rows[:, :3], rows[:, 3:4])
        every = ours.least_value(agent, rows[:, :3].repeat_interleave(41, dim=0), torques)
    return float((mine - every.reshape(-1, 41).mean(dim=1, keepdim=True)).mean())


def make_data(ours, seed, name):
    """A teacher's whole dataset, trained where it is not there yet, or the part with that name."""
    file = DATASETS / f"{seed}-{program()[:12]}.npz"
    if not file.exists():
        run_teacher(ours, seed, (), ours.Run(None, seed))
    if name == "2,000 rows":
        data = ours.load_dataset(file)
        chosen = np.random.default_rng(seed).choice(len(data.rows), 2000, replace=False)
        data.rows = data.rows[np.sort(chosen)]
        return data.freeze()
    if not name.startswith("random"):
        return ours.keep(ours.load_dataset(file), last=None if name == "all" else int(name[5:]))
    data = ours.Data()
    ours.seed_everything(seed)
    for _ in range(int(name.split()[1])):
        data.update_data(types.SimpleNamespace(get_action=lambda _: random.uniform(-2, 2)))
    if "last" in name:
        data.rows = np.concatenate([data.rows, make_data(ours, seed, "last 10").rows])
    return data.freeze()


def run_teacher(ours, seed, as_printed, run):
    """A teacher and its data; a corrected one's dataset is kept for the students."""
    ours.seed_everything(seed)
    agent, data = ours.SAC(as_printed), ours.Data(as_printed)
    ours.train_teacher(agent, data, 100, run, ours.accelerate(agent))
    if not as_printed:
        DATASETS.mkdir(parents=True, exist_ok=True)
        ours.save_dataset(data, DATASETS / f"{seed}-{program()[:12]}.npz")
    return agent, data


def cloner(ours):
    """Behaviour cloning, the yardstick that knows no reward: its policy learns to give the data's
    torques. An agent, so that it is trained and tested as the others are."""
    import torch

    class BC(ours.SAC):
        def train(self, state, action, reward, next_state, over):
            hidden = self.model_action.fc_state(state)
            policy = torch.distributions.Normal(self.model_action.fc_mu(hidden),
                                                self.model_action.fc_std(hidden))
            sample = (action / 2).clamp(-0.9999, 0.9999).atanh()    # that of 2 N m is infinite
            loss = -policy.log_prob(sample).mean()
            self.optimizer_action.zero_grad()
            loss.backward()
            self.optimizer_action.step()

    return BC()


def run_cell(cell):
    """Train one cell in this process, by the module's own functions, and return its line."""
    import torch

    import cql_pendulum as ours

    ours.settle_process()
    torch.set_num_threads(1)
    seed, contrasts, entropies = cell["seed"], [], []

    class Run(ours.Run):
        def test(self, at):
            contrasts.append(contrast(ours, self.agent, self.data.rows))
            super().test(at)

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        data = None if cell["kind"] == "teacher" else make_data(ours, seed, cell["data"])
        run = Run(None, seed)
        begun = time.process_time()
        if data is None:
            agent, data = run_teacher(ours, seed, cell["as_printed"], run)
        else:
            data.as_printed = ours.check_errata(cell["as_printed"])
            ours.seed_everything(cell["student"])
            agent = {"cql": lambda: ours.CQL(cell["as_printed"], cell["weight"]),
                     "sac": ours.SAC, "bc": lambda: cloner(ours)}[cell["kind"]]()
            train = agent.train if cell["kind"] == "bc" else ours.accelerate(agent)
            ours.train_student(agent, data, 50_000, run, train)
    minutes = (time.process_time() - begun) / 60

    hook = agent.model_action.register_forward_hook(lambda *x: entropies.append(x[2][1][:, 0]))
    returns, promised, delivered = ours.evaluate(agent, run.starts(1, 100))
    hook.remove()
    # what the promise counts and the delivery does not: temperature times entropy from step 1 on
    discount = ours.GAMMA ** np.arange(1, len(entropies))
    bonus = torch.stack(entropies).mean(dim=1).numpy()[1:]
    tail = ours.GAMMA ** len(entropies) / (1 - ours.GAMMA) * bonus[-20:].mean()
    temperature = float(agent.alpha.detach().exp())
    return cell | {
        "program": program(), **machine(), "minutes": round(minutes, 2),
        "dataset": hashlib.sha256(data.rows.tobytes()).hexdigest(), "rows": len(data.rows),
        "coverage": round(coverage(data.rows), 3),
        "data mean": round(float(ours.EPISODE * data.rows[:, 4].mean()), 2),
        "return": round(float(returns.mean()), 2), "promised": round(float(promised.mean()), 3),
        "delivered": round(float(delivered.mean()), 3), "temperature": round(temperature, 5),
        "entropy bonus": round(temperature * float(discount @ bonus + tail), 3),
        "tests": [[row[1], *(round(x, 3) for x in (*row[2:5], contrast))]
                  for row, contrast in zip(run.log, contrasts)]}


def work(cells):
    """Run the cells that are missing; students after the teachers, whose data they need."""
    RESULTS.mkdir(exist_ok=True)
    have = finished()
    todo = [cell for cell in cells if key(cell) not in have]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        spent, done = 0.0, 0
        for teachers in (True, False):
            some = [x for x in todo if (x["kind"] == "teacher" and not x["as_printed"]) == teachers]
            for line in pool.imap_unordered(run_cell, some):
                with open(RESULTS / "study.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                spent, done = spent + line["minutes"], done + 1
                left = spent / done * (len(todo) - done) / 2
                print(f"[{done}/{len(todo)}] {key(line)}: {line['return']:.0f}; "
                      f"about {left:.0f} minutes left", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write study.md and the figures")
    options = parser.parse_args()
    report() if options.report else work(grid())


if __name__ == "__main__":
    main()
