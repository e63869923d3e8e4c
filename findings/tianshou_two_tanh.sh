#!/usr/bin/env bash
# tianshou 2.0.1, ContinuousActorProbabilistic: "used primarily in SAC, PPO"; the option `unbounded`
# (False by default) is "whether to apply tanh activation on final logits". SACPolicy takes
# the tanh of what it is given, and `map_action` stretches (-1, 1) to Pendulum's (-2, 2) N m.
# Guess: by default there is the policy's tanh alone; a mean that has grown large is 2 N m.
# Truth: it is 1.523 N m, 2 tanh(1), since the option does the reverse: by default the actor's mean
#   is a tanh already, and SACPolicy takes another. However long it learns, in a test the policy has
#   no larger torque. `unbounded=True` gives 2.
# Page's error: jacobian (it squashes twice, too, there in the density alone).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 tianshou==2.0.1
"$folder/bin/python" -W ignore - <<'END'
from importlib.metadata import version

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm.modelfree.sac import SACPolicy
from tianshou.data import Batch
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic

assert version("tianshou") == "2.0.1"
print("tianshou", version("tianshou"), "torch", torch.__version__)
env = gym.make("Pendulum-v1")
states = np.stack([env.reset(seed=k)[0] for k in range(100)])
for more, most in (({}, 2 * np.tanh(1)), ({"unbounded": True}, 2)):
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=(3,), hidden_sizes=(128,)), action_shape=(1,),
        conditioned_sigma=True, **more)
    with torch.no_grad():
        for bias in [x for x in actor.mu.parameters() if x.ndim == 1]:
            bias.fill_(20)                                      # a mean that has grown large
    policy = SACPolicy(actor=actor, action_space=env.action_space).eval()
    with torch.no_grad():
        torques = policy.map_action(policy(Batch(obs=states, info={})).act.numpy())
    print(f"{more}: torques from {torques.min():.3f} to {torques.max():.3f} N m")
    assert abs(torques - most).max() < 1e-3
END
# Output:
# tianshou 2.0.1 torch 2.13.0+cpu
# {}: torques from 1.523 to 1.523 N m
# {'unbounded': True}: torques from 2.000 to 2.000 N m
