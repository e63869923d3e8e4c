"""Other good data than a SAC teacher's replay buffer: recordings of finished policies.

A replay buffer has the torques that its teacher drew while it learned. Somebody who records a
policy of their own has other data: the trained teacher with or without its noise, or a controller
written by hand. `make` plays 20 episodes of each kind, from the same 20 starts for all kinds of a
seed, in the program's own `env` and with the program's own Data.
"""
import math
import pathlib
import sys

import gym
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import cql_pendulum as ours  # noqa: E402

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


class Controller:
    """Swings up by energy and holds by feedback: a policy without chance and without learning."""

    def get_action(self, state):
        """A torque in N m, not yet limited, for a state, [3]."""
        cos, sin, speed = state
        if cos > NEAR:
            return -(10 * math.atan2(sin, cos) + 2 * speed)
        # Half the speed squared and 15 cos(angle) are the kinetic and the potential energy per
        # moment of inertia (1/3 kg m^2): a free pendulum with 15 in all comes to rest upright.
        lacking = 15 - (speed ** 2 / 2 + 15 * cos)
        return math.copysign(2, speed * lacking)


class Mean:
    """A teacher's policy without its noise."""

    def __init__(self, teacher):
        self.teacher = teacher

    @torch.no_grad()
    def get_action(self, state):
        """The torque at the Gaussian's mean, 2 tanh(mu) N m, for a state, [3]."""
        state = torch.from_numpy(np.asarray(state, np.float32).reshape(1, 3))
        return self.teacher.model_action.mean_action(state).item()


class Noisy:
    """Another agent's torques plus Gaussian noise, clipped."""

    def __init__(self, agent, noise, limit, generator):
        self.agent, self.noise, self.limit, self.generator = agent, noise, limit, generator

    def get_action(self, state):
        """A torque in N m, from -limit to limit, for a state, [3]."""
        torque = self.agent.get_action(state) + self.noise * self.generator.normal()
        return float(np.clip(torque, -self.limit, self.limit))


def make(name, seed, teacher=None):
    """20 episodes, a Data of 4,000 rows; KeyError for a name that is not in NAMES. The teacher, an
    agent after its training, is needed for the names that begin with 20. Seeds torch and `env`."""
    player, noise, limit = NAMES[name]
    agent = {"drawn": teacher, "mean": Mean(teacher), "controller": Controller()}[player]
    start, chance = ours.Run(None, seed).starts(STARTS, 2)
    ours.env.unwrapped.np_random, _ = gym.utils.seeding.np_random(start)
    torch.manual_seed(chance)
    agent = Noisy(agent, noise, limit, np.random.default_rng(chance))
    data = ours.Data()
    for _ in range(EPISODES):
        data.update_data(agent)
    return data
