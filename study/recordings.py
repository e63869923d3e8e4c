"""Data that the program's options do not choose, as files "study/kept/<name>-<seed>.npz".

A replay buffer has the torques that its teacher drew while it learned. Somebody who records a
policy of their own has other data: the trained teacher with or without its noise, or a controller
written by hand. `record` plays 20 episodes of each kind, from the same 20 starts for all kinds of a
seed, in the program's own `env` and with the program's own Data.
"""
import argparse
import math
import os
import pathlib
import sys

import gym
import numpy as np
import torch

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import cql_pendulum as ours  # noqa: E402
import measure  # noqa: E402

EPISODES = 20
NEAR = 0.9                  # cosine of 26 degrees; 2 N m hold the pendulum up to 24 from upright
STARTS = 2                  # a purpose beside 0, the tests' starts, and 1, the final episodes'
NAMES = {                   # who plays; the noise's standard deviation and the torque's limit, N m
    "20 drawn": ("drawn", 0, 2),
    "20 mean": ("mean", 0, 2),
    "20 mean + 0.1": ("mean", 0.1, 2),
    "20 mean + 0.25": ("mean", 0.25, 2),
    "20 mean + 0.5": ("mean", 0.5, 2),
    "20 mean + 1": ("mean", 1, 2),
    "controller": ("controller", 0, 2),
    "controller + 0.5": ("controller", 0.5, 2),
    "controller + 1": ("controller", 1, 2),
    "controller 1.8": ("controller", 0, 1.8),
}


def controller(state):
    """A torque in N m, not yet limited, for a state, [3]: swings up by energy, holds by feedback.
    A policy without chance and without learning."""
    cos, sin, speed = state
    if cos > NEAR:
        return -(10 * math.atan2(sin, cos) + 2 * speed)
    # Half the speed squared and 15 cos(angle) are the kinetic and the potential energy per moment
    # of inertia (1/3 kg m^2): a free pendulum with 15 in all comes to rest upright.
    lacking = 15 - (speed ** 2 / 2 + 15 * cos)
    return math.copysign(2, speed * lacking)


def record(name, seed, teacher=None):
    """20 episodes, a Data of 4,000 rows; KeyError for a name that is not in NAMES. The teacher, an
    agent after its training, is needed for the names that begin with 20. Seeds torch and `env`."""
    player, noise, limit = NAMES[name]
    choose = controller
    if player == "drawn":
        choose = teacher.get_action
    elif player == "mean":
        choose = lambda state: measure.mean_torque(teacher, state[None])[0]     # noqa: E731
    start, chance = measure.seeds_of(seed, STARTS, 2)
    ours.env.unwrapped.np_random, _ = gym.utils.seeding.np_random(start)
    torch.manual_seed(chance)
    rng = np.random.default_rng(chance)

    def get_action(state):
        return float(np.clip(choose(state) + noise * rng.normal(), -limit, limit))

    data = ours.Data()
    for _ in range(EPISODES):
        data.update_data(argparse.Namespace(get_action=get_action))
    return data


def write(file, name, seed, folder=None):
    """Make a file of data: a recording; "2,000 rows" drawn from all of the teacher's; or the last
    10, changed for an intervention. folder: the run in which the teacher was trained."""
    teacher = folder and ours.load_agent(folder / "teacher.pt")
    if name in NAMES:
        data = record(name, seed, teacher)
    else:
        data = ours.load_dataset(folder / "dataset.npz")
        rows = data.rows
        if name == "2,000 rows":
            chosen = np.random.default_rng(seed).choice(len(rows), 2000, replace=False)
            data.rows = rows[np.sort(chosen)]
        else:
            data.rows = measure.changed_rows(name, rows[-10 * ours.EPISODE:], seed, teacher)
    unfinished = file.with_name(f"{os.getpid()} {file.name}")   # another process may make it, too
    ours.save_dataset(unfinished, data)
    os.replace(unfinished, file)
