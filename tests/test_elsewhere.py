"""dataset.npz in other tools, and their datasets here. Copy what you need: each function stands on
its own, with the names of the files it reads and writes. Rewards are Pendulum's, torques are in
N m, the time limit is in `timeouts` and never in `terminals`."""
import re

import h5py
import numpy as np
import pytest
import torch

import cql_pendulum as ours
from conftest import TOP, filled

NAMES = ["observations", "actions", "rewards", "next_observations", "terminals", "timeouts"]


def write_hdf5(npz, hdf5):
    """A file like D4RL's."""
    with np.load(npz) as data, h5py.File(hdf5, "w") as file:
        file.update(data)


def read_hdf5(hdf5, npz):
    """(Without next_observations: take the next row's, and drop each episode's last row.)"""
    with h5py.File(hdf5) as file:
        np.savez(npz, **{name: file[name][()] for name in NAMES})


def write_minari(npz, name):
    """A local Minari dataset, such as "pendulum/cql-v0"; rows must be whole episodes in order."""
    import gymnasium
    import minari
    data, buffers, begin = np.load(npz), [], 0
    for end in np.flatnonzero(data["terminals"] | data["timeouts"]) + 1:
        last = data["next_observations"][end - 1:end]
        buffers.append(minari.data_collector.EpisodeBuffer(
            id=len(buffers), observations=np.concatenate([data["observations"][begin:end], last]),
            actions=data["actions"][begin:end], rewards=data["rewards"][begin:end],
            terminations=data["terminals"][begin:end], truncations=data["timeouts"][begin:end]))
        begin = end
    world = gymnasium.make("Pendulum-v1")
    minari.create_dataset_from_buffers(name, buffers, observation_space=world.observation_space,
                                       action_space=world.action_space)


def read_minari(name, npz):
    import minari
    parts = []
    for episode in minari.load_dataset(name):
        parts.append([episode.observations[:-1], episode.actions,
                      episode.rewards.astype(np.float32), episode.observations[1:],
                      episode.terminations, episode.truncations])
    np.savez(npz, **dict(zip(NAMES, map(np.concatenate, zip(*parts)))))


def read_d3rlpy(dataset, npz):
    """From a d3rlpy dataset. It keeps no state after an episode's last step, so that an episode
    which the time limit cut loses that step."""
    parts = []
    for episode in dataset.episodes:
        n = len(episode) - (not episode.terminated)
        next_states = np.concatenate([episode.observations[1:], episode.observations[-1:]])
        end = np.arange(1, n + 1) == n
        parts.append([episode.observations[:n], episode.actions[:n], episode.rewards[:n, 0],
                      next_states[:n], end & episode.terminated, end & (not episode.terminated)])
    np.savez(npz, **dict(zip(NAMES, map(np.concatenate, zip(*parts)))))


def executed(beginning, name):
    """What the first python block of this file that begins so has made."""
    blocks = re.findall(rf"```python\n({beginning}.*?)```", (TOP / name).read_text(), re.DOTALL)
    scope = {}
    exec(blocks[0], scope)
    return scope


def test_readmes_own_agent_records_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = executed("import cql_pendulum as c", "README.md")
    file, = tmp_path.iterdir()
    rows = ours.load_dataset(file).rows
    np.testing.assert_array_equal(rows, scope["data"].rows)
    assert rows[:, 4].reshape(20, 200).sum(axis=1).mean() > -250        # it swings up


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset.npz of three episodes, in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    data = filled(ours.Data(), 3)
    ours.save_dataset("dataset.npz", data)
    return data


@pytest.mark.filterwarnings("ignore")
def test_hdf5_and_minari_there_and_back_without_loss(dataset):
    write_hdf5("dataset.npz", "dataset.hdf5")
    read_hdf5("dataset.hdf5", "back.npz")
    np.testing.assert_array_equal(ours.load_dataset("back.npz").rows, dataset.rows)
    write_minari("back.npz", "pendulum/cql-v0")
    read_minari("pendulum/cql-v0", "again.npz")
    np.testing.assert_array_equal(ours.load_dataset("again.npz").rows, dataset.rows)


@pytest.mark.filterwarnings("ignore")
def test_readmes_lines_train_d3rlpys_cql_on_it(dataset):
    """Exactly study/README's lines; and what d3rlpy made of the data, read back."""
    scope = executed("import d3rlpy", "study/README.md")
    episodes = scope["dataset"].episodes
    assert [(len(episode), episode.terminated) for episode in episodes] == [(200, False)] * 3
    # the scaler maps torques to [-1, 1], and the trained policy's actions come back as torques
    scaled = scope["torques"].transform(torch.tensor([[-2.0], [0.0], [2.0]]))
    assert scaled.flatten().tolist() == [-1, 0, 1]
    assert scope["cql"].grad_step == 100
    assert np.abs(scope["cql"].predict(dataset.rows[:, :3])).max() <= 2
    read_d3rlpy(scope["dataset"], "back.npz")
    kept = np.delete(dataset.rows, [199, 399, 599], axis=0)         # each episode's last step
    back = ours.load_dataset("back.npz").rows
    np.testing.assert_array_equal(back[:, :9], kept[:, :9])
    assert np.flatnonzero(back[:, 9]).tolist() == [198, 397, 596]
