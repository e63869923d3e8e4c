"""The command as its user meets it: output, files, pictures, the same under Gymnasium, and without the optional packages."""
import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import cql_pendulum as ours

TOP = pathlib.Path(__file__).parents[1]
TINY = ["--epochs", "2", "--steps", "70"]
FILES = {"checkpoint.pt", "config.json", "curves.png", "dataset.npz", "log.csv", "student.pt", "teacher.pt"}


def command(*arguments, before=""):
    """Run the program in a subprocess; `before` is Python to run first."""
    code = f"{before}\nimport runpy; runpy.run_path('cql_pendulum.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=TOP, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})


def inside(capsys, *arguments):
    """Run the program in this process, which has its imports behind it: its stdout, once it has ended well."""
    assert ours.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def lines_without_time(text):
    return [line for line in text.splitlines() if not line.startswith(("minutes", "all files"))]


def test_import_is_silent():
    done = subprocess.run([sys.executable, "-c", "import cql_pendulum"], cwd=TOP, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, command(*TINY, "--out", out)


def test_main_job_end_to_end(whole_run):
    out, done = whole_run
    assert (done.returncode, done.stderr) == (0, "")
    assert {file.name for file in out.iterdir()} == FILES
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [["teacher", "0"], ["teacher", "1"], ["student", "0"], ["student", "69"]]
    assert all("return" in line and "promised" in line and "delivered" in line for line in lines[:4])
    table = {line[:22].strip(): line[22:].split() for line in lines if line.startswith("the ")}
    assert [row[0] for row in table.values()] == ["2", "100", "100"]
    with np.load(out / "dataset.npz") as data:
        shapes = {name: (array.dtype.name, array.shape) for name, array in data.items()}
        returns = data["rewards"].reshape(2, 200).sum(axis=1)
    assert shapes == {"observations": ("float32", (400, 3)), "actions": ("float32", (400, 1)), "rewards": ("float32", (400,)),
                      "next_observations": ("float32", (400, 3)), "terminals": ("bool", (400,)), "timeouts": ("bool", (400,))}
    assert [float(x) for x in (table["the data"][1], *table["the data"][3:])] == pytest.approx(
        [returns.mean(), returns.min(), returns.max()], abs=0.06)
    config = json.loads((out / "config.json").read_text())
    assert (config["seed"], config["options"]["steps"], config["versions"]["torch"]) == (0, 70, torch.__version__)
    with open(out / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert [f"{row['stage']} {row['step']}" for row in log] == ["teacher 0", "teacher 1", "student 0", "student 69"]
    assert [f"{float(row['return']):.1f}" for row in log] == [line.split()[3] for line in lines[:4]]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_lines_and_other_seed_others(whole_run, tmp_path, capsys):
    again = inside(capsys, *TINY, "--out", tmp_path / "again")        # another process than the first
    other = inside(capsys, *TINY, "--out", tmp_path / "other", "--seed", 1)
    assert lines_without_time(again) == lines_without_time(whole_run[1].stdout)
    assert not set(lines_without_time(other)[:4]) & set(lines_without_time(again)[:4])


def test_the_saved_dataset_gives_the_same_student(whole_run, tmp_path, capsys):
    lines = inside(capsys, "--dataset", whole_run[0] / "dataset.npz", "--steps", 70, "--out", tmp_path / "student").splitlines()
    assert lines[:2] == [line for line in whole_run[1].stdout.splitlines() if line.startswith("student")]
    assert not any(line.startswith("the teacher") for line in lines)


def test_last_and_first_choose_the_episodes(whole_run, tmp_path, capsys):
    whole = np.load(whole_run[0] / "dataset.npz")["observations"]
    inside(capsys, "--dataset", whole_run[0] / "dataset.npz", "--steps", 1, "--first", 1, "--out", tmp_path / "first")
    np.testing.assert_array_equal(np.load(tmp_path / "first" / "dataset.npz")["observations"], whole[:200])
    inside(capsys, *TINY, "--last", 1, "--student", "sac", "--out", tmp_path / "last")
    np.testing.assert_array_equal(np.load(tmp_path / "last" / "dataset.npz")["observations"], whole[200:])


def test_gymnasium_in_gyms_place(whole_run, tmp_path):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    done = command(*TINY, "--out", tmp_path / "run", before="import sys, gymnasium; sys.modules['gym'] = gymnasium")
    assert (done.returncode, done.stderr) == (0, "")
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES
    assert lines_without_time(done.stdout) == lines_without_time(whole_run[1].stdout)     # the same Pendulum, the same numbers


def test_without_the_optional_packages(whole_run, tmp_path):
    """One plain line of notice for each, and the same numbers."""
    done = command(*TINY, "--out", tmp_path / "run", before="import sys; sys.modules['tqdm'] = sys.modules['matplotlib'] = None")
    assert done.returncode == 0
    notes = ["note: tqdm is not installed: no progress bars", "note: matplotlib is not installed: no curves.png"]
    assert done.stderr.splitlines() == notes
    assert lines_without_time(done.stdout) == lines_without_time(whole_run[1].stdout)
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES - {"curves.png"}


def test_play_prints_the_return_and_writes_the_animation(whole_run, capsys):
    from PIL import Image

    for name in ("teacher.pt", "student.pt", "checkpoint.pt"):
        gif = whole_run[0] / name.replace(".pt", ".gif")
        lines = inside(capsys, "--play", whole_run[0] / name, "--seed", 3).splitlines()
        assert -2000 < float(lines[0].removeprefix("return ")) < 0
        assert lines[1:] == [f"animation: {gif}"]
        assert Image.open(gif).n_frames > 100               # frames that do not differ are merged
        gif.unlink()


def test_play_without_pygame(whole_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    ours.optional.cache_clear()
    assert ours.main(["--play", str(whole_run[0] / "student.pt")]) == 0
    ours.optional.cache_clear()
    captured = capsys.readouterr()
    assert captured.out.startswith("return -") and captured.out.count("\n") == 1
    assert captured.err == "note: pygame is not installed: no animation\n"
    assert not list(whole_run[0].glob("*.gif"))


def test_default_folders_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ours.parse_options(["--student", "sac", "--seed", "4"])
    assert [str(ours.new_folder(options)) for _ in range(3)] == [f"runs/sac-seed4-{k}" for k in (1, 2, 3)]


def test_help_explains_every_option_and_its_default():
    text = subprocess.run([sys.executable, "cql_pendulum.py", "--help"], cwd=TOP, capture_output=True, text=True).stdout
    for option in "seed epochs steps student weight as-printed last first dataset out resume play".split():
        entry = text.split(f"  --{option} ")[1].split("\n  --")[0]
        assert "(default: " in entry, option


def test_readme_shows_the_real_options_and_links_to_the_errata():
    readme = (TOP / "README.md").read_text()
    done = subprocess.run([sys.executable, "cql_pendulum.py", "--help"], cwd=TOP, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "120"})
    assert done.stdout[done.stdout.index("options:"):].rstrip() in readme
    source = (TOP / "cql_pendulum.py").read_text().splitlines()
    links = dict(re.findall(r"\[(\w+)\]\(cql_pendulum\.py#L(\d+)\)", readme))
    assert links.keys() == ours.ERRATA.keys()
    for name, line in links.items():
        assert f'"{name}" in self.as_printed' in source[int(line) - 1]
        assert any("Page:" in above for above in source[int(line) - 3:int(line)])


def test_saved_agents_come_back_whole(tmp_path):
    agent = ours.CQL(as_printed={"sign"}, weight=0.5)
    data = ours.Data()
    data.update_data(agent)
    agent.train(*data.get_sample())
    ours.save_agent(tmp_path / "agent.pt", agent)
    other, _ = ours.load_agent(tmp_path / "agent.pt")
    assert (type(other), other.as_printed, other.weight) == (ours.CQL, {"sign"}, 0.5)
    batch = data.get_sample()
    for each in (agent, other):
        torch.manual_seed(5)
        each.train(*batch)
    for mine, theirs in zip(ours.agent_tensors(agent).values(), ours.agent_tensors(other).values()):
        assert torch.equal(mine, theirs)
    assert torch.equal(agent.values(*batch[:2]), other.values(*batch[:2]))


def test_saved_datasets_come_back_whole(tmp_path):
    data = ours.Data()
    data.update_data(ours.SAC())
    data.rows[7, 8] = 1
    ours.save_dataset(data, tmp_path / "data.npz")
    other = ours.load_dataset(tmp_path / "data.npz")
    assert other.frozen
    np.testing.assert_array_equal(other.rows, data.rows)
