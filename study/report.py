"""Tables, pictures and README's figures, from results/cells.jsonl.

python study/report.py    write results/tables.md, regimes.png and last10.png

A figure is the interquartile mean over seeds (IQM: without the lowest and the highest quarter;
Agarwal et al. 2021). Intervals are 95 % bootstrap intervals of it, from 10 seeds on. What the words
of the tables mean stands in study/README.md.
"""
import itertools
import json
import math
import pathlib

import numpy as np
import pandas as pd
from scipy import stats

RESULTS = pathlib.Path(__file__).parent / "results"
STUDENTS = "sac", "cql", "bc"
COLOURS = {"sac": "C3", "cql": "C0", "bc": "C2"}
LASTS = [f"last {n}" for n in (5, 10, 20, 40, 70, 85)]
DATA = [*LASTS, "all", "random 20", "random 10 + last 10", "2,000 rows"]
INTERVENTIONS = ("clone target", "uniform torques", "uniform states", "uniform states and torques",
                 "fixed temperature")
WEIGHTS = {"5": "cql", "1": "cql, weight 1", "0.2": "cql, weight 0.2"}
MOMENTS = 2000, 4000, 10_000, 20_000, 49_999
FAILS = 800                  # below its teacher: a student that fails
CLOSE = 25                   # below its teacher: as good as it
HIDDEN = 150                 # from the group's IQM: a seed that the IQM hides
LEAST = (8 - math.pi ** 2 - 0.1 * 8 ** 2 - 0.001 * 2 ** 2) / 8 * 100   # the worst reward for ever
RECORDED = ("20 drawn", "20 mean", "20 mean + 0.1", "20 mean + 0.25", "20 mean + 0.5",
            "20 mean + 1", "controller", "controller 1.8", "controller + 0.5", "controller + 1")
TESTED = "return", "promised", "delivered", "contrast", "gap"          # a test's numbers, in order
NUMBERS = ("return", "promised", "delivered", "temperature", "entropy bonus", "outside", "coverage",
           "data mean", "minutes", "seconds per update", "our seconds per update")  # a line's


class Study:
    """The lines, by data and student. A line may lack any number."""

    def __init__(self, file):
        self.lines = [json.loads(line) for line in file.read_text().splitlines()]
        teachers = {line["seed"]: outcome(line) for line in self.lines
                    if line["kind"] == "teacher" and not line["as_printed"]}
        runs, moments = [], []
        for line in self.lines:
            place = {"data": line["data"] or "", "name": name_of(line), "seed": line["student"]}
            run = place | {name: line.get(name) for name in NUMBERS}
            if line["kind"] == "bc":                # it has no critic; some lines promise something
                run["promised"] = None
            run["outcome"] = outcome(line)
            run["gain"] = run["outcome"] - teachers.get(line["seed"], math.nan)
            tests = line.get("tests", [])
            for step, *values in tests:
                found = dict(zip(TESTED, values))
                moments.append(place | {"update": step} | found
                               | line.get("measures", {}).get(str(step), {}))
            if tests:
                run |= {f"last {name}": value for name, value in found.items()}
            runs.append(run)
        self.runs = groups(runs, ["data", "name"])
        self.moments = groups(moments, ["data", "name", "update"])

    def get(self, column, data, name, update=None):
        """A column of a group by seed, of the run or of its test at an update; without the seeds
        that lack it, empty where there is no such group."""
        found = self.runs.get((data, name)) if update is None else (
            self.moments.get((data, name, update)))
        if found is None or column not in found:
            return pd.Series(dtype=float)
        return found[column].dropna().astype(float)

    def teachers(self, column, data):
        """The same of the teachers whose data some students have."""
        seeds = {seed for name in STUDENTS for seed in self.get("return", data, name).index}
        found = self.get(column, "", "teacher")
        return found[found.index.isin(seeds)]

    def of_the_data(self, column, data):
        """A column that is the same for all students of a seed."""
        found = pd.concat([self.get(column, data, name) for name in STUDENTS])
        return found.groupby(level=0).first()

    def how_many(self, data):
        """The number of seeds of sac, cql and bc: one number where they are equal."""
        sizes = [str(len(self.get("return", data, name))) for name in STUDENTS]
        return sizes[0] if len(set(sizes)) == 1 else " / ".join(sizes)

    def students(self):
        """All groups but the teachers', known data first."""
        places = {data: k for k, data in enumerate(DATA)}
        found = [group for group in self.runs if group[0]]
        return sorted(found, key=lambda group: (places.get(group[0], len(places)), group))

    def close(self, data, name):
        return count(self.get("gain", data, name) > -CLOSE)


def groups(rows, names):
    """{(data, student, ...): the rows' frame by seed}."""
    frame = pd.DataFrame(rows, columns=None if rows else [*names, "seed"])
    return {place: part.set_index("seed").sort_index() for place, part in frame.groupby(names)}


def name_of(line):
    """What a student or a teacher is called in tables and figures."""
    name = line["kind"]
    if len(line["as_printed"]) == 4:
        name += " as printed"
    elif line["as_printed"]:
        name += f", {', '.join(line['as_printed'])} as printed"
    if line["weight"] not in (5, None):
        name += f", weight {line['weight']:g}"
    if line["student"] != line["seed"]:
        name += f" of seed {line['seed']}"
    return name


def outcome(line):
    """The mean return of the last five tests: a seed's teacher and students share the starts."""
    tests = line.get("tests", [])[-5:]
    return sum(test[1] for test in tests) / len(tests) if tests else math.nan


# Numbers and words

def iqm(values, axis=0):
    return stats.trim_mean(values, 0.25, axis=axis) if len(values) else math.nan


def interval(values):
    """The 95 % interval of the IQM in words; nothing below 10 seeds."""
    if len(values) < 10:
        return ""
    found = stats.bootstrap((values,), iqm, n_resamples=20_000, method="percentile", rng=0)
    low, high = found.confidence_interval
    return f"{signed(low)} to {signed(high)}"


def number(value, digits=0):
    return "–" if math.isnan(value) else f"{value:z,.{digits}f}"


def signed(value, digits=0):
    return "–" if math.isnan(value) else f"{value:+z,.{digits}f}"


def middle(values, digits=0):
    return number(iqm(values), digits)


def spread(values, digits=0):
    """IQM (lowest to highest)."""
    if not len(values):
        return "–"
    low, high = number(values.min(), digits), number(values.max(), digits)
    return f"{middle(values, digits)} ({low} to {high})"


def count(found):
    return f"{sum(found)} of {len(found)}"


def each(values, digits=0):
    return ", ".join(f"{seed}: {number(value, digits)}" for seed, value in values.items()) or "–"


def minus(one, other):
    """A difference, seed by seed, in words."""
    gap = (one - other).dropna()
    sure = f" (95 %: {interval(gap)})" if len(gap) >= 10 else ""
    return f"{signed(iqm(gap))}{sure}, better on {count(gap > 0)}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


# What README quotes

ROWS = {                     # README's table of returns: the words of a row, and the data
    "a SAC teacher's last ten episodes": "last 10",
    "its last 85": "last 85",
    "all its 100, of which the first are poor": "all",
    "twenty episodes of random torques": "random 20",
    "twenty of the finished teacher, without noise": "20 mean",
    "twenty of a controller written by hand": "controller",
}


def claims(study):
    """README's figures, in its words; a test looks for each of them in README."""
    for words, data in ROWS.items():
        mean = study.of_the_data("data mean", data)
        cells = [middle(mean), *(middle(study.get("return", data, name)) for name in STUDENTS)]
        yield f"| {words} | {' | '.join(cells)} | {len(mean)} |"
    yield from claims_of_findings(study)
    yield from claims_of_the_page(study)


def claims_of_findings(study):
    """The five sentences, and the table of teachers."""
    get = study.get
    yield f"as good as its teacher** on {study.close('last 10', 'cql')} seeds; imitation is, too"
    reached = study.close("last 10", "uniform states and torques")
    yield f"it reaches its teacher on {reached} seeds"
    gap = (get("outcome", "all", "cql") - get("outcome", "all", "sac")).dropna()
    yield f"CQL returns less than SAC on {count(gap < 0)} seeds"
    left = [left_at(study, "20 mean", "cql", seed)[0] is not None
            for seed in get("return", "20 mean", "cql").index]
    yield f"CQL's promise falls below the least possible, {LEAST:.0f}, on {count(left)} seeds"
    drawn = get("return", "20 drawn", "cql")
    yield f"With the teacher's own noise, from the same starts, CQL returns {middle(drawn)}"
    theirs = get("return", "last 10", "d3rlpy cql")
    yield f"SAC fails there and CQL returns {middle(theirs)} ({len(theirs)} seeds)"
    for words, name, update in (
            ("the course's notebook, its stored output (epoch 90)", "notebook's outputs", 90),
            ("the notebook's own code, run here", "notebook teacher", None),
            ("here, `--as-printed`", "teacher as printed", None),
            ("here, corrected", "teacher", None)):
        found = get("return", "", name, update)
        yield f"| {words} | {middle(found)} | {len(found)} |"


def claims_of_the_page(study):
    """What the runs say of the page's sentences."""
    get = study.get
    near = get("swing excess near", "last 10", "sac", 4000)
    yield f"its Q-values at update 4,000 are {middle(near)} too high for recorded torques, too"
    late = get("contrast", "last 10", "cql", 49_999)
    yield f"CQL's Q-value of the recorded torque ends {middle(late)} above the mean of all torques"
    yield f"{middle(100 * get('outside', 'last 10', 'cql'))} % of its steps are new to the data"
    above = get("return", "random 20", "cql") - get("data mean", "random 20", "cql")
    yield f"from random torques CQL returns more than they did on {count(above > 0)} seeds"
    mixed = get("return", "random 10 + last 10", "sac")
    yield f"SAC returns {middle(mixed)} from ten random and ten good episodes"
    printed = get("return", "", "teacher as printed")
    yield f"{count(printed < -FAILS)} teachers fail"
    heavy = of_seeds(get("gain", "all", "cql"), get("gain", "all", "cql, weight 1").index)
    yield f"with it CQL ends {number(-iqm(heavy))} below its teacher on all its episodes"


def of_seeds(values, seeds):
    return values[values.index.isin(seeds)]


def nearest(study, name, update):
    """On the last 10: returns by a critic's best and by a random one of the nearest torques."""
    return [study.get(f"{what} of the nearest", "last 10", name, update)
            for what in ("best", "random")]


# Tables

def tables(study):
    """(title, a line about it, head, rows) of each."""
    shown = [data for data in DATA if any((data, name) in study.runs for name in STUDENTS)]
    yield from tables_of_returns(study, shown)
    yield from tables_of_promises(study, shown)
    yield from tables_of_the_measure(study)
    yield from tables_of_changes(study)
    yield from tables_of_recordings(study)
    yield from tables_of_others(study)
    yield from tables_of_seeds(study)


def tables_of_returns(study, shown):
    for title, column, note in (
            ("Outcome by data", "outcome", "Mean return of the last five tests."),
            ("Return by data", "return", "Mean of the final 100 episodes.")):
        rows = []
        for data in shown:
            cells = [spread(study.get(column, data, name)) for name in STUDENTS]
            rows.append([data, middle(study.of_the_data("coverage", data), 1),
                         middle(study.of_the_data("data mean", data)), study.how_many(data),
                         spread(study.teachers(column, data)), *cells])
        yield title, note, ["data", "coverage", "data's mean", "seeds", "teachers", *STUDENTS], rows
    rows = []
    for data in shown:
        sac, cql, bc = (study.get("outcome", data, name) for name in STUDENTS)
        above = [study.get("return", data, name) - study.get("data mean", data, name)
                 for name in STUDENTS]
        rows.append([data, minus(cql, sac), minus(cql, bc), *(count(gap > 0) for gap in above),
                     *(study.close(data, name) for name in STUDENTS)])
    yield ("Which student wins", f"Outcomes, seed by seed. Above its data: the final 100 episodes "
           f"against the data's mean. Near: at most {CLOSE} below its teacher.",
           ["data", "cql minus sac", "cql minus bc", "sac above its data", "cql above", "bc above",
            "sac near its teacher", "cql near", "bc near"], rows)
    columns = {"gain": 0, "return": 0, "promised": 1, "delivered": 1, "entropy bonus": 1,
               "temperature": 3, "outside": 3, "last gap": 1, "minutes": 1}
    rows = [[data, name, len(study.runs[data, name]), *(
        spread(study.get(column, data, name), digits) for column, digits in columns.items())]
        for data, name in study.students()]
    yield ("Every student", "Gain: outcome minus its teacher's. Return to outside are of the final "
           "100 episodes.", ["data", "student", "seeds", *columns], rows)


def tables_of_promises(study, shown):
    rows = []
    for data, name in itertools.product(shown, ("sac", "cql")):
        early = study.get("contrast", data, name, 4000)
        run = [study.get(what, data, name) for what in ("promised", "delivered", "entropy bonus")]
        rows.append([data, name, len(early), spread(early, 2),
                     spread(study.get("last contrast", data, name), 2),
                     spread(run[0] - run[1] - run[2], 1)])
    yield ("Contrast and excess", "Excess: of the final 100 episodes.",
           ["data", "student", "seeds", "contrast at 4,000", "at the end", "excess"], rows)
    rows = []
    for name, update in itertools.product(("sac", "cql"), (10_000, 20_000, 40_000)):
        share = study.get("promised", "all", name, update) / (
            study.get("delivered", "all", name, update) + study.get("entropy bonus", "all", name))
        alone = number(1 - math.exp(-update / 20_000), 2)
        rows.append([name, f"{update:,}", spread(share, 2), alone])
    # the target follows by 0.005 of a hundredth (1 - 0.99) of the distance an update
    yield ("Critics warm up", "On all: the promise's share of delivery and bonus, beside 1 - "
           "exp(-update / 20,000), that of a critic that starts at 0 and follows its target.",
           ["student", "update", "share", "a critic that only warms up"], rows)
    rows = []
    for data in shown:
        found = {update: (study.get("return", data, "sac", update),
                          study.get("promised", data, "sac", update))
                 for group, name, update in study.moments if (group, name) == (data, "sac")}
        returns, promised = (pd.DataFrame({update: pair[k] for update, pair in found.items()}).T
                             for k in (0, 1))
        rows.append([data, *(", ".join(when.apply(lambda x: "never" if pd.isna(x) else f"{x:,.0f}"))
                             for when in (lost(returns), promised.gt(100).apply(first)))])
    yield ("When sac fails, seed by seed", 'From which update its return stays below the untrained '
           'one\'s, and when it first promises more than 100. "Never" is no success: a failing '
           'return may stay near the untrained one.', ["data", "return", "promise"], rows)


def first(found):
    """The index of the first that is true, or NaN."""
    return found.idxmax() if found.any() else math.nan


def lost(returns):
    """Returns by update, a column a seed -> from which update on all are below the first."""
    most_from_here = returns[::-1].cummax()[::-1]
    return most_from_here.lt(returns.iloc[0]).apply(first) if len(returns) else pd.Series()


def tables_of_the_measure(study):
    kinds = "swing", "stand"
    with_range = "far minus near", "radius"
    for title, columns, digits in (
            ("Excess of torques near and far from the data's", [
                f"{kind} {what}" for kind in kinds
                for what in ("excess near", "excess far", "far minus near", "bonus")], 1),
            ("Rank correlations of a state's promises", [
                f"{kind} rank {what}" for kind in kinds
                for what in ("delivered", "delivered and bonus", "density", "good")], 2),
            ("Means, and ranges over a state's torques", [*(
                f"{kind} {what}" for kind in kinds
                for what in ("promised", "delivered", "range promised", "range delivered")),
                "radius"], 2),
            ("Along the student's own episodes", ["own excess", *(
                f"own {kind} {what}" for kind in ("both", "state only", "neither")
                for what in ("excess", "share"))], 2)):
        rows = []
        for (data, name), update in itertools.product(study.students(), MOMENTS):
            found = [study.get(column, data, name, update) for column in columns]
            seeds = max(map(len, found))
            if seeds:
                rows.append([data, name, f"{update:,}", seeds, *(
                    (spread if column.endswith(with_range) else middle)(values, digits)
                    + (f" [{len(values)}]" if 0 < len(values) < seeds else "")
                    for column, values in zip(columns, found))])
        yield (title, "[n]: only n seeds have states to measure it in.",
               ["data", "student", "update", "seeds", *columns], rows)
    rows = []
    for name, update in itertools.product(("sac", "cql"), MOMENTS):
        best, chance = nearest(study, name, update)
        rows.append([name, f"{update:,}", len(best), spread(best), spread(chance),
                     count(best > chance)])
    yield ("The nearest rows' torques", "Return on the last 10 if each step takes the critic's "
           "best of the 20 nearest rows' torques, or a random one.",
           ["critic of", "update", "seeds", "its best", "random", "its best is better on"], rows)


def tables_of_changes(study):
    """The interventions on the last 10, beside sac and cql of their seeds at update 20,000."""
    seeds = study.get("last return", "last 10", "uniform states").index
    columns = {}
    for name in (*INTERVENTIONS, "sac", "cql"):
        for what in ("return", "promised", "delivered"):
            if name in INTERVENTIONS:
                columns[name, what] = study.get(f"last {what}", "last 10", name)
            else:
                columns[name, what] = of_seeds(study.get(what, "last 10", name, 20_000), seeds)
    rows = [[name, len(columns[name, "return"]), *(
        spread(columns[name, what], digits) for what, digits in (
            ("return", 0), ("promised", 1), ("delivered", 1))),
        spread(of_seeds(study.get("temperature", "last 10", name), seeds), 3)]
        for name in (*INTERVENTIONS, "sac", "cql")]
    yield ("Interventions on sac of the last 10", "After 20,000 updates, beside sac and cql of the "
           "same seeds, whose temperature is that after 50,000.",
           ["student", "seeds", "return", "promised", "delivered", "temperature"], rows)
    teachers = of_seeds(study.get("outcome", "", "teacher"), seeds)
    rows = [[name, *(f"{number(columns[name, 'return'].get(seed, math.nan))} / "
                     f"{number(columns[name, 'promised'].get(seed, math.nan))}" for seed in seeds)]
            for name in (*INTERVENTIONS, "sac", "cql")]
    yield ("The same by seed", "Return / promised.", ["student", *seeds],
           [["its teacher's outcome", *map(number, teachers)], *rows])


def tables_of_recordings(study):
    """Students of finished policies' recordings, after 20,000 updates."""
    rows, by_seed = [], []
    for data, name in itertools.product(RECORDED, ("sac", "cql", "cql, weight 0.2",
                                                   "cql, fixed temperature", "bc")):
        returned = study.get("return", data, name)
        if not len(returned):
            continue
        promised = study.get("last promised", data, name)
        left = [left_at(study, data, name, seed) for seed in promised.index]
        rows.append([data, name, len(returned), middle(study.get("data mean", data, name)),
                     spread(returned), study.close(data, name), spread(promised),
                     count([update is not None for update, _ in left]) if len(left) else "–",
                     spread(study.get("gap", data, name, 2000), 1),
                     spread(study.get("last gap", data, name), 1),
                     spread(study.get("temperature", data, name), 2)])
        for seed, (update, then) in zip(promised.index, left):
            if update is not None:
                by_seed.append([data, name, seed, f"{update:,}", number(then),
                                number(returned[seed]), number(promised[seed])])
    yield ("Recordings of finished policies", f"20 episodes, 20,000 updates. Close: at most "
           f"{CLOSE} below the seed's teacher. Below: in a test the promise was less than "
           f"{LEAST:.0f}, the worst reward for ever.",
           ["data", "student", "seeds", "data's mean", "return", "close", "promised at the end",
            "below the possible", "gap at 2,000", "gap at the end", "temperature"], rows)
    yield ("When a promise falls below what is possible", "At the first such test.",
           ["data", "student", "seed", "update", "return then", "return at the end",
            "promised at the end"], by_seed)


def left_at(study, data, name, seed):
    """At which update a run's promise was first below the possible, and the return of that test;
    None where it never was."""
    for group in sorted(found for found in study.moments if found[:2] == (data, name)):
        if study.get("promised", *group).get(seed, math.nan) < LEAST:
            return group[2], study.get("return", *group)[seed]
    return None, math.nan


def tables_of_others(study):
    """d3rlpy's students beside ours, and the course's notebook beside our teachers."""
    rows = []
    for data, kind in itertools.product((*DATA, *RECORDED), ("sac", "cql")):
        theirs = f"d3rlpy {kind}"
        seeds = study.get("return", data, theirs).index
        if len(seeds):
            tests = [of_seeds(study.get(what, data, name, update), seeds)
                     for what in ("return", "promised") for name in (theirs, kind)
                     for update in (20_000, 19_999) if (data, name, update) in study.moments]
            cost = [study.get(f"{whose}seconds per update", data, theirs) for whose in ("", "our ")]
            rows.append([data, kind, len(seeds), *map(spread, tests),
                         spread(study.get("return", data, theirs)),
                         spread(cost[0] / cost[1], 2)])
    yield ("Another implementation: d3rlpy", "On the same data and seeds, from the same ten starts "
           "after 20,000 updates; theirs also in 100 episodes after 30,000. Seconds: one update of "
           "theirs, measured in the same process as ours, by processor time.",
           ["data", "student", "seeds", "d3rlpy returns", "ours returns", "d3rlpy promises",
            "ours promises", "d3rlpy returns after 30,000", "d3rlpy's seconds / ours"], rows)
    rows = []
    for name in ("notebook's outputs", "notebook teacher", "teacher as printed", "teacher"):
        early = study.get("return", "", name, 90)
        if len(early):
            rows.append([name, len(early), spread(early), spread(study.get("return", "", name))])
    yield ("Original, as printed, corrected", "Teachers. Notebook's outputs: what the course's "
           "file stores; notebook teacher: its own code run here.",
           ["teacher", "seeds", "test at epoch 90", "100 episodes after epoch 99"], rows)


def tables_of_seeds(study):
    right = study.get("return", "", "teacher")
    rows = []
    for data, name in study.runs:
        if not data and not name.startswith("notebook"):
            found = study.get("return", data, name)
            gap = (found - right).dropna()
            rows.append([name, spread(found), signed(iqm(gap)), count(gap < 0), count(gap == 0),
                         each(found)])
    yield ("Teachers", "Final 100 episodes. sign and range act in the penalty, which a teacher "
           "does not have: such a one equals the corrected one.",
           ["teacher", "return", "minus the corrected", "lower on", "equal on", "by seed"], rows)
    rows = []
    seeds = study.get("gain", "all", "cql, weight 1").index
    for data, (weight, name) in itertools.product(("last 10", "all"), WEIGHTS.items()):
        gain = of_seeds(study.get("gain", data, name), seeds)
        rows.append([data, weight, signed(iqm(gain)), signed(gain.mean()),
                     middle(of_seeds(study.get("return", data, name), seeds)), each(gain)])
    yield ("Weights on the same seeds", "Outcome minus the teacher's.",
           ["data", "weight", "IQM", "mean", "return", "by seed"], rows)
    rows = []
    for data, name in study.students():
        gain = study.get("gain", data, name)
        apart = gain[abs(gain - iqm(gain)) > HIDDEN]
        if len(apart):
            rows.append([data, name, len(gain), signed(iqm(gain)), signed(gain.mean()),
                         each(apart)])
    yield ("Seeds that the IQM hides", f"Outcome minus the teacher's, more than {HIDDEN} from it.",
           ["data", "student", "seeds", "IQM", "mean", "these seeds"], rows)
    rows = []
    for place, some in itertools.groupby(sorted(study.lines, key=made), made):
        some = [line["seed"] for line in some]
        rows.append([*place, len(some), f"{min(some)} to {max(some)}"])
    yield ("Where the lines were made", 'Of one commit and processor. "-dirty": something was not '
           'committed yet.', ["processor", "commit", "lines", "seeds"], rows)


def made(line):
    commit = line.get("commit") or "unknown"
    return line.get("cpu") or "unknown", commit[:7] + commit[40:]


# Pictures

def draw_regimes(study, path):
    """Returns by data: a dot for each seed, a bar up to the IQM, the teachers' IQM a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=100, layout="constrained")
    axes, bottom, width = figure.subplots(), -1750, 0.26
    labels = {"sac": "SAC: no penalty", "cql": "CQL: with the penalty",
              "bc": "BC: imitates the data"}
    places = {data: k for k, data in enumerate([*LASTS, "all"])}
    places |= {"random 10 + last 10": 7.5, "random 20": 8.5}
    for data, place in places.items():
        for shift, name in zip((-width, 0, width), STUDENTS):
            values = study.get("return", data, name)
            spots = place + shift + np.linspace(-0.08, 0.08, len(values) + 2)[1:-1]
            axes.bar(place + shift, iqm(values) - bottom, width - 0.02, bottom, alpha=0.35,
                     color=COLOURS[name], label=labels[name] if place == 0 else None)
            axes.plot(spots, values, "o", color=COLOURS[name], ms=4, alpha=0.8, mew=0)
        level = iqm(study.teachers("return", data))
        axes.plot([place - 0.42, place + 0.42], [level, level], "k-", lw=2,
                  label="the teacher" if place == 0 else None)
    untrained = pd.concat([study.get("return", data, name, 0) for data in places
                           for name in STUDENTS])
    axes.axhline(iqm(untrained), color="0.4", ls=":", lw=1.2)
    axes.text(6.75, iqm(untrained) + 15, "untrained", ha="center", color="0.3", fontsize=11)
    names = [f"{data}\n({study.how_many(data)})".replace(" + ", "\n+ ") for data in places]
    axes.set_xticks([*places.values()], names, fontsize=11)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.6, 9.1), ylim=(bottom, 0))
    axes.set_ylabel("return of an episode (higher is better)", fontsize=12)
    axes.set_xlabel("data: the teacher's last 5 to all 100 episodes, whose first are poor; to the "
                    "right with random torques (in brackets: seeds)", fontsize=12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title("What a student returns depends on its data (bar: mean of the middle seeds, "
                   "dot: a seed)", fontsize=14)
    figure.legend(loc="outside upper center", ncols=4, fontsize=11, frameon=False)
    figure.savefig(path)


def draw_last10(study, path):
    """Sac and cql on the last 10 along training; thick the IQM, thin every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column, style in ((left, "return", "-"), (right, "promised", "-"),
                                (right, "delivered", "--")):
        for name in ("sac", "cql"):
            curves = pd.DataFrame({update: study.get(column, *group, update)
                                   for *group, update in study.moments
                                   if group == ["last 10", name]})              # seeds x updates
            axes.plot(curves.T, style, color=COLOURS[name], lw=0.5, alpha=0.45)
            axes.plot(curves.columns, curves.apply(iqm), style, color=COLOURS[name], lw=2.5,
                      label=f"{name}: {column} ({len(curves)} seeds)")
    left.axhline(iqm(study.teachers("return", "last 10")), color="k", ls=":",
                 label="their teachers")
    right.axhline(100, color="k", ls=":", label="the most possible")
    left.set(ylim=(-1750, 0), title="Return of an episode", ylabel="return")
    right.set(ylim=(-50, 150), title="What the critic promises, and what is delivered",
              ylabel="discounted rewards, 100 at most")
    for axes in (left, right):
        axes.set_xlabel("update")
        axes.legend(loc="center right")
        axes.grid(alpha=0.3)
    figure.suptitle("Students of the teacher's last 10 episodes (thick: typical, thin: a seed)",
                    fontsize=14)
    figure.savefig(path)


def write_tables(study, path):
    parts = ["# The study's tables\n", "Made by study/report.py from cells.jsonl; the words are "
             "explained in [study/README.md](../README.md). IQM over seeds (lowest to highest).\n"]
    for title, note, head, rows in tables(study):
        parts += [f"## {title}\n", f"{note}\n", table(head, rows)]
    parts += ["## What README quotes\n", *(f"- {claim}" for claim in claims(study))]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def main():
    study = Study(RESULTS / "cells.jsonl")
    write_tables(study, RESULTS / "tables.md")
    draw_regimes(study, RESULTS / "regimes.png")
    draw_last10(study, RESULTS / "last10.png")
    print(f"{RESULTS / 'tables.md'} and two pictures, from {len(study.lines)} lines")


if __name__ == "__main__":
    main()
