#!/usr/bin/env bash
# envpool 1.2.5, "Pendulum-v1", and Gymnasium 1.4.0, whose documentation says of its Pendulum-v1:
# "Simplify the math equations, no difference in behavior" from v0. The speed is clipped at 8; the
# angle moves by 0.05 times the speed, and the question is whether before or after the clip. All
# three are pumped up with the torque 2 sign(speed), and each step is compared with both.
# Guess: Gymnasium's v1, envpool's v1 and gym 0.20's Pendulum-v0 do the same.
# Truth: Gymnasium moves the angle with the clipped speed; gym's v0 and envpool's v1 with the one
#   before it is clipped. envpool's Pendulum-v1 is v0. At full speed the angle is off by up to
#   0.05 * 0.05 * (15 + 6) rad = 3 degrees a step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    envpool==1.2.5 gymnasium==1.4.0 numpy==2.4.6 setuptools==65.5.0 wheel==0.38.4
# this gym is older than builds in isolation
"$folder/bin/pip" install --quiet --no-compile --no-build-isolation gym==0.20.0
"$folder/bin/python" -W ignore - <<'END'
from importlib.metadata import version

import envpool
import gym
import gymnasium
import numpy as np

assert (version("envpool"), version("gymnasium"), version("gym")) == ("1.2.5", "1.4.0", "0.20.0")


def gym_v0():
    env = gym.make("Pendulum-v0")
    env.seed(0)
    return env.reset(), lambda torque: env.step(np.array([torque], np.float32))[0]


def gymnasium_v1():
    env = gymnasium.make("Pendulum-v1")
    return env.reset(seed=0)[0], lambda torque: env.step(np.array([torque], np.float32))[0]


def envpool_v1():
    env = envpool.make("Pendulum-v1", env_type="gymnasium", num_envs=1, seed=0)
    return env.reset()[0][0], lambda torque: env.step(np.array([[torque]], np.float32))[0][0]


def turned(state, next_state):
    """The angle from one state to the next, in rad."""
    difference = np.arctan2(next_state[1], next_state[0]) - np.arctan2(state[1], state[0])
    return (difference + np.pi) % (2 * np.pi) - np.pi


print("largest error of the next angle, rad, where the speed was clipped:")
print("                                  steps   clip, then move   move, then clip")
for name, make, first in (
        (f"gym {version('gym')} Pendulum-v0", gym_v0, "move"),
        (f"envpool {version('envpool')} Pendulum-v1", envpool_v1, "move"),
        (f"gymnasium {version('gymnasium')} Pendulum-v1", gymnasium_v1, "clip")):
    state, step = make()
    errors = []
    for _ in range(199):                        # one step less than an episode
        torque = 2.0 if state[2] >= 0 else -2.0
        speed = state[2] + (15 * state[1] + 3 * torque) * 0.05    # g 10, mass 1, length 1
        next_state = step(torque)
        assert abs(next_state[2] - np.clip(speed, -8, 8)) < 1e-4
        if abs(speed) > 8.01:
            moved = turned(state, next_state)
            errors.append((abs(moved - 0.05 * np.clip(speed, -8, 8)), abs(moved - 0.05 * speed)))
        state = next_state
    clip_first, move_first = np.max(errors, axis=0)
    print(f"{name:32s}  {len(errors):5d}   {clip_first:15.5f}   {move_first:15.5f}")
    assert len(errors) > 10
    right, wrong = (move_first, clip_first) if first == "move" else (clip_first, move_first)
    assert right < 1e-5 < 1e-2 < wrong
END
# Output:
# largest error of the next angle, rad, where the speed was clipped:
#                                   steps   clip, then move   move, then clip
# gym 0.20.0 Pendulum-v0               57           0.05247           0.00000
# envpool 1.2.5 Pendulum-v1            73           0.05248           0.00000
# gymnasium 1.4.0 Pendulum-v1          77           0.00000           0.05249
