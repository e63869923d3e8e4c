"""study/: a cell is the program's own run; lines are appended once; tables by hand; README's
figures are those of the lines."""
import json
import math
import os
import pathlib
import re
import sys

import numpy as np
import pandas as pd
import pytest

os.environ["OMP_NUM_THREADS"] = "1"
TOP = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TOP), str(TOP / "study")]

import cql_pendulum as ours  # noqa: E402
import experiments  # noqa: E402
import measure  # noqa: E402
import recordings  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Short episodes, few of them; a folder for what is kept, and a file for the lines."""
    starts = ours.Run.starts
    for module, name, value in ((ours, "EPISODE", 20), (ours, "BATCH", 16), (ours, "UPDATES", 1),
                                (run, "KEPT", tmp_path / "kept"), (measure, "CLONING", 2),
                                (run, "FILE", tmp_path / "cells.jsonl")):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(ours.Run, "starts", lambda self, purpose, n: starts(self, purpose, n)[:3])
    yield tmp_path
    ours.AS_PRINTED.clear()


def test_a_cell_is_the_programs_own_run(tiny):
    """The same tests, agents and 100 episodes as by its command line, teacher and all."""
    one = run.cell("cql", 3, "last 10", weight=0.5, steps=3)
    assert one["argv"] == ["--seed", "3", "--last", "10", "--weight", "0.5", "--steps", "3"]
    line = json.loads(json.dumps(run.run_cell(one), allow_nan=False))
    _, _, student = ours.main([*one["argv"], "--out", tiny / "whole"])
    log = pd.read_csv(tiny / "whole" / "log.csv")
    log = log[log["stage"] == "student"]
    for name in ("step", "return", "promised", "delivered", "temperature", "penalty"):
        assert line["tests"][name] == log[name].round(5).tolist()
    seeds = ours.Run(None, 3).starts(1, 100)
    assert line["return"] == round(ours.evaluate(student, seeds)[0].mean(), 2)
    assert line["temperature"] == round(student.alpha.exp().item(), 5) and student.weight == 0.5
    assert len({line["return"], line["mean"], line["greedy"]}) == 3


def test_other_cells(tiny, monkeypatch):
    """A recording, an intervention, a printed formula; a clone has no critic; measured between."""
    monkeypatch.setattr(run, "BETWEEN", [0])
    clone = run.run_cell(run.cell("bc", 3, "20 mean", steps=3))
    assert clone["rows"] == 400 and clone["at"]["0"]["return"] < 0
    assert not {"promised", "greedy", "temperature"} & {*clone, *clone["tests"]}
    assert (tiny / "kept" / "20 mean-3.npz").exists()
    changed = run.run_cell(run.cell("uniform states", 3, "last 10", steps=3))
    same = run.run_cell(run.cell("sac", 3, "last 10", steps=3))
    assert changed["argv"] is None and changed["coverage"] != same["coverage"]
    fixed = run.run_cell(run.cell("fixed temperature", 3, "last 10", steps=3))
    assert fixed["temperature"] == 0.01 != same["temperature"]
    printed = run.run_cell(run.cell("cql", 3, "all", as_printed=["range"], steps=3))
    assert "--as-printed" in printed["argv"] and ours.AS_PRINTED == {"range"}
    assert run.run_cell(run.cell("sac", 3, "last 10", steps=3))["tests"] == same["tests"]


def test_each_line_once(tiny, capsys):
    """What is there is compared, what is missing appended; teachers come first."""
    (tiny / "kept" / "3").mkdir(parents=True)
    cells = [run.cell(kind, 3, "all") for kind in ("sac", "cql")]
    run.work(cells[:1], 1, run_one=a_line)
    run.work(cells, 1, run_one=lambda one: a_line(one, -148.0))
    lines = [json.loads(line) for line in run.FILE.read_text().splitlines()]
    assert [(line["kind"], line["return"]) for line in lines] == [("sac", -150), ("cql", -148)]
    assert "29 of 110 numbers differ (a processor at abcdefg, a processor at abcdefg) mean: " in (
        capsys.readouterr().out)


def test_the_files_lines():
    """No two with a key; those with a command line have the one that today's run.py gives."""
    lines = [json.loads(line) for line in run.FILE.read_text().splitlines()]
    assert len({run.key(line) for line in lines}) == len(lines) >= 526
    for line in lines:
        if line["argv"] is not None:
            assert line["argv"] == run.command(line), line["argv"]


def test_the_measures_pendulum_is_gyms():
    rng = np.random.default_rng(0)
    states = measure.states_of(rng.uniform(-3.1, 3.1, 200), rng.uniform(-8, 8, 200))
    torques = rng.uniform(-2, 2, 200)
    rewards, following = measure.pendulum(states, torques)
    for k, (state, torque) in enumerate(zip(states, torques)):
        reward, next_state, _ = ours.step_from(state, torque)
        assert reward == pytest.approx(rewards[k], rel=1e-6)
        np.testing.assert_allclose(next_state, following[k], atol=1e-5)


def test_the_measure_of_a_critic_that_is_right():
    """It promises what follows and 5 more for torques beyond 1 N m; the data's torques are 0."""
    angle, speed = np.meshgrid(np.linspace(-3, 3, 40), [-0.5, 0.5])
    rows = np.zeros([80, 10], np.float32)
    rows[:, :3] = measure.states_of(angle.ravel(), speed.ravel())
    agent = ours.SAC()

    def promise(states, torques):
        delivered, bonus = measure.deliver(agent, states, torques)
        return delivered + bonus + 5 * (abs(torques) > 1)

    agent.promise = promise
    found = measure.measure(agent, rows, 0, good=agent)
    for kind in ("swing", "stand"):
        assert found[f"{kind} excess near"] == pytest.approx(0, abs=1e-4)
        assert found[f"{kind} excess far"] == pytest.approx(4, abs=1e-4)    # of 10, 8 are beyond 1
        assert found[f"{kind} far minus near"] == pytest.approx(4, abs=1e-4)


def test_recordings_of_a_seed(tiny):
    """The same starts for all; torques within the limit; and noise as its name says."""
    teacher = ours.SAC()
    found = {name: recordings.record(name, 3, teacher).rows for name in recordings.NAMES}
    for name, rows in found.items():
        np.testing.assert_array_equal(rows[::20, :3], found["controller"][::20, :3])
        assert abs(rows[:, 3]).max() <= np.float32(1.8 if name == "controller 1.8" else 2)
        if name.startswith("20 mean"):
            mean = measure.mean_torque(teacher, rows[:, :3])
            noise = (rows[:, 3] - mean)[abs(mean) < 0.5]
            expected = float((name.split(" + ") + ["0"])[1])
            assert len(noise) > 20 and noise.std() == pytest.approx(expected, rel=0.4, abs=1e-5)


def a_line(cell, value=-150.0):
    """A line of cells.jsonl, made up: tests at 0, 2,000, ..., of which the return is `value`."""
    steps = [*range(0, 50_000, 2000), 49_999]
    tests = {"step": steps, "return": [value] * 26, "promised": [step / 1000 for step in steps],
             "delivered": [80.0] * 26}
    return cell | {"cpu": "a processor", "commit": "abcdefghij", "data mean": -300.0, "mean": value,
                   "coverage": 5.0, "return": value, "promised": 70.0, "greedy": value + 10,
                   "tests": tests}


def study_of(tmp_path, lines):
    file = tmp_path / "cells.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.Study(file)


def test_numbers_and_words():
    assert report.number(-0.2) == "0" and report.number(math.nan) == "–"
    assert report.spread(pd.Series([1.0, 2.0, 6.0]), 1) == "3.0 (1.0 to 6.0) [3]"
    assert report.iqm([9, 1, 2, 3, -500, 4, 5, 1000]) == 3.5
    assert report.iqm([1, 2, 3, 4, 500]) == 3                   # of 5 one is dropped on each side


def test_the_report_of_made_up_lines(tmp_path):
    lines = [a_line(run.cell("teacher", seed), -150.0 - seed) for seed in range(12)]
    lines += [a_line(run.cell("sac", seed, "last 10"), -1500.0) for seed in range(12)]
    lines += [a_line(run.cell("cql", seed, "last 10"), -140.0 - 2 * seed) for seed in range(7)]
    lines += [a_line(run.cell("bc", 0, "last 10"), -999.0) | {"loss": "likelihood"}]
    lines += [a_line(run.cell("cql", seed, "20 mean"), -170.0) for seed in range(2)]
    lines[-1]["tests"]["promised"][12] = -104.0                     # at 24,000
    lines[-1]["at"] = {"20000": {"return": -160.0, "mean": -161.0, "greedy": -162.0}}
    lines += [a_line(run.cell("cql", 0, "20 mean", steps=20_000), -555.0)]
    lines += [a_line(run.cell("cql", 3, "last 10", student=103), -900.0)]
    lines[12]["measures"] = {"4000": {"swing excess near": -2.0, "swing rank good": None}}
    study = study_of(tmp_path, lines)
    claims = [*report.claims(study)]
    assert claims[0] == (
        "| a SAC teacher's last ten episodes | -300 | -1,500 | -146 | – | 12 / 7 / 0 |")
    assert "below -103, the least possible, on 1 of 2 and – seeds" in claims
    assert "on 7 of 7 seeds" in claims
    assert study.below("20 mean", "cql", 20_000) == "0 of 2"        # no test of these was below
    tables = {title: {tuple(row[:2]): row[2:] for row in frame.astype(str).values.tolist()}
              for title, _, frame in report.tables(study)}
    assert tables["Returns by data"]["last 10", "cql"] == [
        "-300 (-300 to -300) [7]", "5.0 (5.0 to 5.0) [7]", "-146 (-152 to -140) [7]",
        "-146 (-152 to -140) [7]", "-136 (-142 to -130) [7]", "70.0 (70.0 to 70.0) [7]", "–", "–",
        "7 of 7"]
    wins = tables["Which student wins, seed by seed"]
    assert wins["last 10", "+1,354, better on 7 of 7"][0] == "–"
    recorded = tables["Recordings of finished policies"]["20 mean", "cql"]
    assert recorded[:2] == ["-358 (-555 to -160) [2]", "-170 (-170 to -170) [2]"]
    blame = tables["Who is to blame: the policy or the critic?"]["20 mean", "cql"]
    assert blame[1] == "-358 (-555 to -161) [2]" and blame[5] == "-160 (-160 to -160) [2]"
    near = tables["Excess of torques near and far from the data's"]["last 10", "sac"]
    assert near[:2] == ["4000", "-2.0 (-2.0 to -2.0) [1]"]


def test_tables_and_readme_have_the_figures_of_the_lines(tmp_path):
    study = report.Study(run.FILE)
    report.write_tables(study, tmp_path / "tables.md")
    text = (report.RESULTS / "tables.md").read_text()
    assert (tmp_path / "tables.md").read_text() == text, "run python study/report.py"
    for folder, claims in ((TOP, report.claims(study)),
                           (TOP / "study", report.study_claims(study))):
        readme = " ".join((folder / "README.md").read_text().split())
        missing = [claim for claim in claims if claim not in readme]
        assert not missing, f"{folder} lacks:\n" + "\n".join(missing)


def test_readmes_experiments_fit_the_program_and_their_results():
    """Each changed program compiles; README has its change, its command and what it returned."""
    readme, program = (TOP / "README.md").read_text(), experiments.PROGRAM.read_text()
    for name, (_, changes, typed) in experiments.EXPERIMENTS.items():
        text = experiments.changed(name)
        compile(text, name, "exec")
        assert (text == program) == (not changes)
        assert experiments.answer(name) in readme, name
        assert f"study/ten.npz {typed}<" in readme, name
    links = re.findall(r"\[(\w+)\]\(cql_pendulum.py#L(\d+)\)", readme)
    assert {name for name, _ in links} == {*ours.ERRATA}
    for name, number in links:
        assert f'"{name}" in AS_PRINTED' in program.splitlines()[int(number) - 1], name
