"""Does CQL do what the page says? Seeds, datasets, errata and weights, measured.

python tests/study.py             run what is still missing, two processes of one thread each; stop and go on at any time
python tests/study.py --report    write results/study.md and the figures from results/study.jsonl alone

A cell is one training run with its final 100 episodes; a finished cell is a line of results/study.jsonl and never runs again.
The teachers' datasets are kept in runs/study/ for the students; minutes are the processor's, of one thread.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import sys
import time

import numpy as np

TOP = pathlib.Path(__file__).parents[1]
RESULTS, DATASETS = TOP / "results", TOP / "runs" / "study"
ERRATA = ("jacobian", "sign", "range", "timeout")


def teacher(seed, as_printed=()):
    return {"kind": "teacher", "seed": seed, "as_printed": list(as_printed)}


def student(seed, data, student="cql", as_printed=(), weight=5.0):
    return {"kind": student, "data": data, "seed": seed, "as_printed": list(as_printed), "weight": weight if student == "cql" else None}


def grid(first_seed=0):
    """All cells, the most important first. The student of seed s learns from the corrected teacher of seed s."""
    ten, five, two = (range(first_seed, first_seed + n) for n in (10, 5, 2))
    cells = [teacher(seed) for seed in ten] + [teacher(seed, ERRATA) for seed in ten]
    for data in ("last 10", "all"):
        cells += [student(seed, data, kind) for seed in ten for kind in ("cql", "sac")]
    cells += [student(seed, "all", as_printed=ERRATA) for seed in ten]
    cells += [student(seed, "first 20", kind) for seed in five for kind in ("cql", "sac")]
    cells += [student(seed, "last 10", as_printed=ERRATA) for seed in two]
    cells += [student(seed, data, as_printed=[name]) for data in ("last 10", "all") for name in ERRATA for seed in two]
    cells += [student(seed, data, weight=weight) for data in ("last 10", "all") for weight in (0.2, 1.0, 25.0) for seed in two]
    return cells


def key(cell):
    return json.dumps(cell, sort_keys=True)


def run_cell(cell):
    """Train one cell in this process, by the module's own functions, and return its line."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(TOP))
    import cql_pendulum as ours

    begun = time.process_time()
    run = ours.Run(None, cell["seed"])
    ours.seed_everything(cell["seed"])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if cell["kind"] == "teacher":
            agent, data = ours.SAC(cell["as_printed"]), ours.Data(cell["as_printed"])
            ours.train_teacher(agent, data, 100, run)
            if not cell["as_printed"]:
                DATASETS.mkdir(parents=True, exist_ok=True)
                ours.save_dataset(data, DATASETS / f"{cell['seed']}.npz")
        else:
            which, n = (cell["data"].split() + [None])[:2]
            data = ours.load_dataset(DATASETS / f"{cell['seed']}.npz", cell["as_printed"])
            data.keep(**({} if n is None else {which: int(n)})).freeze()
            ours.seed_everything(cell["seed"])
            agent = ours.CQL(cell["as_printed"], cell["weight"]) if cell["kind"] == "cql" else ours.SAC(cell["as_printed"])
            ours.train_student(agent, data, 50_000, run)
    minutes = (time.process_time() - begun) / 60
    returns = ours.evaluate(agent, run.starts(1, 100))[0]
    tests = [[row[1], *(float(x) for x in row[2:5])] for row in run.log]
    return cell | {"return": round(float(returns.mean()), 2), "std error": round(float(returns.std(ddof=1) / 10), 2),
                   "data mean": round(float(data.returns().mean()), 2), "minutes": round(minutes, 2), "tests": tests}


def finished():
    file = RESULTS / "study.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {key({name: line[name] for name in line if name in ("kind", "data", "seed", "as_printed", "weight")}): line for line in lines}


def work(cells):
    RESULTS.mkdir(exist_ok=True)
    todo = [cell for cell in cells if key(cell) not in finished()]
    # a student waits for its teacher: teachers come first in the grid, and the pool is emptied between the two kinds
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        spent, done = 0.0, 0
        for kinds in (("teacher",), ("cql", "sac")):
            for line in pool.imap_unordered(run_cell, [cell for cell in todo if cell["kind"] in kinds]):
                with open(RESULTS / "study.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                spent, done = spent + line["minutes"], done + 1
                what = " ".join(str(line[name]) for name in ("kind", "data", "as_printed", "weight", "seed") if line.get(name) not in (None, []))
                print(f"[{done}/{len(todo)}] {what}: {line['return']:.0f}; about {spent / done * (len(todo) - done) / 2:.0f} minutes left",
                      flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write results/study.md and the figures from results/study.jsonl")
    options = parser.parse_args()
    if options.report:
        report(list(finished().values()))
    else:
        work(grid())


if __name__ == "__main__":
    main()
