"""Interruption, bad input, full disks, damaged and hostile files."""
import csv
import io
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cql_pendulum as ours
from test_formulas import batch
from test_program import TINY

# ---- interruption ----

SMALL = ["--epochs", "5", "--steps", "300"]


def start(arguments, out, before=None):
    """The program in a forked process, which has its imports behind it; its output goes to files beside `out`."""
    def child():
        for name, stream in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        if before:
            before()
        status = ours.main(arguments)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def finish(arguments, out, before=None):
    process = start(arguments, out, before)
    process.join()
    return process.exitcode


def stage_of(out):
    try:
        return torch.load(out / "checkpoint.pt", weights_only=True)["stage"]
    except FileNotFoundError:
        return None


def log_without_seconds(out):
    with open(out / "log.csv") as file:
        return [line[:-1] for line in csv.reader(file)]


def assert_whole(out):
    """Every file that is there can be read to its end."""
    for file in out.iterdir():
        if file.suffix == ".pt":
            ours.load_agent(file)
        elif file.suffix == ".npz":
            ours.load_dataset(file)
        elif file.suffix == ".csv":
            assert file.read_text().endswith("\n") and len({len(line) for line in log_without_seconds(out)}) == 1


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    ours.CQL().train(*batch())                     # imports what recording an update needs, for the forked processes
    assert finish([*SMALL, "--out", str(out)], out) == 0
    return out


def test_ten_interruptions_at_random_moments_change_nothing(uninterrupted, tmp_path):
    """One run stopped by SIGKILL, SIGINT and SIGTERM, five times in each stage, each time gone on with, and never stopped."""
    rng, out, stopped = random.Random(int(os.environ.get("CHAIN", "0"))), tmp_path / "run", []
    arguments = [*SMALL, "--out", str(out)]
    for k in range(10):
        signum = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL][k % 3]
        process = start(arguments, out)
        while not stage_of(out) or k >= 5 and stage_of(out) != "student":
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        running = process.is_alive()
        os.kill(process.pid, signum)
        begun = time.monotonic()
        process.join()
        if running and signum != signal.SIGKILL:
            assert time.monotonic() - begun < 1
            assert process.exitcode == 128 + signum
            message = (tmp_path / "run.stderr").read_text()
            assert message.count("\n") == 1 and message.endswith(f"python cql_pendulum.py --resume {out}\n")
            assert not list(out.glob("*.part"))
        assert_whole(out)
        stopped.append((running, stage_of(out)))
        arguments = ["--resume", str(out)]
    assert {(True, "teacher"), (True, "student")} <= set(stopped)
    assert finish(arguments, out) == 0
    assert log_without_seconds(out) == log_without_seconds(uninterrupted)
    for name in ("teacher.pt", "student.pt"):
        mine, theirs = (torch.load(folder / name, weights_only=True)["tensors"] for folder in (out, uninterrupted))
        assert all(torch.equal(mine[tensor], theirs[tensor]) for tensor in theirs)
    assert (out / "dataset.npz").read_bytes() == (uninterrupted / "dataset.npz").read_bytes()


def test_a_finished_run_resumes_to_the_same_table(uninterrupted, tmp_path):
    table = (uninterrupted.parent / "run.stdout").read_text().split("\n\n")[1].split("minutes")[0]
    assert finish(["--resume", str(uninterrupted)], tmp_path / "again") == 0
    assert table in (tmp_path / "again.stdout").read_text()


def test_a_full_disk_while_saving_leaves_the_earlier_files(uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(["--epochs", "300", "--out", str(out)], out)
    while not (out / "log.csv").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "checkpoint.pt" in before

    def no_more_than_100_kilobytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(["--resume", str(out)], tmp_path / "full", no_more_than_100_kilobytes)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    message = (tmp_path / "full.stderr").read_text()
    assert process.exitcode == 2
    assert message.count("\n") == 1 and "checkpoint.pt: cannot be written (File too large)" in message
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_diverged_run_stops_at_the_next_test_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    train, updates = ours.SAC.train, []

    def poisoned(self, state, action, reward, next_state, over):
        updates.append(1)
        train(self, state, action, reward * (math_nan if len(updates) == 450 else 1), next_state, over)

    math_nan = float("nan")
    monkeypatch.setattr(ours.SAC, "train", poisoned)
    assert ours.main(["--epochs", "1", "--steps", "300", "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("cql_pendulum.py: student update 300: ") and "NaN or infinite" in captured.err
    agent, saved = ours.load_agent(tmp_path / "run" / "checkpoint.pt")
    assert (saved["stage"], saved["step"]) == ("student", 1)
    with pytest.raises(ours.UserError, match="NaN or infinite"), ours.Run(tmp_path / "run") as run:     # nor does Ctrl-C save it
        run.stage, run.agent = "student", agent
        agent.alpha.data.fill_(math_nan)
        run.save()
    agent, _ = ours.load_agent(tmp_path / "run" / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in ours.agent_tensors(agent).values())


# ---- bad options ----

def refused(arguments, capsys):
    """The one line on stderr of a call that must end with status 2."""
    try:
        status = ours.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), arguments
    assert captured.err.count("\n") == 1 and captured.err.startswith("cql_pendulum.py: "), captured.err
    return captured.err


@pytest.mark.parametrize("arguments, words", [
    (["--epochs", "0"], "--epochs: '0': give a whole number of at least 1"),
    (["--epochs", "-3"], "--epochs"),
    (["--steps", "1.5"], "--steps"),
    (["--steps", "many"], "--steps"),
    (["--seed", "-1"], "--seed"),
    (["--weight", "0"], "for no penalty, --student sac"),
    (["--weight", "nan"], "--weight"),
    (["--weight", "inf"], "--weight"),
    (["--last", "0"], "--last"),
    (["--first", "-1"], "--first"),
    (["--last", "11", "--epochs", "10"], "--last: the teacher plays 10 episodes"),
    (["--last", "1", "--first", "1"], "exclude each other"),
    (["--student", "dqn"], "--student"),
    (["--as-printed", "sing"], "no erratum is called sing; there are jacobian, sign, range, timeout, epsilon"),
    (["--resume", "runs/x", "--steps", "5"], "--resume has no use for --steps"),
    (["--play", "x.pt", "--epochs", "5"], "--play has no use for --epochs"),
    (["--setps", "5"], "--setps"),
    (["--seed"], "--seed"),
    (["extra"], "extra"),
])
def test_bad_options(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_bad_out(capsys, tmp_path, uninterrupted):
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused([*TINY, "--out", tmp_path / "file"], capsys)
    assert "--out" in refused([*TINY, "--out", tmp_path / "file" / "below"], capsys)
    assert "--out" in refused([*TINY, "--out", "/proc/none"], capsys)
    before = {file.name: file.read_bytes() for file in uninterrupted.iterdir()}
    assert "has files in it" in refused([*TINY, "--out", uninterrupted], capsys)
    assert {file.name: file.read_bytes() for file in uninterrupted.iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"


# ---- bad files ----

class Planted:
    """A pickle that would make a file if anybody unpickled it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def rows(n=64):
    rng = np.random.default_rng(0)
    return {"observations": rng.normal(size=(n, 3)).astype(np.float32), "actions": rng.uniform(-2, 2, (n, 1)).astype(np.float32),
            "rewards": rng.normal(size=n).astype(np.float32), "next_observations": rng.normal(size=(n, 3)).astype(np.float32),
            "terminals": np.zeros(n, bool), "timeouts": np.arange(n) == n - 1}


def changed(name, change):
    arrays = rows()
    arrays[name] = change(arrays[name])
    return arrays


def with_value(value):
    def change(array):
        array.flat[5] = value
        return array
    return change


BAD_DATASETS = {
    "missing keys": ({name: array for name, array in rows().items() if name != "rewards"}, "lacks rewards"),
    "wrong width": (changed("observations", lambda x: x[:, :2]), "observations is float32 [64, 2]"),
    "flat actions": (changed("actions", lambda x: x[:, 0]), "actions is float32 [64]"),
    "integers": (changed("actions", lambda x: x.astype(int)), "actions is int64"),
    "text": (changed("rewards", lambda x: x.astype(str)), "rewards is <U"),
    "complex": (changed("rewards", lambda x: x.astype(complex)), "rewards is complex"),
    "numbers for flags": (changed("terminals", lambda x: x.astype(np.float32)), "terminals is float32"),
    "unequal lengths": (changed("next_observations", lambda x: x[:-1]), "next_observations is float32 [63, 3]"),
    "nan": (changed("rewards", with_value(np.nan)), "rewards holds NaN"),
    "infinite": (changed("observations", with_value(-np.inf)), "observations holds NaN or infinite"),
    "too large for float32": (changed("rewards", lambda x: x.astype(np.float64) * 1e300), "rewards holds NaN or infinite"),
    "torque out of range": (changed("actions", with_value(2.5)), "outside [-2, 2]"),
    "too few rows": (rows(63), "63 rows"),
    "no rows": (rows(0), "0 rows"),
    "scalars": ({name: array[0] for name, array in rows().items()}, "observations is"),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_bad_datasets(case, capsys, tmp_path):
    arrays, words = BAD_DATASETS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    message = refused(["--dataset", tmp_path / "data.npz", "--out", tmp_path / "out"], capsys)
    assert words in message and "data.npz" in message
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_more_episodes_than_the_dataset_has(capsys, tmp_path):
    np.savez(tmp_path / "data.npz", **rows())
    said = refused(["--dataset", tmp_path / "data.npz", "--last", 2, "--out", tmp_path / "out"], capsys)
    assert "--last 2: the data has 1 episodes" in said
    assert not (tmp_path / "out").exists()


def bad_files(folder, good):
    """Files that are neither a dataset nor a checkpoint."""
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("state,action\n1,2\n")
    (folder / "truncated").write_bytes(good.read_bytes()[:-1000])
    (folder / "a folder").mkdir()
    np.save(folder / "array.npy", np.zeros(3))
    with zipfile.ZipFile(folder / "zip", "w") as file:
        file.writestr("hello", "world")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    return ["missing", "missing/below", "empty", "text", "truncated", "a folder", "array.npy", "zip", "other.pt", "list.pt"]


@pytest.mark.parametrize("option", ["--dataset", "--play"])
def test_files_that_are_something_else(option, capsys, tmp_path, uninterrupted):
    for name in bad_files(tmp_path, uninterrupted / ("dataset.npz" if option == "--dataset" else "student.pt")):
        before = sorted(tmp_path.iterdir())
        out = [] if option == "--play" else ["--out", tmp_path / "out"]
        assert str(tmp_path / name) in refused([option, tmp_path / name, *out], capsys)
        assert sorted(tmp_path.iterdir()) == before


def test_resume_of_something_else(capsys, tmp_path, uninterrupted):
    assert "checkpoint.pt" in refused(["--resume", tmp_path / "missing"], capsys)
    assert "checkpoint.pt" in refused(["--resume", uninterrupted / "log.csv"], capsys)
    content = (uninterrupted / "checkpoint.pt").read_bytes()
    agent = (uninterrupted / "student.pt").read_bytes()
    for name, damaged in (("empty", b""), ("half", content[:len(content) // 2]), ("agent", agent)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes(damaged)
        assert f"{tmp_path / name / 'checkpoint.pt'}: damaged, or not" in refused(["--resume", tmp_path / name], capsys)
        assert [file.name for file in (tmp_path / name).iterdir()] == ["checkpoint.pt"]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "checkpoint.pt").write_bytes(content)
    assert "teacher.pt: No such file" in refused(["--resume", tmp_path / "alone"], capsys)


def test_planted_code_never_runs(capsys, tmp_path, uninterrupted):
    witness = tmp_path / "witness"
    arrays = rows()
    arrays["observations"] = np.array([Planted(witness)], dtype=object)
    np.savez(tmp_path / "data.npz", **arrays)
    refused(["--dataset", tmp_path / "data.npz", "--out", tmp_path / "out"], capsys)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Planted(witness)))
    refused(["--dataset", tmp_path / "plain.npz", "--out", tmp_path / "out"], capsys)
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"log": Planted(witness)}, tmp_path / "checkpoint.pt")
    refused(["--play", tmp_path / "checkpoint.pt"], capsys)
    refused(["--resume", tmp_path], capsys)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Planted(witness)))
    refused(["--play", tmp_path / "plain.pt"], capsys)
    assert not witness.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)     # the plant is alive: it would have run
    assert witness.exists()


@pytest.mark.parametrize("name, value", [
    ("class", 7), ("class", "Data"), ("as_printed", ["sing"]), ("as_printed", 3), ("weight", "much"), ("weight", []),
    ("tensors", {}), ("tensors", None),
])
def test_checkpoints_with_other_content(name, value, capsys, tmp_path, uninterrupted):
    saved = torch.load(uninterrupted / "student.pt", weights_only=True)
    torch.save(saved | {name: value}, tmp_path / "bad.pt")
    assert "bad.pt" in refused(["--play", tmp_path / "bad.pt"], capsys)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.double(), lambda x: x * float("nan"), lambda x: x.tolist()])
def test_checkpoints_with_other_tensors(change, capsys, tmp_path, uninterrupted):
    saved = torch.load(uninterrupted / "student.pt", weights_only=True)
    saved["tensors"]["model_value2.sequential.2.weight"] = change(saved["tensors"]["model_value2.sequential.2.weight"])
    torch.save(saved, tmp_path / "bad.pt")
    assert "bad.pt" in refused(["--play", tmp_path / "bad.pt"], capsys)


# ---- fuzzing: FUZZ=10000 python -m pytest tests/test_trust.py -k fuzz ----

fuzz = settings(max_examples=int(os.environ.get("FUZZ", "100")), deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
edits = st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["flip", "cut", "drop", "repeat"]),
                           st.binary(min_size=1, max_size=8)), max_size=6)


def edited(content, changes):
    content = bytearray(content)
    for where, how, data in changes:
        at = where * len(content) // 1000
        if how == "flip":
            content[at:at + len(data)] = data
        elif how == "cut":
            del content[at:]
        elif how == "drop":
            del content[at:at + len(data)]
        else:
            content[at:at] = content[at:at + 100]
    return bytes(content)


@pytest.fixture(scope="module")
def small_dataset():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **rows())
    return buffer.getvalue()


@fuzz
@given(changes=edits, raw=st.none() | st.binary(max_size=200))
def test_fuzz_datasets(changes, raw, tmp_path_factory, small_dataset):
    file = tmp_path_factory.getbasetemp() / "fuzz.npz"
    file.write_bytes(edited(small_dataset, changes) if raw is None else raw)
    try:
        data = ours.load_dataset(file)
    except ours.UserError as error:
        assert "fuzz.npz" in str(error) and "\n" not in str(error)
    else:
        assert data.rows.shape[1] == 10 and np.isfinite(data.rows).all()


@fuzz
@given(changes=edits, raw=st.none() | st.binary(max_size=200))
def test_fuzz_checkpoints(changes, raw, tmp_path_factory, uninterrupted):
    file = tmp_path_factory.getbasetemp() / "fuzz.pt"
    file.write_bytes(edited((uninterrupted / "student.pt").read_bytes(), changes) if raw is None else raw)
    try:
        agent, _ = ours.load_agent(file)
    except ours.UserError as error:
        assert "fuzz.pt" in str(error) and "\n" not in str(error)
    else:
        assert all(tensor.isfinite().all() for tensor in ours.agent_tensors(agent).values())
