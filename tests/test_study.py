"""study/: the measures on cases that can be told by hand, the runs on a few updates, the report on
made-up lines; and that tables.md and README have the figures of the lines."""
import contextlib
import copy
import json
import math
import random
import re
import types

import numpy as np
import pandas as pd
import pytest
import torch

import cql_pendulum as ours
import measure
import notebook
import peers
import recordings
import report
import run
from conftest import TOP, Constant, batch, filled, flat

# a state in each cell of measure.histogram, and some that stand
EVERY_ANGLE, EVERY_SPEED = np.meshgrid(np.radians(np.arange(-172.5, 180, 15)),
                                       [-7, -5, -3, -0.9, 0.9, 3, 5, 7])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", 21)
    monkeypatch.setattr(measure, "STATES", 40)


def rows_of(angle, speed, torque):
    """Rows of a dataset, by angle in radians, speed and torque; the rest is 0."""
    angle, speed, torque = np.broadcast_arrays(angle, speed, torque)
    rows = np.zeros([angle.size, 10], np.float32)
    rows[:, 0], rows[:, 1] = np.cos(angle).ravel(), np.sin(angle).ravel()
    rows[:, 2], rows[:, 3] = speed.ravel(), torque.ravel()
    return rows


def rows_everywhere(*choices):
    """Each of the torques, 20 rows in all, in states all over the plane."""
    repeats = 20 // len(choices)
    parts = [rows_of(EVERY_ANGLE, EVERY_SPEED, torque) for torque in choices]
    return np.concatenate(parts * repeats)


class Policy(torch.nn.Module):
    """A policy that always gives the same torque and entropy."""

    def __init__(self, torque, entropy):
        super().__init__()
        self.torque, self.entropy = torque, entropy
        self.fc_state = torch.nn.Identity()
        self.fc_mu = lambda state: torch.full([len(state), 1], math.atanh(torque / 2.0001))

    def forward(self, state):
        same = torch.ones([len(state), 1])
        return self.torque * same, self.entropy * same


def steady(torque=0.0, entropy=0.0):
    agent = ours.SAC()
    agent.model_action = Policy(torque, entropy)
    return agent


def critic(agent, function):
    """Let both critics answer function(states [n, 3], torques [n]) in numpy; the second a bit more,
    so that the smaller one is the first."""
    def forward(more):
        def answer(state, action):
            found = function(state.double().numpy(), action[:, 0].double().numpy())
            return torch.tensor(found + more)[:, None]
        return answer
    agent.model_value1.forward, agent.model_value2.forward = forward(0), forward(1)
    return agent


def honest(agent, more=lambda torque: 0 * torque):
    """An agent whose critic promises what follows, and something more of the torque."""
    def exact(states, u):
        delivered, bonus = measure.deliver(agent, states, u)
        return delivered + bonus + more(u)
    return critic(agent, exact)


def test_a_test_is_episodes_of_gym():
    seeds = [5, 6, 7]
    agent = critic(steady(1.2, 4.0), lambda states, u: states[:, 2] + u)
    found = measure.play(agent, seeds)
    np.testing.assert_allclose(found["return"], ours.evaluate(Constant(1.2), seeds)[0], rtol=1e-5)
    assert found["states"].shape == (21, 3, 3) and (found["torques"] == np.float32(1.2)).all()
    np.testing.assert_allclose(found["promised"], found["states"][0, :, 2] + 1.2, rtol=1e-6)
    assert found["bonus"] == pytest.approx(0.01 * 4 * 0.99 / (1 - 0.99))
    rewards, _ = measure.pendulum(found["states"].reshape(-1, 3), found["torques"].ravel())
    np.testing.assert_allclose(found["delivered"], ours.discounted(rewards.reshape(21, 3)))
    drawn = ours.SAC()
    assert (measure.play(drawn, seeds)["return"] == measure.play(drawn, seeds)["return"]).all()


def test_delivery_and_bonus_of_a_pendulum_at_rest():
    hanging = np.array([[-1.0, 0, 0]])
    agent = steady(entropy=1.5)
    delivered, bonus = measure.deliver(agent, hanging, np.zeros(1))
    assert delivered == pytest.approx(100 * (8 - math.pi ** 2) / 8, abs=1e-6)
    assert bonus == pytest.approx(0.01 * 1.5 * 0.99 / (1 - 0.99))   # from step 1 on, without an end


def test_the_bonus_counts_the_steps_that_a_reward_follows():
    alone = measure.discounted_entropies(np.eye(29))        # column k: only step k + 1 has entropy
    assert (alone[0], alone[8]) == (pytest.approx(0.99), pytest.approx(0.99 ** 9))
    assert alone[9] == pytest.approx(0.99 ** 10 + 0.99 ** 30 / 0.01 / 20)       # of the last 20
    assert measure.discounted_entropies(np.ones(199)) == pytest.approx(0.99 / (1 - 0.99))


def test_measure_of_a_critic_that_is_right():
    agent, before = honest(ours.SAC()), torch.get_rng_state()
    found = measure.measure(agent, rows_everywhere(-1.0, 1.0), 0)
    for name in ("swing", "stand", "own"):
        assert found[f"{name} excess"] == 0
    for kind in ("swing", "stand"):
        assert found[f"{kind} rank delivered and bonus"] == pytest.approx(1)
        total = found[f"{kind} delivered"] + found[f"{kind} bonus"]
        assert found[f"{kind} promised"] == pytest.approx(total, abs=2e-4)
        assert found[f"{kind} bonus"] != 0
        assert found[f"{kind} far minus near"] == 0
    assert torch.equal(torch.get_rng_state(), before)       # no random number elsewhere differs
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_ranges_and_ranks_of_a_critic_that_is_upside_down():
    rows = rows_everywhere(-1.0)
    found = measure.measure(critic(steady(), lambda s, u: 0.0 * u), rows, 0)
    assert found["swing rank delivered"] is None            # a flat critic orders nothing
    assert found["swing range promised"] == 0 < found["swing range delivered"]
    agent = steady(1.0)
    upside_down = critic(agent, lambda s, u: -2 * measure.deliver(agent, s, u)[0])
    found = measure.measure(upside_down, rows, 0)
    assert found["swing rank delivered"] == -1
    assert found["swing range promised"] == pytest.approx(2 * found["swing range delivered"],
                                                          abs=2e-4)


def test_near_and_far_torques_of_the_data():
    def more(u):             # at -1: 7; a quarter N m away: 10; over three quarters: -3; else 100
        distance = abs(u + 1)
        between = np.where(distance > 0.75, -3, 100)
        return np.select([distance == 0, distance == 0.25], [7, 10], between)

    agent = honest(steady(0.2, 0.7), more)
    found = measure.measure(agent, rows_everywhere(-1.0), 0)
    for kind in ("swing", "stand"):
        assert found[f"{kind} excess near"] == 9                             # -1.25, -1, -0.75
        assert found[f"{kind} excess far"] == -3
        assert found[f"{kind} far minus near"] == -12
        assert found[f"{kind} states with both"] == found[f"{kind} states"]
        every = 7 + 2 * 10 - 10 * 3 + 4 * 100
        assert found[f"{kind} excess"] == pytest.approx(every / 17, abs=1e-4)


def test_states_that_are_none():
    rows = rows_of(np.radians(np.full(60, 3.0)), 0.5, 1.0)
    found = measure.measure(steady(0.2), rows, 0)
    assert found["swing states"] == found["swing states with both"] == 0
    assert found["swing excess"] is found["swing rank density"] is None
    assert found["stand excess"] is not None and found["stand states"] == 40


def test_the_nearest_rows_torques():
    faster = rows_of(np.zeros(20), 1.0, -1.0)                       # 1 / 8 = 7 degrees away
    rows = np.concatenate([rows_of(np.radians(np.full(20, 10.0)), 0.0, 1.0), faster])
    assert (measure.near_torques(rows, np.array([[1.0, 0, 0]])) == -1).all()
    rows = np.concatenate([rows_of(np.full(20, -3.1), 0.0, 2.0), rows_of(np.full(20, 2.9), 0, -2)])
    over_the_edge = rows_of([3.1], 0.0, 0.0)[:, :3]
    assert (measure.near_torques(rows, over_the_edge) == 2).all()   # angles go round


def test_densities_reflect_at_the_limits():
    uniform = np.linspace(-2, 2, 2001)[None]
    found = measure.densities(uniform)
    np.testing.assert_allclose(found, found.mean(), rtol=5e-3)
    assert measure.densities(np.array([[0.5]])).argmax() == 10
    one = measure.densities(np.array([[0.5]]), np.array([0.5, 0.75, 0.25]))[0]
    np.testing.assert_allclose(one, [1, math.exp(-0.5), math.exp(-0.5)], rtol=1e-3)


def test_rank_correlation_by_hand():
    first = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3], [5, 5, 5, 5]])
    second = np.array([[10.0, 30, 20, 40], [4, 3, 2, -9], [1, 2, 3, 4], [1, 2, 3, 4]])
    found = measure.rank_correlations(first, second)
    np.testing.assert_allclose(found, [0.8, -1, math.sqrt(0.9), math.nan])


def test_coverage_and_what_the_data_has():
    eight = rows_of(np.full(8, 0.1), 0.5, np.linspace(-1.99, 1.99, 8))
    assert measure.coverage(eight) == 8
    two = [*[eight] * 5, rows_of(np.full(8, -3.0), -7.9, -2.0)]
    assert measure.coverage(np.concatenate(two)) == 4.5             # of two cells
    assert measure.coverage(rows_of(np.radians([1, 29, 31]), 0.1, [-2.0, 2.0, 2.0])) == 1.5
    data = rows_of([0.1, 0.1], 0.5, [-1.9, 0.1])
    states = rows_of([0.1, 0.2, 0.1, 3.0, 0.1], [0.5, 1.9, 0.5, 0.5, -0.5], 0)[:, :3].astype(float)
    torques = np.array([-1.6, 0.4, 1.9, 0.1, 0.1])
    assert measure.data_has(data, states, torques).tolist() == [
        "both", "both", "state only", "neither", "neither"]
    assert measure.outside(data, states, torques) == 3 / 5


def test_contrast_and_gap_by_hand():
    rows = rows_of(np.linspace(-3, 3, 700), np.linspace(-8, 8, 700), 0.5)
    agent = critic(ours.SAC(), lambda states, u: 3 * states[:, 2] - u ** 2)
    squares = np.linspace(-2, 2, 41) ** 2                               # the state's part cancels
    contrast, gap = measure.contrast_and_gap(agent, rows)
    assert contrast == pytest.approx(squares.mean() - 0.25, abs=1e-5)
    assert gap == pytest.approx(math.log(4 * np.exp(-squares).mean()) + 0.25, abs=1e-5)
    high = critic(ours.SAC(), lambda states, u: 1e4 + 0 * u)            # exp would overflow
    assert measure.contrast_and_gap(high, rows) == pytest.approx((0, math.log(4)))


def test_clone_target_follows_the_clone():
    state, action, reward, next_state, over = batch()
    student = measure.CloneTarget(steady(1.5, 4.0))
    student.model_value_next1.forward = lambda s, a: 3 * a + s[:, 2:]
    student.model_value_next2.forward = lambda s, a: 2 * a + s[:, 2:]
    target = student._get_target(reward, next_state, over)
    wanted = reward + 0.99 * (1 - over) * (2 * 1.5 + next_state[:, 2:] + 0.01 * 4)
    np.testing.assert_allclose(target, wanted, rtol=1e-6)

    student = measure.CloneTarget(ours.BC())                    # and trains it no more
    before = flat(student.clone.model_action)
    student.train(*batch())
    assert torch.equal(before, flat(student.clone.model_action))


@pytest.mark.parametrize("kind", measure.INTERVENTIONS)
def test_rows_of_the_interventions(kind):
    rows, teacher = rows_everywhere(1.0), steady(0.7)
    rows[::10, 9] = 1
    before = rows.copy()
    changed = measure.changed_rows(kind, rows, 5, teacher)
    np.testing.assert_array_equal(rows, before)
    np.testing.assert_array_equal(measure.changed_rows(kind, rows, 5, teacher), changed)
    if not kind.startswith("uniform"):
        assert changed is rows
        return
    np.testing.assert_array_equal(changed[:, 8:], rows[:, 8:])
    if "states" in kind:
        even(measure.angles(changed), math.pi)
        even(changed[:, 2], 8)
    else:
        np.testing.assert_array_equal(changed[:, :3], rows[:, :3])
    if "torques" in kind:
        even(changed[:, 3], 2)
    else:
        np.testing.assert_allclose(changed[:, 3], 0.7, rtol=1e-6)
    reward, following = measure.pendulum(changed[:, :3].astype(float), changed[:, 3].astype(float))
    np.testing.assert_allclose(changed[:, 5:8], following, atol=1e-5)
    np.testing.assert_allclose(changed[:, 4], reward, atol=1e-5)


def even(values, limit):
    share = np.histogram(values, 8, (-limit, limit))[0] / len(values)
    np.testing.assert_allclose(share, 1 / 8, atol=0.02)


def test_every_line_is_of_a_cell():
    lines = [json.loads(line) for line in run.FILE.read_text().splitlines()]
    cells = {run.key(cell) for cell in run.grid()}
    assert len({run.key(line) for line in lines}) == len(lines)
    others = ("notebook's outputs", "notebook teacher", "d3rlpy sac", "d3rlpy cql")
    trained = {run.key(line) for line in lines if line["kind"] not in others}
    assert len(trained) >= 376 and trained <= cells
    for line in lines:
        assert line["commit"] and ("cpu" in line or line["kind"] == "notebook's outputs")


def test_the_data_that_students_get(tmp_path, monkeypatch):
    """From a teacher that does not learn; the parts are nested and none is written twice."""
    monkeypatch.setattr(run, "KEPT", tmp_path)
    monkeypatch.setattr(ours.SAC, "train", lambda self, *batch: None)
    monkeypatch.setattr(ours.Data, "get_sample", lambda self: ())
    monkeypatch.setattr(ours.SAC, "get_action", lambda self, state: random.uniform(-2, 2))
    monkeypatch.setattr(run, "test", lambda *args: [])
    run.train_teacher(run.cell("teacher", 0))
    whole, ten, five, few, uniform, mixed = (run.make_data(name, 0, None).rows for name in (
        "all", "last 10", "last 5", "2,000 rows", "random 20", "random 10 + last 10"))
    assert [len(x) for x in (whole, ten, five, few, uniform, mixed)] == [
        2100, 210, 105, 2000, 420, 420]
    np.testing.assert_array_equal(whole[-210:], ten)
    np.testing.assert_array_equal(ten[-105:], five)
    np.testing.assert_array_equal(mixed, np.concatenate([uniform[:210], ten]))
    assert {x.tobytes() for x in few} <= {x.tobytes() for x in whole}
    assert len({x.tobytes() for x in few}) == 2000
    assert all(30 < count < 80 for count in np.histogram(uniform[:, 3], 8, (-2, 2))[0])


def test_a_cell_becomes_a_line(tmp_path, monkeypatch):
    """A teacher and students of a few updates, in short episodes."""
    train_teacher, train_student = run.train_teacher, run.train_student
    for module, name, value in (
            (ours, "EPISODE", 70), (ours, "UPDATES", 1), (run, "KEPT", tmp_path),
            (run, "MOMENTS", [2]), (run, "train_teacher", lambda cell: train_teacher(cell, 10)),
            (run, "train_student", lambda cell: train_student(cell, 3)),
            (measure, "STATES", 3), (measure, "CLONING", 2), (recordings, "NAMES", ["a recording"]),
            (recordings, "make", lambda name, seed, teacher: record(name, seed, teacher))):
        monkeypatch.setattr(module, name, value)

    def record(name, seed, teacher):
        assert (name, seed) == ("a recording", 10) and type(teacher) is ours.SAC
        return filled(ours.Data())

    lines = {}
    for kind, data in (("teacher", None), ("sac", "last 10"), ("bc", "all"), ("cql", "a recording"),
                       ("uniform states", "last 10")):
        line = run.run_cell(run.cell(kind, 10, data, weight=0.5))
        lines[kind] = json.loads(json.dumps(line, allow_nan=False))
    assert [test[0] for test in lines["teacher"]["tests"]] == [0, 9]
    assert [test[0] for test in lines["sac"]["tests"]] == [0, 2]
    assert [len(test) for kind in lines for test in lines[kind]["tests"]] == [5, 5] + 8 * [6]
    assert [line["rows"] for line in lines.values()] == [700, 700, 700, 70, 700]
    assert lines["sac"]["measures"]["2"]["best of the nearest"] < 0
    assert [kind for kind in lines if "measures" in lines[kind]] == ["sac"]
    assert [test[2] for test in lines["bc"]["tests"]] == [None, None]
    assert run.make_student(run.cell("cql", 0, weight=0.5), None).weight == 0.5
    assert lines["cql"]["coverage"] == 1
    assert lines["uniform states"]["coverage"] != lines["sac"]["coverage"]
    agent = ours.load_agent(tmp_path / "10.pt")
    again = measure.play(agent, measure.seeds_of(10, 1, 100))
    assert lines["teacher"]["return"] == pytest.approx(again["return"].mean(), abs=0.006)


def test_recordings_of_a_seed():
    """The same starts for all; torques within the limit; and noise as its name says."""
    teacher = ours.SAC()
    found = {name: recordings.make(name, 3, teacher).rows for name in recordings.NAMES}
    np.testing.assert_array_equal(recordings.make("20 drawn", 3, teacher).rows, found["20 drawn"])
    starts = found["controller"][::21, :3]
    assert len(starts) == 20 and (starts != recordings.make("controller", 4).rows[::21, :3]).any()
    for name, rows in found.items():
        np.testing.assert_array_equal(rows[::21, :3], starts)
        assert abs(rows[:, 3]).max() <= np.float32(1.8 if name == "controller 1.8" else 2)
        if name.startswith("20 mean"):
            mean = measure.mean_torque(teacher, rows[:, :3])
            noise = (rows[:, 3] - mean)[abs(mean) < 0.5]
            expected = float((name.split(" + ") + ["0"])[1])
            assert len(noise) > 20 and noise.std() == pytest.approx(expected, rel=0.4, abs=1e-5)


def test_the_controller_swings_up_and_stands(monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", 200)
    for name in ("controller", "controller 1.8"):
        rows = recordings.make(name, 0).rows
        assert rows[:, 4].reshape(20, 200).sum(axis=1).mean() > -250, name


def test_d3rlpy_has_the_same_penalty():
    theirs, mine, error = peers.penalties(200)
    assert abs(theirs - mine) < 4 * error < 0.06


def test_the_courses_notebook(tmp_path):
    cells = [{"cell_type": "markdown", "source": ["# a title"]},
             {"cell_type": "code", "source": ["a = 1\n", "a"], "outputs": []},
             {"cell_type": "code", "source": ["b"], "outputs": [
                 {"text": ["0 -1450.25\n", "warning: -5\n"]}, {"data": {}},
                 {"text": ["10 -150.5\n"]}]}]
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": cells}))
    first, second = notebook.code_cells(tmp_path / "page.ipynb")
    assert first == ("a = 1\na", "") and second[0] == "b"
    assert notebook.tests_of(second[1]) == [[0, -1450.25], [10, -150.5]]


def test_a_commit_may_be_unknown(tmp_path, monkeypatch):
    assert run.commit() and run.cpu()
    monkeypatch.setattr(run, "HERE", tmp_path)
    assert run.commit() == "unknown"                            # no repository
    monkeypatch.setenv("PATH", "")
    assert run.commit() == "unknown"                            # no git


def test_what_is_run_is_what_the_file_lacks(tmp_path, monkeypatch, capsys):
    """Students after their teachers; a line that is there is compared, not written again."""
    ran = []
    here = types.SimpleNamespace(imap_unordered=map)            # for a pool: this process
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda _: types.SimpleNamespace(
        Pool=lambda *options: contextlib.nullcontext(here)))
    monkeypatch.setattr(run, "FILE", tmp_path / "cells.jsonl")
    monkeypatch.setattr(run, "KEPT", tmp_path)
    monkeypatch.setattr(run, "run_cell", lambda cell: ran.append(cell) or a_line(cell))
    teacher, student = run.cell("teacher", 3), run.cell("sac", 3, "all")
    run.FILE.write_text(json.dumps(a_line(teacher)) + "\n")
    run.work([student], 2)
    assert ran == [teacher, student] and len(run.FILE.read_text().splitlines()) == 2
    assert "the same 52 numbers (a processor at abcdefg, a processor at abcdefg)" in (
        capsys.readouterr().out)
    (tmp_path / "3.npz").touch()                                # it is kept
    run.work([student], 2)
    assert ran[2:] == [student] and len(run.FILE.read_text().splitlines()) == 2


def test_which_digits_differ():
    old = a_line(run.cell("sac", 3, "all"))
    new = copy.deepcopy(old) | {"cpu": "another", "commit": "1234567890", "minutes": 9.0,
                                "return": -147.99}
    new["tests"] = [[*test, 1.0] for test in new["tests"]]      # a gap, which old lines do not have
    new["tests"][3][1] = -150.1
    assert run.compared(old, new).endswith(
        ": 2 of 112 numbers differ (a processor at abcdefg, another at 1234567), as "
        "return: -148.0, -147.99; return at 6000: -150.0, -150.1")


def a_line(cell, value=-150.0):
    """A line of cells.jsonl, made up."""
    last = 100 if cell["kind"] == "teacher" else 50_000
    steps = range(0, last + 1, last // (10 if cell["kind"] == "teacher" else 25))
    tests = [[min(step, last - 1), value, step / 1000, 80.0, 0.5] for step in steps]
    return cell | {
        "cpu": "a processor", "commit": "abcdefghij", "minutes": 1.0, "rows": 9, "coverage": 5.0,
        "outside": 0.25, "data mean": -300.0, "return": value + 2, "promised": 70.0,
        "delivered": 80.0, "temperature": 0.1, "entropy bonus": -5.0, "tests": tests}


def study_of(tmp_path, lines):
    file = tmp_path / "cells.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.Study(file)


def test_numbers_and_words():
    assert report.number(-0.2) == "0" and report.signed(-0.2) == "+0"
    assert report.number(-1509.4) == "-1,509" and report.number(math.nan) == "–"
    assert report.spread(pd.Series([1.0, 2.0, 6.0]), 1) == "3.0 (1.0 to 6.0)"
    assert report.iqm([9, 1, 2, 3, -500, 4, 5, 1000]) == 3.5
    returns = pd.DataFrame({0: [-1400, -1300, -1500, -1450], 1: [-1400, -1300, -1500, -900],
                            2: [-1400, -1401, -1402, -1403]}, [0, 2000, 4000, 6000])
    assert report.lost(returns).fillna(-1).tolist() == [4000, -1, 2000]
    assert report.outcome({"tests": [[0, 99], [1, -1], [2, -2], [3, -3], [4, -4], [5, -5]]}) == -3


def test_when_promises_leave_the_possible(tmp_path):
    """The first test of those below -103, and its return; a table's row counts the seeds."""
    lines = [a_line(run.cell("teacher", seed), -150.0) for seed in (0, 1)]
    lines += [a_line(run.cell("cql", seed, "20 mean"), -170.0) for seed in (0, 1)]
    for k, promise in ((3, -102.0), (4, -104.0), (5, -2e6)):
        lines[3]["tests"][k][1:3] = -150.0 - k, promise
    study = study_of(tmp_path, lines)
    assert report.left_at(study, "20 mean", "cql", 1) == (8000, -154)
    assert report.left_at(study, "20 mean", "cql", 0)[0] is None
    (_, _, _, (row,)), (_, _, _, (left,)) = report.tables_of_recordings(study)
    assert row[:6] == ["20 mean", "cql", 2, "-300", "-168 (-168 to -168)", "2 of 2"]
    assert row[7] == "1 of 2" and left == ["20 mean", "cql", 1, "8,000", "-154", "-168", "50"]


def test_the_report_of_made_up_lines(tmp_path):
    """Groups of unequal size whose figures can be told by hand; nothing else was run."""
    lines = [a_line(run.cell("teacher", seed), -150.0 - seed) for seed in range(12)]
    for seed in range(12):
        lines += [a_line(run.cell("sac", seed, "last 10"), -1500.0 if seed != 3 else -153.0),
                  a_line(run.cell("bc", seed, "last 10"), -160.0 - seed)]
    lines += [a_line(run.cell("cql", seed, "last 10"), -140.0 - 2 * seed) for seed in range(7)]
    lines += [a_line(run.cell("cql", 2, "last 10", student=103), -900.0)]
    lines += [a_line(run.cell("teacher", 0, as_printed=["jacobian"]), -450.0)]
    for line in lines[12:15:2]:                                   # sac of seeds 0 and 1
        line["measures"] = {"4000": {"swing far minus near": -2.0, "best of the nearest": -1500.0,
                                     "random of the nearest": -1200.0, "radius": 1.2}}
    lines[12]["measures"]["4000"]["swing far minus near"] = None
    del lines[13]["outside"], lines[14]["cpu"]
    study = study_of(tmp_path, lines)
    claims = [*report.claims(study)]
    assert claims[0] == "| a SAC teacher's last ten episodes | -300 | -1,498 | -144 | -164 | 12 |"
    assert claims[1] == "| its last 85 | – | – | – | – | 0 |"
    assert "as good as its teacher** on 7 of 7 seeds; imitation is, too" in claims
    tables = {title: {tuple(row[:2]): row[2:] for row in rows}
              for title, _, _, rows in report.tables(study)}
    assert tables["Outcome by data"]["last 10", "5.0"] == [
        "-300", "12 / 7 / 12", "-156 (-161 to -150)", "-1,500 (-1,500 to -153)",
        "-146 (-152 to -140)", "-166 (-171 to -160)"]
    assert tables["Which student wins"]["last 10", "+1,353, better on 7 of 7"] == [
        "+17, better on 7 of 7", "1 of 12", "7 of 7", "12 of 12", "1 of 12", "7 of 7", "12 of 12"]
    assert tables["Seeds that the IQM hides"] == {
        ("last 10", "sac"): [12, "-1,344", "-1,232", "3: 0"]}
    assert tables["Every student"]["last 10", "cql of seed 2"][:2] == [1, "-748 (-748 to -748)"]
    assert tables["Teachers"]["teacher, jacobian as printed", "-448 (-448 to -448)"] == [
        "-300", "1 of 1", "0 of 1", "0: -448"]
    excess = "Excess of torques near and far from the data's"
    assert tables[excess]["last 10", "sac"][:5] == ["4,000", 1, "–", "–", "-2.0 (-2.0 to -2.0)"]
    for draw in (report.draw_regimes, report.draw_last10):
        draw(study, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_tables_and_readme_have_the_figures_of_the_lines(tmp_path):
    report.write_tables(report.Study(run.FILE), tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    assert text == (report.RESULTS / "tables.md").read_text(), "run python study/report.py"
    quoted = text.split("## What README quotes\n\n")[1].strip().removeprefix("- ").split("\n- ")
    readme = " ".join((TOP / "README.md").read_text().split())
    missing = [claim for claim in quoted if claim not in readme]
    assert len(quoted) > 20 and not missing, "README lacks:\n" + "\n".join(missing)


def whole_numbers(text):
    """Those in a text as README writes them: -1,530 and -155.4 as -1530 and -155."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return {round(float(number.replace(",", ""))) for number in found}


def test_readmes_experiments_are_those_of_tryit():
    """Each command of "Try it" stands in results/tryit.txt, and so do the numbers beside it."""
    section = (TOP / "README.md").read_text().split("## Try it")[1].split("\n## ")[0]
    blocks = (report.RESULTS / "tryit.txt").read_text().split("\n$ ")[1:]
    printed = {block.split("\n")[0]: block for block in blocks}
    rows = re.findall(r"(?m)^\| `(python .*--steps \d+)` \| (.*) \|$", section)
    assert len(rows) == 5
    for command, seen in rows:
        assert whole_numbers(seen) and whole_numbers(seen) <= whole_numbers(printed[command])


def test_readmes_output_is_the_main_jobs():
    shown = re.search(r"```\n(teacher .*?)```", (TOP / "README.md").read_text(), re.DOTALL)[1]
    printed = (report.RESULTS / "main.txt").read_text().splitlines()
    assert len(shown.splitlines()) > 10 and set(shown.splitlines()) <= set(printed)
