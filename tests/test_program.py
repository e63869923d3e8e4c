"""The command as its user meets it: what it prints, its files, its pictures, its options."""
import argparse
import io
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
from conftest import FILES, TOP, log, numbers, same, steps_in, table, with_seed

COLUMNS = ["stage", "step", "return", "promised", "delivered", "squared_error", "temperature",
           "penalty"]


def starts(seed, purpose, n):
    """Seeds of n starts: for tests (0) or final episodes (1)."""
    return np.random.SeedSequence([seed, purpose]).generate_state(n).tolist()


def row_of(returns):
    """The table's numbers for some returns."""
    error = statistics.stdev(returns) / math.sqrt(len(returns))
    return pytest.approx([len(returns), statistics.mean(returns), error, min(returns),
                          max(returns)], abs=0.051)


def test_the_command_just_runs(tmp_path):
    """As it is installed, but with shorter episodes: one thread, no subnormal numbers."""
    code = ("import cql_pendulum as c, sys, torch; c.EPISODE = 64; c.main(sys.argv[1:])\n"
            "print(torch.get_num_threads(), (torch.ones(1) * 1e-40).item())")
    words = f"--last 0 --random 1 --student bc --steps 1 --out {tmp_path / 'run'}".split()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=TOP, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.splitlines()[-2:] == [f"all files: {tmp_path / 'run'}", "1 0.0"]
    assert done.stderr == "" and "note" not in done.stdout
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES - {"teacher.pt"}


def test_main_job_end_to_end(whole):
    out, text = whole
    assert {file.name for file in out.iterdir()} == FILES
    steps = ["teacher 0", "teacher 1", "student 0", "student 6"]
    assert steps_in(out) == steps and text.splitlines()[-1] == f"all files: {out}"
    for row, line in zip(log(out), text.splitlines()[1:5], strict=True):
        assert list(row) == COLUMNS and bool(row["penalty"]) == (row["stage"] == "student")
        stage, step, *said = line.split()
        assert (stage, step) == (row["stage"], row["step"])
        for value, name, digit in zip(said, COLUMNS[2:5], (0.1, 0.01, 0.01), strict=True):
            assert float(value) == pytest.approx(float(row[name]), abs=0.51 * digit)
    with np.load(out / "dataset.npz") as data:
        assert {name: (array.dtype.name, array.shape) for name, array in data.items()} == {
            "observations": ("float32", (40, 3)), "actions": ("float32", (40, 1)),
            "rewards": ("float32", (40,)), "next_observations": ("float32", (40, 3)),
            "terminals": ("bool", (40,)), "timeouts": ("bool", (40,))}
        returns = data["rewards"].astype(float).reshape(2, 20).sum(axis=1)
    assert table(text)["data"] == row_of(returns.tolist())
    config = json.loads((out / "config.json").read_text())
    assert (config["epochs"], config["steps"], config["out"]) == (2, 7, str(out))


@pytest.mark.parametrize("who, kind", [("teacher", ours.SAC), ("student", ours.CQL)])
def test_saved_agents_are_the_tested_ones(whole, who, kind, small):
    out, text = whole
    agent = ours.load_agent(out / f"{who}.pt")
    assert type(agent) is kind
    assert table(text)[who] == row_of(ours.evaluate(agent, starts(0, 1, 100))[0].tolist())
    means = [x.mean() for x in ours.evaluate(agent, starts(0, 0, 10))]
    last = [row for row in log(out) if row["stage"] == who][-1]
    kept = [float(last[name]) for name in ("return", "promised", "delivered", "temperature")]
    assert kept == pytest.approx([*means, agent.alpha.exp().item()], rel=1e-6)


def test_the_seed_makes_the_first_weights_and_the_starts(untrained, tmp_path, program):
    for seed in (0, 1):
        out = tmp_path / str(seed)
        program("--epochs", 1, "--steps", 1, "--seed", seed, "--out", out)
        for who, kind in (("teacher", ours.SAC), ("student", ours.CQL)):
            agent = ours.load_agent(out / f"{who}.pt")
            assert same(numbers(agent), numbers(with_seed(seed, kind))), (who, seed)
        ours.seed_everything(seed)
        first = ours.load_dataset(out / "dataset.npz").datas[0]
        assert list(first[0]) == ours.env.reset().tolist()


@pytest.mark.parametrize("typed, kind, weight", [
    ([], ours.CQL, 5), (["--weight", "0.5"], ours.CQL, 0.5), (["--weight", "0"], ours.CQL, 0),
    (["--student", "sac"], ours.SAC, None), (["--student", "bc"], ours.BC, None)])
def test_each_student_is_of_its_class_and_weight(
        typed, kind, weight, untrained, tmp_path, program):
    program("--epochs", 1, "--steps", 1, *typed, "--out", tmp_path / "run")
    student = ours.load_agent(tmp_path / "run" / "student.pt")
    assert type(student) is kind and getattr(student, "weight", None) == weight
    assert type(ours.load_agent(tmp_path / "run" / "teacher.pt")) is ours.SAC


@pytest.mark.parametrize("typed, restored", [
    ([], set()), (["--as-printed"], set(ours.ERRATA)),
    (["--as-printed", "sign", "timeout"], {"sign", "timeout"})])
def test_as_printed_reaches_all(typed, restored, untrained, tmp_path, program, monkeypatch):
    """Agents and data; what the file says is the default."""
    seen = []

    def train(agent, state, action, reward, next_state, over):
        seen.append((set(ours.AS_PRINTED), bool(over.any())))

    monkeypatch.setattr(ours.SAC, "train", train)
    monkeypatch.setattr(ours, "UPDATES", 20)
    text = program("--epochs", 1, "--steps", 20, *typed, "--out", tmp_path / "run")
    assert text.startswith(f"as printed: {', '.join(sorted(restored))}\n") == bool(restored)
    for part in (seen[:20], seen[20:]):
        assert len(part) == 20 and all(names == restored for names, _ in part)
        assert any(over for *_, over in part) == ("timeout" in restored)
    ours.AS_PRINTED.clear()
    ours.AS_PRINTED.add("range")
    assert ours.parse_options([]).as_printed == ["range"]


def test_defaults_are_the_pages(monkeypatch, tmp_path, capsys):
    """Also in a session whose own command line is another; the folder has a name of its own."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--nonsense"])
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [np.zeros(len(seeds))])
    monkeypatch.setattr(ours, "draw", lambda *_: None)
    for name in ("train_teacher", "train_student"):
        def fewer(agent, data, n, run, train=getattr(ours, name)):
            asked.append((type(agent), n))
            train(agent, data, 1, run)
        monkeypatch.setattr(ours, name, fewer)
    monkeypatch.setattr(ours.SAC, "train", lambda *_: None)
    data, teacher, student = ours.main()
    assert asked == [(ours.SAC, 100), (ours.CQL, 50_000)] and data.frozen
    assert (type(teacher), type(student), student.weight) == (ours.SAC, ours.CQL, 5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"all files: runs/cql-seed0-\d{4}-\d{6}", last)
    assert not ours.AS_PRINTED and ours.ERRATA == ("jacobian", "sign", "range", "timeout")
    assert (ours.BATCH, ours.CAPACITY, ours.EPISODE, ours.UPDATES) == (64, 100_000, 200, 200)
    assert [len(p) for p in student.model_value1.parameters()] == [128, 128, 128, 128, 1, 1]


class Recent(ours.Data):
    """Samples from the newest rows."""
    sampled = 0

    def get_sample(self):
        self.sampled += 1
        return super().get_sample()


def test_own_data_and_loops_without_tests_in_main(small, tmp_path, program, monkeypatch):
    monkeypatch.setattr(ours, "Data", Recent)
    monkeypatch.setattr(ours.Run, "test", lambda *_: None)
    data, teacher, student = ours.main(["--epochs", 1, "--steps", 4, "--out", tmp_path / "run"])
    assert type(data) is Recent and data.sampled == 3 + 4


@pytest.mark.parametrize("promise, said", [
    (500.0, True), (-104.0, True), (99.9, False), (-102.0, False), (math.nan, False)])
def test_an_impossible_promise_is_said_on_the_tests_line(promise, said, monkeypatch, capsys):
    monkeypatch.setattr(ours, "evaluate", lambda *_: (np.zeros(1), np.array([promise]), np.ones(1)))
    agent = types.SimpleNamespace(logged={"return": 7.0, "loss": 1.5})
    run = ours.Run(None, np.int64(3))
    run.test("student", 5, agent)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"student       5       0.0  {promise:8.2f}       1.00" + said * (
        "  impossible: policies deliver -103 to 100")
    assert run.log[0]["return"] == 0 and run.log[0]["logged return"] == 7       # not replaced
    assert run.log[0]["loss"] == 1.5
    run.test("student", 6, agent)
    with pytest.raises(ours.UserError, match="this run has a student already"):
        run.test("student", 7, ours.SAC())


def test_a_runs_starts_are_its_seeds_and_its_purposes():
    found = [ours.Run(None, seed).starts(purpose, 10) for seed in (7, 8) for purpose in (0, 1)]
    assert found == [starts(seed, purpose, 10) for seed in (7, 8) for purpose in (0, 1)]


class Terminal(io.StringIO):
    flushed = ""

    def isatty(self):
        return True

    def flush(self):
        self.flushed = self.getvalue()


def test_on_a_terminal(untrained, tmp_path, monkeypatch):
    """Progress bars, the tests' lines above them, and each line at once."""
    terminal, error = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", error)
    ours.main(["--epochs", "2", "--steps", "3", "--out", str(tmp_path / "run")])
    assert re.search("teacher: .*/2 .*student: .*/3 ", error.getvalue(), re.DOTALL)
    assert "\nteacher       0 " in terminal.getvalue()
    assert terminal.flushed == terminal.getvalue()


@pytest.mark.parametrize("package", ["tqdm", "matplotlib.figure", "savefig"])
def test_without_an_optional_package(package, whole, tmp_path, program, monkeypatch):
    """It is missing, or fails in whatever way: a line of notice, and the same numbers."""
    from matplotlib.figure import Figure
    from conftest import shrink
    shrink(monkeypatch)
    if package == "tqdm":
        monkeypatch.setattr(ours, "tqdm", None)
    elif package == "savefig":
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    lines = program("--epochs", 2, "--steps", 7, "--out", tmp_path / "run").splitlines()
    notes = [line for line in lines if "note: " in line]
    assert len(notes) == 1 and re.match({
        "tqdm": "note: no progress bars .tqdm is not installed", "savefig":
        "note: no curves.png .ZeroDiv", "matplotlib.figure": "note: no curves.png .ModuleNotFound"
    }[package], notes[0])
    assert [line for line in lines if line not in notes][:-1] == whole[1].splitlines()[:-1]
    lost = {"curves.png"} if package != "tqdm" else set()
    assert {file.name for file in (tmp_path / "run").iterdir()} - {"curves.png.part"} == (
        FILES - lost)


@pytest.mark.parametrize("argv, ends", [
    (["/x/ipykernel_launcher.py", "-f", "kernel.json"], r"asked \[\]"),
    (["cql_pendulum.py", "--seed", "1"], r"asked \['--seed', '1'\]"),
    (["cql_pendulum.py", "--play", "a"], "cql_pendulum.py: a: model_action is .*"),
    (["cql_pendulum.py", "--out", "."], "cql_pendulum.py: .*File exists: '.'"),
    (["cql_pendulum.py", "--steps", "9"], "stopped; --dataset FOLDER/dataset.npz, .*")])
def test_as_a_script_and_pasted_into_a_cell(argv, ends, tmp_path, monkeypatch):
    """The options that main gets; a user's mistake is one line, and Ctrl-C."""
    parse_args = argparse.ArgumentParser.parse_args

    def asked(parser, argv):
        if argv == ["--steps", "9"]:
            raise KeyboardInterrupt
        if argv[:1] in (["--play"], ["--out"]):
            return parse_args(parser, argv)
        sys.exit(f"asked {argv}")

    monkeypatch.chdir(tmp_path)
    agent = ours.SAC()
    agent.model_action.fc_mu = torch.nn.Linear(7, 1)            # torch says that in several lines
    ours.save_agent("a", agent)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", asked)
    with pytest.raises(SystemExit) as stop:
        exec((TOP / "cql_pendulum.py").read_text(), {"__name__": "__main__"})
    assert re.fullmatch(ends, stop.value.code)


def test_play_shows_the_episode_that_it_played(whole, small, tmp_path, program, monkeypatch):
    from PIL import Image
    monkeypatch.setattr(ours, "EPISODE", 30)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.chdir(tmp_path)
    agent = ours.load_agent(whole[0] / "student.pt")
    for seed in (0, 4):                                             # 0 is the default
        said = program("--play", whole[0] / "student.pt", *["--seed", seed][:seed]).splitlines()
        ours.seed_everything(seed)
        state, total, over, pictures = ours.env.reset(), 0.0, False, []
        while not over:
            state, reward, over, _ = ours.env.step([agent.get_action(state)])
            total += float(reward)
            pictures.append(ours.env.render()[::2, ::2].astype(int))
        assert said == ["animation: pendulum.gif", f"return {total:.1f}"]
        with Image.open("pendulum.gif") as gif:
            assert (gif.n_frames, gif.size) == (30, (250, 250))
            assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
            gif.seek(12)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            wrong = [abs(frame - picture).mean() for picture in pictures]
            assert np.argmin(wrong) == 12 and wrong[12] < 0.5
    shown = []                                                      # in a notebook's cell
    display = types.SimpleNamespace(clear_output=lambda wait: shown.append(wait),
                                    display=lambda image: shown.append(image.size))
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    agent.test(play=True)
    assert shown == 30 * [True, (250, 250)]
    shown.clear()
    agent.test(play=False)
    assert shown == []


def test_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    run = ours.Run(tmp_path, 0)
    for row in (("teacher", 0, -1500.0, 1.0, 2.0), ("teacher", 10, -230.0, 3.0, 4.0),
                ("student", 0, -1400.0, 5.0, 6.0), ("student", 2000, -300.0, 7.0, 8.5)):
        run.log.append(dict(zip(COLUMNS, row)))
    student, rows = ours.CQL(), np.random.default_rng(0).uniform(0, 1, [500, 10])
    monkeypatch.setattr(ours.CQL, "get_action", lambda agent, state: state[1] + 0.5)
    rows[40:50, :3] = -0.98, 0.19, 0.1                          # the nearest to hanging still
    rows[50:60, :3] = -0.98, 0.19, 0.5                          # too fast to be near it
    ours.draw(run, np.float32(rows), student, -850.0)
    curves = [{line.get_label(): [np.asarray(x).tolist() for x in line.get_data()]
               for line in axes.lines} for axes in figures[0].axes]
    returns, promises, one_state = curves
    assert list(returns.values()) == [
        [[0, 2000], [-1500, -230]], [[0, 2000], [-1400, -300]], [[0, 1], [-850, -850]]]
    assert promises.pop("promised") == [[0, 2000], [5, 7]]
    assert promises.pop("delivered") == [[0, 2000], [6, 8.5]]
    assert [y[0] for _, y in promises.values()] == pytest.approx(ours.possible())
    (torques, promised), = one_state.values()
    assert torques == np.linspace(-2, 2, 41).tolist()
    state = np.float32([-0.98, 0.19, 0.1])
    assert promised == pytest.approx(student.promise([state] * 41, torques).tolist(), abs=1e-5)
    near, drawn = ([line[0][0] for line in found.get_segments()]
                   for found in figures[0].axes[2].collections)
    assert near == np.float32(rows[40:50, 3]).tolist() and drawn == pytest.approx([0.69] * 50)


def test_each_erratum_has_the_pages_version_beside_it():
    source = (TOP / "cql_pendulum.py").read_text()
    for name in ours.ERRATA:
        before, _ = source.split(f'"{name}" in AS_PRINTED')
        assert "# Page: " in before[-400:], name
