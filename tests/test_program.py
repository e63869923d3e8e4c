"""The command as its user meets it: what it prints, its files, its pictures, its options."""
import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import FILES, TOP, log, numbers, shrink, with_seed

COLUMNS = ["stage", "step", "return", "promised", "delivered", "squared_error", "temperature",
           "penalty"]


def test_the_command_just_runs(tmp_path):
    """As it is installed, but with shorter episodes: one thread, no subnormal numbers."""
    code = ("import cql_pendulum as c, sys, torch; c.EPISODE = c.BATCH = 16; c.main(sys.argv[1:])\n"
            "print(torch.get_num_threads(), (torch.ones(1) * 1e-40).item())")
    words = f"--last 0 --random 1 --student bc --steps 1 --out {tmp_path / 'run'}".split()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=TOP, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.splitlines()[-2:] == [f"all files: {tmp_path / 'run'}", "1 0.0"]
    assert done.stderr == "" and "note" not in done.stdout
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES - {"teacher.pt"}


def starts(purpose, n):
    """Seeds of n starts with --seed 0: for tests (0) or final episodes (1)."""
    return np.random.SeedSequence([0, purpose]).generate_state(n).tolist()


def test_main_job_end_to_end(whole, small):
    """What is printed is what was logged, and what the saved agents and the saved data give."""
    out, text = whole
    lines = text.splitlines()
    assert {file.name for file in out.iterdir()} == FILES and lines[-1] == f"all files: {out}"
    agents = {who: ours.load_agent(out / f"{who}.pt") for who in ("teacher", "student")}
    assert [type(agent) for agent in agents.values()] == [ours.SAC, ours.CQL]
    for row, line, tested in zip(log(out), lines[1:5], (
            "teacher 0", "teacher 1", "student 0", "student 6"), strict=True):
        assert list(row) == COLUMNS and bool(row["penalty"]) == (row["stage"] == "student")
        stage, step, *said = line.split()
        assert f"{stage} {step}" == f"{row['stage']} {row['step']}" == tested
        for value, name, digit in zip(said, COLUMNS[2:5], (0.1, 0.01, 0.01), strict=True):
            assert float(value) == pytest.approx(float(row[name]), abs=0.51 * digit)
        if tested in ("teacher 1", "student 6"):
            means = [x.mean() for x in ours.evaluate(agents[stage], starts(0, 10))]
            kept = [float(row[name]) for name in (*COLUMNS[2:5], "temperature")]
            assert kept == pytest.approx([*means, agents[stage].alpha.exp().item()], rel=1e-6)
    with np.load(out / "dataset.npz") as data:
        assert {name: (array.dtype.name, array.shape) for name, array in data.items()} == {
            "observations": ("float32", (40, 3)), "actions": ("float32", (40, 1)),
            "rewards": ("float32", (40,)), "next_observations": ("float32", (40, 3)),
            "terminals": ("bool", (40,)), "timeouts": ("bool", (40,))}
        returns = {"data": data["rewards"].astype(float).reshape(2, 20).sum(axis=1)}
    for who, agent in agents.items():
        returns[who] = ours.evaluate(agent, starts(1, 100))[0]
    for line, (who, x) in zip(lines[7:10], returns.items(), strict=True):
        assert line[:22].split() == ["the", who]
        expected = len(x), x.mean(), statistics.stdev(x) / math.sqrt(len(x)), min(x), max(x)
        assert [float(word) for word in line[22:].split()] == pytest.approx(expected, abs=0.051)
    assert json.loads((out / "config.json").read_text())["steps"] == 7


@pytest.mark.parametrize("seed, typed, restored", [
    (0, [], set()), (1, ["--as-printed"], set(ours.ERRATA)),
    (2, ["--as-printed", "sign", "timeout"], {"sign", "timeout"})])
def test_seeds_and_as_printed_reach_all(
        seed, typed, restored, small, tmp_path, monkeypatch, capsys):
    """First weights, starts, agents and data; what the file says is the default."""
    seen = []
    monkeypatch.setattr(ours.SAC, "train", lambda agent, *batch: seen.append(
        (set(ours.AS_PRINTED), bool(batch[-1].any()))))
    monkeypatch.setattr(ours, "UPDATES", 20)
    data, *agents = ours.main(["--epochs", 1, "--steps", 20, "--seed", seed, *typed,
                               "--out", tmp_path / "run"])
    announced = f"as printed: {', '.join(sorted(restored))}\n"
    assert capsys.readouterr().out.startswith(announced) == bool(restored)
    for part in (seen[:20], seen[20:]):
        assert len(part) == 20 and all(names == restored for names, _ in part)
        assert any(over for _, over in part) == ("timeout" in restored)
    for agent in agents:
        assert numbers(agent) == numbers(with_seed(seed, type(agent)))
    ours.seed_everything(seed)
    assert list(data.datas[0][0]) == ours.env.reset().tolist()
    ours.AS_PRINTED.clear()
    ours.AS_PRINTED.add("range")
    assert ours.parse_options([]).as_printed == ["range"]
    ours.AS_PRINTED.add("jacobain")
    with pytest.raises(ours.UserError, match="jacobain"):
        ours.main(["--steps", 1, "--epochs", 1, "--out", tmp_path / "other"])


def test_defaults_are_the_pages(monkeypatch, tmp_path, capsys):
    """In a session whose own command line is another; with an own Data, and loops without tests."""
    asked, own = [], type("Recent", (ours.Data,), {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--nonsense"])
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [np.zeros(len(seeds))])
    monkeypatch.setattr(ours, "Data", own)
    monkeypatch.setattr(ours.Run, "test", lambda *_: None)
    monkeypatch.setattr(ours.SAC, "train", lambda *_: None)
    for name in ("train_teacher", "train_student"):
        def fewer(agent, data, n, run, train=getattr(ours, name)):
            asked.append((type(agent), n))
            train(agent, data, 1, run)
        monkeypatch.setattr(ours, name, fewer)
    data, teacher, student = ours.main()
    assert asked == [(ours.SAC, 100), (ours.CQL, 50_000)] and student.weight == 5
    assert data.frozen and type(data) is own
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"all files: runs/cql-seed0-\d{4}-\d{6}", last)
    assert not any(line.startswith("note") for line in lines)
    assert not ours.AS_PRINTED and ours.ERRATA == ("jacobian", "sign", "range", "timeout")
    assert (ours.BATCH, ours.CAPACITY, ours.EPISODE) == (64, 100_000, 200)
    assert [len(p) for p in student.model_value1.parameters()] == [128, 128, 128, 128, 1, 1]


@pytest.mark.parametrize("promise, said", [
    (500.0, True), (-104.0, True), (99.9, False), (-102.0, False), (math.nan, False)])
def test_an_impossible_promise_is_said_on_the_tests_line(promise, said, monkeypatch, capsys):
    """And what an agent logs replaces no number of the test."""
    monkeypatch.setattr(ours, "evaluate", lambda *_: (np.zeros(1), np.array([promise]), np.ones(1)))
    agent, run = types.SimpleNamespace(logged={"return": 7.0, "loss": 1.5}), ours.Run(None, 3)
    run.test("student", 5, agent)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"student       5       0.0  {promise:8.2f}       1.00" + said * (
        "  impossible: policies deliver -103 to 100")
    assert run.starts(0, 10) == np.random.SeedSequence([3, 0]).generate_state(10).tolist()
    row = run.log[0]
    assert (row["return"], row["logged return"], row["loss"]) == (0, 7, 1.5)
    run.test("student", 6, agent)
    with pytest.raises(ours.UserError, match="this run has a student already"):
        run.test("student", 7, ours.SAC())


@pytest.mark.parametrize("package, said", [
    ("tqdm", "no progress bars (tqdm is not"), ("matplotlib.figure", "no curves.png (ModuleNotF"),
    ("savefig", "no curves.png (ZeroDivisionError: ")])
def test_without_an_optional_package(package, said, whole, tmp_path, program, monkeypatch):
    """It is missing, or fails in whatever way: a line of notice, and the same numbers."""
    from matplotlib.figure import Figure
    shrink(monkeypatch)
    monkeypatch.setattr(ours.Run, "finish", lambda *_: None)
    if package == "tqdm":
        monkeypatch.setattr(ours, "tqdm", None)
    elif package == "savefig":
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    lines = program("--epochs", 2, "--steps", 7, "--out", tmp_path / "run").splitlines()
    note, = (line for line in lines if line.startswith("note: "))
    lines.remove(note)
    assert said in note and lines[:5] == whole[1].splitlines()[:5]
    assert (tmp_path / "run" / "curves.png").exists() == (package == "tqdm")


@pytest.mark.parametrize("argv, raised, ends", [
    ("/x/ipykernel_launcher.py -f kernel.json", None, "asked []"),
    ("cql_pendulum.py --seed 1", None, "asked ['--seed', '1']"),
    ("cql_pendulum.py --seed 1", OSError("a mistake"), "cql_pendulum.py: a mistake"),
    ("cql_pendulum.py --seed 1", KeyboardInterrupt(), "stopped; ")])
def test_as_a_script_and_pasted_into_a_cell(argv, raised, ends, monkeypatch):
    """The options that main gets; a user's mistake is one line, and Ctrl-C."""
    def asked(parser, argv):
        raise raised or SystemExit(f"asked {argv}")

    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", asked)
    with pytest.raises(SystemExit) as stop:
        exec((TOP / "cql_pendulum.py").read_text(), {"__name__": "__main__"})
    assert stop.value.code.startswith(ends)


def test_play_shows_the_episode_that_it_played(whole, small, tmp_path, program, monkeypatch):
    from PIL import Image
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.chdir(tmp_path)
    agent = ours.load_agent(whole[0] / "student.pt")
    for seed in (0, 4):
        said = program("--play", whole[0] / "student.pt", "--seed", seed).splitlines()
    ours.seed_everything(4)
    state, total, over, pictures = ours.env.reset(), 0.0, False, []
    while not over:
        state, reward, over, _ = ours.env.step([agent.get_action(state)])
        total += float(reward)
        pictures.append(ours.env.render()[::2, ::2].astype(int))
    assert said == ["animation: pendulum.gif", f"return {total:.1f}"]
    with Image.open("pendulum.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (20, (250, 250), 50)
        gif.seek(12)
        frame = np.asarray(gif.convert("RGB")).astype(int)
    assert np.argmin([abs(frame - picture).mean() for picture in pictures]) == 12
    shown = []                                                      # in a notebook's cell
    display = types.SimpleNamespace(clear_output=lambda wait: shown.append(wait),
                                    display=lambda image: shown.append(image.size))
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    agent.test(play=True)
    agent.test(play=False)
    assert shown == 20 * [True, (250, 250)]


def test_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures, run = [], ours.Run(tmp_path, 0)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    for row in (("teacher", 0, -1500.0, 1.0, 2.0), ("teacher", 10, -230.0, 3.0, 4.0),
                ("student", 0, -1400.0, 5.0, 6.0), ("student", 2000, -300.0, 7.0, 8.5)):
        run.log.append(dict(zip(COLUMNS, row)))
    student, rows = ours.CQL(), np.random.default_rng(0).random([500, 10], np.float32)
    monkeypatch.setattr(ours.CQL, "get_action", lambda agent, state: state[1] + 0.5)
    rows[40:50, :3] = -0.98, 0.19, 0.1                          # the nearest to hanging still
    rows[50:60, :3] = -0.98, 0.19, 0.5                          # too fast to be near it
    ours.draw(run, rows, student, -850.0)
    returns, promises, one_state = ([[x.tolist() for x in map(np.asarray, line.get_data())]
                                     for line in axes.lines] for axes in figures[0].axes)
    assert returns == [
        [[200, 2200], [-1500, -230]], [[1, 2001], [-1400, -300]], [[0, 1], [-850, -850]]]
    assert promises == [[[1, 2001], [5, 7]], [[1, 2001], [6, 8.5]]]
    limits, = figures[0].axes[1].collections
    assert [line[0][1] for line in limits.get_segments()] == pytest.approx(ours.possible())
    (torques, promised), = one_state
    expected = student.promise(rows[[40] * 41, :3], np.linspace(-2, 2, 41))
    assert torques == np.linspace(-2, 2, 41).tolist()
    assert promised == pytest.approx(expected.tolist(), abs=1e-5)
    near, drawn = ([line[0][0] for line in found.get_segments()]
                   for found in figures[0].axes[2].collections)
    assert near == rows[40:50, 3].tolist() and drawn == pytest.approx([0.69] * 50)
