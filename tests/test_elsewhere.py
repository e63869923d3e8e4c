"""README, "Use the data elsewhere": exactly its lines, run on a real dataset, and read back."""
import re

import numpy as np
import pytest
import torch

import cql_pendulum as ours
from test_program import TOP, played

SECTION = (TOP / "README.md").read_text().split("## Use the data elsewhere")[1].split("\n## ")[0]
BLOCKS = {re.search(r"import (d3rlpy|h5py|minari)", block)[1]: block
          for block in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)}


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset.npz of three episodes in the folder where the README's lines run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    data = played(3)
    ours.save_dataset(data, tmp_path / "dataset.npz")
    return data


def run_block(package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "minari":
        pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    scope = {}
    exec(BLOCKS[package], scope)
    return scope


@pytest.mark.parametrize("package, file", [("h5py", "from_hdf5.npz"),
                                           ("minari", "from_minari.npz")])
@pytest.mark.filterwarnings("ignore")
def test_there_and_back_without_loss(package, file, dataset):
    run_block(package)
    np.testing.assert_array_equal(ours.load_dataset(file).rows, dataset.rows)


def test_hdf5_has_d4rls_names(dataset):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    run_block("h5py")
    with h5py.File("dataset.hdf5") as file:
        assert {name: array.shape for name, array in file.items()} == {
            "observations": (600, 3), "actions": (600, 1), "rewards": (600,),
            "next_observations": (600, 3), "terminals": (600,), "timeouts": (600,)}


@pytest.mark.filterwarnings("ignore")
def test_d3rlpy_trains_on_it_and_gives_it_back(dataset):
    scope = run_block("d3rlpy")
    episodes = scope["dataset"].episodes
    assert [(len(episode), episode.terminated) for episode in episodes] == [(200, False)] * 3
    np.testing.assert_allclose([episode.compute_return() for episode in episodes],
                               dataset.rows[:, 4].reshape(3, 200).sum(axis=1), rtol=1e-5)
    # the scaler maps torques to [-1, 1], and the trained policy's actions come back as torques
    scaled = scope["torques"].transform(torch.tensor([[-2.0], [0.0], [2.0]]))
    assert scaled.flatten().tolist() == [-1, 0, 1]
    assert scope["cql"].grad_step == 100
    assert np.abs(scope["cql"].predict(dataset.rows[:, :3])).max() <= 2
    # d3rlpy keeps no state after an episode's last step: that one row is gone, the others are there
    back = ours.load_dataset("from_d3rlpy.npz")
    kept = np.delete(dataset.rows, [199, 399, 599], axis=0)
    np.testing.assert_array_equal(back.rows[:, :9], kept[:, :9])
    assert np.flatnonzero(back.rows[:, 9]).tolist() == [198, 397, 596]
