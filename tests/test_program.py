"""The command as its user meets it: what it prints, its files, its pictures, its options."""
import argparse
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tomllib
import types

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import (
    FILES, TOP, filled, log, numbers, printed_tests, same, steps_in,
    table, with_seed)


def starts(seed, purpose, n):
    """Seeds of n starts: for tests (0) or final episodes (1)."""
    return np.random.SeedSequence([seed, purpose]).generate_state(n).tolist()


def row_of(returns):
    """The table's numbers for some returns."""
    error = statistics.stdev(returns) / math.sqrt(len(returns))
    return [len(returns), statistics.mean(returns), error, min(returns), max(returns)]


def rows_of(out):
    return ours.load_dataset(out / "dataset.npz").rows


def test_main_job_end_to_end(whole):
    out, text = whole
    assert {file.name for file in out.iterdir()} == FILES
    steps = ["teacher 0", "teacher 1", "student 0", "student 6"]
    lines = [line for line in text.splitlines()[:6] if "return" not in line]
    assert [" ".join(line.split()[:2]) for line in lines] == steps == steps_in(out)
    assert text.splitlines()[-1] == f"all files: {out}"
    with np.load(out / "dataset.npz") as data:
        assert {name: (array.dtype.name, array.shape) for name, array in data.items()} == {
            "observations": ("float32", (40, 3)), "actions": ("float32", (40, 1)),
            "rewards": ("float32", (40,)), "next_observations": ("float32", (40, 3)),
            "terminals": ("bool", (40,)), "timeouts": ("bool", (40,))}
        returns = data["rewards"].astype(float).reshape(2, 20).sum(axis=1)
    assert table(text)["the data"] == pytest.approx(row_of(returns.tolist()), abs=0.051)
    config = json.loads((out / "config.json").read_text())
    assert config["argv"] == ["--epochs", "2", "--steps", "7", "--out", str(out)]
    assert config["versions"] == {"gym": ours.gym.__version__, "numpy": np.__version__,
                                  "torch": torch.__version__}
    assert config["constants"]["EPISODE"] == 20


def test_the_log_is_what_was_printed(whole):
    out, text = whole
    lines = [line for line in text.splitlines()[:6] if "return" not in line]
    for row, line in zip(log(out), lines, strict=True):
        assert list(row) == ["stage", "step", "return", "promised", "delivered", "seconds",
                             "temperature", "squared_error", "penalty"]
        stage, step, *said = line.split()
        assert (stage, step) == (row["stage"], row["step"])
        for value, name, digit in zip(said, ("return", "promised", "delivered"), (0.1, 0.01, 0.01)):
            assert float(value) == pytest.approx(float(row[name]), abs=0.51 * digit)
        assert bool(row["penalty"]) == (stage == "student")


@pytest.mark.parametrize("who, kind", [("teacher", ours.SAC), ("student", ours.CQL)])
def test_saved_agents_are_the_tested_ones(whole, who, kind, small):
    out, text = whole
    agent = ours.load_agent(out / f"{who}.pt")
    assert type(agent) is kind
    returns = ours.evaluate(agent, starts(0, 1, 100))[0]
    assert table(text)[f"the {who}"] == pytest.approx(row_of(returns.tolist()), abs=0.051)
    means = [x.mean() for x in ours.evaluate(agent, starts(0, 0, 10))]
    last = [row for row in log(out) if row["stage"] == who][-1]
    kept = [float(last[name]) for name in ("return", "promised", "delivered", "temperature")]
    assert kept == pytest.approx([*means, agent.alpha.exp().item()], abs=0.00051)


def test_the_seed_makes_the_first_weights_and_the_starts(untrained, tmp_path, program):
    first = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        program("--epochs", 1, "--steps", 1, "--seed", seed, "--out", out)
        for who, kind in (("teacher", ours.SAC), ("student", ours.CQL)):
            agent = ours.load_agent(out / f"{who}.pt")
            assert same(numbers(agent), numbers(with_seed(seed, kind))), (who, seed)
        first[seed] = rows_of(out)[0, :3].tolist()
        ours.seed_everything(seed)
        assert first[seed] == ours.env.reset().tolist()
    assert first[0] != first[1]


@pytest.mark.parametrize("typed, kind, weight", [
    ([], ours.CQL, 5), (["--weight", "0.5"], ours.CQL, 0.5), (["--weight", "0"], ours.CQL, 0),
    (["--student", "sac"], ours.SAC, None), (["--student", "bc"], ours.BC, None)])
def test_each_student_is_of_its_class_and_weight(
        typed, kind, weight, untrained, tmp_path, program):
    out = tmp_path / "run"
    text = program("--epochs", 1, "--steps", 1, *typed, "--out", out)
    student = ours.load_agent(out / "student.pt")
    assert type(student) is kind
    assert getattr(student, "weight", None) == weight
    assert type(ours.load_agent(out / "teacher.pt")) is ours.SAC
    assert (text.split("student       0")[1].split()[1] == "-") == (kind is ours.BC)


@pytest.mark.parametrize("typed, restored", [
    ([], set()), (["--as-printed"], set(ours.ERRATA)),
    (["--as-printed", "sign", "--as-printed", "timeout"], {"sign", "timeout"})])
def test_as_printed_reaches_all(typed, restored, untrained, tmp_path, program, monkeypatch):
    """Agents, data, and those of a resumed run; and not the next one in a session."""
    seen = []

    def train(agent, state, action, reward, next_state, over):
        seen.append((set(ours.AS_PRINTED), bool(over.any())))

    monkeypatch.setattr(ours.SAC, "train", train)
    monkeypatch.setattr(ours, "UPDATES", 20)
    out = tmp_path / "run"
    text = program("--epochs", 1, "--steps", 20, *typed, "--out", out)
    assert f"as printed: {', '.join(sorted(restored))}\n" in text or not restored
    (out / "checkpoint.pt").unlink()
    ours.AS_PRINTED.add("range")
    program("--resume", out)
    for part in (seen[:20], seen[20:40], seen[40:]):
        assert len(part) == 20 and all(names == restored for names, _ in part)
        assert any(over for *_, over in part) == ("timeout" in restored)
    program("--epochs", 1, "--steps", 1, "--as-printed", "jacobian", "--out", tmp_path / "next")
    assert len(seen) == 81 and all(names == {"jacobian"} for names, _ in seen[60:])
    assert ours.AS_PRINTED == {"range"}                                 # put back
    assert ours.parse_options([]).as_printed == ["range"]               # what the file says


def test_as_it_is_imported(tmp_path):
    """One thread, no subnormal numbers, no erratum, no broken tqdm; in a process of its own."""
    (tmp_path / "tqdm.py").write_text("raise RuntimeError('broken')")
    code = ("import cql_pendulum as ours; torch, tqdm = ours.torch, ours.tqdm\n"
            "print(torch.get_num_threads(), (torch.ones(1) * 1e-40).item(), ours.AS_PRINTED, tqdm)")
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(tmp_path)})
    assert done.stdout == "1 0.0 set() None\n", done.stderr


def test_defaults_are_the_pages():
    options = ours.parse_options([])
    assert (options.epochs, options.steps, options.student, options.seed) == (100, 50_000, "cql", 0)
    assert (options.random, options.last, options.weight) == (0, None, 5)
    assert not options.as_printed and list(ours.ERRATA) == ["jacobian", "sign", "range", "timeout"]
    assert (ours.BATCH, ours.CAPACITY, ours.EPISODE, ours.UPDATES) == (64, 100_000, 200, 200)
    assert [len(p) for p in ours.CQL().model_value1.parameters()] == [128, 128, 128, 128, 1, 1]


def test_folders_are_new_and_those_that_were_named(untrained, tmp_path, program, monkeypatch):
    """The next that is free is taken where it is made; ~ is home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "runs" / "sac-seed4-1").mkdir(parents=True)
    for k in (2, 3):
        text = program("--epochs", 1, "--steps", 1, "--student", "sac", "--seed", 4)
        assert text.splitlines()[-1] == f"all files: runs/sac-seed4-{k}"
    program("--last=0", "--random", 1, "--steps", 1, "--out", "~/new/folder")
    assert {x.name for x in (tmp_path / "home/new/folder").iterdir()} == FILES - {"teacher.pt"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "home"}


def test_a_promise_that_leaves_the_possible_is_said_once(small, tmp_path, program, monkeypatch):
    for promise, words in ((500.0, "promised 500, but a policy delivers -103 to 100; try --student "
                                   "cql or more varied data"), (-200.0, "try --student bc, data")):
        said = iter([promise, 0.0, 99.9, promise, 0.0])         # teacher, its end, student, its end
        monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: (
            np.zeros(len(seeds)), np.full(len(seeds), next(said)), np.zeros(len(seeds))))
        text = program("--epochs", 1, "--steps", 9, "--out", tmp_path / str(promise))
        note, = re.findall("note: .*", text)
        assert words in note and text.index(note) > text.index("student")


def test_what_was_never_possible_has_not_left_it(capsys):
    run = ours.Run(None, 0)
    for promise in (-104, 101, -102, 99.9, 101, 0, -104):
        run.warn(promise)
    assert re.findall("promised -?[0-9]+", capsys.readouterr().out) == ["promised 101"]


def test_episodes_of_another_length_are_noted(small, tmp_path, program):
    data = filled(ours.Data(), 3)
    data.rows[4, 9] = 1
    ours.save_dataset(tmp_path / "data.npz", data)
    text = program("--dataset", tmp_path / "data.npz", "--steps", 1, "--out", tmp_path / "run")
    assert "note: the data's episodes have 5 to 20 steps, the limit is 20 here" in text


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


def failing(*_, **__):
    raise RuntimeError("a bad\nsetting of its own")


@pytest.mark.parametrize("package, broken", [
    ("tqdm", None), ("matplotlib.figure", None),
    ("matplotlib.figure", "matplotlib.figure.Figure.savefig"), ("pygame", None)])
def test_without_an_optional_package(package, broken, small, tmp_path, program, monkeypatch):
    """It is missing, or fails in whatever way: a line of notice, and the same numbers."""
    arguments = ["--epochs", 1, "--steps", 3, "--out"]
    with_all = program(*arguments, tmp_path / "all")
    if package == "tqdm":
        monkeypatch.setattr(ours, "tqdm", None)
    elif broken:
        monkeypatch.setattr(broken, failing)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    text = program(*arguments, tmp_path / "run")
    notes = re.findall("note: .*", text)
    if package == "tqdm":
        assert notes == ["note: no progress bars: tqdm is missing or fails"]
    elif package != "pygame":
        cause = "RuntimeError: a bad setting of its own" if broken else f".*{package}.*"
        assert re.fullmatch(rf"note: no curves.png \({cause}\)", *notes)
    else:
        played = program("--play", tmp_path / "run" / "student.pt")
        assert re.fullmatch(rf"note: no animation \(.*{package}.*\)\nreturn -\d+\.\d\n", played)
    assert printed_tests(text) == printed_tests(with_all)
    assert {file.name for file in (tmp_path / "run").iterdir()} == (
        FILES - {"curves.png"} if package == "matplotlib.figure" else FILES)


@pytest.mark.parametrize("argv, ends", [
    (["/x/ipykernel_launcher.py", "-f", "kernel.json"], "asked []"),
    (["cql_pendulum.py", "--seed", "1"], "asked ['--seed', '1']"),
    (["cql_pendulum.py", "--play", "a"], "cql_pendulum.py: a: is damaged, or does not fit: .*size"),
    (["cql_pendulum.py", "--resume", "b"], "cql_pendulum.py: b/config.json: No such file or dir"),
    (["cql_pendulum.py", "--steps", "9"], 130)])
def test_as_a_script_and_pasted_into_a_cell(argv, ends, tmp_path, monkeypatch):
    """The options that main gets; a user's mistake is one line, Ctrl-C none."""
    parse_args = argparse.ArgumentParser.parse_args

    def asked(parser, argv):
        if argv == ["--steps", "9"]:
            raise KeyboardInterrupt
        if argv[:1] in (["--play"], ["--resume"]):
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
    if ends == 130:
        assert stop.value.code == 130
    else:
        assert re.match(re.escape(ends).replace(r"\.\*", ".*"), stop.value.code)
        assert "\n" not in stop.value.code


def test_main_without_arguments_is_the_main_job(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []
    for name in ("train_teacher", "train_student"):
        def fewer(agent, data, n, run, train=getattr(ours, name)):
            asked.append((type(agent), n))
            train(agent, data, 1, run)
        monkeypatch.setattr(ours, name, fewer)
    monkeypatch.setattr(sys, "argv", ["pytest", "--nonsense"])
    ours.main()
    assert asked == [(ours.SAC, 100), (ours.CQL, 50_000)]
    assert capsys.readouterr().out.splitlines()[-1] == "all files: runs/cql-seed0-1"


def test_play_shows_the_episode_that_it_played(whole, small, tmp_path, program, monkeypatch):
    from PIL import Image
    monkeypatch.setattr(ours, "EPISODE", 30)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    path = tmp_path / "agent.pt"
    path.write_bytes((whole[0] / "checkpoint.pt").read_bytes())     # a checkpoint will do
    agent = ours.load_agent(path)
    for seed in (0, 4):
        said = program("--play", path, *["--seed", seed][:seed]).splitlines()   # 0 is the default
        ours.seed_everything(seed)
        state, total, over, pictures = ours.env.reset(), 0.0, False, []
        while not over:
            state, reward, over, _ = ours.env.step([agent.get_action(state)])
            total += float(reward)
            pictures.append(ours.env.render()[::2, ::2].astype(int))
        assert said == [f"return {total:.1f}", f"animation: {path}.gif"]
        with Image.open(f"{path}.gif") as gif:
            assert (gif.n_frames, gif.size) == (30, (250, 250))
            assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
            gif.seek(12)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            wrong = [abs(frame - picture).mean() for picture in pictures]
            assert np.argmin(wrong) == 12 and wrong[12] < 0.5
    monkeypatch.setattr(ours.SAC, "get_action", failing)
    with pytest.raises(RuntimeError):
        program("--play", path)
    assert "show" not in vars(ours.env)                             # what shows is put back


@pytest.fixture
def figure():
    from matplotlib.figure import Figure
    return Figure()


def curves(axes):
    return {line.get_label(): [np.asarray(x).tolist() for x in line.get_data()]
            for line in axes.lines}


COLUMNS = "stage", "step", "return", "promised", "delivered", "temperature", "squared_error"
LOG = [dict(zip(COLUMNS, row)) for row in (
    ("teacher", 0, -1500.0, 1.0, 2.0, 0.1, 5.0), ("teacher", 10, -230.0, 3.0, 4.0, 0.2, 5.0),
    ("student", 0, -1400.0, 5.0, 6.0, 0.3, 7.0), ("student", 2000, -300.0, 7.0, 8.5, 0.4, 8.0))]
LOG[2]["penalty"], LOG[3]["penalty"] = 4.5, -0.5


def test_the_picture_of_the_tests(figure, monkeypatch):
    monkeypatch.setattr(ours, "GAMMA", 0.95)
    ours.draw_tests(figure, LOG, -850.0)
    teacher, student, promise, penalty = figure.axes
    steps = [0, 2000]
    assert list(curves(teacher).values()) == [[[0, 10], [-1500, -230]]]
    assert curves(student) == {"student": [steps, [-1400, -300]],
                               "the data": [[0, 1], [-850, -850]]}
    drawn = curves(promise)
    assert drawn.pop("promised") == [steps, [5, 7]] and drawn.pop("delivered") == [steps, [6, 8.5]]
    least = (8 - math.pi ** 2 - 6.404) / 8 * 20
    assert [y for _, y in drawn.values()] == [[pytest.approx(least)] * 2, [pytest.approx(20)] * 2]
    assert curves(penalty) == {"penalty: logsumexp minus Q of the data": [steps, [4.5, -0.5]],
                               "squared error": [steps, [7, 8]], "temperature": [steps, [0.3, 0.4]]}
    for axes, labels in ((student, 2), (promise, 2), (penalty, 3)):
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert shown == list(curves(axes))[:labels]
    monkeypatch.setattr(ours, "GAMMA", 1)
    figure.clear()
    ours.draw_tests(figure, LOG, -850.0)
    assert len(figure.axes[2].lines) == 2                       # nothing is impossible then


def test_the_picture_of_the_critic(figure, monkeypatch):
    """Maps over angle and speed with the data's states; and one state, torque by torque."""
    delivered = {}

    def deliver(agent, state, torque):
        delivered[torque] = (agent, *state)
        return 3 * torque

    monkeypatch.setattr(ours, "EPISODE", 10)
    monkeypatch.setattr(ours, "deliver", deliver)
    monkeypatch.setattr(ours.CQL, "get_action", lambda agent, state: state[1] - state[2] / 8)
    student, data = ours.CQL(), filled(ours.Data(), 5)
    fastest = abs(data.rows[:, 2]).max()
    data.rows = np.concatenate([*[data.rows] * 20, data.rows[:1]])  # 20 rows near each state
    data.rows[-1, 2] = 7.9                                      # faster, but alone
    ours.draw_critic(figure, data, student)

    policy = student.get_action

    def critic(state, torque=None):
        torque = policy(state) if torque is None else torque
        row = torch.tensor([[*state]]).float(), torch.tensor([[torque]]).float()
        return min(student.model_value1(*row).item(), student.model_value2(*row).item())

    with torch.no_grad():
        for axes, value in zip(figure.axes, (policy, critic)):
            mesh, = axes.collections
            for i, j in ((0, 0), (3, 25), (35, 10), (40, 45)):
                angle, speed = mesh.get_coordinates()[i:i + 2, j:j + 2].mean(axis=(0, 1))
                angle = math.radians(angle)
                expected = value([math.cos(angle), math.sin(angle), speed])
                assert np.asarray(mesh.get_array())[i, j] == pytest.approx(expected, abs=1e-4)
            dots, = curves(axes).values()
            expected = np.degrees(np.arctan2(data.rows[:, 1], data.rows[:, 0])), data.rows[:, 2]
            np.testing.assert_allclose(dots, expected, rtol=1e-5)
        drawn, torques = curves(figure.axes[2]), np.linspace(-2, 2, 21).tolist()
        (agent, *state), = set(delivered.values())
        assert agent is student and abs(state[2]) == fastest and list(delivered) == torques
        assert drawn["delivered"] == [torques, [3 * torque for torque in torques]]
        assert drawn["promised"] == [torques, pytest.approx(
            [critic(state, torque) for torque in torques], abs=1e-5)]
        near = (abs(data.rows[:, :3] - np.float32(state)) < 0.3).all(axis=1)
        assert drawn["the data's"][0] == data.rows[near, 3].tolist()
        assert drawn["the policy's"][0] == [pytest.approx(policy(state), abs=1e-5)]


def test_a_mean_torque_is_of_five_draws():
    drawn = itertools.count()
    agent = types.SimpleNamespace(get_action=lambda state: next(drawn) + state[0])
    assert ours.mean_torque(agent, [[0.5, 0, 0], [0.25, 0, 0]]).tolist() == [4.5, 5.25]


def test_the_png_is_of_this_run_and_its_trained_student(small, tmp_path, program, monkeypatch):
    drawn = []
    monkeypatch.setattr(ours, "draw_tests", lambda figure, *given: drawn.extend(given))
    monkeypatch.setattr(ours, "draw_critic", lambda figure, *given: drawn.extend(given))
    text = program("--epochs", 2, "--steps", 4, "--out", tmp_path / "run")
    tests, mean, data, student = drawn
    assert data.frozen and not data.rows.flags.writeable
    assert same(numbers(student), numbers(ours.load_agent(tmp_path / "run" / "student.pt")))
    np.testing.assert_array_equal(data.rows, rows_of(tmp_path / "run"))
    assert [f"{row['stage']} {row['step']}" for row in tests] == steps_in(tmp_path / "run")
    assert mean == pytest.approx(table(text)["the data"][1], abs=0.051)


def test_readmes_errata_are_the_codes():
    """A row of README's table for each, and one place in the code with a comment "Page:"."""
    readme = (TOP / "README.md").read_text()
    table = re.search(r"(?m)(^\|.*\n)*^\|.*\bjacobian\b.*\n(^\|.*\n)*", readme)
    rows = [re.findall(r"\w+", row) for row in table[0].splitlines()[2:]]
    assert [[name for name in ours.ERRATA if name in row[:1]] for row in rows] == [
        [name] for name in ours.ERRATA]
    source = (TOP / "cql_pendulum.py").read_text()
    for name in ours.ERRATA:
        before, _ = source.split(f'"{name}" in AS_PRINTED')
        assert "# Page: " in before[-400:], name


def test_the_scripts_own_requirements_are_those_of_the_file():
    """As tools read it: the reference regular expression of PEP 723."""
    block = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
    (found,) = block.finditer((TOP / "cql_pendulum.py").read_text())
    assert found["type"] == "script"
    stated = tomllib.loads(re.sub(r"(?m)^# ?", "", found["content"]))
    listed = [line.split("#")[0].strip()
              for line in (TOP / "requirements.txt").read_text().splitlines()]
    assert sorted(stated["dependencies"]) == sorted(filter(None, listed))
    assert stated["requires-python"] == ">=3.11"
