"""The command as its user meets it: what it prints, its files, its pictures, its options."""
import copy
import io
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import (
    FILES, TOP, Constant, choose, content, log, no_pictures, numbers, printed_tests, same,
    steps_in, table, with_seed)


def starts(seed, purpose, n):
    """Seeds of n starts: for tests (0) or final episodes (1)."""
    return np.random.SeedSequence([seed, purpose]).generate_state(n).tolist()


def row_of(returns):
    """The table's numbers for some returns."""
    error = statistics.stdev(returns) / math.sqrt(len(returns))
    return [len(returns), statistics.mean(returns), error, min(returns), max(returns)]


def rows_of(out):
    return ours.load_dataset(out / "dataset.npz").rows


# ---- the whole main job ----

def test_main_job_end_to_end(whole):
    out, text = whole
    assert {file.name for file in out.iterdir()} == FILES
    steps = ["teacher 0", "teacher 1", "student 0", "student 69"]
    assert [" ".join(line.split()[:2]) for line in text.splitlines()[:4]] == steps
    assert steps_in(out) == steps
    assert text.splitlines()[-1] == "all files: run"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    with np.load(out / "dataset.npz") as data:
        assert {name: (array.dtype.name, array.shape) for name, array in data.items()} == {
            "observations": ("float32", (400, 3)), "actions": ("float32", (400, 1)),
            "rewards": ("float32", (400,)), "next_observations": ("float32", (400, 3)),
            "terminals": ("bool", (400,)), "timeouts": ("bool", (400,))}
        returns = data["rewards"].astype(float).reshape(2, 200).sum(axis=1)
    assert list(table(text)) == ["the data", "the teacher", "the student"]
    assert table(text)["the data"] == pytest.approx(row_of(returns.tolist()), abs=0.051)
    config = json.loads((out / "config.json").read_text())
    assert config["argv"] == ["--epochs", "2", "--steps", "70", "--out", "run"]
    assert config["versions"] == {"gym": ours.gym.__version__, "numpy": np.__version__,
                                  "torch": torch.__version__}


def test_the_log_is_what_was_printed(whole):
    out, text = whole
    for row, line in zip(log(out), text.splitlines()):
        said = re.fullmatch(r"(teacher|student) +(\d+)   return +(-\d+\.\d)   "
                            r"promised +(-?\d+\.\d\d)   delivered +(-?\d+\.\d\d)", line)
        assert said, line
        assert said.groups()[:2] == (row["stage"], row["step"])
        for k, name, digit in ((3, "return", 0.1), (4, "promised", 0.01), (5, "delivered", 0.01)):
            assert float(said[k]) == pytest.approx(float(row[name]), abs=0.51 * digit)


@pytest.mark.parametrize("who, kind", [("teacher", ours.SAC), ("student", ours.CQL)])
def test_saved_agents_are_the_tested_ones(whole, who, kind):
    out, text = whole
    agent = ours.load_agent(out / f"{who}.pt")
    assert type(agent) is kind
    returns = ours.evaluate(agent, starts(0, 1, 100))[0]
    assert table(text)[f"the {who}"] == pytest.approx(row_of(returns.tolist()), abs=0.051)
    means = [x.mean() for x in ours.evaluate(agent, starts(0, 0, 10))]
    last = [row for row in log(out) if row["stage"] == who][-1]
    kept = [float(last[name]) for name in ("return", "promised", "delivered")]
    assert kept == pytest.approx(means, abs=0.00051)


def test_the_saved_dataset_gives_the_same_student(whole, tmp_path, program, monkeypatch):
    no_pictures(ours, monkeypatch)
    out = tmp_path / "run"
    text = program("--dataset", whole[0] / "dataset.npz", "--steps", 70, "--out", out)
    assert printed_tests(text)[:2] == printed_tests(whole[1])[2:4]
    theirs = table(whole[1])
    assert table(text) == {who: theirs[who] for who in ("the data", "the student")}
    assert (out / "dataset.npz").read_bytes() == (whole[0] / "dataset.npz").read_bytes()
    assert same(*(numbers(ours.load_agent(folder / "student.pt")) for folder in (out, whole[0])))


# ---- options reach what they name ----

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
    assert list(log(out)[-1])[:5] == ["stage", "step", "return", "promised", "delivered"]
    assert ("promised        -" in text) == (kind is ours.BC)


@pytest.mark.parametrize("kind, typed, restored", [
    ("cql", [], set()), ("cql", ["--as-printed"], set(ours.ERRATA)),
    ("sac", ["--as-printed", "timeout"], {"timeout"}), ("bc", ["--as-printed"], set(ours.ERRATA)),
    ("cql", ["--as-printed", "sign", "--as-printed", "range"], {"sign", "range"})])
def test_as_printed_reaches_all(typed, restored, kind, untrained, tmp_path, program, monkeypatch):
    """Agents, data, and those of a resumed run."""
    seen = []

    def train(agent, state, action, reward, next_state, over):
        seen.append((agent.as_printed, agent.model_action.as_printed, bool(over.any())))

    monkeypatch.setattr(ours.SAC, "train", train)
    monkeypatch.setattr(ours.BC, "train", train)
    monkeypatch.setattr(ours, "UPDATES", 20)
    out = tmp_path / "run"
    program("--epochs", 1, "--steps", 20, "--student", kind, *typed, "--out", out)
    (out / "checkpoint.pt").unlink()
    (out / "student.pt").unlink()
    program("--resume", out)
    for part in (seen[:20], seen[20:40], seen[40:]):
        assert len(part) == 20
        assert {names for *both, _ in part for names in both} == {frozenset(restored)}
        assert any(over for *_, over in part) == ("timeout" in restored)
    assert type(ours.load_agent(out / "student.pt")).__name__ == kind.upper()


@pytest.mark.parametrize("typed", [["--last", 2], ["--random", 2], ["--random", 2, "--last", 1]])
@pytest.mark.parametrize("given", [True, False])
def test_random_and_last_of_a_teacher_or_a_dataset(given, typed, untrained, tmp_path, program):
    arguments = ["--epochs", 3, "--steps", 1, "--seed", 5]
    program(*arguments, "--out", tmp_path / "all")
    everything = rows_of(tmp_path / "all")
    assert len(everything) == 60
    if given:
        arguments = ["--dataset", tmp_path / "all" / "dataset.npz", *arguments[2:]]
    text = program(*arguments, *typed, "--out", tmp_path / "run")
    chance = choose(ours.Data(), random=2 * ("--random" in typed), seed=5).rows
    last = typed[-1] if "--last" in typed else 3
    kept = rows_of(tmp_path / "run")
    np.testing.assert_array_equal(kept[len(chance):], everything[60 - 20 * last:])
    np.testing.assert_array_equal(kept[:len(chance)], chance)
    assert table(text)["the data"][0] == len(chance) / 20 + last
    assert ("the teacher" in table(text)) != given


def test_the_student_gets_frozen_data(untrained, tmp_path, program, monkeypatch):
    seen = []
    learn = ours.train_student

    def train_student(student, data, steps, run):
        seen.append(data)
        learn(student, data, steps, run)

    monkeypatch.setattr(ours, "train_student", train_student)
    program("--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    with pytest.raises(RuntimeError, match="frozen"):
        seen[0].update_data(Constant(0))
    with pytest.raises(ValueError, match="read-only"):
        seen[0].rows[0, 0] = 1


def test_the_main_job_runs_on_one_thread():
    """And without subnormal numbers; whatever the machine offers, in a process of its own."""
    code = ("import torch, cql_pendulum as ours\n"
            "tiny = lambda: (torch.ones(1) * 1e-40).item()\n"
            "ours.play = lambda *_: print(torch.get_num_threads(), tiny())\n"
            "torch.set_num_threads(2)\n"
            "ours.main(['--play', 'x'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0.0"], done.stderr


# ---- what is printed, and when ----

def test_defaults_are_the_pages():
    options = ours.parse_options([])
    assert (options.epochs, options.steps, options.student, options.seed) == (100, 50_000, "cql", 0)
    assert (options.random, options.last, ours.CQL().weight) == (0, None, 5)
    assert not options.as_printed
    assert (ours.BATCH, ours.CAPACITY, ours.EPISODE, ours.UPDATES) == (64, 100_000, 200, 200)


def test_default_folders_are_new(untrained, tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in (1, 2):
        text = program("--epochs", 1, "--steps", 1, "--student", "sac", "--seed", 4)
        assert text.splitlines()[-1] == f"all files: runs/sac-seed4-{k}"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"sac-seed4-1", "sac-seed4-2"}
    program("--epochs", 1, "--steps", 1, "--out", tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "student.pt").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bars_on_a_terminal(untrained, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    ours.main(["--epochs", "2", "--steps", "3", "--out", str(tmp_path / "run")])
    shown = terminal.getvalue()
    assert "teacher:" in shown and "/2 [" in shown
    assert re.search(r"[\r\n]teacher +0 +return", shown)             # not behind the bar
    assert "student:" in shown and "/3 [" in shown


# ---- optional packages, and another gym ----

@pytest.mark.parametrize("missing", ["tqdm", "matplotlib", "pygame", "PIL.Image"])
def test_without_an_optional_package(missing, small, tmp_path, program, monkeypatch):
    """One line of notice, and the same numbers."""
    without = {"tqdm": "no progress bars", "matplotlib": "no curves.png"}
    arguments = ["--epochs", 1, "--steps", 3, "--out"]
    with_all = program(*arguments, tmp_path / "all")
    monkeypatch.setitem(sys.modules, missing, None)
    ours.optional.cache_clear()
    text = program(*arguments, tmp_path / "run")
    if missing in without:
        note, = re.findall(r"note: .*", text)
        assert note.startswith(f"note: {without[missing]} (") and missing in note
    else:
        played = program("--play", tmp_path / "run" / "student.pt")
        assert re.fullmatch(rf"note: no animation \(.*{missing}.*\)\nreturn -\d+\.\d\n", played)
    ours.optional.cache_clear()
    assert printed_tests(text) == printed_tests(with_all)
    assert {file.name for file in (tmp_path / "run").iterdir()} == (
        FILES - {"curves.png"} if missing == "matplotlib" else FILES)


# ---- the animation ----

def test_play_shows_the_episode_that_it_played(whole, tmp_path, program, monkeypatch):
    from PIL import Image
    monkeypatch.setattr(ours, "EPISODE", 30)
    monkeypatch.setattr(ours.env, "show", ours.env.show, raising=False)     # put back afterwards
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    path = tmp_path / "agent.pt"
    path.write_bytes((whole[0] / "checkpoint.pt").read_bytes())     # a checkpoint will do
    before = content(tmp_path)
    agent = ours.load_agent(path)
    shown = {}
    for seed in ([], ["--seed", 0], ["--seed", 4]):
        said = program("--play", path, *seed).splitlines()
        ours.seed_everything(seed[1] if seed else 0)
        state, total, over, pictures = ours.env.reset(), 0.0, False, []
        while not over:
            state, reward, over, _ = ours.env.step([agent.get_action(state)])
            total += float(reward)
            pictures.append(ours.env.render()[::2, ::2].astype(int))
        assert said == [f"return {total:.1f}", f"animation: {path}.gif"]
        with Image.open(f"{path}.gif") as gif:
            assert (gif.n_frames, gif.size) == (30, (250, 250))
            assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
            for k in (0, 12, 29):
                gif.seek(k)
                frame = np.asarray(gif.convert("RGB")).astype(int)
                wrong = [abs(frame - picture).mean() for picture in pictures]
                assert np.argmin(wrong) == k and wrong[k] < 0.5
        shown[str(seed)] = total
    assert len(set(shown.values())) == 2
    after = content(tmp_path)
    after.pop(pathlib.Path(f"{path}.gif"))
    assert after == before


# ---- the picture ----

@pytest.fixture
def figure():
    from matplotlib.figure import Figure
    return Figure()


def curves(axes):
    return {line.get_label(): [np.asarray(x).tolist() for x in line.get_data()]
            for line in axes.lines}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


NAMES = "stage", "step", "return", "promised", "delivered", "seconds"
LOG = [dict(zip(NAMES, row)) for row in (
    ("teacher", 0, -1500.0, 1.0, 2.0, 9.0), ("teacher", 10, -230.0, 3.0, 4.0, 9.5),
    ("student", 0, -1400.0, 5.0, 6.0, 9.0), ("student", 2000, -300.0, 7.0, 8.5, 9.5))]


def test_the_picture_of_the_tests(figure, monkeypatch):
    monkeypatch.setattr(ours, "GAMMA", 0.95)
    ours.draw_tests(figure, LOG, -850.0)
    teacher, student, promise = figure.axes
    assert [(x.get_title(), x.get_xlabel(), x.get_ylabel()) for x in figure.axes] == [
        ("Teacher, online", "epoch", "return of an episode"),
        ("Student, offline", "update", "return of an episode"),
        ("Promised and delivered", "update", "discounted sum of (reward + 8) / 8")]
    assert list(curves(teacher).values()) == [[[0, 10], [-1500, -230]]]
    assert curves(student) == {"student": [[0, 2000], [-1400, -300]],
                               "the data": [[0, 1], [-850, -850]],
                               "the teacher's last test": [[0, 1], [-230, -230]]}
    assert curves(promise) == {"promised": [[0, 2000], [5, 7]], "delivered": [[0, 2000], [6, 8.5]],
                               "the most possible": [[0, 1], [pytest.approx(20)] * 2]}
    for axes in (student, promise):
        assert legend(axes) == list(curves(axes))
    figure.clear()
    ours.draw_tests(figure, LOG[2:], -850.0)
    assert list(curves(figure.axes[1])) == ["student", "the data"]


def test_the_png_is_of_this_run_and_its_trained_student(small, tmp_path, program, monkeypatch):
    drawn = {}
    monkeypatch.setattr(ours, "draw_tests", lambda figure, log, mean: drawn.update(
        log=copy.deepcopy(log), mean=mean))
    monkeypatch.setattr(ours, "draw_torques", lambda figure, data, student: drawn.update(
        rows=data.rows, student=numbers(student)))
    out = tmp_path / "run"
    text = program("--epochs", 2, "--steps", 4, "--out", out)
    assert same(drawn["student"], numbers(ours.load_agent(out / "student.pt")))
    assert not same(drawn["student"], numbers(with_seed(0, ours.CQL)))
    np.testing.assert_array_equal(drawn["rows"], rows_of(out))
    assert [f"{row['stage']} {row['step']}" for row in drawn["log"]] == steps_in(out)
    assert drawn["mean"] == pytest.approx(table(text)["the data"][1], abs=0.051)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---- what is written about it ----

def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ours.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=-)", text.split("options:")[1])[1:]
    named = {re.search(r"--([a-z-]+)", entry)[1]: " ".join(entry.split()) for entry in entries}
    options = vars(ours.parse_options([]))
    assert named.keys() == {"help", *(name.replace("_", "-") for name in options)}
    assert all(len(entry.split()) >= 4 for entry in named.values())
    for name in ("seed", "epochs", "steps", "student", "random"):
        assert f"({options[name]})" in named[name]
    assert f"({ours.WEIGHT})" in named["weight"] and "{cql,sac,bc}" in named["student"]
    assert "(all)" in named["last"] and "(none)" in named["as-printed"]
    assert all(name in named["as-printed"] for name in ours.ERRATA)


def test_readme_links_to_the_errata():
    source = (TOP / "cql_pendulum.py").read_text().splitlines()
    links = re.findall(r"\[(\w+)\]\(cql_pendulum\.py#L(\d+)\)", (TOP / "README.md").read_text())
    assert {name for name, _ in links} == ours.ERRATA.keys()
    for name, line in links:
        assert f'"{name}"' in source[int(line) - 1], (name, line)
        assert any("Page:" in near for near in source[int(line) - 4:int(line) + 1]), (name, line)


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
