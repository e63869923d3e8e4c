"""Tables, pictures and README's figures, from results/cells.jsonl.

python study/report.py    write results/tables.md, regimes.png and last10.png

A figure is the IQM over seeds, the mean without the lowest and the highest quarter (Agarwal et al.
2021): with 5 seeds that drops one on each side, with 2 or 3 it is the plain mean. [n]: n seeds.
Intervals are 95 % bootstrap intervals of it, from 10 seeds on.
"""
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pandas as pd
from scipy import stats

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cql_pendulum as ours  # noqa: E402

RESULTS = HERE / "results"
STUDENTS = ["sac", "cql", "bc"]
COLOURS = {"sac": "C3", "cql": "C0", "bc": "C2"}
LASTS = [f"last {n}" for n in (5, 10, 20, 40, 70, 85)]
DOSES = {n: f"random {n} + last 10" if n else "last 10" for n in (0, 1, 2, 3, 5, 10)}
RECORDED = ["20 drawn", "20 mean", "20 mean + 0.1", "20 mean + 0.25", "20 mean + 0.5",
            "20 mean + 1", "controller", "controller 1.8", "controller + 0.5", "controller + 1"]
DATA = [*LASTS, "all", "random 20", "2,000 rows", *[*DOSES.values()][1:], *RECORDED]
INTERVENTIONS = ["clone target", "uniform torques", "uniform states", "uniform states and torques",
                 "fixed temperature"]
WEIGHTS = {"5": "cql", "1": "cql, weight 1", "0.2": "cql, weight 0.2"}
PEERS = [f"d3rlpy {name}" for name in ("sac", "cql", "td3+bc", "iql", "bc")]
PEERS += [f"{name}, own layers" for name in PEERS[2:]]
WAYS = ["return", "mean", "greedy"]
OLD_TESTS = ["step", "return", "promised", "delivered", "contrast", "gap"]
USUAL = 50_000               # updates of a student, if nothing else is said
CLOSE = 25                   # below its teacher: as good as it
LEAST, MOST = ours.possible()                           # that a policy can deliver


class Study:
    """The lines as two frames.

    finals    100 final episodes: a row for each line, and one for each "at" of it. `outcome` is the
              mean return of the last five tests, `gain` that minus the teacher's
    tests     a row for each test, with what measure.measure found there"""

    def __init__(self, file):
        self.lines = [json.loads(line) for line in file.read_text().splitlines()]
        finals, tests = [], []
        for line in self.lines:
            if line.get("loss"):                        # a clone by a loss that BC no longer has
                continue
            place = {"data": line["data"] or "", "name": name_of(line), "seed": line["student"],
                     "teacher": line["seed"], "of": line["steps"] if line["data"] else 0}
            found = line["tests"]
            if isinstance(found, list):                 # a test is a list
                found = dict(zip(OLD_TESTS, zip(*found)))
            frame = pd.DataFrame(found)
            measures = pd.DataFrame(line.get("measures", {})).T
            measures.index = measures.index.astype(int)
            tests.append(frame.join(measures, on="step").assign(**place))
            about = place | {name: line.get(name) for name in ("data mean", "coverage")}
            for updates, found in line.get("at", {}).items():
                finals.append(about | found | {"updates": int(updates)})
            whole = {name: value for name, value in line.items() if np.isscalar(value)}
            if line["kind"] == "bc":                    # it has no critic; old lines promise a bit
                whole["promised"] = None
            finals.append(whole | about | {"updates": place["of"],
                                           "outcome": frame["return"].tail(5).mean()})
        # of two runs of a student the longer counts, which began as the other did
        finals = pd.DataFrame(finals).sort_values("of", kind="stable")
        tests = pd.concat(tests).sort_values("of", kind="stable")
        right = finals[finals["name"] == "teacher"].set_index("seed")["outcome"]
        finals["gain"] = finals["outcome"] - finals["teacher"].map(right)
        run = ["data", "name", "seed"]
        self.finals = finals.drop_duplicates([*run, "updates"], keep="last")
        self.tests = tests.drop_duplicates([*run, "step"], keep="last")
        self.groups = {(when, *place): rows.set_index("seed").sort_index()
                       for frame, when in ((self.finals, "updates"), (self.tests, "step"))
                       for place, rows in frame.groupby(["data", "name", when])}

    def get(self, column, data, name, updates=None, step=None):
        """A column of final episodes by seed, or of the test at a step; without seeds that lack
        it. updates: of the student so far, 50,000 if nothing is said."""
        place = "updates", data, name, updates or (USUAL if data else 0)
        found = self.groups.get(place if step is None else ("step", data, name, step))
        if found is None or column not in found:
            return pd.Series(dtype=float)
        return found[column].dropna().astype(float)

    def three_ways(self, data, name, updates):
        """The returns in all three ways, of the seeds that have them: three columns by seed."""
        seeds = self.get("greedy", data, name, updates).index
        return [self.get(way, data, name, updates).reindex(seeds) for way in WAYS]

    def close(self, data, name):
        """On how many seeds a student is as good as its teacher."""
        return count(self.get("gain", data, name) > -CLOSE)

    def below(self, data, name, updates):
        """On how many seeds a test up to this update promises less than is possible; of the runs
        that have so many."""
        found = self.tests[(self.tests["data"] == data) & (self.tests["name"] == name)]
        found = found[(found["of"] >= updates) & (found["step"] <= updates)]
        return count(found.groupby("seed")["promised"].min() < LEAST) if len(found) else "–"


def name_of(line):
    """What a student or a teacher is called in tables and figures."""
    name = line["kind"]
    if len(line["as_printed"]) == len(ours.ERRATA):
        name += " as printed"
    elif line["as_printed"]:
        name += f", {', '.join(line['as_printed'])} as printed"
    if line["weight"] not in (5, None):
        name += f", weight {line['weight']:g}"
    if line["student"] != line["seed"]:
        name += f" of seed {line['seed']}"
    return name


# Numbers and words

def iqm(values, axis=0):
    return stats.trim_mean(values, 0.25, axis=axis) if len(values) else math.nan


def number(value, digits=0, sign=""):
    return "–" if math.isnan(value) else f"{value:{sign}z,.{digits}f}"


def middle(values, digits=0):
    return number(iqm(values), digits)


def spread(values, digits=0, words="{} ({} to {}) [{}]"):
    """IQM (lowest to highest) [seeds]."""
    values = values.dropna()
    if not len(values):
        return "–"
    low, high = number(values.min(), digits), number(values.max(), digits)
    return words.format(middle(values, digits), low, high, len(values))


def count(found):
    return f"{sum(found)} of {len(found)}"


def each(values, digits=0):
    return ", ".join(f"{seed}: {number(value, digits)}" for seed, value in values.items()) or "–"


def minus(one, other):
    """A difference, seed by seed, in words."""
    gap = (one - other).dropna()
    if not len(gap):
        return "–"
    words = f"{number(iqm(gap), sign='+')}, better on {count(gap > 0)}"
    if len(gap) < 10:
        return words
    found = stats.bootstrap((gap,), iqm, method="percentile", rng=0)
    low, high = found.confidence_interval
    return f"{words} (95 %: {number(low, sign='+')} to {number(high, sign='+')})"


def table(frame, index, columns):
    """A group a row; a column's spread, {column: digits}. Known data come first."""
    order = {data: k for k, data in enumerate(DATA)}
    frame = frame.reindex(columns=[*index, *columns])
    found = frame.groupby(index, sort=False).agg(
        {column: lambda values, d=digits: spread(values, d) for column, digits in columns.items()})
    found = found.reset_index()
    return found.sort_values(index[0], key=lambda x: x.map(order) if index[0] == "data" else x,
                             kind="stable")


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
    """README's figures, in its words; a test looks for each of them in README. One more is one more
    yield. What has no lines yet is left out."""
    for words, data in ROWS.items():
        found = [study.get("return", data, name) for name in STUDENTS]
        mean = pd.concat([study.get("data mean", data, name) for name in STUDENTS])
        sizes = [str(len(values)) for values in found]
        seeds = sizes[0] if len(set(sizes)) == 1 else " / ".join(sizes)
        cells = [mean.groupby(level=0).first(), *found]
        yield f"| {words} | {' | '.join(map(middle, cells))} | {seeds} |"
    below = [study.below(data, "cql", USUAL - 1) for data in ("20 mean", "controller")]
    yield f"below {LEAST:.0f}, the least possible, on {' and '.join(below)} seeds"
    yield f"on {study.close('last 10', 'cql')} seeds"
    found = study.get("promised", "last 10", "sac")
    yield f"of the last ten {middle(found)} at the end, where 100 is the most ({len(found)} seeds)"
    near = study.get("swing excess near", "last 10", "sac", step=4000)
    yield f"{middle(near)} too high near recorded torques as well ({len(near)} seeds"
    cql, sac = (study.get("contrast", "last 10", name, step=10_000) for name in ("cql", "sac"))
    yield (f"is {middle(cql, 1)} above the mean of all torques after 10,000 updates, without it "
           f"{middle(sac, 1)} ({len(sac)} seeds)")
    apart = study.get("return", "all", "sac") - study.get("return", "all", "cql")
    yield f"less than SAC on {count(apart.dropna() > 0)} seeds"
    cured = study.get("return", "last 10", "uniform states and torques", 20_000)
    yield f"returns {middle(cured)} after 20,000 updates ({len(cured)} seeds)"
    seeds = study.get("gain", "all", "cql, weight 1").index
    light, usual = (-iqm(study.get("gain", "all", name).reindex(seeds))
                    for name in ("cql, weight 0.2", "cql"))
    yield f"ends {number(light)} below its teacher, at the page's 5, {number(usual)} below"
    for name in ("bc", "bc, a layer more"):
        found = study.get("return", "controller", name)
        if len(found):
            yield spread(found, words="{} ({} to {}, {} seeds)")
    for n, words in ((USUAL, "greedy returns more on {} runs"), (20_000, "after 20,000 on {}")):
        better = []
        for data in ("20 mean", "controller"):
            drawn, _, greedy = study.three_ways(data, "cql", n)
            better += [*(greedy > drawn)]
        yield words.format(count(better))
    for words, name in (("the notebook's own code returned {} here ({} seeds)", "notebook teacher"),
                        ("ours as printed {} ({};", "teacher as printed"),
                        ("ours corrected {} ({})", "teacher")):
        found = study.get("return", "", name)
        yield words.format(middle(found), len(found))


def study_claims(study):
    """Rows of study/README's tables, the same way."""
    for data, name in itertools.product(DATA, ("sac", "cql", "cql, a layer more")):
        for updates in (20_000, USUAL):
            found = study.three_ways(data, name, updates)
            if len(found[0]):
                cells = " | ".join(map(middle, found))
                yield f"| {data} | {name} | {updates:,} | {cells} | {len(found[0])} |"
    for n, data in DOSES.items():
        found = study.get("return", data, "sac")
        if len(found):
            yield f"| {n} | {spread(found)} | {study.close(data, 'sac')} |"


# Tables

def tables(study):
    """(title, a line about it, a frame of words) of each."""
    finals = study.finals
    usual = finals[(finals["updates"] == USUAL) & finals["name"].isin(STUDENTS)]
    found = table(usual, ["data", "name"], {
        "data mean": 0, "coverage": 1, "return": 0, "mean": 0, "greedy": 0, "promised": 1,
        "delivered": 1, "outside": 3})
    found["as good as its teacher"] = list(map(study.close, found["data"], found["name"]))
    yield ("Returns by data", "100 final episodes after 50,000 updates: by torques as drawn "
           "(return), by the policy's mean (mean), by the best of 41 for the critic (greedy). As "
           f"good: at most {CLOSE} below it in the last five tests.", found)
    rows = []
    for data in usual["data"].unique():
        sac, cql, bc = (study.get("outcome", data, name) for name in STUDENTS)
        above = [count(study.get("return", data, name) > study.get("data mean", data, name))
                 for name in STUDENTS]
        rows.append([data, minus(cql, sac), minus(cql, bc), *above])
    yield ("Which student wins, seed by seed", "The last five tests; above its data: 100 final "
           "episodes against the data's mean.", framed(
               rows, "data", "cql minus sac", "cql minus bc", "sac above its data", "cql", "bc"))
    yield from tables_of_time(study)
    yield from tables_of_the_measure(study)
    yield from tables_of_others(study)


def framed(rows, *columns):
    return pd.DataFrame(rows, columns=columns)


def tables_of_time(study):
    """Students after 20,000 updates and at the end; and the dose of random episodes."""
    ends, blame, after, get = [], [], ("20,000", "50,000", "100,000"), study.get
    for data, name in itertools.product(RECORDED, sorted(set(study.finals["name"]))):
        cells = [spread(get(column, data, name, n)) for column in ("return", "promised")
                 for n in (20_000, USUAL, 100_000)]
        if set(cells) != {"–"} and "d3rlpy" not in name:
            below = [study.below(data, name, n - 1) for n in (20_000, USUAL)]
            ends.append([data, name, *cells, *below])
    for data, name in itertools.product(DATA, ("sac", "cql", "cql, a layer more")):
        found = [x for n in (20_000, USUAL) for x in study.three_ways(data, name, n)]
        if any(map(len, found)):
            blame.append([data, name, *map(spread, found)])
    yield ("Recordings of finished policies", "20 episodes; the columns say after how many updates."
           f" Below: on how many seeds a test promised less than {LEAST:.0f}, the worst reward for "
           "ever.", framed(ends, "data", "student", *(f"return, {n}" for n in after), *(
               f"promised, {n}" for n in after), *(f"below by {n}" for n in after[:2])))
    yield ("Who is to blame: the policy or the critic?", "A critic whose greedy torques return "
           "much where the drawn ones (return) do not has a policy that is late.", framed(
               blame, "data", "student", *(f"{way}, {n}" for n in after[:2] for way in WAYS)))
    rows = [[n, *(spread(get(way, data, "sac")) for way in WAYS),
             spread(get("promised", data, "sac"), 1), study.close(data, "sac")]
            for n, data in DOSES.items()]
    yield ("How many random episodes does SAC need?", "Before a teacher's last ten; 50,000 "
           "updates.", framed(rows, "episodes", *WAYS, "promised", "as good as its teacher"))


def tables_of_the_measure(study):
    tests, finals = study.tests, study.finals
    for title, note, columns, digits in (
            ("Excess of torques near and far from the data's", "Promised minus delivered minus "
             "bonus, by measure.py.", ["excess near", "excess far", "far minus near"], 1),
            ("Rank correlations of a state's promises", "With what then comes of its torques.", [
                f"rank {what}" for what in ("delivered", "delivered and bonus", "density", "good")],
             2)):
        columns = {f"{kind} {what}": digits for kind in ("swing", "stand") for what in columns}
        found = tests.dropna(subset=[x for x in columns if x in tests], how="all")
        yield title, note, table(found, ["data", "name", "step"], columns)
    changed = finals[(finals["updates"] == 20_000) & (finals["data"] == "last 10")
                     & finals["name"].isin(INTERVENTIONS)]
    beside = tests[(tests["step"] == 20_000) & (tests["data"] == "last 10")
                   & tests["name"].isin(["sac", "cql"]) & tests["seed"].isin(changed["seed"])]
    yield ("Interventions on sac of the last 10", "100 final episodes after 20,000 updates; sac "
           "and cql of the same seeds by their test at 20,000.",
           table(pd.concat([changed, beside]), ["name"], {
               "return": 0, "mean": 0, "greedy": 0, "promised": 1, "delivered": 1,
               "temperature": 3}))


def tables_of_others(study):
    finals, get = study.finals, study.get
    right, rows = get("return", "", "teacher"), []
    for name in sorted(set(finals[finals["data"] == ""]["name"])):
        found = get("return", "", name)
        gap = (found - right).dropna()
        rows.append([name, spread(get("return", "", name, step=90)), spread(found),
                     number(iqm(gap), sign="+"), count(gap < 0), each(found)])
    yield ("Teachers: original, as printed, corrected", "notebook's outputs: what the course's "
           "file stores; notebook teacher: its own code, run here. sign and range act in the "
           "penalty, which a teacher does not have.", framed(
               rows, "teacher", "test at epoch 90", "100 episodes after epoch 99",
               "minus the corrected", "lower on", "by seed"))
    rows = []
    for data, (weight, name) in itertools.product(("last 10", "all"), WEIGHTS.items()):
        seeds = get("gain", data, "cql, weight 1").index
        gain, found = (get(x, data, name).reindex(seeds) for x in ("gain", "return"))
        rows.append([data, weight, number(iqm(gain), sign="+"), spread(found), each(gain)])
    yield ("Weights on the same seeds", "50,000 updates. Gain: the last five tests minus the "
           "teacher's.", framed(rows, "data", "weight", "gain", "return", "gain by seed"))
    rows = []
    for data, name in itertools.product(DATA, PEERS):
        after, kind = get("return", data, name, 30_000), name.removeprefix("d3rlpy ")
        cells = []
        for what, who in itertools.product(("return", "promised"), (name, kind)):
            found = get(what, data, who, step=20_000)           # or the last of a run that ended
            found = found.combine_first(get(what, data, who, step=19_999))
            cells.append(spread(found.reindex(after.index)))
        if len(after):
            rows.append([data, name, *cells, spread(after)])
    yield ("Another implementation: d3rlpy", "The same data and seeds. Tests after 20,000 updates, "
           "theirs and ours; theirs also in 100 episodes after 30,000.", framed(
               rows, "data", "student", "return", "ours", "promise", "ours promises",
               "return after 30,000"))
    where = pd.DataFrame([{"processor": line.get("cpu") or "unknown", "lines": line["seed"],
                           "commit": line["commit"][:7] + line["commit"][40:]}
                          for line in study.lines])
    yield ("Where the lines were made", '"-dirty": something was not committed yet.',
           where.groupby(["processor", "commit"])["lines"].count().reset_index())


def write_tables(study, path):
    parts = ["# The study's tables\n", "Made by study/report.py from cells.jsonl. A figure is the "
             "IQM over seeds, the mean without the lowest and the highest quarter (lowest to "
             "highest) [seeds]: with 5 seeds one is dropped on each side, with 2 or 3 it is the "
             "plain mean. A row's runs have all the same number of updates.\n"]
    for title, note, frame in tables(study):
        words = frame.astype(str).to_markdown(index=False, disable_numparse=True)
        parts += [f"## {title}\n", f"{note}\n", words + "\n"]
    parts += ["## What README quotes\n", *(f"- {claim}" for claim in claims(study))]
    parts += ["\n## What the study's README quotes\n", *(f"- {x}" for x in study_claims(study))]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


# Pictures

def draw_regimes(study, path):
    """Returns by data: a small dot for each seed, a large one for the IQM."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    shown = [*LASTS, "all", "random 10 + last 10", "random 20", "20 mean", "controller"]
    for place, data in enumerate(shown):
        for shift, name in zip((-0.25, 0, 0.25), STUDENTS):
            values = study.get("return", data, name)
            spots = place + shift + np.linspace(-0.08, 0.08, len(values) + 2)[1:-1]
            axes.plot(spots, values, "o", color=COLOURS[name], ms=4, alpha=0.5, mew=0)
            axes.plot(place + shift, iqm(values), "o", color=COLOURS[name], ms=11, mec="k",
                      label=name.upper() if place == 0 else None)
    axes.axhline(iqm(study.get("return", "", "teacher")), color="k", ls=":", label="the teachers")
    words = {"20 mean": "20 of a\nteacher,\nno noise", "controller": "20 of a\ncontroller"}
    axes.set_xticks(range(len(shown)), [words.get(data, data.replace(" + ", "\n+ "))
                                        for data in shown], fontsize=11)
    axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(-1750, 0))
    axes.set_ylabel("return of an episode (higher is better)", fontsize=12)
    axes.set_xlabel("data: a teacher's last 5 to all 100 episodes; with random torques; recordings "
                    "of a finished teacher and of a controller", fontsize=12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("What a student returns depends on its data (small: a seed, large: the IQM)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    figure.savefig(path)


def draw_last10(study, path):
    """Sac and cql on the last 10 along training; thick the IQM, thin every seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 5.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    tests = study.tests[(study.tests["data"] == "last 10") & (study.tests["of"] == USUAL)]
    for axes, column, style in ((left, "return", "-"), (right, "promised", "-"),
                                (right, "delivered", "--")):
        curves = tests.pivot_table(index="step", columns=["name", "seed"], values=column)
        for name in ("sac", "cql"):
            axes.plot(curves[name], style, color=COLOURS[name], lw=0.5, alpha=0.45)
            axes.plot(curves[name].apply(iqm, axis=1), style, color=COLOURS[name], lw=2.5,
                      label=f"{name}: {column} ({curves[name].shape[1]} seeds)")
    left.axhline(iqm(study.get("return", "", "teacher")), color="k", ls=":", label="the teachers")
    right.axhline(MOST, color="k", ls="-.", label="the most possible")
    left.set(ylim=(-1750, 0), title="Return of an episode", xlabel="update")
    right.set(ylim=(-50, 150), title="What the critic promises, and what is delivered",
              xlabel="update", ylabel="discounted rewards, 100 at most")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Students of the teacher's last 10 episodes (thick: the IQM, thin: a seed)")
    figure.savefig(path)


def main():
    study = Study(RESULTS / "cells.jsonl")
    write_tables(study, RESULTS / "tables.md")
    draw_regimes(study, RESULTS / "regimes.png")
    draw_last10(study, RESULTS / "last10.png")
    print(f"{RESULTS / 'tables.md'} and two pictures, from {len(study.lines)} lines")


if __name__ == "__main__":
    main()
