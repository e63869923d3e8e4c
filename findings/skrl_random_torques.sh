#!/usr/bin/env bash
# skrl 2.1.1, SAC: random_timesteps is the "number of random exploration (sampling random actions)
# steps to perform before sampling actions from the policy". The agent's memory is read after a run
# of Pendulum-v1 in three environments at once, 400 steps of two episodes each.
# Guess: 1,200 torques, uniform on (-2, 2); the memory keeps the flags that the environment sends.
# Truth: each environment gets one random torque and keeps it, step after step; `truncated` is
#   handed to the agent and not kept, so that the memory does not tell where episodes end (its own
#   target is right: a time limit is no end). The step in which Gymnasium's vector environment
#   resets is kept as a transition of reward 0, from one episode's end to the next one's start.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 skrl==2.1.1 gymnasium==1.4.0
cd "$folder"                            # the agent may write its logs where it is started
bin/python -W ignore - <<'END'
import logging
from importlib.metadata import version

import gymnasium as gym
import torch
from skrl.agents.torch.sac import SAC, SAC_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed

assert version("skrl") == "2.1.1"
logging.disable(logging.INFO)
print("skrl", version("skrl"), "gymnasium", gym.__version__)
torch.set_num_threads(1)
set_seed(0)


class Policy(GaussianMixin, Model):
    def __init__(self, **spaces):
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self, clip_actions=True)
        self.mean = torch.nn.Linear(3, 1)

    def compute(self, inputs, role=""):
        mean = self.mean(inputs["observations"])
        return mean, {"log_std": torch.zeros_like(mean)}


class Critic(DeterministicMixin, Model):
    def __init__(self, **spaces):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.value = torch.nn.Linear(4, 1)

    def compute(self, inputs, role=""):
        return self.value(torch.cat([inputs["observations"], inputs["taken_actions"]], dim=1)), {}


ends = []


class Witness(gym.vector.VectorWrapper):
    def step(self, actions):
        answer = self.env.step(actions)
        ends.append(answer[3].sum())
        return answer


env = wrap_env(Witness(gym.make_vec("Pendulum-v1", num_envs=3)), verbose=False)
spaces = {"observation_space": env.observation_space, "state_space": env.state_space,
          "action_space": env.action_space, "device": "cpu"}
names = ("critic_1", "critic_2", "target_critic_1", "target_critic_2")
models = {"policy": Policy(**spaces), **{name: Critic(**spaces) for name in names}}
memory = RandomMemory(memory_size=600, num_envs=3, device="cpu")
cfg = SAC_CFG(random_timesteps=400, learning_starts=10_000)
cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0
agent = SAC(models=models, memory=memory, cfg=cfg, **spaces)
SequentialTrainer(env=env, agents=agent, cfg={
    "timesteps": 450, "headless": True, "disable_progressbar": True}).train()

actions = memory.get_tensor_by_name("actions")[:450, :, 0]
for i in range(3):
    print(f"environment {i}: {len(actions[:400, i].unique())} different torque in 400 random "
          f"steps, {actions[0, i]:.4f}; {len(actions[400:, i].unique())} in the policy's 50 steps")
    assert len(actions[:400, i].unique()) == 1 and len(actions[400:, i].unique()) > 20
assert len(actions[0].unique()) == 3

print("the environments sent truncated", sum(ends), "times; the memory keeps",
      ", ".join(sorted(memory.get_tensor_names())))
ended = memory.get_tensor_by_name("terminated")[:450].sum().item()
resets = torch.nonzero(memory.get_tensor_by_name("rewards")[:450, 0, 0] == 0)[:, 0].tolist()
print("terminated is True in", ended, "rows; of environment 0 the reward is 0 in rows", resets)
assert sum(ends) == 6 and "truncated" not in memory.get_tensor_names()
assert ended == 0 and resets == [200, 401]
END
# Output:
# skrl 2.1.1 gymnasium 1.4.0
# environment 0: 1 different torque in 400 random steps, -0.2783; 42 in the policy's 50 steps
# environment 1: 1 different torque in 400 random steps, -0.4126; 39 in the policy's 50 steps
# environment 2: 1 different torque in 400 random steps, 0.3676; 38 in the policy's 50 steps
# the environments sent truncated 6 times; the memory keeps actions, next_observations,
#     observations, rewards, terminated
# terminated is True in 0 rows; of environment 0 the reward is 0 in rows [200, 401]
# (other torques in each run: set_seed(0) does not reach them)
