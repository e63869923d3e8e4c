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
INTERVENTIONS = "clone target", "uniform torques", "fixed temperature"
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
    10 to 14, on another: a seed's numbers agree on machines of one kind alone, and so a seed's
    students are compared with students of the very same data."""
    ten, later = range(10), range(10, 15)
    cells = [cell("teacher", seed) for seed in range(15)]

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
    cells += regimes(later, MEASURED)
    cells += [cell("teacher", seed, as_printed=[name]) for seed in range(10, 14)
              for name in ERRATA]
    return [*{key(one): one for one in cells}.values()]


def key(line):
    names = "kind", "seed", "data", "as_printed", "weight", "student"
    return json.dumps({name: line[name] for name in names})


def finished():
    """{key: line} of the lines that count: of this program, or of one that results/same.jsonl shows
    to give the same numbers."""
    file = RESULTS / "study.jsonl"
    counting = {program(), *same_programs()}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {key(line): line for line in lines if line["program"] in counting}


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


def machine():
    """What the numbers may depend on beside the program."""
    import gym
    import torch

    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else [platform.processor()]
    git = functools.partial(subprocess.run, cwd=TOP, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "HEAD"], check=True).stdout.strip()
    if git(["git", "diff", "--quiet", "HEAD", "--", "cql_pendulum.py", "tests"]).returncode:
        commit += "-changed"
    return {"cpu": names[0], "threads": torch.get_num_threads(),
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
                if cell["kind"] == "sac" and cell["data"] == "last 10":
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
            if cell["kind"] == "uniform torques":
                data.rows = torques.uniform_torques(data.rows, seed)
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
    temperature = float(agent.alpha.detach().exp())
    line = cell | {
        "program": program(), **machine(), "minutes": round(minutes, 2),
        "dataset": hashlib.sha256(data.rows.tobytes()).hexdigest(), "rows": len(data.rows),
        "coverage": round(coverage(data.rows), 3),
        "outside": round(outside(visited, data.rows), 4),
        "data mean": round(float(ours.EPISODE * data.rows[:, 4].mean()), 2),
        "return": round(float(returns.mean()), 2),
        "promised": torques.rounded(float(promised.mean()), 3),
        "delivered": round(float(delivered.mean()), 3), "temperature": round(temperature, 5),
        "entropy bonus": round(temperature * float(bonus), 3),
        "tests": [[row[1], *(torques.rounded(x, 3) for x in (*row[2:5], contrast))]
                  for row, contrast in zip(run.log, contrasts)]}
    if measures:
        line["measures"] = measures
    return line


def work(cells, processes):
    """Run the cells that are missing; students after the teachers, whose data they need."""
    RESULTS.mkdir(exist_ok=True)
    have = finished()
    todo = [cell for cell in cells if key(cell) not in have]
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


def iqm(values):
    """Interquartile mean: without the lowest and the highest quarter (Agarwal et al. 2021)."""
    values = np.sort(values, axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut:values.shape[-1] - cut].mean(axis=-1)


def interval(values):
    """95 % bootstrap interval of the IQM over seeds; for 10 seeds, with 5 it covers about 90 %."""
    values = np.asarray(values, float)
    return np.percentile(iqm(np.random.default_rng(0).choice(values, (20_000, len(values)))),
                         [2.5, 97.5])


def outcome(line):
    """The primary outcome: the mean return of the last five tests, whose 10 starts a seed's teacher
    and all its students share."""
    return float(np.mean([test[1] for test in line["tests"][-5:]]))


def at(line, update, column):
    """A column of the test at an update: 1 return, 2 promised, 3 delivered, 4 contrast."""
    return next(test[column] for test in line["tests"] if test[0] == update)


def excess(line):
    """How much more the critics promise than the episodes pay, like with like: the promise counts
    temperature times entropy, so that is added to the delivery. NaN for bc, which has no critic."""
    if line["kind"] == "bc":
        return math.nan
    return line["promised"] - line["delivered"] - line["entropy bonus"]


def drift(line):
    """How many steps of 100 the data lacks, or NaN in lines older than this measure."""
    return 100 * line.get("outside", math.nan)


def lost(line):
    """The first test from which every return is below the untrained student's, or None."""
    returns = [test[1] for test in line["tests"]]
    below = [k for k in range(1, len(returns)) if max(returns[k:]) < returns[0]]
    return line["tests"][below[0]][0] if below else None


def above_100(line):
    """The first test that promises more than any policy can deliver, or None."""
    return next((test[0] for test in line["tests"] if test[2] > 100), None)


def name_of(line):
    """What a student is called in tables and figures."""
    if line["kind"] != "cql":
        return line["kind"]
    if line["as_printed"]:
        return "cql as printed" if len(line["as_printed"]) == 4 else f"cql, {line['as_printed'][0]}"
    return "cql" if line["weight"] == 5.0 else f"cql, weight {line['weight']:g}"


class Study:
    """The lines that count, by data and student, in the grid's order."""

    def __init__(self):
        have = finished()
        self.lines = [have[key(cell)] for cell in grid() if key(cell) in have]
        self.teachers = {x["seed"]: x for x in self.lines
                         if x["kind"] == "teacher" and not x["as_printed"]}
        self.printed = {x["seed"]: x for x in self.lines
                        if x["kind"] == "teacher" and x["as_printed"]}
        self.again = [x for x in self.lines if x["student"] != x["seed"]]
        self.groups = {}
        for line in self.lines:
            if line["kind"] != "teacher" and line["student"] == line["seed"]:
                group = self.groups.setdefault((line["data"], name_of(line)), {})
                group[line["seed"]] = line

    def get(self, data, name):
        """{seed: line}, maybe empty."""
        return self.groups.get((data, name), {})

    def values(self, data, name, function=outcome):
        """What a function gives for a group's lines, where it was measured."""
        found = np.array([function(line) for line in self.get(data, name).values()], float)
        return found[~np.isnan(found)]

    def gain(self, line):
        """A student's outcome minus its teacher's."""
        return outcome(line) - outcome(self.teachers[line["seed"]])

    def data_gain(self, line):
        """The mean of a student's data minus its teacher's final 100 episodes."""
        return line["data mean"] - self.teachers[line["seed"]]["return"]

    def to_teacher(self, data, name):
        return self.values(data, name, self.gain)

    def minus(self, one, other):
        """One (data, student) group's outcome minus another's, for the seeds that both have."""
        one, other = self.get(*one), self.get(*other)
        return np.array([outcome(one[seed]) - outcome(other[seed])
                         for seed in one if seed in other])

    def pairs(self, one, other):
        """The IQM of such a difference, its interval for 10 seeds, how often it is positive."""
        x = self.minus(one, other)
        if not len(x):
            return "not run"
        low, high = interval(x)
        more = f" (95 %: {round(low):+,} to {round(high):+,})" if len(x) == 10 else ""
        return f"{round(iqm(x)):+,}{more}, better on {count(x > 0)}"


def count(found):
    return f"{sum(found)} of {len(found)}"


def spread(values, digits=0):
    """IQM (lowest to highest)."""
    if not len(values):
        return "–"
    return f"{iqm(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


HEADER = """# The study

`python tests/study.py` runs what results/study.jsonl lacks, `--report` writes this page and three
figures from it. Finished: {done} of {all} cells.

A cell: one student, 50,000 updates, on data of its seed's teacher. **Outcome**: the mean of the
last five tests, whose 10 starts a seed's teacher and all its students share. Beside it the final
100 episodes. A figure is the interquartile mean (IQM) over seeds, the mean without the lowest and
the highest quarter (lowest to highest seed). Intervals are 95 % bootstrap intervals, for 10 seeds
only: with 5 they cover about 90 %. bc is behaviour cloning: the same policy network learns to
give the data's torques and knows no reward.

**Coverage**: how many of 8 equal torque bins occur in a state cell (30 degrees by 2 rad/s),
averaged over the cells that the data visits; it also grows with the number of rows. **Contrast**:
the smaller critic's value of the data's torque minus its mean over all torques, over 500 states of
the data. **Excess**: promise minus delivery, like with like: the promise is a soft value, so
temperature times entropy from the second step on is added to the delivery. **Drift**: the share of
the final episodes' steps whose state cell and torque bin the data does not hold; it was added late
and measured in {drifts} runs.

"last N": the last N of the teacher's 100 episodes; "all": the 100; "random 20": 20 episodes of
uniformly random torques; "random 10 + last 10": 10 of these and the last 10; "2,000 rows": drawn
from all.

Made with {machines}.
"-dirty": only results/study.jsonl itself was not committed yet. The `program` of every line is that
of the module today. The same machine gives the same numbers; another processor or number of threads
rounds differently, and what diverges then differs: reproducible as statistics, not digit by digit.
"""


def report():
    study = Study()
    kinds, ten = ("sac", "cql", "bc"), ("last 10", "all")
    machines = sorted({"{cpu}, {threads} thread, Python {python}, torch {torch}, NumPy {numpy}, "
                       "gym {gym}, commit {commit}".format(**line) for line in study.lines})
    text = [HEADER.format(done=len(study.lines), all=len(grid()), machines="; ".join(machines),
                          drifts=sum("outside" in line for line in study.lines))]
    shown = [data for data in DATA if study.get(data, "cql")]

    def regime(title, function, digits=0, who=kinds, **more):
        rows = [[data, f"{study.values(data, 'cql', lambda x: x['coverage']).mean():.1f}",
                 f"{study.values(data, 'cql', lambda x: x['data mean']).mean():.0f}",
                 *(f(data) for f in more.values()),
                 *(spread(study.values(data, kind, function), digits) for kind in who)]
                for data in shown]
        return [f"## {title}\n", table(["data", "coverage", "data's mean", *more, *who], rows)]

    text.append("![Every student against its teacher](study.png)\n")
    text += regime("The regime map: outcome", outcome, seeds=lambda d: " / ".join(
        f"{len(study.get(d, kind))}" for kind in kinds),
                   teacher=lambda d: spread(np.array([outcome(study.teachers[s])
                                                      for s in study.get(d, "cql")])))
    text += regime("The final 100 episodes", lambda x: x["return"])
    text += regime("Drift, in % of the steps", drift, 1, seeds=lambda data: " / ".join(
        f"{len(study.values(data, kind, drift))}" for kind in kinds))
    text += regime("Contrast at update 4,000", lambda x: at(x, 4000, 4), 2, kinds[:2])
    text += regime("Contrast at the end", lambda x: x["tests"][-1][4], 2, kinds[:2])
    text += regime("Promised at the final episodes' start", lambda x: x["promised"], 1, kinds[:2])
    text += regime("Delivered there, 100 at most", lambda x: x["delivered"], 1, kinds[:2])
    text += regime("Excess of the promise, like with like", excess, 1, kinds[:2])
    text += regime("Temperature at the end", lambda x: x["temperature"], 3, kinds[:2])

    for data in ten:
        rows = []
        for name in [name for which, name in study.groups if which == data]:
            values = study.values(data, name)
            low, high = interval(values)
            rows.append([name, len(values), spread(values),
                         f"{low:.0f} to {high:.0f}" if len(values) == 10 else "–",
                         spread(study.to_teacher(data, name)),
                         spread(study.values(data, name, lambda x: x["return"])),
                         spread(study.values(data, name, excess), 1),
                         f"{study.values(data, name, lambda x: x['minutes']).mean():.1f}"])
        text += [f"## All students of {data}\n", table(
            ["student", "seeds", "outcome", "95 %", "minus its teacher's", "final 100 episodes",
             "excess", "minutes"], rows)]

    rows = [[name, len(some), spread(np.array([*map(outcome, some.values())])),
             spread(np.array([x["return"] for x in some.values()])),
             spread(np.array([x["data mean"] for x in some.values()]))]
            for name, some in (("corrected", study.teachers), ("as printed", study.printed))
            if some]
    text += ["## Teachers\n", table(
        ["teacher", "seeds", "outcome", "final 100 episodes", "its data's mean"], rows)]
    if study.again:
        rows = [[line["student"], f"{outcome(line):,.0f}", f"{line['return']:,.0f}"]
                for line in [study.get("last 10", "cql")[3], *study.again]]
        text += ["## Other students of seed 3's last 10 episodes: luck of the data or the run?\n",
                 table(["student's seed", "outcome", "final 100 episodes"], rows)]
    text += answers(study)
    (RESULTS / "study.md").write_text("\n".join(text) + "\n")
    for draw in (draw_last10, draw_students, draw_regimes):
        draw(study)
    print(f"{RESULTS / 'study.md'} and three figures, from {len(study.lines)} cells")


def answers(study):
    """The sentences and tables that README's verdicts rest on."""
    kinds, rows, moments = ("sac", "cql", "bc"), [], []
    for data in [data for data in DATA if study.get(data, "cql")]:
        groups = [[*study.get(data, kind).values()] for kind in kinds]
        rows.append([data, *(study.pairs((data, "cql"), (data, other)) for other in ("sac", "bc")),
                     *(count([x["return"] > x["data mean"] for x in lines]) for lines in groups),
                     *(count(study.to_teacher(data, kind) > -25) for kind in kinds)])
        when = [[f(x) for x in groups[0]] for f in (lost, above_100)]
        moments.append([data, *(", ".join("never" if x is None else f"{x:,}" for x in some)
                                for some in when)])
    yield "## Where which student wins\n"
    yield table(["data", "cql minus sac", "cql minus bc", *(f"{x} above its data" for x in kinds),
                 *(f"{x} near its teacher" for x in kinds)], rows)
    yield ("Above its data: the final 100 episodes against the data's mean, which has other starts."
           "\nNear: less than 25 below its teacher, on the same starts.\n")
    yield "## When sac fails, seed by seed\n"
    yield table(["data", "return below the untrained student's for good from update",
                 "promise above 100 from update"], moments)
    yield 'By seed. "Never" is no success: a failing return may stay near the untrained one.\n'
    yield "## More of what is asked\n"
    for other, name in itertools.product(("bc", "cql"), ("cql", "sac")):
        yield (f"- last tenth: {other} on the last 10 minus {name} on all: "
               f"{study.pairs(('last 10', other), ('all', name))}")
    for data, name in [("all", "cql as printed"), *itertools.product(
            ("last 10", "all"), ("cql, weight 0.2", "cql, weight 1"))]:
        yield f"- {data}: cql minus {name}: {study.pairs((data, 'cql'), (data, name))}"
    for data, name in itertools.product(("last 10", "all"), ("cql", "sac")):
        lines = study.get(data, name).values()
        yield (f"- {data}, {name}: promises more than it delivers in the final episodes, like with "
               f"like: {count([excess(x) > 0 for x in lines])} seeds")
    # a critic that starts at 0 and follows its target, which moves by 0.005 of a hundredth
    # (1 - 0.99) of the distance an update, has 1 - exp(-t / 20,000) of the way behind it
    for name, update in itertools.product(("sac", "cql"), (10_000, 20_000, 40_000)):
        share = study.values("all", name, lambda x: at(x, update, 2) / (
            at(x, update, 3) + x["entropy bonus"]))
        if len(share):
            yield (f"- all, {name}: at update {update:,} the promise is {spread(share, 2)} of the "
                   f"delivery; a critic that only warms up has "
                   f"{1 - math.exp(-update / 20_000):.2f}")


def readme(study):
    """The figures as README has them in "What the page says"; a test compares them."""
    def gain(data, name):
        return f"{round(iqm(study.to_teacher(data, name))):+,}"

    def seeds(data, name="cql"):
        return len(study.get(data, name))

    def better(one, other):
        return f"{count(study.minus(one, other) > 0)} seeds"

    def measured(data, name, function):
        return f"{iqm(study.values(data, name, function)):,.0f}"

    yield f"{len(study.lines)} of {len(grid())} planned runs are done"
    yield f"On the last 85 alone it reaches {outcome(study.get('last 85', 'cql')[0]):.0f}"
    yield f"sac fails on narrow data, on {count(study.to_teacher('last 10', 'sac') < -800)} seeds"
    yield ", ".join(f"{data}: {gain(data, 'sac')} ({seeds(data, 'sac')})"
                    for data in ("last 10", "random 20"))
    yield (f"steps that the last 40 lack: cql {measured('last 40', 'cql', drift)} %, "
           f"bc {measured('last 40', 'bc', drift)} %, "
           f"sac {measured('last 40', 'sac', drift)} % "
           f"({len(study.values('last 40', 'sac', drift))})")
    early = (iqm(study.values("last 10", x, lambda x: at(x, 4000, 4))) for x in ("cql", "sac"))
    yield "at update 4,000 by: cql {:.1f}, sac {:.2f};".format(*early)
    passed = [at(x, 4000, 2) > at(x, 4000, 3) for x in study.get("last 10", "sac").values()]
    yield f"its promise passes its delivery by update 4,000 on {count(passed)}"
    mixed = [measured("random 10 + last 10", x, lambda x: x["return"]) for x in ("cql", "sac")]
    yield "final 100 episodes, return: cql {}, sac {} |".format(*mixed)
    below = [outcome(x) < outcome(study.teachers[seed]) for seed, x in study.printed.items()]
    yield f"teachers end below the corrected ones on {count(below)} seeds"
    for what in ("last 10", "all", "random 10 + last 10"):
        other = "bc" if what == "last 10" else "sac"
        yield f"{what}: cql {gain(what, 'cql')}, {other} {gain(what, other)} ({seeds(what)})"
    yield f"cql below sac on {better(('all', 'sac'), ('all', 'cql'))}"
    above = [x["return"] > x["data mean"] for x in study.get("random 20", "cql").values()]
    yield f"cql exceeds it on {count(above)} seeds"
    means = (measured("random 20", *x) for x in (("cql", lambda x: x["return"]), (
        "sac", lambda x: x["return"]), ("cql", lambda x: x["data mean"])))
    yield "return: cql {}, sac {}, the data {} ({})".format(*means, seeds("random 20"))
    worst = [min(x["return"] for x in some.values()) for some in (study.printed, study.teachers)]
    yield "as printed {:,.0f}, corrected {:,.0f} ({})".format(*worst, len(study.printed))
    yield f"cql minus cql as printed: {study.pairs(('all', 'cql'), ('all', 'cql as printed'))}"
    for data in ("last 10", "all"):
        less = [study.to_teacher(data, f"cql, weight {w}") for w in ("0.2", "1")]
        less += [study.to_teacher(data, "cql")[:len(less[1])]]                      # the same seeds
        yield "{}: weight 0.2 {:+,}, 1 {:+,}, 5 {:+,} (same {})".format(
            data, *(round(iqm(x)) for x in less), len(less[1]))
        if data == "last 10":
            yield f"0.2 fails on {count(less[0] < -100)} seeds"
    over = [study.minus(("last 85", "cql"), ("last 85", name)) for name in ("bc", "sac")]
    yield f"cql beats both on {count(np.minimum(*over) > 0)} seeds, bc by {iqm(over[0]):.0f}"
    yield f"do not save sac ({gain('last 85', 'sac')}, {seeds('last 85', 'sac')} seeds)"
    yield f"cql beats bc on {better(('2,000 rows', 'cql'), ('2,000 rows', 'bc'))}"
    yield (f"sac, which fails or not, on "
           f"{count(study.minus(('2,000 rows', 'cql'), ('2,000 rows', 'sac')) > 0)}")
    yield f"beats cql on all ({better(('last 10', 'bc'), ('all', 'cql'))})"
    low = min(study.get("last 10", "cql").values(), key=lambda line: line["promised"])
    yield (f"falls to {low['promised']:,.0f} for a student whose outcome is "
           f"{round(study.gain(low)):+,}")
    again = sorted(study.gain(line) for line in study.again)
    yield f"{len(again)} other cql students of them end {-again[-1]:.0f} to {-again[0]:.0f} below"


COLOURS = {"sac": "C3", "cql": "C0", "bc": "C2", "cql as printed": "C4"}


def figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def draw_last10(study):
    """Sac and cql on the last 10 episodes: return minus the teacher's, promise and delivery; thick
    the IQM, with its band for 10 seeds, thin every seed."""
    picture = figure(13, 5)
    left, right = picture.subplots(1, 2)

    def curves(axes, name, values, label, style="-"):
        updates, colour = 2000 * np.arange(len(values[0])), COLOURS[name]       # the last: 49,999
        axes.plot(updates, np.transpose(values), style, color=colour, lw=0.5, alpha=0.5)
        axes.plot(updates, iqm(np.transpose(values)), style, color=colour, lw=2, label=label)
        if len(values) == 10:
            low, high = np.transpose([interval(x) for x in np.transpose(values)])
            axes.fill_between(updates, low, high, color=colour, alpha=0.2, lw=0)

    for name in ("sac", "cql"):
        group = study.get("last 10", name)
        tests = {seed: np.array(line["tests"]) for seed, line in group.items()}
        curves(left, name, [x[:, 1] - outcome(study.teachers[seed]) for seed, x in tests.items()],
               f"{name}, {len(group)} seeds")
        for column, style, what in ((2, "-", "promised"), (3, "--", "delivered")):
            curves(right, name, [x[:, column] for x in tests.values()], f"{name} {what}", style)
        out = sorted(x[-1, 2] for x in tests.values() if not -50 <= x[-1, 2] <= 150)
        if out:
            right.text(0.98, 0.97 if name == "sac" else 0.03, ha="right", transform=right.transAxes,
                       s=f"{name} seeds off the axis promise at the end\n" + ", ".join(
                           f"{x:,.0f}" for x in out), va="top" if name == "sac" else "bottom",
                       fontsize="small", color=COLOURS[name], bbox={"color": "w", "alpha": 0.8})
    data = study.values("last 10", "cql", study.data_gain).mean()
    for value, colour, label in (
            (0, "k", "its teacher"), (iqm(study.to_teacher("last 10", "bc")), COLOURS["bc"], "bc"),
            (data, "0.5", "the data (other starts)")):
        left.axhline(value, color=colour, ls="--", lw=1, label=f"{label}: {value:+.0f}")
    right.axhline(100, color="k", ls="-.", lw=1, label="the most possible")
    for axes, what, y, function in ((left, "below the untrained student for good", 0.45, lost),
                                    (right, "promise above 100", 0.13, above_100)):
        found = [function(line) for line in study.get("last 10", "sac").values()]
        when = [x for x in found if x is not None]
        if when:
            axes.axvline(np.median(when), color=COLOURS["sac"], ls=":", lw=1)
            axes.text(np.median(when) + 600, y, f"sac: {what}\n{len(when)} of {len(found)} seeds, "
                      f"from update {np.median(when):,.0f} on (median)", fontsize="small",
                      transform=axes.get_xaxis_transform(), color=COLOURS["sac"],
                      bbox={"color": "w", "alpha": 0.8})
    left.set(title="Return minus the teacher's, 10 episodes from the same starts",
             xlabel="update", ylabel="return")
    right.set(title="Promise and delivery", xlabel="update", ylim=(-50, 150),
              ylabel="discounted sum of (reward + 8) / 8")
    left.legend(loc="center right", fontsize="small")
    right.legend(loc="center right", fontsize="small")
    picture.suptitle("Students of the last 10 episodes; thick: interquartile mean, thin: a seed")
    picture.savefig(RESULTS / "last10.png")


def draw_students(study):
    """Every seed's outcome minus its teacher's, a panel for each of three datasets."""
    datas = [data for data in ("last 10", "all", "random 20") if study.get(data, "cql")]
    names = [[name for which, name in study.groups if which == data] for data in datas]
    picture = figure(11, 1.2 + 0.34 * sum(map(len, names)))
    panels = picture.subplots(len(datas), 1, sharex=True, squeeze=False,
                              height_ratios=[*map(len, names)])[:, 0]
    for axes, data, some in zip(panels, datas, names):
        for y, name in enumerate(some):
            values, colour = study.to_teacher(data, name), COLOURS.get(name, "C7")
            spots = y + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1]
            axes.plot(values, spots, "o", color=colour, ms=5, alpha=0.5)
            if len(values) > 2:
                axes.plot(iqm(values), y, "|", color=colour, ms=16, mew=3)
        axes.axvline(0, color="k", ls=":", lw=1)
        axes.set_xscale("symlog", linthresh=20)
        axes.set(ylim=(len(some) - 0.4, -0.6), yticks=range(len(some)), title=f"Data: {data}",
                 yticklabels=[f"{name} ({len(study.get(data, name))})" for name in some])
        axes.grid(axis="x", alpha=0.3)
    ticks = [-1000, -300, -100, -20, 0, 20]
    panels[-1].set(xlabel="outcome minus the teacher's, same starts (logarithmic beyond 20)",
                   xticks=ticks, xticklabels=ticks)
    picture.suptitle("Dot: a seed; bar: interquartile mean of 3 seeds and more; in brackets: seeds")
    picture.savefig(RESULTS / "study.png")


def draw_regimes(study):
    """Outcome minus the teacher's against coverage, a dot for each seed; a line joins the IQMs
    of the last 5 to 85. The students of a dataset are 0.04 apart: dots do not hide others."""
    picture = figure(12, 6.5)
    axes = picture.subplots()
    marks = dict(zip(["all", *MIXTURES], "*sD^"))
    axes.plot([], [], "o", color="0.4", label="last N")
    for data, mark in marks.items():
        axes.plot([], [], mark, color="0.4", label=data)
    axes.plot([], [], "_", color="0.4", ms=12, mew=2, label="mean of the data (minus the\n"
              "teacher's 100 episodes; other\nstarts: may exceed 0)")
    for shift, name in ((-0.04, "sac"), (0, "cql"), (0.04, "bc")):
        middles = []
        for data in DATA:
            lines = study.get(data, name).values()
            points = np.array([(line["coverage"] + shift, study.gain(line)) for line in lines])
            if len(points):
                axes.plot(*points.T, marks.get(data, "o"), color=COLOURS[name], alpha=0.5)
                middles += [(points[:, 0].mean(), iqm(points[:, 1]))] if data in LASTS else []
        axes.plot(*np.transpose(middles), color=COLOURS[name], alpha=0.5)
        axes.plot([], [], "o-", color=COLOURS[name], label=name)
    for data in DATA:
        axes.plot(study.values(data, "cql", lambda line: line["coverage"]),
                  study.values(data, "cql", study.data_gain), "_", color="0.4", ms=12)
    for data in [*LASTS, "all"]:
        if found := study.get(data, "cql").values():
            axes.text(np.mean([x["coverage"] for x in found]), 1.01, f"{data} ({len(found)})",
                      rotation=40, transform=axes.get_xaxis_transform())
    ticks = [-1500, -1000, -500, -200, -100, -50, 0]
    axes.set_yscale("symlog", linthresh=50)
    axes.set(xlabel="coverage: occupied torque bins of 8 in a visited state cell; (n): seeds",
             ylabel="outcome minus the teacher's (logarithmic below -50; lines: IQM)",
             ylim=(-1900, 30), yticks=ticks, yticklabels=ticks)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    picture.savefig(RESULTS / "regimes.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write study.md and the figures")
    parser.add_argument("--processes", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--same", action="store_true",
                        help="run the cells of results/same.jsonl that this program lacks")
    options = parser.parse_args()
    if options.report:
        report()
    elif options.same:
        run_same()
    else:
        work(grid(), options.processes)


if __name__ == "__main__":
    main()
