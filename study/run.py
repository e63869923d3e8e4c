"""Does CQL do what the page says? Data, students, seeds, weights and errata, measured.

python tests/study.py             run what is missing, two processes of one thread; stop at any time
python tests/study.py --report    write results/study.md and three figures: tests/report.py
python tests/study.py --picture   train four students, and draw what they promise and deliver

A cell is one training run with its final 100 episodes, and a line of results/study.jsonl. It counts
as long as `program` is the same: a hash of the code, without comments, that the numbers follow
from (the page's part and NUMBERS below). Each line says on which machine and commit it was made.
"""
import argparse
import ast
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import time
import types

import numpy as np

TOP = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
RESULTS, DATASETS = TOP / "results", TOP / "runs" / "study"
ERRATA = ("jacobian", "sign", "range", "timeout")
# beside the classes and loops, which stand before main
NUMBERS = "evaluate", "discounted", "least_value", "seed_everything", "choose_episodes", "BC"
LASTS = [f"last {n}" for n in (5, 10, 20, 40, 70, 85)]
MIXTURES = ["random 20", "random 10 + last 10", "2,000 rows"]
DATA = [*LASTS, "all", *MIXTURES]
MEASURED = ["last 10", "last 85", "all", "random 20", "last 40"]      # what torques.measure is for
MOMENTS = 2000, 4000, 10_000, 20_000, 49_999                          # updates at which it is made
INTERVENTIONS = ("clone target", "uniform torques", "uniform states", "uniform states and torques",
                 "fixed temperature")
CELLS = 12, 8                # of the states' angle and speed, 30 degrees by 2 rad/s, for coverage
BINS = 8                     # of the torques, 0.5 N m each


def program():
    """The hash of the code that the numbers follow from, without comments, docstrings and errors'
    texts; the same in every version of Python."""
    tree = ast.parse((TOP / "cql_pendulum.py").read_text(encoding="utf-8"))
    before_main = True
    kept = []
    for part in tree.body:
        name = getattr(part, "name", None)
        if name == "main":
            before_main = False
        if before_main or name in NUMBERS:
            kept.append(fingerprint(part))
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def fingerprint(node):
    """A part of a program as nested lists; None for what gives no numbers."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise)):
        return None
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return None                                                   # a docstring
    if isinstance(node, ast.AST):
        fields = [[name, fingerprint(value)] for name, value in ast.iter_fields(node)
                  if value is not None and value != []]               # newer versions have new ones
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [fingerprint(part) for part in node]
    return repr(node)


def cell(kind, seed, data=None, as_printed=(), weight=5.0, student=None):
    """One run: a teacher of a seed, or a student (sac, cql, bc, an intervention of torques.py) of
    that teacher's data, which has the seed of its teacher unless another is given."""
    return {"kind": kind, "seed": seed, "data": data, "as_printed": list(as_printed),
            "weight": weight if kind == "cql" else None,
            "student": seed if student is None else student}


def grid():
    """All cells. Seeds 0 to 9 were run first, on one machine; what was asked later has the seeds
    from 10 on, on another: a seed's numbers agree on machines of one kind alone, and so a seed's
    students are compared with students of the very same data."""
    ten, later, measured = range(10), range(10, 15), range(10, 20)
    cells = [cell("teacher", seed) for seed in range(20)]

    def regimes(seeds, datas):
        return [cell(kind, seed, data) for seed in seeds for data in datas
                for kind in ("cql", "sac", "bc")]

    cells += regimes([0], DATA) + regimes(ten, ["last 10", "all"])
    cells += [cell("cql", 3, "last 10", student=student) for student in range(103, 108)]
    cells += [cell("cql", seed, "all", ERRATA) for seed in ten]
    cells += [cell("teacher", seed, as_printed=ERRATA) for seed in ten]
    cells += regimes(range(1, 5), DATA)
    cells += [cell("cql", seed, data, weight=weight)
              for seed in range(5) for data in ("all", "last 10") for weight in (0.2, 1.0)]
    cells += [cell(kind, seed, "last 10") for seed in later for kind in ("sac", "cql")]
    cells += [cell(kind, seed, "last 10") for kind in INTERVENTIONS for seed in later]
    cells += regimes(later, ["last 85", "all", "random 20"]) + regimes(measured, ["last 10"])
    cells += [cell("teacher", seed, as_printed=[name]) for seed in range(10, 14)
              for name in ERRATA]
    cells += regimes(later, ["last 40"])
    return [*{key(one): one for one in cells}.values()]


def key(line):
    names = "kind", "seed", "data", "as_printed", "weight", "student"
    return json.dumps({name: line[name] for name in names})


def counting():
    """The lines that count: of this program, or of one that results/same.jsonl shows to give the
    same numbers."""
    file = RESULTS / "study.jsonl"
    programs = {program(), *same_programs()}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["program"] in programs]


def finished():
    """{key: line} of the lines that count. A seed's teacher, and so its data, differ from machine
    to machine: a seed has the lines of the one that ran the most of it."""
    seeds = {}
    for line in counting():
        machines = seeds.setdefault(line["seed"], {})
        machines.setdefault(line["cpu"], {}).setdefault(key(line), line)
    found = {}
    for machines in seeds.values():
        found.update(max(machines.values(), key=len))
    return found


def missing(cells, mine):
    """The cells to run on the processor `mine`: of a seed that no machine has finished, all that
    this one lacks."""
    have = finished()
    unfinished = {one["seed"] for one in cells if key(one) not in have}
    run_here = {key(line) for line in counting() if line["cpu"] == mine}
    return [one for one in cells if one["seed"] in unfinished and key(one) not in run_here]


def same_programs():
    """The earlier programs whose cells in results/same.jsonl equal those of this program, digit by
    digit: at least eight cells, run on one machine."""
    file = RESULTS / "same.jsonl"
    if not file.exists():
        return set()
    cells = {}
    for line in map(json.loads, file.read_text().splitlines()):
        cells.setdefault(line["program"], {})[key(line)] = comparable(line)
    mine = cells.pop(program(), {})
    return {other for other, theirs in cells.items() if len(theirs) >= 8 and theirs == mine}


def comparable(line):
    """What must be equal in the lines of two programs. A clone's critic learns nothing, and what it
    promises is not compared."""
    names = ["return", "delivered", "dataset", "coverage", "outside", "data mean", "temperature"]
    columns = [0, 1, 3]
    if line["kind"] != "bc":
        names += ["promised", "entropy bonus"]
        columns = [0, 1, 2, 3, 4]
    tests = [[test[column] for column in columns] for test in line["tests"]]
    return {name: line[name] for name in names} | {"tests": tests}


def run_same():
    """Run nine cells of seed 0 for results/same.jsonl, as far as this program lacks them."""
    cells = [cell("teacher", 0), cell("cql", 0, "all"), cell("sac", 0, "last 10"),
             cell("bc", 0, "last 10"), cell("cql", 0, "all", ERRATA),
             cell("cql", 0, "last 10", weight=0.2), cell("sac", 0, "random 10 + last 10"),
             cell("cql", 0, "random 20"), cell("teacher", 0, as_printed=ERRATA)]
    file = RESULTS / "same.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    have = {key(line) for line in lines if line["program"] == program()}
    for one in cells:
        if key(one) not in have:
            with open(file, "a") as appended:
                appended.write(json.dumps(run_cell(one)) + "\n")


def cpu():
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else [platform.processor()]
    return names[0]


def machine():
    """What the numbers may depend on beside the program."""
    import gym
    import torch

    git = functools.partial(subprocess.run, cwd=TOP, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "HEAD"], check=True).stdout.strip()
    if git(["git", "diff", "--quiet", "HEAD", "--", "cql_pendulum.py", "tests"]).returncode:
        commit += "-changed"
    return {"cpu": cpu(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "gym": gym.__version__, "commit": commit}


def histogram(rows):
    """How many rows lie in each cell of the states and bin of the torques, [12, 8, 8]."""
    angle, speed = np.arctan2(rows[:, 1], rows[:, 0]), rows[:, 2]
    parts = (angle / math.pi, speed / 8, rows[:, 3] / 2)                # each from -1 to 1
    return np.histogramdd(np.stack(parts, 1), [*CELLS, BINS], range=3 * [(-1, 1)])[0]


def coverage(rows):
    """The mean number of torque bins of 8 that the rows occupy in a state cell that they visit."""
    occupied = (histogram(rows) > 0).sum(axis=2)
    return float(occupied[occupied > 0].mean())


def outside(visited, rows):
    """The share of visited states and torques, [n, 3 + 1], whose bin and cell the rows lack."""
    found = histogram(visited)
    return float(found[histogram(rows) == 0].sum() / len(visited))


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


def kept(seed, kind):
    """Where a seed's teacher ("pt") and its data ("npz") are kept."""
    return DATASETS / f"{seed}-{program()[:12]}.{kind}"


def make_data(ours, seed, name):
    """A teacher's whole dataset, trained where it is not there yet, or the part with that name: as
    the main job's --random and --last choose it, or 2,000 rows."""
    if not kept(seed, "npz").exists():
        run_teacher(ours, seed, (), ours.Run(None, seed))
    data = ours.load_dataset(kept(seed, "npz"))
    if name == "2,000 rows":
        chosen = np.random.default_rng(seed).choice(len(data.rows), 2000, replace=False)
        data.rows = data.rows[np.sort(chosen)]
        return data.freeze()
    options = types.SimpleNamespace(seed=seed, random=0, last=None)
    for part in name.split(" + "):
        if part.startswith("random"):
            options.random, options.last = int(part.split()[1]), 0
        elif part.startswith("last"):
            options.last = int(part.split()[1])
    return ours.choose_episodes(data, options).freeze()


def run_teacher(ours, seed, as_printed, run):
    """A teacher and its data; a corrected one and its dataset are kept for the students."""
    ours.seed_everything(seed)
    agent, data = ours.SAC(as_printed), ours.Data(as_printed)
    run.begin("teacher", agent, data)
    ours.train_teacher(agent, data, 100, run)
    if not as_printed:
        DATASETS.mkdir(parents=True, exist_ok=True)
        ours.save_agent(kept(seed, "pt"), agent)
        ours.save_dataset(kept(seed, "npz"), data)
    return agent, data


def make_student(ours, cell, data):
    """The agent of a cell, seeded as the main job's student is, and how many updates it has."""
    import torques

    if cell["kind"] in INTERVENTIONS:
        return torques.make_student(cell["kind"], data.rows, cell["student"]), 20_000
    ours.seed_everything(cell["student"])
    if cell["kind"] == "cql":
        return ours.CQL(cell["as_printed"], cell["weight"]), 50_000
    return {"sac": ours.SAC, "bc": ours.BC}[cell["kind"]](), 50_000


def run_cell(cell):
    """Train one cell in this process, by the module's own functions, and return its line."""
    import torch

    import cql_pendulum as ours
    import torques

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seed, contrasts, steps, measures = cell["seed"], [], [], {}

    class Run(ours.Run):
        def test(self, at):
            contrasts.append(contrast(ours, self.agent, self.data.rows))
            if cell["data"] in MEASURED and cell["kind"] in ("sac", "cql") and at in MOMENTS and (
                    seed >= 10):
                measures[at] = torques.measure(self.agent, self.data.rows, seed, good)
                if cell["data"] == "last 10":
                    measures[at] |= torques.nearest_returns(self.agent, self.data.rows,
                                                            self.starts(1, 100))
            super().test(at)

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        data = None if cell["kind"] == "teacher" else make_data(ours, seed, cell["data"])
        run = Run(None, seed)
        begun = time.process_time()
        if data is None:
            agent, data = run_teacher(ours, seed, cell["as_printed"], run)
        else:
            good = ours.load_agent(kept(seed, "pt"))
            data.as_printed = ours.check_errata(cell["as_printed"])
            if cell["kind"] in INTERVENTIONS:
                data.rows = torques.changed_rows(cell["kind"], data.rows, seed, good)
            agent, updates = make_student(ours, cell, data)
            run.begin("student", agent, data)
            ours.train_student(agent, data, updates, run)
    minutes = (time.process_time() - begun) / 60

    hook = agent.model_action.register_forward_hook(lambda _, x, y: steps.append(x + y))
    returns, promised, delivered = ours.evaluate(agent, run.starts(1, 100))
    hook.remove()
    states, torques_, entropies = map(torch.stack, zip(*steps))         # [200, 100, 3], twice 1
    visited = torch.cat([states, torques_], dim=2).flatten(0, 1).numpy()
    # what the promise counts and the delivery does not: temperature times entropy from step 1 on
    bonus = torques.discounted_entropies(entropies.mean(dim=(1, 2)).numpy()[1:])
    temperature = torques.temperature(agent)
    tests = []
    for row, found in zip(run.log, contrasts):
        values = row["return"], row["promised"], row["delivered"], found
        tests.append([row["step"], *(torques.rounded(value, 3) for value in values)])
    line = cell | {
        "program": program(), **machine(), "minutes": round(minutes, 2),
        "dataset": hashlib.sha256(data.rows.tobytes()).hexdigest(), "rows": len(data.rows),
        "coverage": round(coverage(data.rows), 3),
        "outside": round(outside(visited, data.rows), 4),
        "data mean": round(float(ours.EPISODE * data.rows[:, 4].mean()), 2),
        "return": round(float(returns.mean()), 2),
        "promised": torques.rounded(float(promised.mean()), 3),
        "delivered": round(float(delivered.mean()), 3), "temperature": round(temperature, 5),
        "entropy bonus": round(temperature * float(bonus), 3), "tests": tests}
    if measures:
        line["measures"] = measures
    return line


def work(cells, processes):
    """Run the cells that are missing; students after the teachers, whose data they need."""
    RESULTS.mkdir(exist_ok=True)
    todo = missing(cells, cpu())
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        spent, done = 0.0, 0
        for teachers in (True, False):
            some = [x for x in todo if (x["kind"] == "teacher" and not x["as_printed"]) == teachers]
            for line in pool.imap_unordered(run_cell, some):
                with open(RESULTS / "study.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                spent, done = spent + line["minutes"], done + 1
                left = spent / done * (len(todo) - done) / processes
                print(f"[{done}/{len(todo)}] {key(line)}: {line['return']:.0f}; "
                      f"about {left:.0f} minutes left", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write study.md and the figures")
    parser.add_argument("--picture", action="store_true",
                        help="train what torques.png and torques10.png show, and draw them")
    parser.add_argument("--processes", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--same", action="store_true",
                        help="run the cells of results/same.jsonl that this program lacks")
    options = parser.parse_args()
    if options.report:
        import report
        report.report()
    elif options.picture:
        import report
        report.pictures()
    elif options.same:
        run_same()
    else:
        work(grid(), options.processes)


if __name__ == "__main__":
    main()
