"""The study's runs: data, students, seeds, weights and errata.

python study/run.py                     run what results/cells.jsonl lacks; stop at any time
python study/run.py --only cql "all"    of that, the cells of this kind, data or seed alone
python study/run.py --again 5           run five cells a second time: which digits come again?

A cell is a training run and 100 episodes after it, and a line of the file, which says on which
commit and processor it was made. Another processor rounds differently, and in a long run the digits
part: a seed's students are compared with the teacher and the students of their seed alone. Teachers
and their data are kept in study/kept; delete it after a change of the program that changes numbers.
"""
import argparse
import json
import multiprocessing
import pathlib
import platform
import random
import signal
import subprocess
import sys
import time
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cql_pendulum as ours  # noqa: E402
import measure  # noqa: E402
import recordings  # noqa: E402

FILE, KEPT = HERE / "results" / "cells.jsonl", HERE / "kept"
KEY = "kind", "seed", "data", "as_printed", "weight", "student"
STUDENTS = {"cql": ours.CQL, "sac": ours.SAC, "bc": ours.BC,
            "cql, fixed temperature": lambda: measure.fixed_temperature(ours.CQL())}
LASTS = [f"last {n}" for n in (5, 10, 20, 40, 70, 85)]
DATA = [*LASTS, "all", "random 20", "random 10 + last 10", "2,000 rows"]
MEASURED = ["last 10", "last 85", "all", "random 20", "last 40"]      # what measure.measure is for
MOMENTS = 2000, 4000, 10_000, 20_000, 49_999                          # updates at which it is made
DIGITS = {"minutes": 2, "coverage": 3, "outside": 4, "data mean": 2, "return": 2, "promised": 3,
          "delivered": 3, "temperature": 5, "entropy bonus": 3}       # a line's numbers
ALL_FOUR = tuple(ours.ERRATA)
FIVE, TEN, LATER, TWENTY = range(5), range(10), range(10, 15), range(20)
# kinds, data, seeds, all combinations of them; and what is not as usual
GRID = [
    (["teacher"], [None], TWENTY, {}),
    (["cql", "sac", "bc"], ["last 10"], TWENTY, {}),
    (["cql", "sac", "bc"], ["all"], range(15), {}),
    (["cql", "sac", "bc"], DATA, FIVE, {}),
    (["cql", "sac", "bc"], ["last 85", "random 20", "last 40"], LATER, {}),
    (["cql"], ["all", "last 10"], FIVE, {"weight": 0.2}),
    (["cql"], ["all", "last 10"], FIVE, {"weight": 1.0}),
    (["cql"], ["all"], TEN, {"as_printed": ALL_FOUR}),
    (["teacher"], [None], TEN, {"as_printed": ALL_FOUR}),
    *((["teacher"], [None], range(10, 14), {"as_printed": [name]}) for name in ALL_FOUR),
    *((["cql"], ["last 10"], [3], {"student": student}) for student in range(103, 108)),
    (measure.INTERVENTIONS, ["last 10"], LATER, {}),
    # recordings, 20,000 updates, in the order of what they answer
    (["cql"], ["20 drawn", "20 mean"], TEN, {}),
    (["cql, fixed temperature"], ["20 mean", "controller"], FIVE, {}),
    (["cql", "sac", "bc"], ["controller"], FIVE, {}),
    (["cql"], ["controller"], FIVE, {"weight": 0.2}),
    (["cql"], ["20 mean + 0.5"], TEN, {}),
    (["cql"], ["controller + 0.5"], FIVE, {}),
    (["bc", "sac"], ["20 mean"], TEN, {}),
    (["bc", "sac"], ["20 drawn"], FIVE, {}),
    (["cql"], ["20 mean"], FIVE, {"weight": 0.2}),
    (["cql"], ["controller 1.8"], FIVE, {}),
    (["cql"], ["20 mean + 0.1", "20 mean + 0.25", "20 mean + 1", "controller + 1"], FIVE, {}),
    (["bc", "sac"], ["20 mean + 0.5", "controller + 0.5"], FIVE, {}),
    (["cql"], ["controller + 0.5"], FIVE, {"weight": 0.2}),
]


def grid():
    """All cells. A student has the seed of its teacher unless another is given."""
    cells = {}
    for kinds, names, seeds, more in GRID:
        for kind in kinds:
            for data in names:
                for seed in seeds:
                    one = cell(kind, seed, data, **more)
                    cells[key(one)] = one
    return [*cells.values()]


def cell(kind, seed, data=None, as_printed=(), weight=5.0, student=None):
    return {"kind": kind, "seed": seed, "data": data, "as_printed": [*as_printed],
            "weight": weight if kind == "cql" else None,
            "student": seed if student is None else student}


def key(line):
    return json.dumps([line[name] for name in KEY])


# Data and students

def make_data(name, seed, teacher):
    """The Data of a name: all 100 episodes of the teacher, or the last N, N of random torques
    before them, or 2,000 rows of all; or what recordings.py makes."""
    if name in recordings.NAMES:
        return recordings.make(name, seed, teacher)
    data = ours.load_dataset(KEPT / f"{seed}.npz")
    rows = data.rows
    if name == "2,000 rows":
        chosen = np.random.default_rng(seed).choice(len(rows), 2000, replace=False)
        data.rows = rows[np.sort(chosen)]
    elif name != "all":
        numbers = dict(part.split() for part in name.split(" + "))              # {"last": "10"}
        anybody = types.SimpleNamespace(get_action=lambda state: random.uniform(-2, 2))
        ours.seed_everything(seed)
        data = ours.Data()
        for _ in range(int(numbers.get("random", 0))):
            data.update_data(anybody)
        last = ours.EPISODE * int(numbers.get("last", 0))
        data.rows = np.concatenate([data.rows, rows[len(rows) - last:]])
    return data


def make_student(cell, rows):
    """The agent of a cell, seeded as the main job's student is."""
    if cell["kind"] in measure.INTERVENTIONS:
        return measure.make_student(cell["kind"], rows, cell["student"])
    ours.seed_everything(cell["student"])
    student = STUDENTS[cell["kind"]]()
    if cell["kind"] == "cql":
        student.weight = cell["weight"]
    return student


# A run

def train_teacher(cell, epochs=100):
    """The page's loop: the teacher, its data and its tests. A corrected one is kept."""
    seed, tests = cell["seed"], []
    ours.seed_everything(seed)
    agent, data = ours.SAC(), ours.Data()
    for epoch in range(epochs):
        data.update_data(agent)
        for _ in range(ours.UPDATES):
            agent.train(*data.get_sample())
        if epoch % 10 == 0 or epoch == epochs - 1:
            tests.append(test(epoch, agent, data, seed)[:5])    # no gap: its data are not frozen
    if not cell["as_printed"]:
        KEPT.mkdir(exist_ok=True)
        ours.save_agent(KEPT / f"{seed}.pt", agent)
        ours.save_dataset(KEPT / f"{seed}.npz", data)
    return agent, data, tests, {}


def train_student(cell, updates=None):
    """The page's loop: the student, its data, its tests, and measure.measure at MOMENTS."""
    kind, seed, tests, measures = cell["kind"], cell["seed"], [], {}
    short = kind in measure.INTERVENTIONS or cell["data"] in recordings.NAMES
    updates = updates or (20_000 if short else 50_000)
    teacher = ours.load_agent(KEPT / f"{seed}.pt")
    data = make_data(cell["data"], seed, teacher)
    data.rows = measure.changed_rows(kind, data.rows, seed, teacher)
    agent = make_student(cell, data.rows)
    data.freeze()
    measured = cell["data"] in MEASURED and kind in ("sac", "cql") and seed >= 10
    for i in range(updates):
        agent.train(*data.get_sample())
        if i % 2000 == 0 or i == updates - 1:
            tests.append(test(i, agent, data, seed))
            if measured and i in MOMENTS:
                measures[str(i)] = measure.measure(agent, data.rows, seed, teacher)
                if cell["data"] == "last 10":
                    measures[str(i)] |= measure.nearest_returns(agent, data.rows,
                                                                measure.seeds_of(seed, 1, 100))
    return agent, data, tests, measures


def test(step, agent, data, seed):
    """A list: the update, means of ten episodes' return, promised and delivered, then contrast and
    gap (measure.contrast_and_gap; lines of 2026-11-28 and before have no gap)."""
    played = measure.play(agent, measure.seeds_of(seed, 0, 10))
    values = [played[name].mean() for name in ("return", "promised", "delivered")]
    values += measure.contrast_and_gap(agent, data.rows)
    return [step, *(measure.rounded(float(value), 3) for value in values)]


def run_cell(cell):
    """Train one cell in this process, on one thread, and return its line."""
    ours.AS_PRINTED.update(cell["as_printed"])
    begun = time.process_time()
    train = train_teacher if cell["kind"] == "teacher" else train_student
    agent, data, tests, measures = train(cell)
    minutes = (time.process_time() - begun) / 60
    played = measure.play(agent, measure.seeds_of(cell["seed"], 1, 100))
    drift = measure.outside(data.rows, played["states"].reshape(-1, 3), played["torques"].ravel())
    numbers = (minutes, measure.coverage(data.rows), drift, ours.EPISODE * data.rows[:, 4].mean(),
               played["return"].mean(), played["promised"].mean(), played["delivered"].mean(),
               measure.temperature(agent), played["bonus"].mean())
    line = {name: measure.rounded(float(value), digits)
            for (name, digits), value in zip(DIGITS.items(), numbers)}
    line |= {"rows": len(data.rows), "tests": tests}
    if measures:
        line["measures"] = measures
    return cell | {"commit": commit(), "cpu": cpu()} | line


def commit():
    """The commit that is checked out, "-dirty" behind it where a program differs; or "unknown"."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
    try:
        found = git("rev-parse", "HEAD").stdout.strip()
        same = git("diff", "--quiet", "HEAD", "--", "../cql_pendulum.py", "*.py").returncode == 0
    except OSError:                                             # no git
        found = ""
    return found + ("" if same else "-dirty") if found else "unknown"


def cpu():
    """The processor's name."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = [line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")]
    return [*names, platform.processor() or platform.machine()][0]


# All that is asked for

def lines():
    """The file's lines by key; of two with a key the first."""
    found = {}
    for n, text in enumerate(FILE.read_text().splitlines() if FILE.exists() else [], 1):
        try:
            line = json.loads(text)
        except ValueError:
            sys.exit(f"{FILE}: line {n} is broken; delete it")
        found.setdefault(key(line), line)
    return found


def append(line):
    with open(FILE, "a") as file:
        file.write(json.dumps(line) + "\n")


def work(cells, processes, run_student=None):
    """Run cells, each in a process of its own: first teachers, and those whose data students need.
    A line that the file lacks is appended; another is compared with the one that is there."""
    have = lines()
    students = [one for one in cells if one["kind"] != "teacher"]
    teachers = [one for one in cells if one["kind"] == "teacher"]
    teachers += [cell("teacher", seed) for seed in sorted({one["seed"] for one in students})
                 if not (KEPT / f"{seed}.npz").exists() and cell("teacher", seed) not in teachers]
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # kill stops like Ctrl-C
    context = multiprocessing.get_context("spawn")
    # Ctrl-C is for this process, which then ends the others
    with context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN), 1) as pool:
        try:
            for run_one, some in ((run_cell, teachers), (run_student or run_cell, students)):
                for line in pool.imap_unordered(run_one, some):
                    known = have.get(key(line))
                    if known is None:
                        append(line)
                    print(compared(known, line) if known else f"{key(line)}: {line['return']:.0f}",
                          flush=True)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on with what is missing")


def compared(old, new):
    """In words: which numbers of two lines of a cell differ, and where the lines were made."""
    one, other = numbers_of(old), numbers_of(new)
    differ = [name for name in one if name in other and one[name] != other[name]]
    where = ", ".join(f"{line['cpu']} at {line['commit'][:7]}" for line in (old, new))
    if not differ:
        return f"{key(new)}: the same {len(one)} numbers ({where})"
    first = "; ".join(f"{name}: {one[name]}, {other[name]}" for name in differ[:4])
    return f"{key(new)}: {len(differ)} of {len(one)} numbers differ ({where}), as {first}"


def numbers_of(line):
    """What a run gives, as a flat dict: what is in both of two lines can be compared."""
    found = {name: line[name] for name in DIGITS if name in line and name != "minutes"}
    for step, *values in line["tests"]:
        for name, value in zip(("return", "promised", "delivered", "contrast", "gap"), values):
            found[f"{name} at {step}"] = value
    for step, values in line.get("measures", {}).items():
        found |= {f"{name} at {step}": value for name, value in values.items()}
    # a clone promises nothing, though some old lines have what its untrained critic said
    return {name: value for name, value in found.items() if value is not None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="cells that have all of these as kind, data or seed")
    parser.add_argument("--again", type=int, metavar="N", help="run N of the file's cells again")
    options = parser.parse_args()
    have = lines()
    cells = [one for one in grid() if (key(one) in have) == (options.again is not None)
             and set(options.only) <= {one["kind"], one["data"], str(one["seed"])}]
    if not cells:
        sys.exit("there is no such cell to run")
    if options.again is not None:
        cells = random.sample(cells, min(options.again, len(cells)))
    work(cells, options.processes)


if __name__ == "__main__":
    main()
