"""The study's runs: each is a command line of the program, and becomes a line of cells.jsonl.

python study/run.py                     run what results/cells.jsonl lacks; stop at any time
python study/run.py --only cql "all"    of that, the cells of this kind, data or seed alone
python study/run.py --again 5           run five of its cells again: which digits are the same?
python study/run.py --scheduler ADDRESS    on Dask's workers, which need this repository; start each
                                           in it: PYTHONPATH=study dask worker ADDRESS --nthreads 1

A cell's "argv" is what to type behind `python cql_pendulum.py`. Nothing is trained here: run_cell
calls the program's main, reads its log, and plays 100 final episodes in three ways. To save time a
seed's teacher is trained once, into study/kept/<seed>, and students get its dataset.npz: the same
students to the last bit. Delete study/kept after a change of the program that changes numbers.
Another processor rounds differently, and in a long run the digits part.
"""
import argparse
import contextlib
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time
from unittest import mock

import joblib
import pandas as pd

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cql_pendulum as ours  # noqa: E402
import measure  # noqa: E402
import recordings  # noqa: E402

FILE, KEPT = HERE / "results" / "cells.jsonl", HERE / "kept"
KEY = "kind", "seed", "data", "as_printed", "weight", "student", "steps", "loss"
STUDENTS = ["cql", "sac", "bc"]
DATA = [*(f"last {n}" for n in (5, 10, 20, 40, 70, 85)), "all", "random 20", "random 10 + last 10",
        "2,000 rows"]
DOSES = [f"random {n} + last 10" for n in (1, 2, 3, 5, 10)]
MEASURED = ["last 10", "last 85", "all", "random 20", "last 40"]      # what measure.measure is for
MOMENTS = 2000, 4000, 10_000, 20_000, 49_999                          # updates at which it is made
BETWEEN = 20_000, 50_000                # updates with final episodes, if the student goes on
ALL_FOUR = tuple(ours.ERRATA)
FIVE, TEN, LATER, TWENTY = range(5), range(10), range(10, 15), range(20)
SHORT = {"steps": 20_000}
# kinds, data, seeds, all combinations of them; and what is not as usual
GRID = [
    (["teacher"], [None], TWENTY, {}),
    (STUDENTS, ["last 10"], TWENTY, {}),
    (STUDENTS, ["all"], range(15), {}),
    (STUDENTS, DATA, FIVE, {}),
    (STUDENTS, ["last 85", "random 20", "last 40"], LATER, {}),
    (STUDENTS, ["20 mean"], TEN, {}),
    (STUDENTS, ["controller"], FIVE, {}),
    (STUDENTS, ["20 drawn"], TEN, {}),
    (STUDENTS, ["controller + 0.5"], FIVE, {}),
    (["bc, a layer more", *measure.LOSSES, "cql, a layer more"], ["controller"], FIVE, {}),
    (["sac"], DOSES, TEN, {}),
    (["cql"], ["20 mean", "controller"], range(3), {"steps": 100_000}),
    (["cql"], ["all", "last 10"], FIVE, {"weight": 0.2}),
    (["cql"], ["all", "last 10"], FIVE, {"weight": 1.0}),
    (["cql"], ["all"], TEN, {"as_printed": ALL_FOUR}),
    (["teacher"], [None], TEN, {"as_printed": ALL_FOUR}),
    *((["teacher"], [None], range(10, 14), {"as_printed": [name]}) for name in ALL_FOUR),
    *((["cql"], ["last 10"], [3], {"student": student}) for student in range(103, 108)),
    (measure.INTERVENTIONS, ["last 10"], LATER, SHORT),
    (["sac", "cql"], ["last 10", "all", "random 20"], FIVE, SHORT),
    (["cql, fixed temperature"], ["20 mean", "controller"], FIVE, SHORT),
    (["cql"], ["20 mean", "controller", "controller + 0.5"], FIVE, {"weight": 0.2} | SHORT),
    (["cql"], ["20 mean + 0.5"], TEN, SHORT),
    (["sac"], ["20 mean + 0.5"], FIVE, SHORT),
    (["bc"], ["20 mean + 0.5"], FIVE, SHORT),
    (["cql"], ["controller 1.8", "20 mean + 0.1", "20 mean + 0.25", "20 mean + 1",
               "controller + 1"], FIVE, SHORT),
]


def grid():
    """All cells, each once."""
    cells = {}
    for kinds, names, seeds, more in GRID:
        for kind, data, seed in ((k, d, s) for k in kinds for d in names for s in seeds):
            one = cell(kind, seed, data, **more)
            cells[key(one)] = one
    return [*cells.values()]


def cell(kind, seed, data=None, as_printed=(), weight=5.0, student=None, steps=50_000):
    """seed: of the teacher and the data; student: of the student, the same if nothing is said."""
    one = {"kind": kind, "data": data, "seed": seed, "as_printed": [*as_printed],
           "student": seed if student is None else student,
           "weight": weight if kind.endswith("cql") else None,
           "steps": 1 if kind == "teacher" else steps}
    typed = kind in ("teacher", *STUDENTS) and data != "2,000 rows"
    return one | {"argv": command(one) if typed else None}


def key(line):
    return json.dumps([line.get(name) for name in KEY])


def command(one):
    """The program's options for a cell. Files in study/kept are made by run_cell."""
    kind, data, seed = one["kind"], one["data"], one["seed"]
    argv = ["--seed", str(one["student"])]
    if kind.startswith("uniform"):
        argv += ["--dataset", f"study/kept/{kind}-{seed}.npz"]
    elif data in recordings.NAMES or data == "2,000 rows":
        argv += ["--dataset", f"study/kept/{data}-{seed}.npz"]
    elif kind != "teacher":
        if seed != one["student"] or one["as_printed"]:         # a student of another's teacher
            argv += ["--dataset", f"study/kept/{seed}/dataset.npz"]
        for part in data.split(" + ") if data != "all" else []:                 # "random 10"
            argv += [f"--{word}" if word.isalpha() else word for word in part.split()]
        if "random" in data and "last" not in data:
            argv += ["--last", "0"]
    if not kind.startswith(("teacher", "cql")):
        argv += ["--student", "bc" if kind.startswith("bc") else "sac"]
    if one["weight"] not in (None, 5):
        argv += ["--weight", f"{one['weight']:g}"]
    if one["as_printed"]:
        argv += ["--as-printed", *one["as_printed"]]
    return argv + (["--steps", str(one["steps"])] if one["steps"] != 50_000 else [])


# A run

def run_cell(one):
    """Run the program's main for a cell in this process, and return the cell's line."""
    kind, seed, found = one["kind"], one["seed"], {"at": {}, "measures": {}}
    KEPT.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        out = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=KEPT)), "run")
        argv = [*with_files(one), "--out", str(out)]
        changed = {"Run": watched(one, found), "tqdm": None}
        if kind == "clone target":
            rows = ours.load_dataset(kept(seed) / "dataset.npz").rows[-10 * ours.EPISODE:]
            changed["SAC"] = lambda: measure.clone_target(rows, one["student"])
        elif kind in measure.LOSSES:
            changed["BC"] = measure.LOSSES[kind]
        elif kind.endswith(("fixed temperature", "a layer more")):      # "cql, a layer more"
            name = kind.split(",")[0].upper() if "," in kind else "SAC"
            make = getattr(ours, name)
            changed[name] = measure.deeper(make) if kind.endswith("more") else (
                lambda: measure.fixed_temperature(make()))
        ours.AS_PRINTED.clear()         # what the last cell of this process left
        begun = time.process_time()
        with mock.patch.multiple(ours, **changed):
            data, teacher, student = ours.main(argv)
        line = {"minutes": round((time.process_time() - begun) / 60, 2), "rows": len(data.rows),
                "coverage": round(float(measure.coverage(data.rows)), 3),
                "data mean": round(float(ours.EPISODE * data.rows[:, 4].mean()), 2)}
        line |= measure.final(teacher or student, data.rows, seed)
        log = pd.read_csv(out / "log.csv")
        log = log[log["stage"] == ("student" if teacher is None else "teacher")]
        log = log.drop(columns="stage").dropna(axis=1, how="all").round(5)
        if kind == "teacher" and not one["as_printed"] and not (KEPT / str(seed)).exists():
            with contextlib.suppress(OSError):          # another process was faster
                out.rename(KEPT / str(seed))
    line |= {name: value for name, value in found.items() if value}
    return one | {"commit": commit(), "cpu": cpu()} | line | {"tests": log.to_dict("list")}


def run_apart(one):
    """run_cell in a process of its own. Inside a Dask worker's process some cells gave other digits
    than outside, for a cause that was not found."""
    command = [sys.executable, str(HERE / "run.py"), "--cell", json.dumps(one)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def with_files(one):
    """The options of a cell, with its files in study/kept, which are made where they are missing;
    a student of its own teacher gets the teacher's dataset instead."""
    argv, seed = command(one), one["seed"]
    if one["kind"] == "teacher" or one["data"].startswith("random 20"):         # these need none
        return argv
    if "--dataset" not in argv:
        argv += ["--dataset", f"study/kept/{seed}/dataset.npz"]
    k = argv.index("--dataset") + 1
    file = KEPT / argv[k].removeprefix("study/kept/")
    argv[k] = str(file)
    if not file.exists():
        name = one["kind"] if one["kind"].startswith("uniform") else one["data"]
        teacher = None if name.startswith("controller") else kept(seed)
        if file.name != "dataset.npz":
            recordings.write(file, name, seed, teacher)
    return argv


def kept(seed):
    """The folder of a seed's teacher; trained where there is none."""
    if not (KEPT / str(seed)).exists():
        run_cell(cell("teacher", seed))
    return KEPT / str(seed)


def watched(one, found):
    """The program's Run, which also measures the student at some tests, and puts into `found` what
    it finds. Training does not notice: its random numbers go on as if nothing had been drawn."""
    measured = one["data"] in MEASURED and one["kind"] in ("sac", "cql") and one["seed"] >= 10

    class Watched(ours.Run):
        def test(self, stage, step, agent):
            super().test(stage, step, agent)
            if stage == "teacher" or one["kind"] == "teacher":
                return
            with ours.chance_kept():
                rows = ours.load_dataset(self.folder / "dataset.npz", check=False).rows
                if step in BETWEEN and step < one["steps"] - 1:
                    found["at"][str(step)] = measure.final(agent, rows, one["seed"])
                if measured and step in MOMENTS:
                    good = ours.load_agent(kept(one["seed"]) / "teacher.pt")
                    found["measures"][str(step)] = measure.measure(agent, rows, one["seed"], good)

    return Watched


def commit():
    """The commit that is checked out, "-dirty" behind it where a program differs."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
    same = git("diff", "--quiet", "HEAD", "--", "../cql_pendulum.py", "*.py").returncode == 0
    return git("rev-parse", "HEAD").stdout.strip() + ("" if same else "-dirty")


def cpu():
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
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
        file.write(json.dumps(line, allow_nan=False) + "\n")


def work(cells, processes=2, scheduler=None, run_one=run_apart):
    """Run cells side by side: first teachers, and those whose data students need. A line that the
    file lacks is appended as soon as it is there; another is compared with the file's."""
    have = lines()
    students = [one for one in cells if one["kind"] != "teacher"]
    teachers = {key(one): one for one in cells if one["kind"] == "teacher"}
    for seed in {one["seed"] for one in students}:
        if not (KEPT / str(seed)).exists():
            teachers.setdefault(key(cell("teacher", seed)), cell("teacher", seed))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))     # the same command goes on
        if scheduler:
            import distributed
            stack.enter_context(distributed.Client(scheduler))
            stack.enter_context(joblib.parallel_config("dask"))
        # all at once, one by one: a worker that comes late finds some, one that goes loses one
        parallel = joblib.Parallel(-1 if scheduler else processes, batch_size=1, pre_dispatch="all",
                                   return_as="generator_unordered")
        for job, some in ((run_apart, teachers.values()), (run_one, students)):
            for line in parallel(joblib.delayed(job)(one) for one in some):
                known = have.get(key(line))
                if known is None:
                    append(line)
                print(compared(known, line) if known else f"{key(line)}: {line['return']:.0f}",
                      flush=True)


def compared(old, new):
    """In words: which numbers of two lines of a cell differ, and where the lines were made."""
    one, other = numbers_of(old), numbers_of(new)
    both = [name for name in one if name in other]
    differ = [name for name in both if one[name] != other[name]]
    where = ", ".join(f"{line['cpu']} at {line['commit'][:7]}" for line in (old, new))
    first = "; ".join(f"{name}: {one[name]}, {other[name]}" for name in differ[:4])
    return f"{key(new)}: {len(differ)} of {len(both)} numbers differ ({where}) {first}"


def numbers_of(line):
    """What a run gives, as a flat dict. Lines without "mean" were played with other noise: of them
    only what training alone makes can be the same."""
    if "mean" not in line:
        return {name: line[name] for name in ("rows", "coverage", "data mean", "temperature")
                if name in line}
    found = {name: value for name, value in line.items()
             if isinstance(value, float) and name not in ("minutes", "weight")}
    for step, values in [*line.get("at", {}).items(), *line.get("measures", {}).items()]:
        found |= {f"{name} at {step}": value for name, value in values.items()}
    tests = line["tests"] if isinstance(line["tests"], dict) else {}
    for name, column in tests.items():
        found |= {f"{name} of test {k}": value for k, value in enumerate(column)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, whose workers then work")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="cells that have all of these as kind, data or seed")
    parser.add_argument("--again", type=int, metavar="N", help="run N of the file's cells again")
    parser.add_argument("--cell", type=json.loads, help="print the line of this cell, in JSON")
    options = parser.parse_args()
    if options.cell:
        return print(json.dumps(run_cell(options.cell), allow_nan=False))
    have = lines()
    cells = [one for one in grid() if (key(one) in have) == (options.again is not None)
             and set(options.only) <= {one["kind"], one["data"], str(one["seed"])}]
    if not cells:
        sys.exit("there is no such cell to run")
    if options.again is not None:
        cells = random.sample(cells, min(options.again, len(cells)))
    work(cells, options.processes, options.scheduler)


if __name__ == "__main__":
    import run                          # by this name workers find it, wherever they have it
    run.main()
