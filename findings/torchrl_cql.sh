#!/usr/bin/env bash
# TorchRL 0.14.1, CQLLoss: its documentation has num_random as the "number of random actions to
# sample for the CQL loss", and it is given the action spec, here Pendulum's, from -2 to 2. The
# critic below writes down what it is asked, and answers 0 for this state and 5 for the next one.
# Guess: random actions over the spec; a log-sum-exp over 3 num_random actions, all in this state.
# Truth: random actions from (-1, 1), whose density is per that interval of length 2 while the
#   policy's is per the spec's of length 4; a log-sum-exp over 3 actions whatever num_random is; the
#   next state's actions are tried in the next state (CQL's own code: in this one); with
#   reduction="none" all rows get the mean log-sum-exp of the batch and not their own.
# Page's error: range.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 torchrl==0.14.1
"$folder/bin/python" -W ignore - <<'END'
import math
from importlib.metadata import version

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import CQLLoss

assert version("torchrl") == "0.14.1"
print("torchrl", version("torchrl"), "torch", torch.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)
asked = []


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.next_state = torch.nn.Parameter(torch.tensor(5.0))

    def forward(self, observation, action):
        asked.append((observation.detach().clone(), action.detach().clone()))
        return self.next_state * observation[..., :1]    # the first number is 1 in the next state


def penalty(rows, num_random, next_mark, reduction="mean"):
    """loss_cql / 2, that is for one critic, and minus the log densities of each row's 3 num_random
    actions, which are the terms of its log-sum-exp, as this state's Q is 0."""
    asked.clear()
    spec = Bounded(-2.0, 2.0, (1,))
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), NormalParamExtractor())
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)                  # the same policy in each state
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]), in_keys=["loc", "scale"],
        spec=spec, distribution_class=TanhNormal, distribution_kwargs={"low": -2.0, "high": 2.0})
    critic = ValueOperator(Critic(), in_keys=["observation", "action"])
    loss = CQLLoss(actor, critic, action_spec=spec, num_random=num_random, reduction=reduction,
                   deactivate_vmap=True, scalar_output_mode="exclude")
    observation = torch.zeros(rows, 3)
    next_observation = observation.clone()
    next_observation[:, 0] = next_mark
    data = TensorDict({
        "observation": observation, "action": spec.rand([rows]),
        "next": {"observation": next_observation, "reward": torch.zeros(rows, 1),
                 "done": torch.zeros(rows, 1, dtype=torch.bool),
                 "terminated": torch.zeros(rows, 1, dtype=torch.bool)}}, [rows])
    loss.q_loss(data)                                    # it leaves its predictions in data
    asked.clear()
    out, _ = loss.cql_loss(data)
    # three kinds of actions, each asked of two critics: random, this state's, the next one's
    kinds = [asked[i] for i in (0, 2, 4)]
    dist = actor.get_dist(TensorDict({"observation": torch.zeros(rows * num_random, 3)},
                                     [rows * num_random]))
    with torch.no_grad():
        terms = [torch.full([rows * num_random], math.log(2))]
        terms += [-dist.log_prob(action).reshape(-1) for _, action in kinds[1:]]
        terms = torch.cat([term.reshape(rows, num_random) for term in terms], dim=1)
    return out / 2, terms, kinds


print("num_random   loss_cql for one critic   log-sum-exp over 3 num_random actions")
losses = []
for n in (1, 5, 50):
    loss, terms, kinds = penalty(4096, n, 0.0)
    own = torch.logsumexp(terms, dim=1)
    losses.append(loss.item())
    print(f"{n:10d}   {loss.item():23.3f}   {own.mean().item():37.3f}")
    assert abs(own.mean().item() - loss.item() - math.log(n)) < 0.2
assert max(losses) - min(losses) < 0.03, losses
lengths = terms.exp().reshape(4096, 3, n).mean(dim=(0, 2)).tolist()
print("1 / density on average, the length of the interval it is per: random "
      f"{lengths[0]:.2f}, policy {lengths[1]:.2f} and {lengths[2]:.2f}")
assert abs(lengths[0] - 2) < 1e-4 and all(abs(length - 4) < 0.05 for length in lengths[1:])

largest_random, largest_policy = (kinds[i][1].abs().max().item() for i in (0, 1))
print(f"largest random action {largest_random:.3f}, of the policy {largest_policy:.3f}")
assert 0.99 < largest_random <= 1 and 1.9 < largest_policy <= 2

_, _, kinds = penalty(64, 5, 1.0)
marks = [kind[0][:, 0].mean().item() for kind in kinds]
print("asked in the next state: random", marks[0], "current", marks[1], "next", marks[2])
assert marks == [0, 0, 1]

loss, terms, _ = penalty(64, 5, 0.0, reduction="none")
own = torch.logsumexp(terms, dim=1)
print(f"reduction=none: {loss.numel()} losses from {loss.min():.4f} to {loss.max():.4f}; "
      f"the rows' own log-sum-exp from {own.min():.4f} to {own.max():.4f}")
assert loss.numel() == 64 and loss.max() - loss.min() < 1e-5 and own.max() - own.min() > 0.1
END
# Output:
# torchrl 0.14.1 torch 2.13.0+cpu
# num_random   loss_cql for one critic   log-sum-exp over 3 num_random actions
#          1                     2.296                                   2.296
#          5                     2.295                                   3.910
#         50                     2.295                                   6.214
# 1 / density on average, the length of the interval it is per: random 2.00, policy 4.00 and 4.00
# largest random action 1.000, of the policy 1.999
# asked in the next state: random 0.0 current 0.0 next 1.0
# reduction=none: 64 losses from 2.2964 to 2.2964; the rows' own log-sum-exp from 3.8054 to 4.0107
