"""results/study.md and its figures, from results/study.jsonl, of as many cells as are finished.

python tests/study.py --report     the page and three figures
python tests/study.py --picture    torques.png and torques10.png, whose students are trained here
"""
import contextlib
import itertools
import json
import math
import os
import textwrap

import numpy as np

import study

STUDENTS = "sac", "cql", "bc"
FOUR = "last 10", "last 85", "all", "random 20"            # all their students are shown
SHORT = *FOUR, "2,000 rows"                                # the rows of README's table
PLAIN = [*study.LASTS, "all", "random 10 + last 10", "random 20"]         # regimes.png, in order
FAILS = 800                  # below its teacher: a student that fails
APART = 10                   # between outcome and final 100 episodes: both are told
CLOSE = 25                   # below its teacher: as good as it
HIDDEN = 150                 # from the group's IQM: a seed that the IQM hides
FEWEST = 3                   # seeds for a verdict
LITTLE = 5                   # of 100: a range of deliveries that is little
PICTURED = 10_001            # updates: the last test is that of update 10,000


def report():
    """Write study.md and three figures."""
    runs = Study()
    parts = []
    for part in (first_page, returns_of_students, promises, torques_measured, interventions, errata,
                 verdicts, other_tables, same_digits, quoted):
        parts += part(runs)
    (study.RESULTS / "study.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    for draw in (draw_last10, draw_students, draw_regimes):
        draw(runs)
    print(f"{study.RESULTS / 'study.md'} and three figures, from {len(runs.lines)} cells")


# The lines, and what is asked of one line

class Study:
    """The lines that count, by data and student, in the grid's order."""

    def __init__(self):
        have = study.finished()
        self.lines = [have[study.key(cell)] for cell in study.grid() if study.key(cell) in have]
        self.teachers, self.printed, self.again = {}, {}, []
        self.alone = {name: {} for name in study.ERRATA}     # teachers with one erratum
        self.groups = {}
        for line in self.lines:
            errata, seed = line["as_printed"], line["seed"]
            if line["kind"] == "teacher" and not errata:
                self.teachers[seed] = line
            elif line["kind"] == "teacher" and len(errata) == 4:
                self.printed[seed] = line
            elif line["kind"] == "teacher":
                self.alone[errata[0]][seed] = line
            elif line["student"] != seed:
                self.again.append(line)
            else:
                self.groups.setdefault((line["data"], name_of(line)), {})[seed] = line

    def get(self, data, name):
        """{seed: line}, maybe empty."""
        return self.groups.get((data, name), {})

    def values(self, data, name, function=None):
        """What a function (the outcome) gives for a group's lines, where it was measured."""
        function = function or outcome
        found = [function(line) for line in self.get(data, name).values()]
        return known(found)

    def gain(self, line):
        """A student's outcome minus its teacher's."""
        return outcome(line) - outcome(self.teachers[line["seed"]])

    def final_gain(self, line):
        """A student's final 100 episodes minus its teacher's."""
        return line["return"] - self.teachers[line["seed"]]["return"]

    def to_teacher(self, data, name):
        return self.values(data, name, self.gain)

    def minus(self, one, other, function=None):
        """One (data, student) group's outcome, or something else, minus another's, for the seeds
        that both have."""
        function = function or outcome
        one, other = self.get(*one), self.get(*other)
        return known([function(one[seed]) - function(other[seed]) for seed in one if seed in other])

    def pairs(self, one, other):
        """The IQM of such a difference, its interval from 10 seeds on, how often it is positive."""
        found = self.minus(one, other)
        if not len(found):
            return "not run"
        more = ""
        if len(found) >= 10:
            low, high = interval(found)
            more = f" (95 %: {signed(low)} to {signed(high)})"
        return f"{signed(iqm(found))}{more}, better on {count(found > 0)}"

    def seeds_of(self, data):
        """The seeds that have a student of STUDENTS on some data."""
        return sorted({seed for name in STUDENTS for seed in self.get(data, name)})

    def how_many(self, data):
        """The number of seeds of sac, cql and bc: one number where they are equal."""
        numbers = [len(self.get(data, name)) for name in STUDENTS]
        return str(numbers[0]) if len(set(numbers)) == 1 else " / ".join(map(str, numbers))

    def teacher(self, data, function):
        """What a function gives for the teachers of a dataset's students."""
        return known([function(self.teachers[seed]) for seed in self.seeds_of(data)])

    def measured(self, data, name, update, column):
        """{seed: a number of torques.measure}, for the seeds where it has a value."""
        found = {}
        for seed, line in self.get(data, name).items():
            value = line.get("measures", {}).get(str(update), {}).get(column)
            if value is not None:
                found[seed] = value
        return found

    def measure(self, data, name, update, column):
        """The same numbers alone."""
        return known(list(self.measured(data, name, update, column).values()))

    def measure_pairs(self, data, name, update, one, other):
        """One column minus another, seed by seed."""
        one = self.measured(data, name, update, one)
        other = self.measured(data, name, update, other)
        return known([one[seed] - other[seed] for seed in one if seed in other])


def name_of(line):
    """What a student is called in tables and figures."""
    if line["kind"] != "cql":
        return line["kind"]
    if line["as_printed"]:
        return "cql as printed" if len(line["as_printed"]) == 4 else f"cql, {line['as_printed'][0]}"
    return "cql" if line["weight"] == 5.0 else f"cql, weight {line['weight']:g}"


def outcome(line):
    """The primary outcome: the mean return of the last five tests, whose 10 starts a seed's teacher
    and all its students share."""
    return float(np.mean([test[1] for test in line["tests"][-5:]]))


def returned(line):
    """The mean return of the final 100 episodes."""
    return line["return"]


def at(line, update, column):
    """A column of the test at an update: 1 return, 2 promised, 3 delivered, 4 contrast. The last
    test of 50,000 updates is at 49,999, that of an intervention's 20,000 at 19,999."""
    for test in line["tests"]:
        if test[0] == update:
            return math.nan if test[column] is None else test[column]
    return math.nan


def last(line, column):
    """The same column of the last test."""
    return at(line, line["tests"][-1][0], column)


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
    for test in line["tests"]:
        if test[2] is not None and test[2] > 100:
            return test[0]
    return None


# Numbers and words

def iqm(values):
    """Interquartile mean: without the lowest and the highest quarter (Agarwal et al. 2021)."""
    values = np.sort(np.asarray(values, float), axis=-1)
    if not values.shape[-1]:
        return math.nan
    cut = values.shape[-1] // 4
    return values[..., cut:values.shape[-1] - cut].mean(axis=-1)


def interval(values):
    """95 % bootstrap interval of the IQM over seeds; with 5 seeds it covers about 90 %."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(0).choice(values, (20_000, len(values)))
    return np.percentile(iqm(draws), [2.5, 97.5])


def known(values):
    """An array of those that are numbers."""
    values = np.array(values, float)
    return values[~np.isnan(values)]


def count(found):
    return f"{sum(found)} of {len(found)}"


def number(value, digits=0):
    """A number as text, with a dash where there is none."""
    if math.isnan(value):
        return "–"
    return f"{value:z,.{digits}f}"


def signed(value, digits=0):
    return "–" if math.isnan(value) else f"{value:+z,.{digits}f}"


def middle(values, digits=0):
    """The IQM as text."""
    return number(iqm(values), digits)


def spread(values, digits=0):
    """IQM (lowest to highest)."""
    if not len(values):
        return "–"
    return f"{middle(values, digits)} ({number(min(values), digits)} to " \
           f"{number(max(values), digits)})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def paragraph(text):
    return textwrap.fill(" ".join(text.split()), 100) + "\n"


# The first page: findings, then definitions

def first_page(runs):
    yield "# The study\n"
    yield paragraph(
        f"{len(runs.lines)} of {len(study.grid())} planned runs are done. Typical: the "
        "interquartile mean over seeds (IQM), the mean without the lowest and the highest "
        "quarter. Every other word is defined below. The findings say what these seeds show, on "
        "one task of three dimensions, and no more.")
    yield "## Findings\n"
    for k, (title, seeds, text) in enumerate(findings(runs), 1):
        text = " ".join(text.split()) if seeds else "Not run yet."
        yield textwrap.fill(f"{k}. **{title}.** {text}", 100, subsequent_indent="   ")
    yield "\nTypical return of the final 100 episodes:\n"
    yield table(["data", *STUDENTS, "their teachers", "seeds"], short_rows(runs))
    yield "![Every student's return by data set](regimes.png)\n"
    yield from definitions(runs)


def short_rows(runs):
    """README's table: data, typical returns of sac, cql, bc and of their teachers, seeds."""
    rows = []
    for data in SHORT:
        row = [data]
        for name in STUDENTS:
            row.append(middle(runs.values(data, name, returned)))
        row.append(middle(runs.teacher(data, returned)))
        row.append(runs.how_many(data))
        rows.append(row)
    return rows


def typical(runs, data, name):
    return middle(runs.values(data, name, returned))


def findings(runs):
    """Titles, how many seeds each text rests on (0: not run), and the texts, in which each word
    that could turn out otherwise is computed."""
    ten = runs.to_teacher("last 10", "sac")
    yield ("Narrow data of an expert (last 10)", len(ten),
           f"sac returns typically {typical(runs, 'last 10', 'sac')} and ends more than {FAILS} "
           f"below its teacher on {count(ten < -FAILS)} seeds. cql returns "
           f"{typical(runs, 'last 10', 'cql')} and ends at most {CLOSE} below its teacher on "
           f"{close(runs, 'last 10', 'cql')}, imitation (bc) {typical(runs, 'last 10', 'bc')} and "
           f"on {close(runs, 'last 10', 'bc')}; cql minus bc: "
           f"{runs.pairs(('last 10', 'cql'), ('last 10', 'bc'))}.")
    over_sac, over_bc, both = last_85(runs)
    yield ("Nearly expert data (last 85)", len(both),
           f"cql returns more than sac on {count(over_sac > 0)} "
           f"seeds, more than bc on {count(over_bc > 0)} (typically by "
           f"{middle(over_bc)}), more than both on {count(both > 0)}. At most {CLOSE} below its "
           f"teacher ends cql on {close(runs, 'last 85', 'cql')}, bc on "
           f"{close(runs, 'last 85', 'bc')}, sac on {close(runs, 'last 85', 'sac')}.")
    below = runs.minus(("all", "cql"), ("all", "sac"))
    yield ("Broad data with poor episodes (all)", len(below),
           f"sac returns {typical(runs, 'all', 'sac')}, "
           f"its teachers {middle(runs.teacher('all', returned))}. cql's outcome is below sac's on "
           f"{count(below < 0)} seeds; it returns {typical(runs, 'all', 'cql')}, and "
           f"{middle(weight_values(runs, 'all', 'cql, weight 0.2', returned))} with weight 0.2 "
           f"where the same {len(weight_seeds(runs, 'all'))} seeds return "
           f"{middle(weight_values(runs, 'all', 'cql', returned))} with weight 5.")
    means = runs.values("random 20", "cql", lambda line: line["data mean"])
    yield ("Random torques alone", len(means),
           f"sac returns {typical(runs, 'random 20', 'sac')}, cql "
           f"{typical(runs, 'random 20', 'cql')}, bc {typical(runs, 'random 20', 'bc')}; the data "
           f"returned {middle(means)} ({runs.how_many('random 20')} seeds).")
    difference = runs.measure("last 10", "sac", 4000, "swing far minus near")
    standing = runs.measure("last 10", "sac", 4000, "stand far minus near")
    near = runs.measure("last 10", "sac", 4000, "swing excess near")
    far = runs.measure("last 10", "sac", 4000, "swing excess far")
    yield ("Unseen torques", len(difference),
           f"At update 4,000 sac of the last 10 over-estimates a torque far from the "
           f"data's by {number(abs(iqm(difference)), 1)} {more_or_less(iqm(difference))} than a "
           f"near one in the same swinging state, by more on {count(difference > 0)} seeds; in "
           f"standing ones the difference is {spread(standing, 1)}. All of them are promised too "
           f"much: near {middle(near, 1)}, far {middle(far, 1)} in swinging states.")
    share = runs.measure("last 10", "sac", 10_000, "own neither share")
    yield ("Seen and unseen states", len(share),
           f"Along its own episodes at update 10,000 sac of the last 10 promises too much, like "
           f"with like (see Words): by {own(runs, 'both')} where the data has state and torque, by "
           f"{own(runs, 'state only')} where it has the state only, by {own(runs, 'neither')} "
           f"where it has neither; these are {number(100 * iqm(share))} % of its steps "
           f"({len(share)} seeds).")
    best, chance, gained = nearest(runs, "sac")
    cql_best, _, cql_gained = nearest(runs, "cql")
    yield ("The order of near rows' torques", len(best),
           f"At update 4,000 the best by sac's critic among the torques of the 20 nearest rows "
           f"returns {middle(best)}, a random one of them {middle(chance)}, the best by cql's "
           f"critic {middle(cql_best)}; sac's is worse than the random one on {count(gained < 0)} "
           f"seeds, cql's on {count(cql_gained < 0)}. Over all torques of a swinging state the "
           f"rank correlation of sac's promises with what it then delivers itself is "
           f"{order(runs, 'sac', 'delivered')}, cql's {order(runs, 'cql', 'delivered')}; with what "
           f"a good policy then delivers {order(runs, 'sac', 'good')} and "
           f"{order(runs, 'cql', 'good')}.")
    (plain, uniform), (states, both) = states_or_torques(runs)
    yield ("States or torques", len(runs.get("last 10", "uniform states")),
           f"As many rows as the last 10 has, 20,000 updates of sac, return of the last test: the "
           f"data's states with the teacher's torques {middle(plain)}, with uniform torques "
           f"{middle(uniform)}; uniform states with the teacher's torques {spread(states)}, with "
           f"uniform torques {spread(both)}. At most {CLOSE} below its teacher (last five tests) "
           f"end uniform torques on {close(runs, 'last 10', 'uniform torques')}, uniform states on "
           f"{close(runs, 'last 10', 'uniform states')}, both on "
           f"{close(runs, 'last 10', 'uniform states and torques')}.")
    yield ("Changed on purpose, last 10", len(changed_seeds(runs)),
           f"In the test after 20,000 updates {changed(runs, 'clone target')}; "
           f"{changed(runs, 'fixed temperature')}; plain sac of the same seeds "
           f"{plain_sac(runs)}.")
    pushed = runs.measure("last 10", "cql", 20_000, "swing far minus near")
    yield ("What the penalty does", len(pushed),
           f"At update 20,000 cql of the last 10 promises "
           f"{number(abs(iqm(pushed)))} {more_or_less(iqm(pushed))} for far torques than for near "
           f"ones, like with like, in swinging states. The rank correlation of its promises with "
           f"the data's density / with what a good policy delivers is "
           f"{ranks(runs, 'last 10', 'cql')} on the last 10, sac's "
           f"{ranks(runs, 'last 10', 'sac')}; on all {ranks(runs, 'all', 'cql')}, sac's "
           f"{ranks(runs, 'all', 'sac')}.")
    paired = printed_gains(runs)
    students = runs.pairs(("all", "cql"), ("all", "cql as printed"))
    yield ("The page's formulas", len(paired),
           f"Teachers as printed return typically "
           f"{middle(finals(runs.printed))}, corrected ones of the same seeds "
           f"{middle(finals(same_teachers(runs, runs.printed)))}; lower on {count(paired < 0)}, "
           f"worst {number(lowest(runs.printed))} against "
           f"{number(lowest(same_teachers(runs, runs.printed)))}. Students, cql minus cql as "
           f"printed on all: {students}.")


def more_or_less(value):
    return "more" if value > 0 else "less"


def own(runs, kind):
    return middle(runs.measure("last 10", "sac", 10_000, f"own {kind} excess"))


def rank(runs, data, name, what="density", kind="swing"):
    """A rank correlation of the promises in a kind of states at update 20,000."""
    return number(iqm(runs.measure(data, name, 20_000, f"{kind} rank {what}")), 2)


def ranks(runs, data, name):
    return f"{rank(runs, data, name)} / {rank(runs, data, name, 'good')}"


def close(runs, data, name):
    return count(runs.to_teacher(data, name) > -CLOSE)


def nearest(runs, name, update=4000):
    """Returns on the last 10 by a critic's best and by a random one of the nearest rows' torques,
    and how much more the best returns, seed by seed."""
    asked = "best of the nearest", "random of the nearest"
    best, chance = (runs.measure("last 10", name, update, column) for column in asked)
    return best, chance, runs.measure_pairs("last 10", name, update, *asked)


def order(runs, name, what):
    return signed(iqm(runs.measure("last 10", name, 4000, f"swing rank {what}")), 2)


def states_or_torques(runs):
    """Returns of the test after 20,000 updates: the data's and uniform states, each with the
    teacher's and with uniform torques."""
    plain, _ = without_it(runs, changed_seeds(runs))
    changed = [at_the_end(runs, kind)[0] for kind in
               ("uniform torques", "uniform states", "uniform states and torques")]
    return (plain, changed[0]), (changed[1], changed[2])


def changed(runs, kind):
    """An intervention in half a sentence."""
    values, promised = at_the_end(runs, kind)
    return f"{kind}: return {middle(values)}, promise {middle(promised)} ({len(values)} seeds)"


def at_the_end(runs, kind):
    """Returns and promises of an intervention on the last 10, at update 20,000."""
    return [runs.values("last 10", kind, lambda line: last(line, column)) for column in (1, 2)]


def without_it(runs, seeds):
    """The same of plain sac, for some seeds."""
    lines = [line for seed, line in runs.get("last 10", "sac").items() if seed in seeds]
    return [known([at(line, 20_000, column) for line in lines]) for column in (1, 2)]


def plain_sac(runs):
    values, promised = without_it(runs, changed_seeds(runs))
    return f"{middle(values)}, promise {middle(promised)} ({len(values)})"


def changed_seeds(runs):
    """The seeds of which an intervention is done."""
    return {seed for kind in study.INTERVENTIONS for seed in runs.get("last 10", kind)}


def last_85(runs):
    """Outcomes of cql minus sac's, minus bc's, and minus the better of them, by seed."""
    cql, sac, bc = (runs.get("last 85", name) for name in ("cql", "sac", "bc"))
    better = [outcome(cql[seed]) - max(outcome(sac[seed]), outcome(bc[seed]))
              for seed in cql if seed in sac and seed in bc]
    return (runs.minus(("last 85", "cql"), ("last 85", "sac")),
            runs.minus(("last 85", "cql"), ("last 85", "bc")), known(better))


def weight_seeds(runs, data):
    """The seeds that have cql with the weights 0.2, 1 and 5."""
    names = "cql, weight 0.2", "cql, weight 1", "cql"
    return sorted(set.intersection(*(set(runs.get(data, name)) for name in names)))


def weight_values(runs, data, name, function):
    lines = runs.get(data, name)
    return known([function(lines[seed]) for seed in weight_seeds(runs, data)])


def finals(lines):
    """{seed: line} -> the returns of the final 100 episodes."""
    return known([line["return"] for line in lines.values()])


def lowest(lines):
    return min(finals(lines), default=math.nan)


def same_teachers(runs, lines):
    """The corrected teachers of the same seeds."""
    return {seed: runs.teachers[seed] for seed in lines if seed in runs.teachers}


def printed_gains(runs):
    """Final 100 episodes of the teachers as printed minus those of the corrected ones."""
    return known([runs.final_gain(line) for line in runs.printed.values()])


def definitions(runs):
    drifts = sum("outside" in line for line in runs.lines if line["kind"] != "teacher")
    measures = sum("measures" in line for line in runs.lines)
    yield "## Words\n"
    yield paragraph("""`python tests/study.py` runs what results/study.jsonl lacks, `--report`
        writes this page and its figures from it, `--picture` the two pictures of torques. A cell is
        one student on data of its seed's teacher, 50,000 updates, an intervention 20,000. **sac**:
        the student without a penalty. **cql**: with it, weight 5 if nothing else is said. **bc**:
        behaviour cloning, the same policy network learns to give the data's torques and knows no
        reward.""")
    yield paragraph("""**Return**: the mean of the final 100 episodes. **Outcome**: the mean of the
        last five tests, whose 10 starts a seed's teacher and all its students share; where its IQM
        and the return's are more than 10 apart, both are given. A figure is the IQM over seeds,
        (lowest to highest seed) behind it. Intervals are 95 % bootstrap intervals, from 10 seeds
        on. The regimes' first runs and the four errata together have the seeds 0 to 9; the measure
        over torques, the interventions and each erratum alone have seeds from 10 on, on another
        machine: a student is compared only with students and the teacher of its own seed.""")
    yield paragraph("""**last N**: the last N of the teacher's 100 episodes; **all**: the 100;
        **random 20**: 20 episodes of uniformly random torques; **random 10 + last 10**: 10 of these
        and the last 10; **2,000 rows**: drawn from all.""")
    yield paragraph(f"""**Coverage**: how many of 8 equal torque bins occur in a state cell (30
        degrees by 2 rad/s), averaged over the cells that the data visits; it also grows with the
        number of rows. **Drift**: the share of the final episodes' steps whose state cell and
        torque bin the data does not hold; it was added late and measured in {drifts} runs.
        **Contrast**: the smaller critic's value of the data's torque minus its mean over all
        torques, over 500 states of the data.""")
    yield paragraph(f"""**Promise**: the smaller critic's value. **Delivery**: what is then paid in
        the same unit, the discounted sum of (reward + 8) / 8; 100 is the most possible. **Bonus**:
        temperature times the policy's later entropies, which a promise counts and a delivery does
        not; it is below 0 where the policy is nearly certain, and grows with the temperature.
        **Excess**: promise minus delivery minus bonus, like with like: with a bonus below 0 it is
        more than what promise and delivery differ by. **The measure**
        (tests/torques.py, in {measures} runs): 17 torques in 300 states of the data that swing
        (more than 20 degrees from upright) and 300 that stand (within 20 degrees, slower than 1
        rad/s), the same noise for all torques of a state. **Near**: a torque within 0.25 N m of one
        of the 20 nearest rows'; **far**: more than 0.75 from all of them; **far minus near** is
        taken within a state. **Good**: the seed's teacher. **Radius**: the largest eigenvalue's
        size of one step around upright under the policy's mean: above 1 the pendulum falls.
        **Own**: along 20 of the student's own episodes, by whether state cell and torque bin are
        in the data.""")
    yield from machines(runs)


def machines(runs):
    names = "cpu", "threads", "python", "torch", "numpy", "gym"
    seeds, commits = {}, {}
    for line in runs.lines:
        made = tuple(line[name] for name in names)
        seeds.setdefault(made, []).append(line["seed"])
        commits.setdefault(made, set()).add(line["commit"][:7] + line["commit"][40:])
    rows = []
    for made, some in seeds.items():
        which = f"{min(some)} to {max(some)}"
        rows.append([*made, which, len(some), ", ".join(sorted(commits[made]))])
    yield table([*names, "seeds", "cells", "commits"], rows)
    yield paragraph(""""-dirty", "-changed": something was not committed yet; each line's `program`,
        a hash of the code, counts. The same machine gives the same numbers; another processor
        rounds differently, and what diverges then differs: reproducible as statistics, not digit
        by digit.""")


# Returns

def returns_of_students(runs):
    yield "## Returns by data\n"
    yield table(["data", "coverage", "data's mean", "seeds", "teachers", *STUDENTS],
                regime_rows(runs, with_final, lambda data: with_final_of_teachers(runs, data)))
    yield paragraph("""Outcome, IQM (lowest to highest); behind a semicolon the final 100 episodes'
        IQM where the two are more than 10 apart.""")
    yield "### The final 100 episodes\n"
    yield table(["data", "coverage", "data's mean", "seeds", "teachers", *STUDENTS],
                regime_rows(runs, lambda runs, data, name: spread(
                    runs.values(data, name, returned)),
                    lambda data: spread(runs.teacher(data, returned))))
    yield "### Where which student wins\n"
    rows = []
    for data in shown(runs):
        row = [data, runs.pairs((data, "cql"), (data, "sac")),
               runs.pairs((data, "cql"), (data, "bc"))]
        for name in STUDENTS:
            lines = runs.get(data, name).values()
            row.append(count([line["return"] > line["data mean"] for line in lines]))
        for name in STUDENTS:
            row.append(close(runs, data, name))
        rows.append(row)
    above = [f"{name} above its data" for name in STUDENTS]
    near = [f"{name} near its teacher" for name in STUDENTS]
    yield table(["data", "cql minus sac", "cql minus bc", *above, *near], rows)
    yield ("Above its data: the final 100 episodes against the data's mean, which has other starts."
           f"\nNear: less than {CLOSE} below its teacher, on the same starts.\n")
    yield "### Seeds that the IQM hides\n"
    yield table(["data", "student", "seeds", "IQM", "mean", "these seeds are apart"], hidden(runs))
    yield paragraph(f"""Outcome minus the teacher's. Named: seeds more than {HIDDEN} from the IQM of
        their group; groups without one are left out.""")
    yield "![Every student against its teacher](study.png)\n"
    for data in FOUR:
        yield from all_students(runs, data)


def shown(runs):
    return [data for data in study.DATA if runs.seeds_of(data)]


def regime_rows(runs, text, teachers):
    """A row for each data set: what it is like, and a text for its teachers and each student."""
    rows = []
    for data in shown(runs):
        lines = {}                                          # of the same data, one for each seed
        for name in STUDENTS:
            lines.update(runs.get(data, name))
        row = [data, middle([line["coverage"] for line in lines.values()], 1),
               middle([line["data mean"] for line in lines.values()]), runs.how_many(data),
               teachers(data)]
        for name in STUDENTS:
            row.append(text(runs, data, name))
        rows.append(row)
    return rows


def with_final(runs, data, name):
    return both_returns(runs.values(data, name), runs.values(data, name, returned))


def with_final_of_teachers(runs, data):
    return both_returns(runs.teacher(data, outcome), runs.teacher(data, returned))


def both_returns(outcomes, final, digits=0):
    """Outcomes, and beside them the final 100 episodes where the two are apart."""
    text = spread(outcomes, digits)
    if len(final) and abs(iqm(outcomes) - iqm(final)) > APART:
        text += f"; {middle(final, digits)}"
    return text


def hidden(runs):
    rows = []
    for (data, name), lines in runs.groups.items():
        values = runs.to_teacher(data, name)
        apart = []
        for seed, line in lines.items():
            if abs(runs.gain(line) - iqm(values)) > HIDDEN:
                apart.append(f"{seed}: {signed(runs.gain(line))}")
        if apart:
            rows.append([data, name, len(values), signed(iqm(values)), signed(values.mean()),
                         ", ".join(apart)])
    return rows


def all_students(runs, data):
    rows = []
    for name in [name for which, name in runs.groups if which == data]:
        values = runs.values(data, name)
        sure = "–"
        if len(values) >= 10:
            low, high = interval(values)
            sure = f"{number(low)} to {number(high)}"
        gains = both_returns(runs.to_teacher(data, name),
                             runs.values(data, name, runs.final_gain))
        rows.append([name, len(values), spread(values), sure, gains,
                     spread(runs.values(data, name, returned)),
                     spread(runs.values(data, name, excess), 1),
                     number(runs.values(data, name, lambda line: line["minutes"]).mean(), 1)])
    if rows:
        yield f"### All students of {data}\n"
        yield table(["student", "seeds", "outcome", "95 %", "minus its teacher's",
                     "final 100 episodes", "excess", "minutes"], rows)


# Promises along training

def promises(runs):
    yield "## Promises, contrast, drift\n"
    yield "![sac and cql on the last 10 episodes](last10.png)\n"
    asked = [
        ("Drift, in % of the steps", drift, 1),
        ("Contrast at update 4,000", lambda line: at(line, 4000, 4), 2),
        ("Contrast at the end", lambda line: last(line, 4), 2),
        ("Promised at the final episodes' start", lambda line: line["promised"], 1),
        ("Delivered there, 100 at most", lambda line: line["delivered"], 1),
        ("Excess of the promise, like with like", excess, 1),
        ("Temperature at the end", lambda line: line["temperature"], 3)]
    for title, function, digits in asked:
        who = STUDENTS if function is drift or title.startswith("Delivered") else STUDENTS[:2]
        rows = []
        for data in shown(runs):
            values = [runs.values(data, name, function) for name in who]
            rows.append([data, " / ".join(str(len(some)) for some in values),
                         *(spread(some, digits) for some in values)])
        yield f"### {title}\n"
        yield table(["data", "seeds", *who], rows)
    yield "### When sac fails, seed by seed\n"
    rows = []
    for data in shown(runs):
        row = [data]
        for function in (lost, above_100):
            found = [function(line) for line in runs.get(data, "sac").values()]
            row.append(", ".join("never" if x is None else f"{x:,}" for x in found))
        rows.append(row)
    yield table(["data", "return below the untrained student's for good from update",
                 "promise above 100 from update"], rows)
    yield 'By seed. "Never" is no success: a failing return may stay near the untrained one.\n'


# The measure over torques

def torques_measured(runs):
    yield "## What a critic promises for each torque, and what is delivered\n"
    yield ("![sac above, cql below, seed 0: promise and delivery over the torques of three states]"
           "(torques.png)\n")
    yield "Another seed, 10:\n"
    yield "![The same for seed 10](torques10.png)\n"
    yield paragraph("""Students of the last 10 at update 10,000, trained for these pictures on the
        machine that made them; in the row's title the return of 100 episodes.""")
    yield "### Found in a probe: does it come again?\n"
    words = {True: "comes again", False: "does not", None: "open"}
    rows = []
    for what, probe, ours, seeds, again in probed(runs):
        rows.append([what, probe, ours, seeds, words[again]])
    yield table(["found in the probe", "the probe's figures", "here (IQM)", "seeds", "verdict"],
                rows)
    yield paragraph(f"""The rule, in `probed` of tests/report.py: a finding comes again when each
        difference that it claims has its IQM on the claimed side and so have more than half of the
        seeds; below {FEWEST} seeds it stays open. "Fails": more than {FAILS} below the teacher.
        "Little": at most {LITTLE} of 100. Excesses here are like with like; whether the probe's
        along own episodes were is not known: their order compares, their sizes may not.""")
    yield "### All of the measure\n"
    yield paragraph("""IQM over seeds; "swing" and "stand" are the kinds of states. The first table
        has excesses: of torques near and far from the data's, and far minus near within a state,
        with its lowest and highest seed.""")
    yield measure_table(runs, [
        *((f"{kind} {what}", f"{kind} {what}", 1, what == "far minus near")
          for kind in ("swing", "stand")
          for what in ("excess near", "excess far", "far minus near", "bonus"))])
    yield "Rank correlations of a state's promises over the torques:\n"
    yield measure_table(runs, [
        *((f"{kind}: {what}", f"{kind} rank {what}", 2, False)
          for kind in ("swing", "stand")
          for what in ("delivered", "delivered and bonus", "density", "good"))])
    yield "Means and ranges (the most of a state's torques minus the least), and the radius:\n"
    yield measure_table(runs, [
        *((f"{kind} {what}", f"{kind} {what}", 1, False) for kind in ("swing", "stand")
          for what in ("promised", "delivered", "range promised", "range delivered")),
        ("radius", "radius", 3, True)])
    yield "Along the student's own episodes: excess, and share of the steps:\n"
    yield measure_table(runs, [
        ("excess", "own excess", 1, False),
        *((f"{what}: {kind}", f"own {kind} {what}", 2 if what == "share" else 1, False)
          for kind in ("both", "state only", "neither") for what in ("excess", "share"))])


def measure_table(runs, columns):
    """A row for each data set, update and student. A column: its title, the measure's name, its
    digits, and whether the lowest and highest seed are told."""
    rows = []
    for data, update, name in itertools.product(study.MEASURED, study.MOMENTS, ("sac", "cql")):
        seeds = len(runs.measured(data, name, update, "radius"))
        if not seeds:
            continue
        row = [data, f"{update:,}", name, seeds]
        for _, column, digits, whole in columns:
            values = runs.measure(data, name, update, column)
            text = spread(values, digits) if whole else middle(values, digits)
            fewer = f" [{len(values)}]" if 0 < len(values) < seeds else ""
            row.append(text + fewer)
        rows.append(row)
    if not rows:
        return "Not run yet.\n"
    titles = [title for title, *_ in columns]
    return table(["data", "update", "student", "seeds", *titles], rows) + (
        "\n[n]: only n seeds have states to measure it in.\n")


def probed(runs):
    """Eight rows: what a probe found, its figures, ours, how many seeds, and whether it comes
    again (None: open)."""
    def value(data, name, update, column):
        return runs.measure(data, name, update, column)

    early = value("last 10", "sac", 2000, "swing far minus near")
    later = value("last 10", "sac", 4000, "swing far minus near")
    standing = [value("last 10", "sac", update, "stand far minus near") for update in (2000, 4000)]
    yield ("sac does not over-estimate unseen torques more than seen ones (last 10)",
           "far minus near -4.8 to +0.2 at 2,000, -2.6 to -0.1 at 4,000",
           f"swing {spread(early, 1)} at 2,000, {spread(later, 1)} at 4,000; stand "
           f"{spread(standing[0], 1)} and {spread(standing[1], 1)}",
           len(later), every(*(opposite(mostly(some)) for some in (early, later, *standing))))

    unseen = runs.measure_pairs("last 10", "sac", 10_000, "own neither excess", "own both excess")
    outside = 100 * (1 - value("last 10", "sac", 10_000, "own both share"))
    yield ("it does so in unseen states (own episodes at 10,000, last 10)",
           "+36 state and torque in the data, +30 state only, +58 neither; 32 to 66 % of the steps "
           "outside",
           f"{own(runs, 'both')} both, {own(runs, 'state only')} state only, "
           f"{own(runs, 'neither')} neither; neither minus both {spread(unseen, 1)}; "
           f"{spread(outside)} % outside", len(unseen), mostly(unseen))

    best, chance, gained = nearest(runs, "sac")
    yield ("its order of torques is wrong even among seen ones (last 10, 4,000)",
           "best of the nearest -1,358 to -1,569, random -1,066 to -1,309",
           f"best {spread(best)}, random {spread(chance)}", len(gained), mostly(-gained))

    clone, plain = runs.get("last 10", "clone target"), runs.get("last 10", "sac")
    both = [seed for seed in clone if seed in plain]
    promised = known([last(clone[seed], 2) for seed in both])
    plainly = known([at(plain[seed], 20_000, 2) for seed in both])
    short = known([outcome(runs.teachers[seed]) - last(clone[seed], 1) for seed in both])
    yield ("bootstrapping through its own torques explains the promise above 100, not the failure "
           "(20,000, last 10)",
           "target's torque from bc: promise 45 and 51, plain 118 and 66; return -1,648 and -1,531 "
           "all the same",
           f"promise {spread(promised)}, plain {spread(plainly)}, above 100 on "
           f"{count(plainly > 100)}; return "
           f"{spread(known([last(clone[seed], 1) for seed in both]))}", len(both),
           every(mostly(plainly - 100), mostly(100 - promised), mostly(short - FAILS)))

    pushed = value("last 10", "cql", 20_000, "swing far minus near")
    near, far = (value("last 10", "cql", 20_000, f"swing excess {x}") for x in ("near", "far"))
    yield ("CQL pushes the promise down away from the data's torques (last 10, 20,000)",
           "over-estimate near / far -52 / -111",
           f"swing {middle(near)} / {middle(far)}; far minus near {spread(pushed)}", len(pushed),
           mostly(-pushed))

    leads = []
    for data, name in (("last 10", "cql"), ("all", "cql"), ("all", "sac")):
        leads.append(runs.measure_pairs(data, name, 20_000, "swing rank density",
                                        "swing rank good"))
    yield ("so its order of torques is the data's density (rank with density / with a good "
           "policy's delivery)",
           "cql last 10 +.85 / +.43, cql all +.78 / +.25, sac all +.35 / +.54",
           f"swing, 20,000: cql last 10 {ranks(runs, 'last 10', 'cql')}, cql all "
           f"{ranks(runs, 'all', 'cql')}, sac all {ranks(runs, 'all', 'sac')}",
           " / ".join(str(len(lead)) for lead in leads),
           every(mostly(leads[0]), mostly(leads[1]), mostly(-leads[2])))

    narrow = value("last 10", "sac", 20_000, "radius")
    held = value("last 10", "cql", 20_000, "radius")
    broad = value("all", "sac", 20_000, "radius")
    yield ("upright, where all torques are seen, sac's policy of the last 10 is unstable",
           "radius 1.09 to 1.36 on 4 of 5 seeds, cql 0.93, sac of all 0.91",
           f"20,000: {spread(narrow, 2)}, above 1 on {count(narrow > 1)}; cql {spread(held, 2)}; "
           f"sac of all {spread(broad, 2)}", f"{len(narrow)} / {len(held)} / {len(broad)}",
           every(mostly(narrow - 1), mostly(1 - held), mostly(1 - broad)))

    moved = [value("last 10", name, 4000, "swing range delivered") for name in ("sac", "cql")]
    yield ("one torque moves the delivery little", "range in a swing state about 1 to 2 of 100",
           f"last 10, 4,000: sac {spread(moved[0], 1)}, cql {spread(moved[1], 1)}",
           f"{len(moved[0])} / {len(moved[1])}",
           every(mostly(LITTLE - moved[0]), mostly(LITTLE - moved[1])))


def mostly(values):
    """Whether the IQM and more than half of the values are above 0; None for fewer than 3."""
    if len(values) < FEWEST:
        return None
    return bool(iqm(values) > 0 and np.mean(values > 0) > 0.5)


def opposite(answer):
    return None if answer is None else not answer


def every(*answers):
    """Whether all are true; None where one is not known."""
    return None if None in answers else all(answers)


# Interventions

def interventions(runs):
    yield "## Interventions on sac of the last 10\n"
    yield paragraph("""Each changes one thing and has 20,000 updates. "clone target": a frozen clone
        of the data chooses the torque and the entropy in the critics' target. "uniform torques":
        the data's states, but torques drawn uniformly, with the reward and next state that follow.
        "uniform states": as many single steps from any angle and speed, with the torque that the
        teacher's policy draws there. "uniform states and torques": both. "fixed temperature": it
        stays 0.01. Beside them plain sac and cql of the same seeds at update 20,000; return,
        promise and delivery of the test's 10 episodes.""")
    rows = []
    seeds = changed_seeds(runs)
    for kind in study.INTERVENTIONS:
        lines = runs.get("last 10", kind).values()
        temperatures = known([line["temperature"] for line in lines])
        bonuses = known([line["entropy bonus"] for line in lines])
        rows.append([kind, len(lines), *steps_in(lines, 19_999), spread(finals_of(lines)),
                     spread(temperatures, 3), spread(bonuses, 1)])
    for name in ("sac", "cql"):
        found = runs.get("last 10", name)
        lines = [found[seed] for seed in found if seed in seeds]
        temperatures = known([line["temperature"] for line in lines])
        bonus = known([runs.measured("last 10", name, 20_000, "swing bonus").get(seed, math.nan)
                       for seed in found if seed in seeds])
        rows.append([f"plain {name}", len(lines), *steps_in(lines, 20_000), "–",
                     f"at 50,000: {spread(temperatures, 3)}", spread(bonus, 1)])
    yield table(["student", "seeds", "return", "promised", "delivered", "final 100 episodes",
                 "temperature", "bonus"], rows)
    yield paragraph("""The temperature of plain students was written down at the end only. Bonus: of
        the final episodes' first state, for plain students of the measure's swinging states at
        20,000: what the temperature then adds to a promise.""")
    yield "By seed, return / promised:\n"
    rows = []
    for seed in sorted(seeds):
        row = [seed, number(outcome(runs.teachers[seed]))]
        for kind in study.INTERVENTIONS:
            row.append(one_test(runs.get("last 10", kind).get(seed), 19_999))
        for name in ("sac", "cql"):
            row.append(one_test(runs.get("last 10", name).get(seed), 20_000))
        rows.append(row)
    yield table(["seed", "teacher's outcome", *study.INTERVENTIONS, "plain sac", "plain cql"], rows)
    yield "### At test time: the best of the nearest rows' torques, or a random one\n"
    rows = []
    for name, update in itertools.product(("sac", "cql"), study.MOMENTS):
        best, chance, gained = nearest(runs, name, update)
        if len(best):
            rows.append([name, f"{update:,}", len(best), spread(best), spread(chance),
                         count(gained > 0)])
    yield table(["critic of", "update", "seeds", "its best", "random", "its best is better on"],
                rows)
    yield "**What these do not separate.**\n"
    yield bullet("""A clone target takes two things away at once: the policy's own torques and its
        own entropies; its temperature still learns.""")
    yield bullet("""Uniform torques change more than the torques: the next states leave the data,
        too, by one step. So they cannot tell whether torques are of no use in the data's states, or
        of none until what they lead to is in the data as well.""")
    yield bullet("""Uniform states change more than which states there are: rows are single steps,
        no episodes, and few of them stand upright. The teacher's torques there are its policy's, as
        in the data, also where it has hardly been. More than 20,000 updates were not tried, and
        some of its seeds still rise.""")
    yield bullet("""The best of the nearest rows' torques stays with torques that the data has near,
        not with states that the data has. Where it goes then was not measured.""")
    yield bullet(f"The temperature: {temperature_verdict(runs)}")
    yield ""


def steps_in(lines, update):
    return [spread(known([at(line, update, column) for line in lines]), 1 if column > 1 else 0)
            for column in (1, 2, 3)]


def finals_of(lines):
    return known([line["return"] for line in lines])


def one_test(line, update):
    if line is None:
        return "not run"
    return f"{number(at(line, update, 1))} / {number(at(line, update, 2))}"


def temperature_verdict(runs):
    """Cause or symptom, by the rule of `mostly`: no cause of the failure if sac with a fixed
    temperature fails all the same, nor of the promise if that passes 100 all the same."""
    fixed = runs.get("last 10", "fixed temperature")
    short = known([outcome(runs.teachers[seed]) - last(line, 1) for seed, line in fixed.items()])
    returns, promised = at_the_end(runs, "fixed temperature")
    fails = mostly(short - FAILS)
    if fails is None:
        return "Not run yet."
    ends = runs.values("last 10", "sac", lambda line: line["temperature"])
    broad = runs.values("all", "sac", lambda line: line["temperature"])
    if fails:
        failure = "Not the cause of the failure: with the temperature fixed sac fails all the same."
    else:
        failure = "A cause of the failure: with the temperature fixed sac fails on few seeds."
    if mostly(promised - 100):
        too_high = "Nor is it needed for a promise above 100."
    else:
        too_high = "With the temperature fixed the promise does not pass 100 on most seeds."
    _, plainly = without_it(runs, fixed)
    return (f"{failure} {too_high} Fixed at 0.01, sac of the last 10 ends more than {FAILS} below "
            f"its teacher on {count(short > FAILS)} seeds (return "
            f"{middle(returns)}) and promises "
            f"{spread(promised)} at update 20,000, plain sac {spread(plainly)}. Left to learn, the "
            f"temperature ends at {spread(ends, 3)} on the last 10 and at {spread(broad, 3)} on "
            f"all ({len(ends)} and {len(broad)} seeds, 50,000 updates).")


# Errata

def errata(runs):
    yield "## Teachers and the page's formulas\n"
    rows = []
    for title, lines in (("corrected", runs.teachers),
                         ("corrected, same seeds as printed", same_teachers(runs, runs.printed)),
                         ("all four errata as printed", runs.printed)):
        rows.append([title, len(lines), spread(finals(lines)),
                     spread(known([outcome(line) for line in lines.values()])),
                     spread(known([line["data mean"] for line in lines.values()]))])
    yield table(["teacher", "seeds", "final 100 episodes", "outcome", "its data's mean"], rows)
    yield "### Each erratum alone\n"
    seeds = sorted({seed for lines in runs.alone.values() for seed in lines})
    if not seeds:
        yield "Not run yet.\n"
        return
    rows = []
    corrected = {seed: runs.teachers[seed] for seed in seeds}
    for title, lines in [("corrected", corrected), *runs.alone.items()]:
        row = [title, len(lines)]
        for seed in seeds:
            row.append(number(lines[seed]["return"]) if seed in lines else "not run")
        below = known([line["return"] - corrected[seed]["return"] for seed, line in lines.items()])
        row += [middle(finals(lines)), signed(iqm(below)), count(below < 0), count(below == 0)]
        rows.append(row)
    yield table(["teacher", "seeds", *(f"seed {seed}" for seed in seeds), "IQM",
                 "minus the corrected", "lower on", "equal on"], rows)
    yield paragraph("""Final 100 episodes of the teacher. The errata `sign` and `range` act in the
        penalty alone, which a teacher does not have: such a teacher has to be equal to the
        corrected one. Four seeds show a teacher that fails, not a difference of some tens.""")


# Verdicts to mend

def verdicts(runs):
    yield "## Verdicts of an earlier README, computed again\n"
    more = runs.minus(("last 10", "sac"), ("last 10", "cql"), lambda line: last(line, 4)) > 0
    yield bullet(f"Contrast at the end, last 10: sac's IQM is "
                 f"{middle(runs.values('last 10', 'sac', lambda x: last(x, 4)), 1)}, cql's "
                 f"{middle(runs.values('last 10', 'cql', lambda x: last(x, 4)), 1)}; by pairs sac "
                 f"has more of it in {count(more)} seeds.")
    parts = []
    for data, name in (("last 10", "sac"), ("all", "sac"), ("last 10", "cql")):
        promised = runs.values(data, name, lambda line: at(line, 4000, 2))
        delivered = runs.values(data, name, lambda line: at(line, 4000, 3))
        parts.append(f"{name} of {data}: promise {middle(promised, 1)}, delivery "
                     f"{middle(delivered, 1)} ({len(promised)} seeds)")
    yield bullet("Promise and delivery at 4,000, where a critic that starts at 0 still warms up: "
                 + "; ".join(parts) + ".")
    mixed = "random 10 + last 10"
    parts = []
    for name in ("cql", "sac"):
        gains = runs.values(mixed, name, runs.final_gain)
        parts.append(f"{name} {typical(runs, mixed, name)}, {signed(iqm(gains))} to its teacher "
                     f"(outcome {signed(iqm(runs.to_teacher(mixed, name)))})")
    yield bullet(f"The mixture, final 100 episodes: {'; '.join(parts)}; "
                 f"{runs.how_many(mixed)} seeds.")
    gaps = printed_gains(runs)
    yield bullet(f"Teachers as printed, final 100 episodes: typically "
                 f"{middle(finals(runs.printed))} against "
                 f"{middle(finals(same_teachers(runs, runs.printed)))}; lower on "
                 f"{count(gaps < 0)} seeds, on {sum((gaps < 0) & (gaps > -11))} of them by less "
                 f"than 11; the worst {number(lowest(runs.printed))} against "
                 f"{number(lowest(same_teachers(runs, runs.printed)))}.")
    over_sac, over_bc, both = last_85(runs)
    reached = [str(seed) for seed, line in runs.get("last 85", "sac").items()
               if runs.gain(line) > -CLOSE]
    yield bullet(f"Last 85: cql beats sac on {count(over_sac > 0)} seeds, bc on "
                 f"{count(over_bc > 0)}, both on {count(both > 0)}. sac comes within {CLOSE} of "
                 f"its teacher on {len(reached)} of {len(over_sac)}"
                 + (f" (seed {', '.join(reached)})." if reached else "."))
    yield bullet(f"sac of the last 85 ends {middle(runs.to_teacher('last 85', 'sac'))} to its "
                 f"teacher as IQM, {number(mean_of(runs.to_teacher('last 85', 'sac')))} as mean; "
                 f"its seeds: {by_seed(runs, 'last 85', 'sac')}.")
    yield bullet("The temperature: " + temperature_verdict(runs))
    yield "\n### Weights on the same seeds: means beside IQMs\n"
    rows = []
    for data, name in itertools.product(("last 10", "all"),
                                        ("cql, weight 0.2", "cql, weight 1", "cql")):
        gains = weight_values(runs, data, name, runs.gain)
        lines = runs.get(data, name)
        each = [f"{seed}: {signed(runs.gain(lines[seed]))}" for seed in weight_seeds(runs, data)]
        rows.append([data, "cql, weight 5" if name == "cql" else name, len(gains),
                     signed(iqm(gains)), signed(mean_of(gains)),
                     middle(weight_values(runs, data, name, returned)), ", ".join(each)])
    yield table(["data", "student", "seeds", "IQM", "mean", "final 100 episodes (IQM)", "by seed"],
                rows)
    yield "Outcome minus the teacher's.\n"


def bullet(text):
    return textwrap.fill("- " + " ".join(text.split()), 100, subsequent_indent="  ")


def mean_of(values):
    return values.mean() if len(values) else math.nan


def by_seed(runs, data, name):
    return ", ".join(f"{seed}: {signed(runs.gain(line))}"
                     for seed, line in runs.get(data, name).items())


# The rest

def other_tables(runs):
    yield "## More of what is asked\n"
    for other, name in itertools.product(("bc", "cql"), ("cql", "sac")):
        yield bullet(f"last tenth: {other} on the last 10 minus {name} on all: "
                     f"{runs.pairs(('last 10', other), ('all', name))}")
    for data, name in [("all", "cql as printed"), *itertools.product(
            ("last 10", "all"), ("cql, weight 0.2", "cql, weight 1"))]:
        yield bullet(f"{data}: cql minus {name}: {runs.pairs((data, 'cql'), (data, name))}")
    for data, name in itertools.product(("last 10", "all"), ("cql", "sac")):
        too_much = runs.values(data, name, excess) > 0
        yield bullet(f"{data}, {name}: promises more than it delivers in the final episodes, like "
                     f"with like: {count(too_much)} seeds")
    # a critic that starts at 0 and follows its target, which moves by 0.005 of a hundredth
    # (1 - 0.99) of the distance an update, has 1 - exp(-t / 20,000) of the way behind it
    for name, update in itertools.product(("sac", "cql"), (10_000, 20_000, 40_000)):
        share = runs.values("all", name, lambda line: at(line, update, 2) / (
            at(line, update, 3) + line["entropy bonus"]))
        if len(share):
            yield bullet(f"all, {name}: at update {update:,} the promise is {spread(share, 2)} of "
                         f"the delivery; a critic that only warms up has "
                         f"{1 - math.exp(-update / 20_000):.2f}")
    if runs.again and 3 in runs.get("last 10", "cql"):
        rows = [[line["student"], number(outcome(line)), number(line["return"])]
                for line in [runs.get("last 10", "cql")[3], *runs.again]]
        yield "\n### Other students of seed 3's last 10 episodes: luck of the data or the run?\n"
        yield table(["student's seed", "outcome", "final 100 episodes"], rows)


def same_digits(_):
    """Which cells show that an earlier program gives the same numbers."""
    yield "## Programs that give the same digits\n"
    file = study.RESULTS / "same.jsonl"
    if not file.exists():
        yield "results/same.jsonl is not there: only lines of today's program count.\n"
        return
    now = study.program()
    cells = {}
    for line in map(json.loads, file.read_text().splitlines()):
        cells.setdefault(study.key(line), {})[line["program"]] = line
    others = sorted({program for lines in cells.values() for program in lines} - {now})
    counting = study.same_programs()
    yield paragraph(f"""The program today is {now[:12]}. Lines of an earlier one count if at least
        eight cells, run with both programs on one machine, are equal in every digit of
        `study.comparable`.""")
    for other in others:
        rows = []
        for lines in cells.values():
            if other in lines and now in lines:
                old, new = lines[other], lines[now]
                equal = study.comparable(old) == study.comparable(new)
                place = new["cpu"] if new["cpu"] == old["cpu"] else f"{old['cpu']}, {new['cpu']}"
                what = "teacher" if new["kind"] == "teacher" else f"{name_of(new)}, {new['data']}"
                if new["kind"] == "teacher" and new["as_printed"]:
                    what += " as printed"
                rows.append([what, new["seed"], f"{new['return']:,.2f}", place,
                             "the same" if equal else "differ"])
        yield table(["cell", "seed", "return", "machine", f"digits of {other[:12]}"], rows)
        yield f"Its lines {'count' if other in counting else 'do not count'}.\n"


# README's figures

def quoted(runs):
    yield "## What README quotes, in its words\n"
    for sentence, figure in page_numbers(runs).items():
        yield bullet(f"{sentence}: {figure}.")
    for figure in more_numbers(runs):
        yield bullet(figure)
    yield ""


def page_numbers(runs):
    """For each of the page's seven sentences the measured number, in plain English."""
    swinging, standing = ([runs.measure("last 10", "sac", 4000, f"{kind} excess {where}")
                           for where in ("near", "far")] for kind in ("swing", "stand"))
    early, late = ([runs.values("last 10", name, lambda line: at(line, update, 4))
                    for name in ("cql", "sac")] for update in (4000, 49_999))
    drifts, others = ([runs.values(data, name, drift) for name in ("cql", "sac")]
                      for data in ("last 10", "random 20"))
    means = runs.values("random 20", "cql", lambda line: line["data mean"])
    exceeds = [line["return"] > line["data mean"]
               for line in runs.get("random 20", "cql").values()]
    mixture = "random 10 + last 10"
    mixed = {name: signed(iqm(runs.to_teacher(mixture, name))) for name in ("cql", "sac")}
    alone = {name: signed(iqm(known([runs.gain(line) for seed, line in runs.get(data, name).items()
                                     if seed in runs.get(mixture, name)])))
             for data, name in (("last 10", "cql"), ("random 20", "sac"))}
    weights = []
    for weight, name in ((5, "cql"), (1, "cql, weight 1"), (0.2, "cql, weight 0.2")):
        broad, narrow = (signed(iqm(weight_values(runs, data, name, runs.gain)))
                         for data in ("all", "last 10"))
        weights.append(f"{weight}: {broad} / {narrow}")
    below = printed_gains(runs)
    return {
        '"... assigns high Q-values to actions not seen in the dataset"':
            f"at update 4,000, where the pendulum swings, it promises {middle(swinging[0])} too "
            f"much for torques close to the data's and {middle(swinging[1])} for those far from "
            f"them; where it stands {middle(standing[0])} and {middle(standing[1])} "
            f"({len(swinging[0])} seeds)",
        '"... penalized relative to the in-dataset Q-value"':
            f"CQL's critic puts the data's torque {middle(early[0], 1)} above the mean of all "
            f"torques at update 4,000 and {middle(late[0], 1)} at the end, SAC's "
            f"{middle(early[1], 2)} and {middle(late[1], 1)} ({len(early[0])} seeds)",
        '"... never drifts far from the training distribution"':
            f"{middle(drifts[0])} % of CQL's steps and {middle(drifts[1])} % of SAC's are a pair "
            f"of state and torque that the data does not have ({len(drifts[0])} seeds); on random "
            f"20 {middle(others[0])} % and {middle(others[1], 1)} % ({len(others[0])})",
        '"... cannot exceed the data quality"':
            f"they return {middle(means)}; CQL returns "
            f"{typical(runs, 'random 20', 'cql')}, more than its data on {count(exceeds)} seeds, "
            f"and SAC {typical(runs, 'random 20', 'sac')}",
        '"... a diverse mixture of behaviors, including near-optimal demonstrations"':
            f"Minus its teacher: on 10 random and the last 10 episodes CQL {mixed['cql']}, SAC "
            f"{mixed['sac']}; on the last 10 alone CQL {alone['cql']}, on 20 random ones SAC "
            f"{alone['sac']} (the same {runs.how_many(mixture)} seeds)",
        "the page's formulas":
            f"teachers typically return {middle(finals(runs.printed))} with the page's formulas "
            f"and {middle(finals(same_teachers(runs, runs.printed)))} with the right ones; "
            f"{count(below > -CLOSE)} are at most {CLOSE} lower, the worst returns "
            f"{number(lowest(runs.printed))}",
        "`loss_value += 5.0 * ...`":
            f"CQL minus its teacher on all 100 / the last 10, weight {', '.join(weights)} "
            f"(the same {len(weight_seeds(runs, 'all'))} seeds)",
    }


def more_numbers(runs):
    """Other figures of README."""
    done, planned = len(runs.lines), len(study.grid())
    yield f"of {done} runs" if done == planned else f"{done} of {planned} planned runs are done"
    ten = runs.to_teacher("last 10", "sac")
    yield (f"SAC ends more than {FAILS} below its teacher on {count(ten < -FAILS)} seeds, CQL at "
           f"most {CLOSE} below on {close(runs, 'last 10', 'cql')}")
    _, over_bc, both = last_85(runs)
    yield f"CQL beats both on {count(both > 0)} seeds; its lead over imitation is {middle(over_bc)}"
    below = runs.minus(("all", "cql"), ("all", "sac"))
    yield f"CQL ends below SAC on {count(below < 0)} seeds"
    few = runs.to_teacher("2,000 rows", "sac")
    yield f"SAC fails on {count(few < -FAILS)} seeds"
    (plain, uniform), (states, both) = states_or_torques(runs)
    teachers = known([outcome(runs.teachers[seed]) for seed in changed_seeds(runs)])
    yield f"({len(teachers)} seeds; from these starts their teachers: {middle(teachers)})"
    yield f"| the data's | {middle(plain)} | {middle(uniform)} |"
    yield f"| uniform | {middle(states)} | {middle(both)} |"
    if len(states):
        yield (f"on some seeds only (from {number(min(states))} to {number(max(states))}); both "
               f"together bring it to its teacher on "
               f"{close(runs, 'last 10', 'uniform states and torques')} seeds")
    clones, promised = at_the_end(runs, "clone target")
    seeds = runs.get("last 10", "clone target")
    plain_returns, plain_promised = without_it(runs, seeds)
    yield (f"promises {middle(promised)} after 20,000 updates, not {middle(plain_promised)}, and "
           f"returns {middle(clones)}, not {middle(plain_returns)} ({len(clones)} seeds)")
    best, chance, gained = nearest(runs, "sac")
    cql_best, _, _ = nearest(runs, "cql")
    yield (f"SAC's favourite returns {middle(best)}, a random pick {middle(chance)}, CQL's "
           f"favourite {middle(cql_best)}; SAC's is worse than the random pick on "
           f"{count(gained < 0)} seeds")
    seeds = runs.measure("last 10", "cql", 20_000, "swing rank density")
    yield (f"the rank correlation of promise and frequency is {rank(runs, 'last 10', 'cql')}, "
           f"SAC's {rank(runs, 'last 10', 'sac')} ({len(seeds)} seeds)")
    seeds = runs.measure("all", "cql", 20_000, "swing rank density")
    yield (f"CQL's promises go {rank(runs, 'all', 'cql')} with frequency and "
           f"{rank(runs, 'all', 'cql', 'good')} with what a good policy delivers, SAC's "
           f"{rank(runs, 'all', 'sac')} and {rank(runs, 'all', 'sac', 'good')} ({len(seeds)} "
           f"seeds); where it stands CQL's go {rank(runs, 'all', 'cql', 'good', 'stand')} with the "
           f"latter, SAC's {rank(runs, 'all', 'sac', 'good', 'stand')}")
    yield f"CQL {runs.pairs(('all', 'cql'), ('all', 'cql as printed'))}"


def readme(runs):
    """The figures as README has them; a test compares them."""
    for data, *cells in short_rows(runs):
        yield f"| {' | '.join(cells)} |"
    yield from page_numbers(runs).values()
    yield from more_numbers(runs)


# Figures

COLOURS = {"sac": "C3", "cql": "C0", "bc": "C2", "cql as printed": "C4"}


def figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def draw_regimes(runs):
    """Returns by data set: a dot for each seed, a bar up to the IQM, the teachers' IQM a line."""
    picture = figure(13, 6)
    axes = picture.subplots()
    datas = [data for data in PLAIN if runs.seeds_of(data)]
    bottom, width = -1750, 0.26
    places = []
    for k, data in enumerate(datas):
        place = k + (0.5 if data.startswith("random") else 0)
        places.append(place)
        for shift, name in zip((-width, 0, width), STUDENTS):
            values = runs.values(data, name, returned)
            if not len(values):
                continue
            spots = place + shift + np.linspace(-0.08, 0.08, len(values) + 2)[1:-1]
            axes.bar(place + shift, iqm(values) - bottom, width - 0.02, bottom,
                     color=COLOURS[name], alpha=0.35)
            axes.plot(spots, values, "o", color=COLOURS[name], ms=4, alpha=0.8, mew=0)
        teachers = iqm(runs.teacher(data, returned))
        axes.plot([place - 0.42, place + 0.42], [teachers, teachers], "k-", lw=2)
    students = [line for line in runs.lines if line["kind"] != "teacher"]
    untrained = iqm(known([line["tests"][0][1] for line in students]))
    axes.axhline(untrained, color="0.4", ls=":", lw=1.2)
    axes.text(datas.index("all") + 0.75 if "all" in datas else 0, untrained + 15, "untrained",
              ha="center", color="0.3", fontsize=11)
    for name, label in zip(STUDENTS, ("SAC: no penalty", "CQL: with the penalty",
                                      "BC: imitates the data")):
        axes.bar(0, 0, 0, bottom, color=COLOURS[name], alpha=0.35, label=label)
    axes.plot([], [], "k-", lw=2, label="the teacher")
    labels = [f"{data.replace(' + ', chr(10) + '+ ')}\n({runs.how_many(data)})" for data in datas]
    axes.set_xticks(places, labels, fontsize=11)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, max(places, default=0) + 0.6)
    axes.set_ylim(bottom, 0)
    axes.set_ylabel("return of an episode (higher is better)", fontsize=12)
    axes.set_xlabel("data: the teacher's last 5 to all 100 episodes, whose first are poor; to the "
                    "right with random torques (in brackets: seeds)", fontsize=12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title("What a student returns depends on its data (bar: typical, dot: one seed)",
                   fontsize=14)
    picture.legend(loc="outside upper center", ncols=4, fontsize=11, frameon=False)
    picture.savefig(study.RESULTS / "regimes.png")


def draw_last10(runs):
    """Sac and cql on the last 10 episodes: return, and promise against delivery; thick the IQM,
    thin every seed."""
    picture = figure(13, 5)
    left, right = picture.subplots(1, 2)
    for name in ("sac", "cql"):
        lines = runs.get("last 10", name).values()
        label = f"{name} ({len(lines)} seeds)"
        curves(left, [line["tests"] for line in lines], 1, COLOURS[name], "-", label)
        for column, style, what in ((2, "-", "promises"), (3, "--", "delivers")):
            curves(right, [line["tests"] for line in lines], column, COLOURS[name], style,
                   f"{name} {what}")
    left.axhline(iqm(runs.teacher("last 10", returned)), color="k", ls=":", label="their teachers")
    right.axhline(100, color="k", ls=":", lw=1.5)
    right.text(500, 102, "the most possible", fontsize=11)
    left.set(ylim=(-1750, 0))
    left.set_title("Return of an episode", fontsize=13)
    right.set(ylim=(-50, 150))
    right.set_title("What the critic promises, and what is delivered", fontsize=13)
    left.set_ylabel("return", fontsize=12)
    right.set_ylabel("discounted rewards, 100 at most", fontsize=12)
    left.legend(loc="center right", fontsize=11)
    right.legend(loc="center right", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("update", fontsize=12)
        axes.grid(alpha=0.3)
    picture.suptitle("Students of the teacher's last 10 episodes (thick: typical, thin: a seed)",
                     fontsize=14)
    picture.savefig(study.RESULTS / "last10.png")


def curves(axes, tests, column, colour, style, label):
    """A column of several students' tests over their updates."""
    if not tests:
        return
    updates = [test[0] for test in tests[0]]
    values = np.array([[test[column] for test in some] for some in tests], float)
    axes.plot(updates, values.T, style, color=colour, lw=0.5, alpha=0.45)
    axes.plot(updates, iqm(values.T), style, color=colour, lw=2.5, label=label)


def draw_students(runs):
    """Every seed's outcome minus its teacher's, a panel for each of the four datasets."""
    datas = [data for data in FOUR if runs.seeds_of(data)]
    if not datas:
        return
    names = [[name for which, name in runs.groups if which == data] for data in datas]
    picture = figure(11, 2 + 0.36 * sum(map(len, names)))
    panels = picture.subplots(len(datas), 1, sharex=True, squeeze=False,
                              height_ratios=[*map(len, names)])[:, 0]
    for axes, data, some in zip(panels, datas, names):
        for y, name in enumerate(some):
            values = runs.to_teacher(data, name)
            colour = COLOURS.get(name, "C7")
            spots = y + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1]
            axes.plot(values, spots, "o", color=colour, ms=5, alpha=0.5)
            if len(values) > 2:
                axes.plot(iqm(values), y, "|", color=colour, ms=18, mew=3)
        axes.axvline(0, color="k", lw=1)
        axes.set(ylim=(len(some) - 0.4, -0.6), yticks=range(len(some)), title=f"Data: {data}",
                 yticklabels=[f"{name} ({len(runs.get(data, name))})" for name in some])
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("outcome minus the teacher's, same starts (0: as good as its teacher)")
    picture.suptitle("Dot: a seed; bar: interquartile mean of 3 seeds and more; in brackets: seeds")
    picture.savefig(study.RESULTS / "study.png")


def pictures():
    """Write torques.png, of seed 0, and torques10.png, of seed 10: three minutes each."""
    for seed, name in ((0, "torques.png"), (10, "torques10.png")):
        picture(seed, study.RESULTS / name)


def picture(seed, file, updates=PICTURED):
    """Train sac and cql on a seed's last 10 as its cells do, up to the test at update 10,000, and
    draw what they promise and deliver."""
    import torch

    import cql_pendulum as ours
    import torques

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    agents, returns = {}, {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        data = study.make_data(ours, seed, "last 10")
        for kind, name in (("sac", "SAC, no penalty"), ("cql", "CQL, with the penalty")):
            agent, _ = study.make_student(ours, study.cell(kind, seed, "last 10"), data)
            run = ours.Run(None, seed)
            run.begin("student", agent, data)
            ours.train_student(agent, data, updates, run)
            agents[name] = agent
            returns[name] = float(ours.evaluate(agent, run.starts(1, 100))[0].mean())
    title = f"The teacher's last 10 episodes (seed {seed}), after {updates - 1:,} updates"
    torques.draw(agents, data, returns, file, title)
    print(f"{file}: " + ", ".join(f"{name} returns {x:,.1f}" for name, x in returns.items()))
