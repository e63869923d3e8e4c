"""Every formula against an independent reference: torch.distributions, a plain update in double
precision. And whatever a learner edits acts."""
import copy
import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import linear, relu, softplus

import cql_pendulum as ours
from conftest import batch, numbers, with_seed
from cql_pendulum import BC, CQL, ERRATA, SAC

CRITICS = ["model_value1", "model_value2", "model_value_next1", "model_value_next2"]


@pytest.fixture
def double():
    """Two orders of summation then differ by 1e-15 and not by 1e-7, which Adam would magnify."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def critic_value(model, state, action):
    """The critic's network, written out, [b, 1]."""
    w1, b1, w2, b2, w3, b3 = model.parameters()
    hidden = relu(linear(torch.cat([state, action], dim=1), w1, b1))
    return linear(relu(linear(hidden, w2, b2)), w3, b3)


def policy(model, state, n, as_printed=()):
    """The policy's network, written out: n values of tanh and their entropies, [b, n]."""
    parts = dict(model.named_parameters())
    hidden = relu(linear(state, parts["fc_state.0.weight"], parts["fc_state.0.bias"]))
    mu = linear(hidden, parts["fc_mu.weight"], parts["fc_mu.bias"])
    std = softplus(linear(hidden, parts["fc_std.0.weight"], parts["fc_std.0.bias"]))
    dist = Normal(mu.expand(-1, n), std.expand(-1, n))
    sample = dist.mean + dist.stddev * torch.randn(len(state), n)
    tanh = torch.tanh(sample)
    if "jacobian" in as_printed:
        log_slope = (1 - tanh.tanh() ** 2).log()
    else:
        log_slope = TanhTransform().log_abs_det_jacobian(sample, tanh)
    return tanh, -(dist.log_prob(sample) - log_slope)


def test_the_targets_begin_as_their_critics_and_the_critics_differ():
    agent = SAC()
    for k in "12":
        critic, target = getattr(agent, f"model_value{k}"), getattr(agent, f"model_value_next{k}")
        for p, q in zip(critic.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, q) and p is not q
    pairs = zip(agent.model_value1.parameters(), agent.model_value2.parameters())
    assert not any(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("far", [-17.0, 12.0])
def test_a_saturated_policy_is_pulled_back(far):
    """Where float32's tanh is 1, d log(1 - tanh(x)^2) / dx is still -2 tanh(x)."""
    model = SAC.ModelAction()
    with torch.no_grad():
        model.fc_mu.weight.zero_()
        model.fc_mu.bias.fill_(far)
        model.fc_std[0].bias.fill_(-3.0)
    action, entropy = model(batch()[0])
    assert (action.abs() == 2).all()
    slope, = torch.autograd.grad(entropy.mean(), model.fc_mu.bias)
    assert slope.item() == pytest.approx(-2 * math.copysign(1, far), rel=1e-5)


class Gentle(SAC):
    """An edited policy: at most a tenth of the torque."""
    class ModelAction(SAC.ModelAction):
        def forward(self, state, n=1):
            action, entropy = super().forward(state, n)
            return action / 10, entropy


def test_a_torque_for_any_sequence_of_three_is_the_policys():
    agent = Gentle()
    for state in ([1, 0, 0], (1.0, 0.0, -8.0), torch.tensor([0.0, 1.0, 8]).numpy()):
        row = torch.tensor([list(state)], dtype=torch.float32)
        expected = with_seed(5, agent.model_action, row)[0].item()
        assert with_seed(5, agent.get_action, state) == pytest.approx(expected, abs=1e-6)
        assert 0 < abs(expected) < 0.2
    with pytest.raises(ValueError):
        agent.get_action([1, 0, 0, 0])


NOTEBOOK = {"GAMMA": 0.99, "TAU": 0.005, "TEMPERATURE": 0.01, "TARGET_ENTROPY": -1.0, "SCALE": 8,
            "SAMPLES": 5, "WEIGHT": 5.0, "LR_VALUE": 3e-3, "LR_ACTION": 3e-4, "TORQUE": 2.0}


class PlainUpdate:
    """SAC and CQL with nothing shared: torch.distributions, an optimizer for each part, one loss
    after another, one term after another, every constant as the notebook has it.

    It draws in the module's order: target; random torques and policy for each critic; actor."""
    def __init__(self, agent, as_printed=(), **constants):
        self.as_printed, self.c, self.logged = as_printed, NOTEBOOK | constants, {}
        self.penalised = isinstance(agent, CQL)
        for name in ["model_action", *CRITICS]:
            setattr(self, name, copy.deepcopy(getattr(agent, name)))
        self.alpha = torch.tensor(math.log(self.c["TEMPERATURE"]), requires_grad=True)
        self.optimizers = [torch.optim.Adam(parameters, lr=self.c[lr]) for parameters, lr in (
            (self.model_value1.parameters(), "LR_VALUE"),
            (self.model_value2.parameters(), "LR_VALUE"),
            (self.model_action.parameters(), "LR_ACTION"), ([self.alpha], "LR_ACTION"))]

    def smaller(self, critics, state, action):
        one, two = (critic_value(getattr(self, name), state, action) for name in critics)
        return torch.min(one, two)

    def descend(self, k, loss):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[k].step()

    def policy(self, state, n):
        tanh, entropy = policy(self.model_action, state, n, self.as_printed)
        return tanh * self.c["TORQUE"], entropy

    @torch.no_grad()
    def torques(self, state, next_state):
        """Torques of each kind for each state and minus the log of their densities, [b, 3 n]."""
        b, n = len(state), self.c["SAMPLES"]
        limit = 1 if "range" in self.as_printed else self.c["TORQUE"]
        sign = -1 if "sign" in self.as_printed else 1
        random_torques = torch.empty(b, n).uniform_(-limit, limit)
        torques, entropy = self.policy(torch.cat([state, next_state]), n)
        return (torch.cat([random_torques, torques[:b], torques[b:]], dim=1),
                torch.cat([torch.full([b, n], math.log(2)), sign * entropy[:b],
                           sign * entropy[b:]], dim=1))

    def loss_value(self, critic, target, state, action, next_state):
        loss = ((critic_value(critic, state, action) - target) ** 2).mean()
        self.logged["squared_error"] = loss.item()              # of the last critic
        if not self.penalised:
            return loss
        torques, log_weights = self.torques(state, next_state)
        terms = [critic_value(critic, state, u[:, None])[:, 0] + w
                 for u, w in zip(torques.T, log_weights.T)]
        highest = torch.stack(terms).exp().sum(dim=0).log().mean()
        penalty = highest - critic_value(critic, state, action).mean()
        self.logged["penalty"] = penalty.item()
        return loss + self.c["WEIGHT"] * penalty

    def train(self, state, action, reward, next_state, over):
        scale, tau = self.c["SCALE"], self.c["TAU"]
        with torch.no_grad():
            next_action, entropy = self.policy(next_state, 1)
            value = self.smaller(CRITICS[2:], next_state, next_action) + self.alpha.exp() * entropy
            target = (reward + scale) / scale + self.c["GAMMA"] * (1 - over) * value
        losses = [self.loss_value(critic, target, state, action, next_state)
                  for critic in (self.model_value1, self.model_value2)]
        self.descend(0, losses[0])
        self.descend(1, losses[1])
        torque, entropy = self.policy(state, 1)
        temperature = self.alpha.exp()
        loss_alpha = ((entropy.detach() - self.c["TARGET_ENTROPY"]) * temperature).mean()
        value = self.smaller(CRITICS[:2], state, torque)
        self.descend(2, (-temperature.detach() * entropy - value).mean())
        self.descend(3, loss_alpha)
        self.logged["temperature"] = self.alpha.exp().item()
        with torch.no_grad():
            for name, target_name in zip(CRITICS[:2], CRITICS[2:]):
                for new, old in zip(getattr(self, name).parameters(),
                                    getattr(self, target_name).parameters()):
                    old.copy_((1 - tau) * old + tau * new)


def agrees_with_the_plain_update(agent, plain, updates, b=64):
    for update in range(updates):
        rows = [x.double() for x in batch(b, seed=update)]
        with_seed(update, agent.train, *rows)
        with_seed(update, plain.train, *rows)
    assert agent.alpha.item() == pytest.approx(plain.alpha.item(), rel=1e-12)
    assert agent.logged == pytest.approx(plain.logged, rel=1e-6)
    for name in ["model_action", *CRITICS]:
        torch.testing.assert_close(getattr(agent, name).state_dict(),
                                   getattr(plain, name).state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make, as_printed", [
    (SAC, ()), (SAC, ["jacobian"]), (CQL, ()), (CQL, ["jacobian"]), (CQL, ["sign"]),
    (CQL, ["range"]), (CQL, ERRATA)])
def test_train_is_the_plain_update(make, as_printed, double):
    agent = make()
    ours.AS_PRINTED.update(as_printed)              # acts at once, in agents that are there
    agent.weight = 0.3                              # as this does
    agrees_with_the_plain_update(agent, PlainUpdate(agent, as_printed, WEIGHT=0.3), updates=5)


@pytest.mark.parametrize("name, value", [
    ("GAMMA", 0.8), ("TAU", 0.1), ("TEMPERATURE", 0.5), ("TARGET_ENTROPY", 0.5), ("SCALE", 2),
    ("SAMPLES", 3), ("WEIGHT", 0.7), ("LR_VALUE", 1e-2), ("LR_ACTION", 1e-2), ("TORQUE", 0.5)])
def test_a_changed_constant_acts_where_the_plain_update_has_it(name, value, double, monkeypatch):
    """And with another number of rows."""
    monkeypatch.setattr(ours, name, value)
    agent = CQL()
    agrees_with_the_plain_update(agent, PlainUpdate(agent, **{name: value}), 3, b=7)


def test_what_a_reward_counts_is_changed_in_one_place(double, monkeypatch):
    """In an update, in what is delivered, and in what is possible."""
    monkeypatch.setattr(ours, "scaled", lambda reward: (reward + 4) / 4)
    agent = SAC()
    agrees_with_the_plain_update(agent, PlainUpdate(agent, SCALE=4), 1)
    assert ours.discounted([-4.0, -2.0], terminal=True) == pytest.approx(0.99 * 0.5)
    worst = -(math.pi ** 2 + 0.1 * 8 ** 2 + 0.001 * 2 ** 2)
    assert ours.possible() == pytest.approx((25 * (worst + 4), 100))


@pytest.mark.parametrize("make, name", [
    (SAC, "model_value1"), (CQL, "model_value2"), (CQL, "model_action"), (SAC, "alpha")])
def test_what_is_frozen_stays_and_the_others_learn(make, name):
    agent = make()
    getattr(agent, name).requires_grad_(False)
    before = numbers(agent)
    agent.train(*batch())
    after = numbers(agent)
    for part in ("model_value1", "model_value2", "model_action", "alpha"):
        assert (before[part] == after[part]) == (part == name), part


def test_gradients_after_an_update_are_each_parts_own():
    """What a learner prints: no gradient of the critics' loss in the policy, nor the reverse."""
    agent, (state, action, _, next_state, _) = CQL(), batch()
    agent._get_loss_value(agent.model_value1, action, state, action, next_state).backward()
    assert all(p.grad is None for p in agent.model_action.parameters())
    other = copy.deepcopy(agent)
    other._get_loss_action = lambda state: (
        other.model_action(state)[0].sum() * 0, torch.zeros(64, 1))
    with_seed(0, agent.train, *batch())
    with_seed(0, other.train, *batch())
    for mine, its in zip(agent.model_value1.parameters(), other.model_value1.parameters()):
        torch.testing.assert_close(mine.grad, its.grad)


def test_cloning_descends_the_squared_error_of_the_drawn_torques(double):
    agent = BC()
    model = copy.deepcopy(agent.model_action)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    before = numbers(agent)
    for k in range(5):
        state, action, *rest = (x.double() for x in batch(seed=k))
        with_seed(k, agent.train, state, action, *rest)
        tanh, _ = with_seed(k, policy, model, state, 1)
        optimizer.zero_grad()
        ((2 * tanh - action) ** 2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(agent.model_action.state_dict(), model.state_dict(),
                               rtol=1e-9, atol=1e-9)
    assert all(numbers(agent)[name] == before[name] for name in ("alpha", *CRITICS))
    assert all(map(math.isnan, agent.promise(state.numpy(), action[:, 0].numpy())))
