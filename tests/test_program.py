"""The command as its user meets it: what it prints, its files, its pictures, its options."""
import copy
import csv
import functools
import importlib.util
import io
import json
import math
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

import numpy as np
import pytest
import torch

import cql_pendulum as ours

TOP = pathlib.Path(__file__).parents[1]
SCRIPT = [sys.executable, str(TOP / "cql_pendulum.py")]
FILES = {"checkpoint.pt", "config.json", "curves.png", "dataset.npz", "log.csv", "student.pt",
         "teacher.pt"}
CRITICS = "model_value1", "model_value2", "model_value_next1", "model_value_next2"


# ---- the program in this process ----

@pytest.fixture
def small(monkeypatch):
    """Short episodes, few updates, no torques drawn: a run takes a fraction of a second."""
    shrink(ours, monkeypatch)


def shrink(module, monkeypatch):
    monkeypatch.setattr(module, "EPISODE", 70)
    monkeypatch.setattr(module, "UPDATES", 3)
    monkeypatch.setattr(module, "draw_tests", lambda *_: None)
    monkeypatch.setattr(module, "draw_torques", lambda *_: None)


@pytest.fixture
def untrained(monkeypatch, small):
    """A main job that trains and plays nothing: its agents stay as they were made."""
    monkeypatch.setattr(ours.SAC, "train", lambda *_: None)
    monkeypatch.setattr(ours, "evaluate", lambda agent, seeds: 3 * [-np.arange(len(seeds)) - 1.0])


def run(capsys, *arguments):
    """What the program prints, once it has ended well and without a word on stderr."""
    ours.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def lines(text):
    """What was printed, without what no two runs share."""
    return [line for line in text.splitlines() if not line.startswith(("minutes", "all files"))]


def table(text):
    found = [line for line in text.splitlines() if line.startswith("the ") and "was" not in line]
    return {line[:22].strip(): [float(x) for x in line[22:].split()] for line in found}


def log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def steps_in(out):
    """Stage and step of each test in log.csv."""
    return [f"{row['stage']} {row['step']}" for row in log(out)]


def starts(seed, purpose, n):
    """Seeds of n starts: for tests (0) or final episodes (1)."""
    return np.random.SeedSequence([seed, purpose]).generate_state(n).tolist()


def played(n, as_printed=()):
    """A Data of n episodes."""
    torch.manual_seed(0)
    ours.env.reset(seed=0)
    data = ours.Data(as_printed)
    agent = ours.SAC()
    for _ in range(n):
        data.update_data(agent)
    return data


def row_of(returns):
    """The table's numbers for some returns."""
    error = statistics.stdev(returns) / math.sqrt(len(returns))
    return [len(returns), statistics.mean(returns), error, min(returns), max(returns)]


def equal(one, other):
    """Whether two agents have the same networks and temperature."""
    for name in (*CRITICS, "model_action"):
        pairs = zip(getattr(one, name).parameters(), getattr(other, name).parameters())
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return torch.equal(one.alpha, other.alpha)


# ---- the whole main job ----

@functools.cache
def main_job():
    """The main job as its user starts it: its folder, and what it printed."""
    folder = tempfile.TemporaryDirectory()
    arguments = ["--epochs", "2", "--steps", "70", "--out", "run"]
    done = subprocess.run([*SCRIPT, *arguments], cwd=folder.name, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


@pytest.fixture
def whole():
    folder, text = main_job()
    return pathlib.Path(folder.name) / "run", text


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


def test_the_log_is_what_was_printed(whole):
    out, text = whole
    for row, line in zip(log(out), text.splitlines()):
        said = re.fullmatch(r"(teacher|student) +(\d+)   return +(-\d+\.\d)   "
                            r"promised +(-?\d+\.\d\d)   delivered +(-?\d+\.\d\d)", line)
        assert said, line
        assert said.groups()[:2] == (row["stage"], row["step"])
        assert float(said[3]) == pytest.approx(float(row["return"]), abs=0.051)
        assert float(said[4]) == pytest.approx(float(row["promised"]), abs=0.0051)
        assert float(said[5]) == pytest.approx(float(row["delivered"]), abs=0.0051)


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
    assert ours.evaluate(agent, starts(1, 0, 10))[0].mean() != pytest.approx(means[0])


def test_the_table_has_the_returns_of_the_data(whole):
    out, text = whole
    with np.load(out / "dataset.npz") as data:
        returns = data["rewards"].astype(float).reshape(2, 200).sum(axis=1)
    assert list(table(text)) == ["the data", "the teacher", "the student"]
    assert table(text)["the data"] == pytest.approx(row_of(returns.tolist()), abs=0.051)


def test_config_says_what_was_typed_and_the_versions(whole):
    assert json.loads((whole[0] / "config.json").read_text()) == {
        "argv": ["--epochs", "2", "--steps", "70", "--out", "run"],
        "versions": {"gym": ours.gym.__version__, "numpy": np.__version__,
                     "torch": torch.__version__}}


def test_the_saved_dataset_gives_the_same_student(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ours, "draw_torques", lambda *_: None)
    text = run(capsys, "--dataset", whole[0] / "dataset.npz", "--steps", 70, "--out",
               tmp_path / "run")
    assert lines(text)[:2] == [x for x in lines(whole[1]) if x.startswith("student")]
    theirs = table(whole[1])
    assert table(text) == {who: theirs[who] for who in ("the data", "the student")}
    assert (tmp_path / "run" / "dataset.npz").read_bytes() == (
        whole[0] / "dataset.npz").read_bytes()
    mine = ours.load_agent(tmp_path / "run" / "student.pt")
    assert equal(mine, ours.load_agent(whole[0] / "student.pt"))


# ---- options reach what they name ----

def test_the_seed_makes_the_first_weights_and_the_starts(untrained, tmp_path, capsys):
    agents = {}
    first = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        run(capsys, "--epochs", 1, "--steps", 1, "--seed", seed, "--out", out)
        for who, kind in (("teacher", ours.SAC), ("student", ours.CQL)):
            agents[who, seed] = ours.load_agent(out / f"{who}.pt")
            torch.manual_seed(seed)
            assert equal(agents[who, seed], kind()), (who, seed)
        first[seed] = ours.load_dataset(out / "dataset.npz").rows[0, :3].tolist()
        ours.env.reset(seed=seed)
        assert first[seed] == ours.env.reset().tolist()
    for who in ("teacher", "student"):
        assert not equal(agents[who, 0], agents[who, 1])
    assert first[0] != first[1]


def test_the_seed_makes_the_starts_of_tests_and_final_episodes(
        untrained, tmp_path, capsys, monkeypatch):
    seen = []

    def evaluate(agent, seeds):
        seen.append(seeds)
        return 3 * [np.arange(len(seeds), dtype=float)]

    monkeypatch.setattr(ours, "evaluate", evaluate)
    run(capsys, "--epochs", 1, "--steps", 1, "--seed", 6, "--out", tmp_path / "run")
    tests, final = starts(6, 0, 10), starts(6, 1, 100)
    assert seen == [tests, tests, final, final]                     # the teacher's, the student's
    assert not set(tests) & set(final)


def test_another_seed_prints_other_lines_and_the_same_seed_the_same(small, tmp_path, capsys):
    texts = [run(capsys, "--epochs", 1, "--steps", 2, "--seed", seed, "--out", tmp_path / name)
             for seed, name in ((3, "a"), (3, "b"), (4, "c"))]
    assert lines(texts[0]) == lines(texts[1])
    assert not set(lines(texts[0])[:3]) & set(lines(texts[2])[:3])


@pytest.mark.parametrize("typed, kind, weight", [
    ([], ours.CQL, 5), (["--weight", "0.5"], ours.CQL, 0.5), (["--weight", "0"], ours.CQL, 0),
    (["--student", "sac"], ours.SAC, None), (["--student", "bc"], ours.BC, None)])
def test_each_student_is_of_its_class_and_weight(typed, kind, weight, untrained, tmp_path, capsys):
    run(capsys, "--epochs", 1, "--steps", 1, *typed, "--out", tmp_path / "run")
    student = ours.load_agent(tmp_path / "run" / "student.pt")
    assert type(student) is kind
    assert getattr(student, "weight", None) == weight
    assert type(ours.load_agent(tmp_path / "run" / "teacher.pt")) is ours.SAC


@pytest.mark.parametrize("kind, typed, restored", [
    ("cql", [], set()), ("cql", ["--as-printed"], set(ours.ERRATA)),
    ("sac", ["--as-printed", "timeout"], {"timeout"}), ("bc", ["--as-printed"], set(ours.ERRATA)),
    ("cql", ["--as-printed", "sign", "--as-printed", "range"], {"sign", "range"})])
def test_as_printed_reaches_all(typed, restored, kind, untrained, tmp_path, capsys, monkeypatch):
    """Agents, data, and those of a resumed run."""
    seen = []

    def train(agent, state, action, reward, next_state, over):
        seen.append((agent.as_printed, agent.model_action.as_printed, bool(over.any())))

    monkeypatch.setattr(ours.SAC, "train", train)
    monkeypatch.setattr(ours.BC, "train", train)
    monkeypatch.setattr(ours, "UPDATES", 20)
    out = tmp_path / "run"
    run(capsys, "--epochs", 1, "--steps", 20, "--student", kind, *typed, "--out", out)
    for part in (seen[:20], seen[20:]):
        assert len(part) == 20
        assert {errata for errata, _, _ in part} == {frozenset(restored)}
        assert {errata for _, errata, _ in part} == {frozenset(restored)}
        assert any(over for _, _, over in part) == ("timeout" in restored)
    for name in ("teacher.pt", "student.pt", "checkpoint.pt"):
        assert ours.load_agent(out / name).as_printed == restored
    (out / "checkpoint.pt").unlink()
    (out / "student.pt").unlink()
    ours.main(["--resume", str(out)])
    assert {errata for errata, _, _ in seen[40:]} == {frozenset(restored)}
    assert any(over for _, _, over in seen[40:]) == ("timeout" in restored)
    assert type(ours.load_agent(out / "student.pt")).__name__ == kind.upper()


def random_rows(seed, n):
    """Rows of n episodes of random torques, spelled out."""
    random.seed(seed)
    env = ours.MyWrapper()
    env.reset(seed=seed)
    rows = []
    for _ in range(n):
        state = env.reset()
        over = False
        while not over:
            torque = random.uniform(-2, 2)
            next_state, reward, over, _ = env.step([torque])
            rows.append([*state, torque, reward, *next_state, False, over])
            state = next_state
    return np.array(rows, np.float32)


def test_random_and_last_of_a_dataset(untrained, tmp_path, capsys):
    data = played(12)
    ours.save_dataset(tmp_path / "data.npz", data)
    text = run(capsys, "--dataset", tmp_path / "data.npz", "--random", 10, "--last", 10,
               "--student", "sac", "--seed", 3, "--steps", 1, "--out", tmp_path / "run")
    rows = ours.load_dataset(tmp_path / "run" / "dataset.npz").rows
    np.testing.assert_array_equal(rows[:700], random_rows(3, 10))
    np.testing.assert_array_equal(rows[700:], data.rows[140:])
    assert table(text)["the data"][0] == 20


def test_random_and_last_of_a_teacher(untrained, tmp_path, capsys):
    arguments = ["--epochs", 3, "--steps", 1, "--seed", 5]
    run(capsys, *arguments, "--out", tmp_path / "all")
    everything = ours.load_dataset(tmp_path / "all" / "dataset.npz").rows
    assert len(everything) == 210
    chance = random_rows(5, 2)
    for k, (typed, wanted) in enumerate([
            (["--last", 2], everything[70:]), (["--last", 3], everything),
            (["--random", 2], np.concatenate([chance, everything])),
            (["--random", 2, "--last", 1], np.concatenate([chance, everything[140:]]))]):
        run(capsys, *arguments, *typed, "--out", tmp_path / str(k))
        rows = ours.load_dataset(tmp_path / str(k) / "dataset.npz").rows
        np.testing.assert_array_equal(rows, wanted)


def test_random_data_alone_need_no_teacher(untrained, tmp_path, capsys):
    text = run(capsys, "--random", 2, "--last", 0, "--steps", 1, "--seed", 5, "--out",
               tmp_path / "run")
    rows = ours.load_dataset(tmp_path / "run" / "dataset.npz").rows
    np.testing.assert_array_equal(rows, random_rows(5, 2))
    assert steps_in(tmp_path / "run") == ["student 0"]
    assert list(table(text)) == ["the data", "the student"]
    assert not (tmp_path / "run" / "teacher.pt").exists()


def test_cloning_promises_nothing_and_moves_toward_the_datas_torques(
        small, tmp_path, capsys, monkeypatch):
    class Pilot:
        def get_action(self, state):
            return float(np.clip(4 * state[1], -2, 2))             # 2 N m often, to the last bit

    data = ours.Data()
    for _ in range(4):
        data.update_data(Pilot())
    ours.save_dataset(tmp_path / "data.npz", data)

    def error(agent):
        hidden = agent.model_action.fc_state(torch.from_numpy(data.rows[:, :3]))
        torques = 2 * agent.model_action.fc_mu(hidden).detach().tanh().numpy()
        return abs(torques[:, 0] - data.rows[:, 3]).mean()

    out = tmp_path / "run"
    text = run(capsys, "--dataset", tmp_path / "data.npz", "--student", "bc", "--steps", 500,
               "--out", out)
    torch.manual_seed(0)
    assert error(ours.load_agent(out / "student.pt")) < 0.4 * error(ours.BC())
    for line in text.splitlines()[:2]:
        assert re.fullmatch(r"student +\d+   return +-\d+\.\d   promised        -   "
                            r"delivered +-?\d+\.\d\d", line), line
    assert math.isnan(float(log(out)[1]["promised"]))


def test_the_student_gets_frozen_data(untrained, tmp_path, capsys, monkeypatch):
    seen = []
    learn = ours.train_student

    def train_student(student, data, steps, run):
        seen.append(data)
        learn(student, data, steps, run)

    monkeypatch.setattr(ours, "train_student", train_student)
    run(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    with pytest.raises(RuntimeError, match="frozen"):
        seen[0].update_data(ours.SAC())
    with pytest.raises(ValueError, match="read-only"):
        seen[0].rows[0, 0] = 1


def test_the_main_job_runs_on_one_thread(untrained, tmp_path, capsys):
    torch.set_num_threads(2)
    torch.set_flush_denormal(False)
    run(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1
    assert (torch.tensor([1e-40]) * 1).item() == 0                 # denormals are flushed


# ---- what is printed, and when ----

def test_one_episode_has_no_standard_error(untrained, tmp_path, capsys):
    text = run(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "run")
    assert math.isnan(table(text)["the data"][2])


def test_tests_come_when_the_page_has_them(untrained, tmp_path, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr(ours.SAC, "train", lambda agent, *_: trained.append(type(agent)))
    monkeypatch.setattr(ours, "UPDATES", 200)
    run(capsys, "--epochs", 12, "--steps", 4002, "--out", tmp_path / "run")
    assert steps_in(tmp_path / "run") == [
        "teacher 0", "teacher 10", "teacher 11", "student 0", "student 2000", "student 4000",
        "student 4001"]
    assert trained == 12 * 200 * [ours.SAC] + 4002 * [ours.CQL]
    assert len(ours.load_dataset(tmp_path / "run" / "dataset.npz")) == 12 * 70


def test_defaults_are_the_pages():
    options = ours.parse_options([])
    assert (options.epochs, options.steps, options.student, options.seed) == (100, 50_000, "cql", 0)
    assert (options.random, options.last, options.weight, ours.WEIGHT) == (0, None, None, 5)
    assert not options.as_printed


def test_seconds_and_minutes_are_each_stages_own(untrained, tmp_path, capsys, monkeypatch):
    """On a clock that an update moves by 30 seconds; a resumed stage goes on counting."""
    clock = [1000.0]
    dies_at = [None]

    def train(*_):
        clock[0] += 30
        if clock[0] == dies_at[0]:
            raise ConnectionError

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ours.SAC, "train", train)
    arguments = ["--epochs", 11, "--steps", 5]
    for name, dies in (("whole", None), ("resumed", 1000 + 33 * 30 + 3 * 30)):
        clock[0] = 1000.0
        dies_at[0] = dies
        out = tmp_path / name
        if dies:
            with pytest.raises(ConnectionError):
                run(capsys, *arguments, "--out", out)
            clock[0] = 7.0                                          # another boot
            text = run(capsys, "--resume", out)
        else:
            text = run(capsys, *arguments, "--out", out)
        assert [row["seconds"] for row in log(out)] == ["90.0", "990.0", "30.0", "150.0"]
        assert "minutes: teacher 16.5, student 2.5" in text.splitlines()


def test_a_test_is_saved_before_it_is_printed(untrained, tmp_path, capsys, monkeypatch):
    say = ours.say
    checked = []

    def checking(line):
        if line.startswith(("teacher ", "student ")):
            checked.append(" ".join(line.split()[:2]))
            assert steps_in(tmp_path / "run")[-1] == checked[-1]
            saved = ours.read_agent(tmp_path / "run" / "checkpoint.pt")["log"]
            assert f"{saved[-1]['stage']} {saved[-1]['step']}" == checked[-1]
        say(line)

    monkeypatch.setattr(ours, "say", checking)
    run(capsys, "--epochs", 1, "--steps", 2, "--out", tmp_path / "run")
    assert checked == ["teacher 0", "student 0", "student 1"]


def test_default_folders_are_new(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in (1, 2):
        text = run(capsys, "--epochs", 1, "--steps", 1, "--student", "sac", "--seed", 4)
        assert text.splitlines()[-1] == f"all files: runs/sac-seed4-{k}"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"sac-seed4-1", "sac-seed4-2"}
    run(capsys, "--epochs", 1, "--steps", 1, "--out", tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bars_on_a_terminal(untrained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    out = tmp_path / "run"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    ours.main(["--epochs", "2", "--steps", "3", "--out", str(out)])
    shown = terminal.getvalue()
    assert "teacher:" in shown and "/2 [" in shown
    assert re.search(r"[\r\n]teacher +0 +return", shown)             # not behind the bar
    assert "student:" in shown and "/3 [" in shown
    saved = ours.read_agent(out / "checkpoint.pt")
    saved["done"] = 1
    torch.save(saved, out / "checkpoint.pt")
    terminal.truncate(0)
    ours.main(["--resume", str(out)])
    assert "| 1/3 [" in terminal.getvalue()
    assert "teacher:" not in terminal.getvalue()


# ---- optional packages, and another gym ----

def test_without_the_optional_packages(small, tmp_path, capsys, monkeypatch):
    """One line of notice for each, and the same numbers."""
    arguments = ["--epochs", "2", "--steps", "3", "--out"]
    with_all = run(capsys, *arguments, tmp_path / "all")
    for name in ("tqdm", "matplotlib", "pygame"):
        monkeypatch.setitem(sys.modules, name, None)
    ours.optional.cache_clear()
    text = run(capsys, *arguments, tmp_path / "run")
    play = run(capsys, "--play", tmp_path / "run" / "student.pt")
    ours.optional.cache_clear()
    monkeypatch.undo()
    notes = [line for line in text.splitlines() if line.startswith("note:")]
    assert [note.split(" (")[0] for note in notes] == ["note: no progress bars",
                                                       "note: no curves.png"]
    assert "tqdm" in notes[0] and "matplotlib" in notes[1]
    assert [line for line in lines(text) if line not in notes] == lines(with_all)
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES - {"curves.png"}
    assert re.fullmatch(r"note: no animation \(.*pygame.*\)\nreturn -\d+\.\d\n", play)


def test_without_pillow_there_is_no_animation(small, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pygame", reason="pygame-ce is not installed")
    ours.save_agent(tmp_path / "agent.pt", ours.SAC())
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    ours.optional.cache_clear()
    text = run(capsys, "--play", tmp_path / "agent.pt")
    ours.optional.cache_clear()
    assert re.fullmatch(r"note: no animation \(.*PIL.*\)\nreturn -\d+\.\d\n", text)
    assert [file.name for file in tmp_path.iterdir()] == ["agent.pt"]


def test_gymnasium_in_gyms_place(small, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    text = (TOP / "cql_pendulum.py").read_text()
    text, count = re.subn(r"(?m)^import gym$", "import gymnasium as gym", text)
    assert count == 1
    (tmp_path / "other.py").write_text(text)
    spec = importlib.util.spec_from_file_location("other", tmp_path / "other.py")
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    shrink(other, monkeypatch)
    arguments = ["--epochs", "2", "--steps", "3", "--out"]
    other.main([*arguments, str(tmp_path / "other")])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert lines(printed.out) == lines(run(capsys, *arguments, tmp_path / "ours"))
    assert {file.name for file in (tmp_path / "other").iterdir()} == FILES


# ---- the animation ----

@pytest.fixture
def short_play(monkeypatch):
    """Episodes of 30 steps; what play changes in the environment is put back."""
    pytest.importorskip("pygame", reason="pygame-ce is not installed")
    monkeypatch.setattr(ours, "EPISODE", 30)
    monkeypatch.setattr(ours.env, "show", ours.env.show, raising=False)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def test_play_shows_the_episode_that_it_played(short_play, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    torch.manual_seed(8)
    agent = ours.SAC()
    path = tmp_path / "agent.pt"
    ours.save_agent(path, agent)
    before = path.read_bytes()
    shown = {}
    for seed in (3, 4):
        said = run(capsys, "--play", path, "--seed", seed).splitlines()
        torch.manual_seed(seed)
        env = ours.MyWrapper()
        env.reset(seed=seed)
        state, total, over, pictures = env.reset(), 0.0, False, []
        while not over:
            state, reward, over, _ = env.step([agent.get_action(state)])
            total += float(reward)
            pictures.append(env.env.render()[::2, ::2].astype(int))
        assert said == [f"return {total:.1f}", f"animation: {path}.gif"]
        with image.open(f"{path}.gif") as gif:
            assert (gif.n_frames, gif.size) == (30, (250, 250))
            assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
            for k in (0, 12, 29):
                gif.seek(k)
                frame = np.asarray(gif.convert("RGB")).astype(int)
                wrong = [abs(frame - picture).mean() for picture in pictures]
                assert np.argmin(wrong) == k and wrong[k] < 0.5
        shown[seed] = pathlib.Path(f"{path}.gif").read_bytes()
    assert shown[3] != shown[4]
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"agent.pt", "agent.pt.gif"}


def test_the_seed_of_play_is_0_where_none_is_given(short_play, tmp_path, capsys):
    ours.save_agent(tmp_path / "agent.pt", ours.SAC())
    texts = [run(capsys, "--play", tmp_path / "agent.pt", *seed)
             for seed in ([], ["--seed", 0], ["--seed", 1])]
    assert texts[0] == texts[1] != texts[2]


def test_a_checkpoint_can_be_played(whole, short_play, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((whole[0] / "checkpoint.pt").read_bytes())
    assert run(capsys, "--play", tmp_path / "checkpoint.pt").startswith("return -")


# ---- the picture ----

@pytest.fixture
def figure():
    module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    return module.Figure()


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


def test_the_picture_without_a_teacher(figure):
    ours.draw_tests(figure, LOG[2:], -850.0)
    assert list(curves(figure.axes[1])) == ["student", "the data"]


def own_delivery(student, state, torque):
    """Mean over 20 episodes in the environment itself: this torque, then the student's policy."""
    envs = [ours.MyWrapper() for _ in range(20)]
    for env in envs:
        env.reset(seed=0)
        env.unwrapped.state = np.array([math.atan2(state[1], state[0]), state[2]], float)
    torques = [torque] * 20
    scaled = []
    torch.manual_seed(0)
    for t in range(ours.EPISODE):
        steps = [env.step([x]) for env, x in zip(envs, torques)]
        scaled.append([(step[1] + 8) / 8 for step in steps])
        with torch.no_grad():
            torques = student.model_action(torch.tensor(np.stack([step[0] for step in steps])))[0]
        torques = torques[:, 0].tolist()
    scaled = np.mean(scaled, axis=1)
    tail = 0.99 ** len(scaled) / 0.01 * scaled[-20:].mean()
    return sum(0.99 ** t * x for t, x in enumerate(scaled)) + tail


def test_the_picture_of_the_torques(figure, monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", 70)
    torch.manual_seed(3)
    student, data = ours.CQL(), played(6)
    data.rows[140:, [1, 2, 3, 6, 7]] *= -1                          # as in a mirror
    for _ in range(20):
        student.train(*data.get_sample())
    ours.draw_torques(figure, data, student)
    rows = data.rows
    angles = np.degrees(np.arctan2(rows[:, 1], rows[:, 0]))
    away = np.hypot(np.radians(angles), rows[:, 2] / 8)
    beyond = np.hypot(math.pi - abs(np.radians(angles)), rows[:, 2] / 8)
    chosen = [away.argmin(), abs(rows[:, 2]).argmax(), beyond.argmin()]
    assert len(set(chosen)) == 3 and len(figure.axes) == 3
    assert rows[chosen[1], 2] < 0 and angles[chosen[2]] < 0         # their sizes count
    for axes, k in zip(figure.axes, chosen):
        state = rows[k, :3]
        assert axes.get_title() == f"{angles[k]:.0f} degrees from upright, {state[2]:.1f} rad/s"
        assert axes.get_xlabel() == "torque of this step (N m); then the policy's"
        lines_of = {line.get_label(): line for line in axes.lines}
        assert list(lines_of) == ["promised", "delivered", "data near here", "the policy's torque"]
        torques, promised = lines_of["promised"].get_data()
        np.testing.assert_allclose(torques, np.linspace(-2, 2, 41), atol=1e-6)
        with torch.no_grad():
            pair = (torch.from_numpy(state).expand(41, 3),
                    torch.linspace(-2, 2, 41).reshape(41, 1))
            value = torch.min(student.model_value1(*pair), student.model_value2(*pair))
            hidden = student.model_action.fc_state(pair[0][:1])
            mean = 2 * math.tanh(student.model_action.fc_mu(hidden).item())
        np.testing.assert_allclose(np.ravel(promised), value[:, 0], atol=1e-4)
        torques, delivered = lines_of["delivered"].get_data()
        np.testing.assert_allclose(torques, np.linspace(-2, 2, 41), atol=1e-6)
        for j in (0, 25, 40):
            own = own_delivery(student, state, torques[j])
            assert delivered[j] == pytest.approx(own, abs=0.02)
        near = (abs(rows[:, :3] - state) < 0.3).all(axis=1)
        assert 0 < near.sum() < len(rows)
        np.testing.assert_array_equal(lines_of["data near here"].get_xdata(), rows[near, 3])
        assert np.ravel(lines_of["the policy's torque"].get_xdata()) == pytest.approx(mean)
        for name in ("data near here", "the policy's torque"):
            heights = np.ravel(lines_of[name].get_ydata())
            assert ((0 < heights) & (heights < 0.2)).all()          # of the panel, from its bottom
            assert lines_of[name].get_transform() == axes.get_xaxis_transform()
    assert figure.axes[0].get_ylabel() == "discounted sum of (reward + 8) / 8"
    assert legend(figure.axes[0]) == list(lines_of)
    limits = {axes.get_ylim() for axes in figure.axes}
    assert len(limits) == 1                                         # they can be compared


def test_what_is_delivered_leaves_all_chance_as_it_was(monkeypatch):
    monkeypatch.setattr(ours, "EPISODE", 20)
    agent = ours.SAC()
    before = torch.get_rng_state()
    one, other = (ours.deliver(agent, np.tile([1.0, 0.0, 0.0], (2, 1)), np.zeros(2))
                  for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.tolist() == other.tolist() and one[0] != one[1]


def test_the_png_is_of_this_run_and_its_trained_student(tmp_path, capsys, monkeypatch):
    module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    monkeypatch.setattr(ours, "EPISODE", 64)
    monkeypatch.setattr(ours, "UPDATES", 3)
    drawn = {}
    tests, torques = ours.draw_tests, ours.draw_torques

    def draw_tests(figure, log, mean):
        drawn["log"], drawn["mean"] = copy.deepcopy(log), mean
        tests(figure, log, mean)

    def draw_torques(figure, data, student):
        drawn["data"], drawn["student"] = data.rows, copy.deepcopy(student)
        figure.subplots(1, 3)

    monkeypatch.setattr(ours, "draw_tests", draw_tests)
    monkeypatch.setattr(ours, "draw_torques", draw_torques)
    out = tmp_path / "run"
    text = run(capsys, "--epochs", 2, "--steps", 4, "--out", out)
    assert equal(drawn["student"], ours.load_agent(out / "student.pt"))
    torch.manual_seed(0)
    assert not equal(drawn["student"], ours.CQL())
    np.testing.assert_array_equal(drawn["data"], ours.load_dataset(out / "dataset.npz").rows)
    assert [(row["stage"], row["step"]) for row in drawn["log"]] == [
        ("teacher", 0), ("teacher", 1), ("student", 0), ("student", 3)]
    assert drawn["mean"] == pytest.approx(table(text)["the data"][1], abs=0.051)

    figure = module.Figure(figsize=(13, 7.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    tests(upper, drawn["log"], drawn["mean"])
    lower.subplots(1, 3)
    figure.savefig(tmp_path / "own.png")
    assert (out / "curves.png").read_bytes() == (tmp_path / "own.png").read_bytes()


# ---- what is written about it ----

def test_import_is_silent_and_changes_nothing():
    code = ("import signal, torch; now = lambda: [torch.get_num_threads(), "
            "signal.pthread_sigmask(0, []), *map(signal.getsignal, (1, 2, 15))]; "
            "old = now(); import cql_pendulum; assert now() == old; "
            "assert (torch.tensor([1e-40]) * 1).item() != 0")
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ours.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=-)", text.split("options:")[1])[1:]
    named = {re.search(r"--([a-z-]+)", entry)[1]: entry for entry in entries}
    options = vars(ours.parse_options([]))
    assert named.keys() == {"help", *(name.replace("_", "-") for name in options)}
    for name, entry in named.items():
        words = re.sub(r"^.*?(  +|\n +)", "", entry, count=1)
        assert len(words.split()) >= 3, name
    for name in ("seed", "epochs", "steps", "student", "random"):
        assert f"({options[name]})" in named[name]
    assert f"({ours.CQL().weight})" in named["weight"]
    assert "(all)" in named["last"] and "(none)" in " ".join(named["as-printed"].split())
    assert all(name in " ".join(named["as-printed"].split()) for name in ours.ERRATA)
    assert "{cql,sac,bc}" in named["student"]


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
    content = "".join(line[2:] if line.startswith("# ") else line[1:]
                      for line in found["content"].splitlines(keepends=True))
    stated = tomllib.loads(content)
    listed = (TOP / "requirements.txt").read_text().splitlines()
    assert sorted(stated["dependencies"]) == sorted(
        line.split("#")[0].strip() for line in listed if line.split("#")[0].strip())
    assert stated["requires-python"] == ">=3.11"


# ---- what is saved comes back ----

@pytest.mark.parametrize("as_text", [str, pathlib.Path])
def test_saved_agents_come_back_whole(as_text, tmp_path):
    agent, data = ours.CQL(as_printed={"sign"}, weight=0.5), played(1)
    agent.train(*data.get_sample())
    path = as_text(tmp_path / "agent.pt")
    ours.save_agent(path, agent)
    other = ours.load_agent(path)
    assert (type(other), other.as_printed, other.weight) == (ours.CQL, {"sign"}, 0.5)
    assert equal(agent, other)
    batch = data.get_sample()
    for each in (agent, other):
        torch.manual_seed(5)
        each.train(*batch)
    assert equal(agent, other)                                      # Adam's averages came along


@pytest.mark.parametrize("as_text", [str, pathlib.Path])
def test_saved_datasets_come_back_whole(as_text, tmp_path):
    data = played(1)
    data.rows[7, 8] = 1
    path = as_text(tmp_path / "data.npz")
    ours.save_dataset(path, data)
    other = ours.load_dataset(path, as_printed={"timeout"})
    assert not other.frozen and other.as_printed == {"timeout"}
    np.testing.assert_array_equal(other.rows, data.rows)


def test_an_agent_of_a_learners_own_class_comes_back(tmp_path):
    class Mine(ours.CQL):
        def __init__(self):
            super().__init__()
            self.losses = 7

    agent = Mine()
    agent.losses = 12
    ours.save_agent(tmp_path / "mine.pt", agent)
    other = Mine()
    ours.restore_agent(other, ours.read_agent(tmp_path / "mine.pt"))
    assert other.losses == 12 and equal(other, agent)
    with pytest.raises(ours.UserError, match="Mine"):
        ours.load_agent(tmp_path / "mine.pt")
