"""Does CQL do what the page says? Seeds, datasets, errata and weights, measured.

python tests/study.py             run what is still missing, two processes of one thread each; stop and go on at any time
python tests/study.py --report    write results/study.md and the figures from results/study.jsonl alone

A cell is one training run with its final 100 episodes; a finished cell is a line of results/study.jsonl and never runs again
with the same cql_pendulum.py: lines that another version of it wrote (results/study.md is of commit 7c15fab) do not count.
The teachers' datasets are kept in runs/study/ for the students; minutes are the processor's, of one thread.
"""
import argparse
import contextlib
import hashlib
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


def student(seed, data, kind="cql", as_printed=(), weight=5.0):
    weight = weight if kind == "cql" else None
    return {"kind": kind, "data": data, "seed": seed, "as_printed": list(as_printed), "weight": weight}


def grid():
    """All cells, the most important first. The student of seed s learns from the corrected teacher of seed s."""
    ten, five = range(10), range(5)
    cells = [teacher(seed) for seed in ten] + [teacher(seed, ERRATA) for seed in ten]
    for data in ("last 10", "all"):
        cells += [student(seed, data, kind) for seed in ten for kind in ("cql", "sac")]
    cells += [student(seed, "all", as_printed=ERRATA) for seed in ten]
    cells += [student(seed, "first 20", kind) for seed in five for kind in ("cql", "sac")]
    cells += [student(seed, data, "bc") for data in ("last 10", "all") for seed in ten]
    for seed in range(2):
        cells += [student(seed, "last 10", as_printed=names) for names in (ERRATA, *([name] for name in ERRATA))]
        cells += [student(seed, data, weight=weight) for data in ("last 10", "all") for weight in (0.2, 1.0, 25.0)]
        cells += [student(seed, "all", as_printed=[name]) for name in ERRATA]
    return cells


def key(cell):
    return json.dumps(cell, sort_keys=True)


def train_teacher(ours, seed, as_printed, run):
    """A teacher and its data; a corrected one's dataset is kept for the students."""
    ours.seed_everything(seed)
    agent, data = ours.SAC(as_printed), ours.Data(as_printed)
    ours.train_teacher(agent, data, 100, run, ours.accelerate(agent))
    if not as_printed:
        DATASETS.mkdir(parents=True, exist_ok=True)
        ours.save_dataset(data, DATASETS / f"{seed}-{ours.PROGRAM[:12]}.npz")
    return agent, data


def clone(agent, data, steps):
    """Behaviour cloning, the yardstick without critics and rewards: the policy learns to give the data's torques."""
    import torch

    policy = agent.model_action
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    for _ in range(steps):
        state, action, *_ = data.get_sample()
        hidden = policy.fc_state(state)
        before_tanh = torch.distributions.Normal(policy.fc_mu(hidden), policy.fc_std(hidden))
        loss = -before_tanh.log_prob((action / 2).clamp(-0.9999, 0.9999).atanh()).mean()      # a torque of 2 is infinitely far
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_cell(cell):
    """Train one cell in this process, by the module's own functions, and return its line."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(TOP))
    import cql_pendulum as ours

    begun = time.process_time()
    run = ours.Run(None, cell["seed"])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if cell["kind"] == "teacher":
            agent, data = train_teacher(ours, cell["seed"], cell["as_printed"], run)
        else:
            file = DATASETS / f"{cell['seed']}-{ours.PROGRAM[:12]}.npz"
            if not file.exists():                                   # finished elsewhere: train that teacher again
                train_teacher(ours, cell["seed"], (), ours.Run(None, cell["seed"]))
                begun = time.process_time()
            which, n = (cell["data"].split() + [None])[:2]
            data = ours.load_dataset(file, cell["as_printed"])
            data = ours.keep(data, **({} if n is None else {which: int(n)}))
            ours.seed_everything(cell["seed"])
            agent = ours.CQL(cell["as_printed"], cell["weight"]) if cell["kind"] == "cql" else ours.SAC(cell["as_printed"])
            if cell["kind"] == "bc":
                clone(agent, data, 50_000)
            else:
                ours.train_student(agent, data, 50_000, run, ours.accelerate(agent))
    minutes = (time.process_time() - begun) / 60
    returns = ours.evaluate(agent, run.starts(1, 100))[0]
    tests = [[row[1], *(float(x) for x in row[2:5])] for row in run.log]
    data_mean = float(np.mean([rows[:, 4].sum() for rows in ours.episodes(data)]))
    return cell | {"program": ours.PROGRAM, "return": round(float(returns.mean()), 2),
                   "std error": round(float(returns.std(ddof=1) / 10), 2), "data mean": round(data_mean, 2),
                   "minutes": round(minutes, 2), "tests": tests}


def finished():
    file = RESULTS / "study.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    program = hashlib.sha256((TOP / "cql_pendulum.py").read_bytes()).hexdigest()
    lines = [line for line in lines if line.get("program") == program]
    names = ("kind", "data", "seed", "as_printed", "weight")
    return {key({name: line[name] for name in names if name in line}): line for line in lines}


def work(cells):
    RESULTS.mkdir(exist_ok=True)
    have = finished()
    todo = [cell for cell in cells if key(cell) not in have]
    # a student waits for its teacher: teachers come first in the grid, and the pool is emptied between the two kinds
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        spent, done = 0.0, 0
        for kinds in (("teacher",), ("cql", "sac", "bc")):
            for line in pool.imap_unordered(run_cell, [cell for cell in todo if cell["kind"] in kinds]):
                with open(RESULTS / "study.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                spent, done = spent + line["minutes"], done + 1
                names = ("kind", "data", "as_printed", "weight", "seed")
                what = " ".join(str(line[name]) for name in names if line.get(name) not in (None, []))
                left = spent / done * (len(todo) - done) / 2
                print(f"[{done}/{len(todo)}] {what}: {line['return']:.0f}; about {left:.0f} minutes left", flush=True)


def iqm(values):
    """Interquartile mean: the mean without the lowest and the highest quarter (Agarwal et al. 2021), along the last axis."""
    values = np.sort(values, axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut:values.shape[-1] - cut].mean(axis=-1)


def interval(values):
    """95 % bootstrap interval of the IQM over seeds, 50,000 resamples; one stratum, as there is one environment."""
    values = np.asarray(values)
    samples = np.random.default_rng(0).choice(values, (50_000, len(values)))
    return np.percentile(iqm(samples), [2.5, 97.5])


def name_of(line):
    """What a student is called in tables and figures."""
    if line["kind"] != "cql":
        return line["kind"]
    errata, weight = line["as_printed"], line["weight"]
    what = "corrected" if weight == 5.0 else f"weight {weight:g}"
    if errata:
        what = "as printed" if len(errata) == len(ERRATA) else f"with {errata[0]}"
    return f"cql, {what}"


def markdown(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def spread(lines):
    """The columns that teachers and students share: seeds, IQM, its interval, worst to best."""
    returns = np.array([line["return"] for line in lines])
    low, high = interval(returns)
    return [len(lines), f"{iqm(returns):.0f}", f"{low:.0f} to {high:.0f}", f"{returns.min():.0f} to {returns.max():.0f}"]


def minutes(lines):
    return f"{np.mean([line['minutes'] for line in lines]):.1f}"


def row(name, lines, teachers):
    """A student's row: IQMs over its seeds, and how often it did better than its data and its teacher."""
    late, promise = ["–"], ["–"] * 3
    if all(line["tests"] for line in lines):                                   # behaviour cloning has no critics and no tests
        late = [f"{iqm(np.array([np.mean([test[1] for test in line['tests'][-5:]]) for line in lines])):.0f}"]
        promised, delivered = np.array([line["tests"][-1][2:] for line in lines]).T
        promise = [f"{iqm(values):.1f}" for values in (promised, delivered, promised - delivered)]
    beat = [f"{sum(line['return'] > other(line) for line in lines)} of {len(lines)}"
            for other in (lambda line: line["data mean"], lambda line: teachers[line["seed"]]["return"])]
    return markdown(name, *spread(lines), *late, *promise, *beat, minutes(lines))


def pair_row(name, groups):
    """What a student of seeds 0 and 1 returned, and by how much its last promise was above its delivery, on both datasets."""
    cells = []
    for data in ("last 10", "all"):
        lines = {line["seed"]: line for line in groups.get((data, name), [])}
        cells += [f"{lines[seed]['return']:.0f}" if seed in lines else "" for seed in (0, 1)]
        cells += [f"{lines[seed]['tests'][-1][2] - lines[seed]['tests'][-1][3]:.0f}" if seed in lines else "" for seed in (0, 1)]
    return markdown(name, *cells)


def holds_from(line, level=-200):
    """The first tested epoch from which every test's mean return stays above the level, or None."""
    held = None
    for test in reversed(line["tests"]):
        if test[1] <= level:
            break
        held = test[0]
    return held


HEADER = """# The study

Written by `python tests/study.py --report` from results/study.jsonl; `python tests/study.py` runs what is missing.
Return of an episode, 100 fresh episodes for each seed; interquartile mean (IQM) over seeds and its 95 % bootstrap interval.
The last five tests, the last test's promise, delivery and their difference: IQMs too. Minutes are of one processor, two runs
side by side. bc is behaviour cloning: the policy's network learns to give the data's torques, without critics and rewards."""

TEACHERS = """
## Teachers

| teacher | seeds | IQM | interval | worst to best seed | epochs until -200 holds in every later test | minutes |
|---|---|---|---|---|---|---|"""

STUDENTS = """
| student | seeds | IQM | interval | worst to best | last five tests | promised | delivered | difference | beat data | beat teacher | minutes |
|---|---|---|---|---|---|---|---|---|---|---|---|"""

PAIRS = """
## Errata and weights one by one, seeds 0 and 1

The return of 100 episodes, and the last promise minus the delivery. "with sign" has that erratum alone, "as printed" has all;
"corrected" has the page's weight, 5.

| student | last 10: seed 0 | seed 1 | promise: seed 0 | seed 1 | all: seed 0 | seed 1 | promise: seed 0 | seed 1 |
|---|---|---|---|---|---|---|---|---|"""


def report():
    from matplotlib.figure import Figure

    have = finished()
    lines = list(have.values())
    teachers = {line["seed"]: line for line in lines if line["kind"] == "teacher" and not line["as_printed"]}
    groups = {}
    for cell in grid():
        if cell["kind"] != "teacher" and key(cell) in have:
            groups.setdefault((cell["data"], name_of(cell)), []).append(have[key(cell)])
    missing = [cell for cell in grid() if key(cell) not in have]
    names = [f"{cell['data']}: {name_of(cell)}, seed {cell['seed']}" for cell in missing if cell["kind"] != "teacher"]
    text = [HEADER, "", f"Finished: {len(lines)} of {len(lines) + len(missing)} cells."]
    if missing:
        text += ["", "Not finished: " + "; ".join(names) + "."]
    text.append(TEACHERS)
    for name, printed in (("corrected", False), ("as printed", True)):
        some = [line for line in lines if line["kind"] == "teacher" and bool(line["as_printed"]) == printed]
        if some:
            some.sort(key=lambda line: line["seed"])
            epochs = ", ".join("never" if holds_from(line) is None else str(holds_from(line)) for line in some)
            text.append(markdown(name, *spread(some), epochs, minutes(some)))
    for data in ("last 10", "all", "first 20"):
        if some := {name: found for (which, name), found in groups.items() if which == data}:
            means = {line["seed"]: line["data mean"] for found in some.values() for line in found}.values()
            text += ["", f"## Students on {data} episodes", "", f"The data's mean return is {np.mean(list(means)):.0f} "
                     f"({min(means):.0f} to {max(means):.0f} by seed).", STUDENTS]
            text += [row(name, found, teachers) for name, found in some.items() if len(found) > 2]
    pairs = dict.fromkeys(name for data, name in groups if data != "first 20" and name != "bc")
    text += [PAIRS, *(pair_row(name, groups) for name in pairs)]
    text += ["", "## What had to come out", "", *verdicts(groups)]
    (RESULTS / "study.md").write_text("\n".join(text) + "\n")
    draw_headline(groups, Figure)
    draw_all(groups, teachers, Figure)
    print(f"{RESULTS / 'study.md'} and two figures, from {len(lines)} cells")


def verdicts(groups):
    def count(found, test):
        return f"{sum(map(test, found))} of {len(found)} seeds"

    def within(tests):
        return all(promised <= delivered for _, _, promised, delivered in tests)

    def pairs(name, other):
        """The returns of two kinds of students on all episodes, by seed."""
        mine, theirs = ({line["seed"]: line["return"] for line in groups.get(("all", kind), [])} for kind in (name, other))
        return [(mine[seed], theirs[seed]) for seed in mine.keys() & theirs.keys()]

    cql, sac = (groups.get(("last 10", name), []) for name in ("cql, corrected", "sac"))
    yield f"- last 10, corrected cql above -250: {count(cql, lambda line: line['return'] > -250)}"
    yield ("- last 10, corrected cql never promised more than it delivered, in any test: "
           f"{count(cql, lambda line: within(line['tests']))}")
    yield f"- last 10, sac below -800: {count(sac, lambda line: line['return'] < -800)}"
    yield f"- last 10, sac's last promise above 100: {count(sac, lambda line: line['tests'][-1][2] > 100)}"
    for other in ("cql, as printed", "sac"):
        yield f"- all, corrected cql above {other}: {count(pairs('cql, corrected', other), lambda pair: pair[0] > pair[1])}"


def draw_headline(groups, Figure):
    """Last 10 episodes: every seed's return and promise, sac against cql."""
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in (("sac", "C3"), ("cql, corrected", "C0")):
        found = groups.get(("last 10", name), [])
        for k, line in enumerate(found):
            step, returned, promised, delivered = np.array(line["tests"]).T
            left.plot(step, returned, color=colour, lw=0.8, alpha=0.8, label=f"{name}: {len(found)} seeds" if k == 0 else None)
            right.plot(step, promised, color=colour, lw=0.8, alpha=0.8, label=f"{name}: promised" if k == 0 else None)
            right.plot(step, delivered, color=colour, lw=0.8, alpha=0.8, ls=":", label=f"{name}: delivered" if k == 0 else None)
    right.axhline(100, color="k", ls="--", lw=1, label="the most that can be delivered")
    left.set(title="Return", xlabel="update", ylabel="mean return of 10 episodes")
    right.set(title="Promise and delivery", xlabel="update", ylabel="discounted sum of (reward + 8) / 8")
    right.set_yscale("symlog", linthresh=10)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    figure.suptitle("Students of the teacher's last 10 episodes")
    figure.savefig(RESULTS / "last10.png")


def draw_all(groups, teachers, Figure):
    """Every seed's return over 100 episodes, with the IQM and its interval."""
    figure = Figure(figsize=(11, 1.5 + 0.35 * len(groups)), dpi=100, layout="constrained")
    axes = figure.subplots()
    order = sorted(groups, key=lambda group: ["last 10", "all", "first 20"].index(group[0]))
    for y, group in enumerate(order):
        found = groups[group]
        returns = np.array([line["return"] for line in found])
        axes.plot(returns, [y] * len(found), "o", color="C0", ms=4, alpha=0.6, label="a seed" if y == 0 else None)
        if len(found) > 2:
            axes.plot(interval(returns), [y, y], "-", color="C1", lw=2, label="95 % interval of the IQM" if y == 0 else None)
            axes.plot(iqm(returns), y, "|", color="C1", ms=14, mew=3, label="interquartile mean" if y == 0 else None)
        axes.plot(np.mean([line["data mean"] for line in found]), y, "x", color="0.3", ms=6,
                  label="mean of the data" if y == 0 else None)
    axes.axvline(iqm(np.array([line["return"] for line in teachers.values()])), color="k", ls=":", lw=1, label="teachers' IQM")
    ticks = [-1600, -800, -400, -200, -150]
    axes.set_xscale("symlog", linthresh=100)
    axes.set(xlim=(-1800, -120), ylim=(-0.7, len(order) - 0.3), xticks=ticks, xticklabels=ticks, yticks=range(len(order)),
             yticklabels=[f"{data}: {name} ({len(groups[data, name])})" for data, name in order],
             xlabel="return of an episode, mean of 100 (logarithmic)", title="All students: data, student (seeds)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(RESULTS / "study.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write results/study.md and the figures from results/study.jsonl")
    options = parser.parse_args()
    if options.report:
        report()
    else:
        work(grid())


if __name__ == "__main__":
    main()
