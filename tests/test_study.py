"""The study's measures, on cases that can be told by hand; its runs are not tests."""
import json
import math

import numpy as np
import pytest
import torch

import cql_pendulum as ours
import study


def test_program_is_the_code_that_the_numbers_follow_from(tmp_path, monkeypatch):
    text = (study.TOP / "cql_pendulum.py").read_text()
    monkeypatch.setattr(study, "TOP", tmp_path)

    def program(old="", new=""):
        assert old in text
        (tmp_path / "cql_pendulum.py").write_text(text.replace(old, new) if old else text)
        return study.program()

    before = program()
    assert program("# rows in a batch", "# rows") == before
    assert program('"""The policy: a Gaussian', '"""A Gaussian') == before
    assert program("in a window or a notebook", "somewhere") == before
    for old, new in (("BATCH = 64", "BATCH = 65"), ("- value.mean()", "- value.max()"),
                     ("scaled[-20:]", "scaled[-10:]"), ("TAU)", "2 * TAU)")):
        assert program(old, new) != before, old


def rows(angle, speed, torque):
    found = np.zeros([len(angle), 10], np.float32)
    found[:, 0], found[:, 1], found[:, 2] = np.cos(angle), np.sin(angle), speed
    found[:, 3] = torque
    return found


def test_coverage_counts_bins_of_visited_cells():
    torques = np.linspace(-1.99, 1.99, 8)
    assert study.coverage(rows(np.full(8, 0.1), 0.5, torques)) == 8
    assert study.coverage(rows(np.full(8, 0.1), 0.5, 1.0)) == 1
    two = [rows(np.full(8, 0.1), 0.5, torques), rows(np.full(8, -3.0), -7.9, -2.0)]
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


def test_interquartile_mean():
    assert study.iqm([9, 1, 2, 3, -500, 4, 5, 1000]) == 3.5
    assert study.iqm([1, 2, 6]) == 3


def test_every_cell_has_its_own_key_and_comes_back(tmp_path, monkeypatch):
    cells = study.grid()
    assert len({study.key(cell) for cell in cells}) == len(cells)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    lines = [cells[30] | {"program": study.program()}, cells[31] | {"program": "older"}]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [*study.finished()] == [study.key(cells[30])]


def test_the_moments_of_a_failure():
    line = {"tests": [[0, -1400, 0, 5, 0], [2000, -1300, 20, 5, 0], [4000, -1500, 101, 5, 0],
                      [6000, -1450, 90, 5, 0]]}
    assert (study.lost(line), study.above_100(line)) == (4000, 4000)
    line["tests"][-1][1] = -900
    assert study.lost(line) is None
    assert study.outcome({"tests": [[0, 99, 0, 0, 0]] + line["tests"] + [[8000, -100, 0, 0, 0]]}
                         ) == (-1400 - 1300 - 1500 - 900 - 100) / 5


def test_behaviour_cloning_learns_the_datas_torques():
    torch.manual_seed(0)
    agent = study.cloner(ours)
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
    monkeypatch.setattr(ours, "accelerate", lambda agent: lambda *_: None)
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
    assert len([*tmp_path.iterdir()]) == 1


def test_the_report_of_a_part_of_the_cells(tmp_path, monkeypatch):
    """Groups of unequal size, with returns that can be told by hand."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    made = {"program": study.program(), "cpu": "one", "threads": 1, "python": "3", "torch": "2",
            "numpy": "2", "gym": "0", "commit": "abcdefghij", "minutes": 1.0, "rows": 9,
            "data mean": -300.0, "promised": 70.0, "delivered": 80.0, "temperature": 0.1,
            "entropy bonus": -5.0}
    base = {"teacher": -150.0, "cql": -160.0, "sac": -1500.0, "bc": -170.0}
    lines = []
    for cell in study.grid():
        if cell["as_printed"] or cell["weight"] not in (5.0, None) or (
                cell["kind"] == "cql" and cell["seed"] > 3):
            continue
        value = base[cell["kind"]] - 10 * cell["seed"]
        coverage = 2.0 + 0.5 * study.DATA.index(cell["data"]) if cell["data"] else 5.0
        tests = [[2000 * k, -1400 if k == 0 else value, 10 * k, 80, 0.5] for k in range(26)]
        lines.append(cell | made | {"coverage": coverage, "return": value + 2, "tests": tests})
        if cell["seed"]:                              # a measure that older lines do not have
            lines[-1]["outside"] = 0.1 * cell["seed"]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    study.report()
    assert all((tmp_path / name).stat().st_size > 10_000
               for name in ("last10.png", "study.png", "regimes.png"))
    text = (tmp_path / "study.md").read_text()
    assert f"Finished: {len(lines)} of {len(study.grid())} cells" in text
    rows = {tuple(cells[:2]): cells for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())}
    assert rows["cql", "4"][2:6] == ["-175 (-190 to -160)", "–", "-10 (-10 to -10)",
                                     "-173 (-188 to -158)"]
    assert rows["sac", "10"][2] == "-1,545 (-1,590 to -1,500)"
    assert rows["last 10", "+1,340, better on 4 of 4"][2:] == [
        "+10, better on 4 of 4", "0 of 10", "4 of 4", "10 of 10", "0 of 10", "4 of 4", "10 of 10"]
    assert "| 4 / 3 / 4 | 25.0 (10.0 to 40.0) | 20.0 (10.0 to 30.0) |" in text      # drift, last 5
    assert "all: cql minus cql as printed: not run" in text
    assert "of the delivery; a critic that only warms up has 0.39" in text


def test_readme_has_the_figures_of_the_results():
    text = " ".join((study.TOP / "README.md").read_text().split())
    measured = study.Study()
    assert measured.lines, "results/study.jsonl is of another program: run tests/study.py"
    figures = [*study.readme(measured)]
    assert len(figures) == 27
    for figure in figures:
        assert figure in text, figure
