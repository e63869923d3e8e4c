"""The study's measures and its report, on cases that can be told by hand; its runs are not tests.
The last two tests hold results/ and README to what was measured."""
import ast
import json
import math
import random
import re
import textwrap

import numpy as np
import pytest
import torch

import cql_pendulum as ours
import report
import study
import torques


# The program that the numbers follow from

def test_program_is_the_code_that_the_numbers_follow_from(tmp_path, monkeypatch):
    text = (study.TOP / "cql_pendulum.py").read_text()
    monkeypatch.setattr(study, "TOP", tmp_path)

    def program(old="", new=""):
        assert old in text
        (tmp_path / "cql_pendulum.py").write_text(text.replace(old, new) if old else text)
        return study.program()

    before = program()
    for old, new in (("# rows in a batch", "# rows"),
                     ('"""The policy: a Gaussian', '"""A Gaussian'),
                     ("offline training never adds to it", "it is frozen"),
                     ("import zipfile", "import zlib"),
                     ("no curves.png", "no picture")):              # after main, no number
        assert program(old, new) == before, old
    for old, new in (("BATCH = 64", "BATCH = 65"), ("- value.mean()", "- value.max()"),
                     ("scaled[-20:]", "scaled[-10:]"), ("TAU)", "2 * TAU)"),
                     ("log_prob(sample).mean()", "log_prob(sample).sum()")):
        assert program(old, new) != before, old


SNIPPET = '''
@cached
def more(x, *, by: int = 2):
    """What is added."""
    if x < 0:
        raise ValueError(f"{x} is negative")
    return [x + by for _ in range(1)]
'''


def test_a_fingerprint_is_the_same_in_every_python():
    """Written down once; Python 3.12 and 3.13 add fields to a function, which are empty here."""
    name, fields = study.fingerprint(ast.parse(textwrap.dedent(SNIPPET)).body[0])
    fields = dict(fields)
    assert name == "FunctionDef"
    assert [*fields] == ["name", "args", "body", "decorator_list"]
    assert fields["name"] == "'more'"
    load = ["ctx", ["Load", []]]
    assert fields["decorator_list"] == [["Name", [["id", "'cached'"], load]]]
    docstring, branch, answer = fields["body"]
    assert docstring is None
    assert branch == ["If", [
        ["test", ["Compare", [["left", ["Name", [["id", "'x'"], load]]],
                              ["ops", [["Lt", []]]],
                              ["comparators", [["Constant", [["value", "0"]]]]]]]],
        ["body", [None]]]]
    addition = ["BinOp", [["left", ["Name", [["id", "'x'"], load]]], ["op", ["Add", []]],
                          ["right", ["Name", [["id", "'by'"], load]]]]]
    kind, comprehension = answer[1][0][1]
    assert (kind, comprehension[0]) == ("ListComp", ["elt", addition])


def a_line(cell, program="old", value=-150.0):
    """A line of study.jsonl, made up."""
    tests = [[2000 * k, value, 10.0 * k, 80.0, 0.5] for k in range(26)]
    tests[-1][0] = 49_999
    return cell | {
        "program": program, "cpu": "one", "threads": 1, "python": "3", "torch": "2", "numpy": "2",
        "gym": "0", "commit": "abcdefghij", "minutes": 1.0, "rows": 9, "dataset": "d",
        "coverage": 5.0, "outside": 0.25, "data mean": -300.0, "return": value + 2,
        "promised": 70.0, "delivered": 80.0, "temperature": 0.1, "entropy bonus": -5.0,
        "tests": tests}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_of_an_earlier_program_count_after_eight_equal_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert study.same_programs() == set()                           # no file
    cells = [study.cell("sac", seed, "all") for seed in range(7)] + [study.cell("bc", 0, "all")]
    now = study.program()
    lines = [a_line(cell, program) for cell in cells for program in ("old", now)]
    lines[-1]["tests"][3][2] = None                     # a clone promises nothing: not compared
    lines[-1]["promised"] = None
    write(tmp_path / "same.jsonl", lines)
    assert study.same_programs() == {"old"}
    write(tmp_path / "study.jsonl", [a_line(study.grid()[3], "old"), a_line(study.grid()[4], now),
                                     a_line(study.grid()[5], "other")])
    assert [*study.finished()] == [study.key(cell) for cell in study.grid()[3:5]]

    write(tmp_path / "same.jsonl", lines[2:])                       # seven cells
    assert study.same_programs() == set()
    write(tmp_path / "same.jsonl", lines[:-1])                      # eight of one, seven of ours
    assert study.same_programs() == set()
    for change in ({"delivered": 80.001}, {"dataset": "e"}, {"temperature": 0.10001},
                   {"promised": 70.001}):
        write(tmp_path / "same.jsonl", [lines[0] | change, *lines[1:]])
        assert study.same_programs() == set(), change
    for column in (1, 2, 3, 4):
        other = json.loads(json.dumps(lines))
        other[0]["tests"][5][column] += 0.001
        write(tmp_path / "same.jsonl", other)
        assert study.same_programs() == set(), column
    other[0]["tests"][5][4] -= 0.001
    other[0]["minutes"] = 9.0                                       # no number of the program
    write(tmp_path / "same.jsonl", other)
    assert study.same_programs() == {"old"}


def test_every_cell_has_its_own_key_and_comes_back(tmp_path, monkeypatch):
    cells = study.grid()
    assert len({study.key(cell) for cell in cells}) == len(cells)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    now = study.program()
    first, again = a_line(cells[30], now, -1.0), a_line(cells[30], now, -2.0)
    write(tmp_path / "study.jsonl", [first, a_line(cells[31], "older"), again])
    assert study.finished() == {study.key(cells[30]): first}        # the first of a key stays


# What is measured of a run

def rows(angle, speed, torque):
    found = np.zeros([len(angle), 10], np.float32)
    found[:, 0], found[:, 1], found[:, 2] = np.cos(angle), np.sin(angle), speed
    found[:, 3] = torque
    return found


def test_coverage_counts_bins_of_visited_cells():
    eight = np.linspace(-1.99, 1.99, 8)
    assert study.coverage(rows(np.full(8, 0.1), 0.5, eight)) == 8
    assert study.coverage(rows(np.full(8, 0.1), 0.5, 1.0)) == 1
    two = [rows(np.full(8, 0.1), 0.5, eight), rows(np.full(8, -3.0), -7.9, -2.0)]
    assert study.coverage(np.concatenate(two)) == 4.5           # of two cells, whatever their rows
    assert study.coverage(np.concatenate([two[0]] * 5 + [two[1]])) == 4.5
    assert study.coverage(rows(np.radians([1, 29, 31]), 0.1, [-2.0, 2.0, 2.0])) == 1.5


def test_outside_is_the_share_of_steps_that_the_data_lacks():
    data = rows(np.full(2, 0.1), 0.5, [-1.9, 0.1])
    other_torques, other_state = rows(np.full(3, 0.1), 0.5, [0.2, 0.6, 1.9]), rows([3.0], 0.5, 0.1)
    assert study.outside(data, data) == 0
    assert study.outside(np.concatenate([other_torques, other_state]), data) == 3 / 4


def test_contrast_is_the_datas_torque_against_all():
    agent = ours.SAC()
    for critic, more in ((agent.model_value1, 5.0), (agent.model_value2, 0.0)):
        critic.forward = lambda state, action, more=more: 3 * state[:, 2:] - action ** 2 + more
    mine = rows(np.linspace(-3, 3, 700), np.linspace(-8, 8, 700), 0.5)
    wanted = -0.25 + np.mean(np.linspace(-2, 2, 41) ** 2)       # the state's part cancels
    assert study.contrast(ours, agent, mine) == pytest.approx(wanted, abs=1e-4)


def test_behaviour_cloning_learns_the_datas_torques():
    torch.manual_seed(0)
    agent = ours.BC()
    agent.optimizer_action = torch.optim.Adam(agent.model_action.parameters(), lr=3e-3)
    state = torch.from_numpy(rows(np.linspace(-3, 3, 64), np.linspace(-1, 1, 64), 0)[:, :3])
    action = 1.5 * state[:, 1:2]
    for _ in range(400):
        agent.train(state, action, None, None, None)
    with torch.no_grad():
        hidden = agent.model_action.fc_state(state)
        mean = 2 * torch.tanh(agent.model_action.fc_mu(hidden))
    assert (mean - action).abs().mean() < 0.15
    assert math.isclose(agent.alpha.item(), math.log(0.01), rel_tol=1e-6)


def test_the_data_that_students_get(tmp_path, monkeypatch):
    """From a teacher that does not learn; the parts are nested and none is written twice."""
    monkeypatch.setattr(study, "DATASETS", tmp_path)
    monkeypatch.setattr(ours.SAC, "train", lambda self, *batch: None)
    monkeypatch.setattr(ours.SAC, "get_action", lambda self, state: random.uniform(-2, 2))
    monkeypatch.setattr(ours.Data, "get_sample", lambda self: ())
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [np.zeros(len(seeds))])
    whole, ten, five, few, uniform, mixed = (
        study.make_data(ours, 0, name).rows for name in
        ("all", "last 10", "last 5", "2,000 rows", "random 20", "random 10 + last 10"))
    assert [len(x) for x in (whole, ten, five, few, uniform, mixed)] == [
        20_000, 2000, 1000, 2000, 4000, 4000]
    np.testing.assert_array_equal(whole[-2000:], ten)
    np.testing.assert_array_equal(ten[-1000:], five)
    np.testing.assert_array_equal(mixed, np.concatenate([uniform[:2000], ten]))
    assert {x.tobytes() for x in few} <= {x.tobytes() for x in whole}
    assert len({x.tobytes() for x in few}) == 2000
    counts, _ = np.histogram(uniform[:, 3], 8, (-2, 2))
    assert all(400 < count < 600 for count in counts)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", ".pt"]


def test_a_cell_becomes_a_line(tmp_path, monkeypatch):
    """A teacher and a student of a few updates, in short episodes."""
    evaluated, evaluate = [], ours.evaluate
    train_teacher, train_student = ours.train_teacher, ours.train_student

    def spy(agent, seeds):
        found = evaluate(agent, seeds)
        evaluated.append([round(float(part.mean()), 3) for part in found])
        return found

    for name, value in (("EPISODE", 70), ("UPDATES", 1), ("evaluate", spy),
                        ("train_teacher", lambda agent, data, _, run: train_teacher(
                            agent, data, 10, run)),
                        ("train_student", lambda agent, data, _, run: train_student(
                            agent, data, 3, run))):
        monkeypatch.setattr(ours, name, value)
    monkeypatch.setattr(study, "DATASETS", tmp_path)
    monkeypatch.setattr(study, "MOMENTS", [2])
    monkeypatch.setattr(torques, "STATES", 3)
    teacher = study.run_cell(study.cell("teacher", 10))
    assert [test[0] for test in teacher["tests"]] == [0, 9]
    assert teacher["rows"] == 700 and "measures" not in teacher
    evaluated.clear()
    line = study.run_cell(study.cell("sac", 10, "all"))
    assert [test[0] for test in line["tests"]] == [0, 2]
    assert [test[1:4] for test in line["tests"]] == evaluated[:2]
    assert [line["return"], line["promised"], line["delivered"]] == [
        pytest.approx(evaluated[2][0], abs=0.006), *evaluated[2][1:]]
    assert [*line["measures"]] == [2] and line["measures"][2]["radius"] > 0
    assert json.loads(json.dumps(line, allow_nan=False))["dataset"] == teacher["dataset"]
    clone = study.run_cell(study.cell("bc", 10, "all"))
    assert [test[2] for test in clone["tests"]] == [None, None] and clone["promised"] is None
    assert "measures" not in clone
    assert study.comparable(line).keys() - study.comparable(clone).keys() == {
        "promised", "entropy bonus"}
    assert "best of the nearest" not in line["measures"][2]
    for kind in ("sac", "cql"):
        narrow = study.run_cell(study.cell(kind, 10, "last 10"))
        assert narrow["measures"][2]["best of the nearest"] < 0
        assert narrow["dataset"] == teacher["dataset"]
    changed = study.run_cell(study.cell("uniform states", 10, "last 10"))
    assert changed["rows"] == 700 and changed["dataset"] != teacher["dataset"]


# What is asked of the lines

def test_interquartile_mean():
    assert report.iqm([9, 1, 2, 3, -500, 4, 5, 1000]) == 3.5
    assert report.iqm([1, 2, 6]) == 3
    assert math.isnan(report.iqm([]))


def test_the_moments_of_a_failure():
    line = {"tests": [[0, -1400, 0, 5, 0], [2000, -1300, 20, 5, 0], [4000, -1500, 101, 5, 0],
                      [6000, -1450, 90, 5, 0]]}
    assert (report.lost(line), report.above_100(line)) == (4000, 4000)
    line["tests"][-1][1] = -900
    assert report.lost(line) is None
    assert report.outcome({"tests": [[0, 99, 0, 0, 0]] + line["tests"] + [[8000, -100, 0, 0, 0]]}
                          ) == (-1400 - 1300 - 1500 - 900 - 100) / 5
    assert (report.at(line, 2000, 2), report.last(line, 1)) == (20, -900)
    assert math.isnan(report.at(line, 3000, 2))


def test_the_rule_of_what_comes_again():
    assert report.mostly([]) is None
    assert report.mostly(np.array([1.0, 2])) is None
    assert report.mostly(np.array([1.0, 2, 3, -1, -1])) is True
    assert report.mostly(np.array([-9.0, -9, 1, 1, 1])) is False            # IQM below 0
    assert report.mostly(np.array([9.0, 9, -1, -1, -0.5])) is False         # on two of five seeds
    assert report.every(True, True) and not report.every(True, False)
    assert report.every(False, None) is None
    assert report.opposite(None) is None


def test_numbers_as_text():
    assert report.number(-0.2) == "0" and report.signed(-0.2) == "+0"
    assert report.number(-1509.4) == "-1,509" and report.number(math.nan) == "–"
    assert report.spread([1.0, 2.0, 6.0], 1) == "3.0 (1.0 to 6.0)"
    outcomes, near, apart = (np.array([value]) for value in (-163.0, -153.0, -152.0))
    assert report.both_returns(outcomes, near) == "-163 (-163 to -163)"
    assert report.both_returns(outcomes, apart) == "-163 (-163 to -163); -152"


def test_a_seed_has_the_lines_of_one_machine(tmp_path, monkeypatch):
    """Of three cells of seed 3 machine "one" ran two and "another" one; seed 4 is done."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    cells = [study.cell(kind, 3, "all") for kind in ("sac", "cql", "bc")]
    done = study.cell("sac", 4, "all")
    now = study.program()
    lines = [a_line(one, now) for one in (cells[0], cells[0], cells[1], done)]
    lines[0]["cpu"] = "another"
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {line["cpu"] for line in study.finished().values()} == {"one"}
    assert len(study.finished()) == 3
    assert study.missing([*cells, done], "one") == [cells[2]]
    assert study.missing([*cells, done], "another") == cells[1:]
    assert study.missing([*cells, done], "a third") == cells


def part_of_the_cells():
    """Groups of unequal size, with returns that can be told by hand: the seeds 0 to 14, of cql 0 to
    3 and 10 to 12, and no line of the errata or of other weights."""
    base = {"teacher": -150.0, "cql": -160.0, "sac": -1500.0, "bc": -170.0, "clone target": -1450.0,
            "uniform torques": -1400.0, "uniform states": -300.0,
            "uniform states and torques": -200.0}
    lines = []
    program = study.program()
    for cell in study.grid():
        kind, seed = cell["kind"], cell["seed"]
        if kind not in base or cell["as_printed"] or cell["weight"] not in (5.0, None):
            continue
        if seed > 14:
            continue
        if kind == "cql" and (3 < seed < 10 or seed > 12 or cell["student"] != seed):
            continue
        line = a_line(cell, program, base[kind] - 10 * (seed % 10))
        line["tests"][0][1] = -1400
        if kind in study.INTERVENTIONS:
            line["tests"] = line["tests"][:10] + [[19_999, base[kind], 50.0, 5.0, 0.5]]
        if seed == 0:                                 # a measure that older lines do not have
            del line["outside"]
        if seed >= 10 and kind in ("sac", "cql") and cell["data"] in study.MEASURED:
            line["measures"] = {"4000": a_measure(seed), "20000": a_measure(seed)}
        lines.append(line)
    return lines


def a_measure(seed):
    found = {"radius": 1.2, "best of the nearest": -1500.0, "random of the nearest": -1200.0 + seed,
             "own excess": 40.0}
    for kind in ("swing", "stand"):
        found |= {f"{kind} {name}": value for name, value in (
            ("excess near", 30.0), ("excess far", 28.0), ("far minus near", -2.0), ("bonus", 1.0),
            ("rank delivered", 0.1), ("rank delivered and bonus", 0.2), ("rank density", 0.8),
            ("rank good", 0.3), ("promised", 40.0), ("delivered", 10.0), ("range promised", 3.0),
            ("range delivered", 2.0))}
    for kind in ("both", "state only", "neither"):
        found |= {f"own {kind} excess": 40.0, f"own {kind} share": 1 / 3}
    if seed == 10:
        found["swing far minus near"] = None
    return found


def test_the_report_of_a_part_of_the_cells(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines = part_of_the_cells()
    write(tmp_path / "study.jsonl", lines)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    report.report()
    assert all((tmp_path / name).stat().st_size > 10_000
               for name in ("last10.png", "study.png", "regimes.png"))
    text = (tmp_path / "study.md").read_text()
    assert f"{len(lines)} of {len(study.grid())} planned runs are done" in " ".join(text.split())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found = {}
    for cells in rows:
        found.setdefault(tuple(cells[:2]), cells)               # the first of each beginning
    begins = {cells[0]: cells for cells in rows}
    # sac: -1,500 to -1,590 and -1,500 to -1,540, the middle nine; the return is 2 more
    assert found["last 10", "-1,531"][2:] == ["-170", "-201", "-181", "15 / 7 / 15"]
    assert found["random 20", "-1,518"][5] == "10 / 7 / 10"
    again = "sac does not over-estimate unseen torques more than seen ones (last 10)"
    assert begins[again][-2:] == ["4", "open"]                  # 4,000 is there, 2,000 is not
    assert begins["its order of torques is wrong even among seen ones (last 10, 4,000)"][2:] == [
        "best -1,500 (-1,500 to -1,500), random -1,188 (-1,190 to -1,186)", "5", "comes again"]
    assert begins["one torque moves the delivery little"][3:] == ["5 / 3", "comes again"]
    # of the last tests, not of the lines' returns
    assert ["clone target", "5", "-1,450 (-1,450 to -1,450)", "50.0 (50.0 to 50.0)",
            "5.0 (5.0 to 5.0)"] in [cells[:5] for cells in rows]
    assert begins["plain sac"][:4] == [
        "plain sac", "5", "-1,520 (-1,540 to -1,500)", "100.0 (100.0 to 100.0)"]
    assert ("the data's states with the teacher's torques -1,520, with uniform torques -1,400; "
            "uniform states with the teacher's torques -300 (-300 to -300), with uniform torques "
            "-200 (-200 to -200). At most 25 below its teacher (last five tests) end uniform "
            "torques on 0 of 5, uniform states on 0 of 5, both on 0 of 5."
            ) in " ".join(text.split())
    assert found["sac", "15"][2] == "-1,533 (-1,590 to -1,500)"
    assert found["last 5", "+1,340, better on 4 of 4"][2:] == [
        "+10, better on 4 of 4", "0 of 5", "4 of 4", "5 of 5", "0 of 5", "4 of 4", "5 of 5"]
    assert found["last 10", "4,000"][2:5] == ["sac", "5", "30.0"]
    assert "-2.0 (-2.0 to -2.0) [4]" in text                    # far minus near, of four seeds
    assert "all: cql minus cql as printed: not run" in text
    assert "a critic that only warms up has 0.39" in " ".join(text.split())
    assert "**The page's formulas.** Not run yet." in text
    assert "results/same.jsonl is not there" in text
    assert "nan" not in text.lower().replace("nanometre", "")


def verdicts_of_the_probe(tmp_path, monkeypatch, standing=-1.0, plain=120.0):
    """Of three seeds whose far minus near is -1 in swinging states and whose clone promises 50."""
    lines = [a_line(study.cell("teacher", seed)) for seed in (10, 11, 12)]
    for seed in (10, 11, 12):
        sac = a_line(study.cell("sac", seed, "last 10"), value=-1500.0)
        sac["tests"][10][2] = plain
        sac["measures"] = {str(update): {"swing far minus near": -1.0,
                                         "stand far minus near": standing}
                           for update in (2000, 4000)}
        clone = a_line(study.cell("clone target", seed, "last 10"))
        clone["tests"] = [[0, -1400.0, 0.0, 5.0, 0.0], [19_999, -1500.0, 50.0, 5.0, 0.0]]
        lines += [sac, clone]
    rows = [*report.probed(study_of(tmp_path, monkeypatch, lines))]
    return rows[0][-1], rows[3][-1]


def test_what_a_probes_findings_ask_for(tmp_path, monkeypatch):
    assert verdicts_of_the_probe(tmp_path, monkeypatch) == (True, True)
    assert verdicts_of_the_probe(tmp_path, monkeypatch, standing=1.0) == (False, True)
    assert verdicts_of_the_probe(tmp_path, monkeypatch, plain=84.0) == (True, False)


def study_of(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    now = study.program()
    write(tmp_path / "study.jsonl", [line | {"program": now} for line in lines])
    return report.Study()


def test_each_erratum_alone(tmp_path, monkeypatch):
    lines = [a_line(study.cell("teacher", seed), value=-150.0 - seed) for seed in range(10, 14)]
    lines += [a_line(study.cell("teacher", seed, as_printed=["jacobian"]), value=-500.0)
              for seed in (10, 11)]
    lines += [a_line(study.cell("teacher", seed, as_printed=["sign"]), value=-150.0 - seed)
              for seed in range(10, 14)]
    text = "\n".join(report.errata(study_of(tmp_path, monkeypatch, lines)))
    assert "| corrected | 4 | -158 | -159 | -160 | -161 | -160 | +0 | 0 of 4 | 4 of 4 |" in text
    assert ("| jacobian | 2 | -498 | -498 | not run | not run | -498 | -340 | 2 of 2 | 0 of 2 |"
            in text)
    assert "| sign | 4 | -158 | -159 | -160 | -161 | -160 | +0 | 0 of 4 | 4 of 4 |" in text
    assert "| timeout | 0 | not run | not run | not run | not run | – | – | 0 of 0 |" in text


@pytest.mark.parametrize("value, promise, words", [
    (-1450.0, 150.0, ["Not the cause of the failure", "Nor is it needed"]),
    (-1450.0, 60.0, ["Not the cause of the failure", "does not pass 100 on most seeds"]),
    (-200.0, 60.0, ["A cause of the failure", "does not pass 100 on most seeds"])])
def test_whether_the_temperature_is_a_cause(value, promise, words, tmp_path, monkeypatch):
    lines = [a_line(study.cell("teacher", seed)) for seed in (10, 11, 12)]
    for seed in (10, 11, 12):
        line = a_line(study.cell("fixed temperature", seed, "last 10"), value=value)
        line["tests"] = [[0, -1400.0, 0.0, 5.0, 0.0], [19_999, value, promise, 5.0, 0.0]]
        lines.append(line)
    said = report.temperature_verdict(study_of(tmp_path, monkeypatch, lines))
    assert all(some in said for some in words), said


def test_what_the_interquartile_mean_hides(tmp_path, monkeypatch):
    lines = [a_line(study.cell("teacher", seed)) for seed in range(5)]
    for seed in range(5):
        sac = -150.0 if seed == 3 else -1500.0
        lines.append(a_line(study.cell("sac", seed, "last 85"), value=sac))
        lines.append(a_line(study.cell("cql", seed, "last 85"), value=-155.0))
        lines.append(a_line(study.cell("bc", seed, "last 85"), value=-170.0))
    runs = study_of(tmp_path, monkeypatch, lines)
    assert report.hidden(runs) == [["last 85", "sac", 5, "-1,350", "-1,080", "3: +0"]]
    over_sac, over_bc, both = report.last_85(runs)
    assert (over_sac.tolist(), both.tolist()) == ([1345, 1345, 1345, -5, 1345],
                                                  [15, 15, 15, -5, 15])
    assert (over_bc == 15).all()
    text = " ".join(" ".join(report.verdicts(runs)).split())
    assert "cql beats sac on 4 of 5 seeds, bc on 5 of 5, both on 4 of 5." in text
    assert "sac comes within 25 of its teacher on 1 of 5 (seed 3)." in text


def test_a_report_without_any_line(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for name in ("draw_last10", "draw_students", "draw_regimes"):
        monkeypatch.setattr(report, name, lambda runs: None)
    report.report()
    assert (tmp_path / "study.md").read_text().count("Not run yet.") >= 10
    assert [*report.readme(report.Study())][0] == "| – | – | – | – | 0 |"


def test_the_report_names_the_cells_that_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    cells = [study.cell("sac", seed, "all") for seed in range(8)]
    now = study.program()
    lines = [a_line(cell, program) for cell in cells for program in ("older", now)]
    write(tmp_path / "same.jsonl", lines)
    text = "\n".join(report.same_digits(None))
    assert text.count("| sac, all |") == text.count("| the same |") == 8
    assert "Its lines count." in text
    lines[0]["delivered"] += 0.001
    write(tmp_path / "same.jsonl", lines)
    text = "\n".join(report.same_digits(None))
    assert text.count("| differ |") == 1 and "Its lines do not count." in text


# results/ and README

def disagreements(text, teacher, student):
    """The lines of a main job's output that do not show the tests of these cells. The cells hold
    three digits, the output one or two: half of its last digit and of theirs may lie between."""
    wanted = [("teacher", test) for test in teacher["tests"]]
    wanted += [("student", test) for test in student["tests"]]
    printed = [line for line in text.splitlines() if " promised " in line]
    wrong = [] if len(printed) == len(wanted) else [f"{len(printed)} lines, {len(wanted)} tests"]
    for line, (stage, test) in zip(printed, wanted):
        said, step, _, value, _, promised, _, delivered = line.split()
        near = abs(float(value) - test[1]) < 0.0506
        near &= abs(float(promised) - test[2]) < 0.0056
        near &= abs(float(delivered) - test[3]) < 0.0056
        if (said, int(step)) != (stage, test[0]) or not near:
            wrong.append(line)
    for who, cell in (("the teacher", teacher), ("the student", student)):
        row = [line for line in text.splitlines() if line.startswith(who)]
        if not row or abs(float(row[0].split()[3]) - cell["return"]) > 0.0556:
            wrong.append(who)
    return wrong


def as_printed(teacher, student):
    """What the program prints for the tests of two cells."""
    lines = []
    for stage, cell in (("teacher", teacher), ("student", student)):
        for step, value, promised, delivered, _ in cell["tests"]:
            lines.append(f"{stage} {step:6d}   return {value:8.1f}   promised {promised:8.2f}"
                         f"   delivered {delivered:6.2f}")
    for who, cell in (("the teacher", teacher), ("the student", student)):
        lines.append(f"{who:<22}{100:>9}{cell['return']:>10.1f}{10:>12.1f}{-300:>10.1f}{-1:>10.1f}")
    return "\n".join(lines)


def test_what_disagrees_with_the_main_jobs_output():
    teacher, student = a_line(study.cell("teacher", 0)), a_line(study.cell("cql", 0, "all"))
    teacher["tests"] = [[10 * k, -1625.249, 0.125, 1.855, 0.0] for k in range(11)]
    text = as_printed(teacher, student)
    assert text.startswith("teacher      0   return  -1625.2   promised     0.1")
    assert disagreements(text, teacher, student) == []
    other = text.replace("-1625.2", "-1625.3", 1)
    assert disagreements(other, teacher, student) == [other.splitlines()[0]]
    teacher["return"] += 0.11
    assert disagreements(text, teacher, student) == ["the teacher"]
    assert len(disagreements(text.split("\n", 1)[1], teacher, student)) > 1


def test_the_main_jobs_output_is_the_studys():
    file = study.RESULTS / "same.jsonl"
    if not file.exists():
        pytest.fail("results/same.jsonl is not there: run python tests/study.py --same")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    mine = {study.key(line): line for line in lines if line["program"] == study.program()}
    asked = study.key(study.cell("teacher", 0)), study.key(study.cell("cql", 0, "all"))
    missing = [key for key in asked if key not in mine]
    assert not missing, f"results/same.jsonl lacks this program's {missing}"
    text = (study.RESULTS / "main.txt").read_text()
    assert disagreements(text, *(mine[key] for key in asked)) == []


def test_readme_has_the_figures_of_the_results():
    text = " ".join((study.TOP / "README.md").read_text().split())
    runs = report.Study()
    assert runs.lines, "no line of results/study.jsonl counts: see study.finished"
    figures = [*report.readme(runs)]
    missing = [figure for figure in figures if figure not in text]
    assert not missing, "README lacks:\n" + "\n".join(missing)


def numbers(text):
    """The numbers in a text as README writes them, whole: -1,530 and -155.4 as -1530 and -155."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return {round(float(number.replace(",", ""))) for number in found}


def test_readmes_experiments_are_those_of_tryit():
    """Each command of "Try it" stands in results/tryit.txt, and so do the numbers beside it and, to
    half a minute, the time that it took."""
    section = (study.TOP / "README.md").read_text().split("## Try it")[1].split("\n## ")[0]
    blocks = (study.TOP / "results" / "tryit.txt").read_text().split("\n$ ")[1:]
    printed = {block.split("\n")[0]: block for block in blocks}
    rows = re.findall(r"(?m)^\| `(python .*--steps \d+)` \((.*) min\) \| (.*) \|$", section)
    assert len(rows) == 5
    for command, minutes, seen in rows:
        seconds = int(re.search(r"(?m)^seconds (\d+)$", printed[command])[1])
        halves = max(1, round(seconds / 30))
        assert minutes == (str(halves // 2) if halves > 1 else "") + "½" * (halves % 2), command
        assert numbers(seen), command
        assert numbers(seen) <= numbers(printed[command]), command


def test_readmes_output_is_the_main_jobs():
    text = (study.TOP / "README.md").read_text()
    shown = re.search(r"```\n(teacher .*?)```", text, re.DOTALL)[1].splitlines()
    printed = (study.TOP / "results" / "main.txt").read_text().splitlines()
    assert len(shown) > 10 and set(shown) <= set(printed)
