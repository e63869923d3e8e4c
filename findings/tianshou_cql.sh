#!/usr/bin/env bash
# tianshou 2.0.1, CQL: its documentation has min_action and max_action as the bounds "used when
# sampling random actions", num_repeat_actions as the "number of action samples generated per
# state", more of them "more accurate". The critics below answer a constant and write down the
# actions that they are asked.
# Guess: uniform actions between the bounds; a log-sum-exp over 3 num_repeat_actions; two critics
#   that differ; a time limit, which the buffer keeps apart from an end, is none in the target (so
#   it is in this library's SAC); calibrated=True, the default, works or says what it needs.
# Truth: the bounds are (-min_action, max_action), so that all random actions are +1, or +2; the
#   log-sum-exp runs over 3 actions; without critic2 both critics stay equal to the last bit; a
#   time limit ends the target; the default fails in update() unless a trainer, or the user, calls
#   process_buffer first.
# Page's error: timeout.
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
from tianshou.algorithm import CQL, SAC
from tianshou.algorithm.algorithm_base import policy_within_training_step
from tianshou.algorithm.modelfree.sac import SACPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, ReplayBuffer

assert version("tianshou") == "2.0.1"
print("tianshou", version("tianshou"), "torch", torch.__version__)
torch.set_num_threads(1)
asked = []


class Actor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = torch.nn.Linear(3, 1)

    def forward(self, obs, state=None, info=None):
        mu = self.mu(torch.as_tensor(obs, dtype=torch.float32))
        return (mu, torch.ones_like(mu)), state


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, obs, act):
        asked.append(torch.as_tensor(act).detach().clone())
        return self.value.expand(len(obs), 1)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def forward(self, obs, act):
        return self.layers(torch.cat([torch.as_tensor(obs), torch.as_tensor(act)], dim=1))


def make(algorithm, critic, **options):
    torch.manual_seed(0)
    policy = SACPolicy(actor=Actor(), action_space=gym.spaces.Box(-2, 2, (1,)))
    optim = AdamOptimizerFactory(lr=1e-3)
    return algorithm(policy=policy, policy_optim=optim, critic=critic, critic_optim=optim,
                     **options)


def rows(n, terminated=False, truncated=False):
    """A buffer of n one-step episodes, reward 0."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(n)
    for _ in range(n):
        buffer.add(Batch(
            obs=rng.normal(size=3).astype(np.float32), obs_next=np.zeros(3, np.float32),
            act=rng.uniform(-1, 1, 1).astype(np.float32), rew=0.0, terminated=terminated,
            truncated=truncated, info={}))
    return buffer


def update(agent, buffer, times=1):
    for _ in range(times):
        with policy_within_training_step(agent.policy):
            stats = agent.update(buffer=buffer, sample_size=0)
    return stats


plain = {"with_lagrange": False, "calibrated": False}
for bound in (1.0, 2.0):
    asked.clear()
    agent = make(CQL, Constant(0.0), **plain, min_action=-bound, max_action=bound)
    update(agent, rows(64))
    random_actions = asked[-1]                 # 64 states, 10 actions each; asked last of all
    low, high = random_actions.min().item(), random_actions.max().item()
    print(f"bounds -{bound}, {bound}: {len(random_actions)} random actions from {low} to {high}")
    assert len(random_actions) == 640 and low == high == bound

print("num_repeat_actions   log-sum-exp, critic 0")
found = []
for n in (1, 10, 50):
    agent = make(CQL, Constant(0.0), **plain, num_repeat_actions=n)
    found.append(update(agent, rows(2048, terminated=True)).critic1_loss)    # its target is 0
    print(f"{n:18d}   {found[-1]:.3f}")
assert max(found) - min(found) < 0.03      # over 3 n actions: 2.3 and 3.9 more than the first

for critic2 in (None, Network()):
    agent = make(CQL, Network(), critic2=critic2, **plain)
    update(agent, rows(64), times=20)
    pairs = zip(agent.critic.parameters(), agent.critic2.parameters())
    equal = all(torch.equal(one, two) for one, two in pairs)
    print(f"after 20 updates {'with' if critic2 else 'without'} critic2: equal critics {equal}")
    assert equal == (critic2 is None)

for name, algorithm, options in (("SAC", SAC, {}), ("CQL", CQL, {**plain, "cql_weight": 0.0})):
    # critic 10, reward 0: the squared error is 100 where nothing follows, else near 0
    errors = [update(make(algorithm, Constant(10.0), **options), rows(256, **flags)).critic1_loss
              for flags in ({}, {"truncated": True}, {"terminated": True})]
    print(f"{name}: squared error in mid-episode {errors[0]:.2f}, at a time limit "
          f"{errors[1]:.2f}, at an end {errors[2]:.2f}")
    assert errors[0] < 1 and errors[2] == 100
    assert errors[1] == (100 if name == "CQL" else errors[0])

agent = make(CQL, Network(), with_lagrange=False)
try:
    update(agent, rows(64))
    raised = None
except AttributeError as error:
    raised = error
print("defaults, update on a plain buffer:", type(raised).__name__, raised)
assert raised is not None
update(agent, agent.process_buffer(rows(64)))
print("defaults, update after process_buffer: no error")
END
# Output:
# tianshou 2.0.1 torch 2.13.0+cpu
# bounds -1.0, 1.0: 640 random actions from 1.0 to 1.0
# bounds -2.0, 2.0: 640 random actions from 2.0 to 2.0
# num_repeat_actions   log-sum-exp, critic 0
#                  1   1.748
#                 10   1.748
#                 50   1.751
# after 20 updates without critic2: equal critics True
# after 20 updates with critic2: equal critics False
# SAC: squared error in mid-episode 0.01, at a time limit 0.01, at an end 100.00
# CQL: squared error in mid-episode 0.01, at a time limit 100.00, at an end 100.00
# defaults, update on a plain buffer: AttributeError 'dict' object has no attribute
#     'calibration_returns'
# defaults, update after process_buffer: no error
