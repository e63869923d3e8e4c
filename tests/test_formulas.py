"""Every formula against an independent reference: torch.distributions, torch.optim, quadrature, or the page's own lines."""
import copy
import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions.transforms import TanhTransform

from cql_pendulum import CQL, ERRATA, SAC, Adam, Data, UserError

EACH = [(), *((name,) for name in ERRATA), tuple(ERRATA)]


def batch(b=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    angle = torch.empty(2, b, 1).uniform_(-math.pi, math.pi, generator=g)
    speed = torch.empty(2, b, 1).uniform_(-8, 8, generator=g)
    state, next_state = torch.cat([angle.cos(), angle.sin(), speed], dim=2)
    action = torch.empty(b, 1).uniform_(-2, 2, generator=g)
    reward = torch.empty(b, 1).uniform_(-16, 0, generator=g)
    over = torch.randint(2, (b, 1), generator=g)
    return state, action, reward, next_state, over


def policy(model, state, n, as_printed=()):
    """The page's forward, by torch.distributions, for n torques a state: torques and entropies, [b, n]."""
    hidden = torch.nn.functional.linear(state, model.fc_state[0].weight, model.fc_state[0].bias).clamp(min=0)
    mu = hidden @ model.fc_mu.weight.T + model.fc_mu.bias
    std = torch.nn.functional.softplus(hidden @ model.fc_std[0].weight.T + model.fc_std[0].bias)
    dist = Normal(mu.expand(-1, n), std.expand(-1, n))
    sample = dist.mean + dist.stddev * torch.randn(len(state), n)
    action = torch.tanh(sample)
    x = action if "jacobian" in as_printed else sample
    slope = (1 - x.tanh() ** 2 + 1e-7).log() if "epsilon" in as_printed else TanhTransform().log_abs_det_jacobian(x, x.tanh())
    return 2 * action, -(dist.log_prob(sample) - slope)


def with_seed(seed, function, *arguments):
    torch.manual_seed(seed)
    return function(*arguments)


# ---- the policy ----

@pytest.mark.parametrize("as_printed", [(), ("jacobian",), ("epsilon",), ("jacobian", "epsilon")])
def test_policy_agrees_with_torch_distributions(as_printed):
    agent, (state, *_) = SAC(as_printed), batch()
    action, entropy = with_seed(3, agent.model_action, state)
    expected_action, expected_entropy = with_seed(3, policy, agent.model_action, state, 1, as_printed)
    assert action.shape == entropy.shape == (64, 1)
    torch.testing.assert_close(action, expected_action)
    torch.testing.assert_close(entropy, expected_entropy)


@pytest.mark.parametrize("as_printed, returns", [((), True), (("epsilon",), False)])
@pytest.mark.parametrize("far", [-17.0, 12.0])
def test_a_saturated_policy_is_pulled_back(as_printed, returns, far):
    """Where float32's tanh is 1, d log(1 - tanh(x)^2) / dx is still -2 tanh(x), by double precision too."""
    agent, (state, *_) = SAC(as_printed), batch()
    with torch.no_grad():
        agent.model_action.fc_mu.weight.zero_()
        agent.model_action.fc_mu.bias.fill_(far)
        agent.model_action.fc_std[0].bias.fill_(-3.0)
    action, entropy = with_seed(0, agent.model_action, state)
    assert (action.abs() == 2).all()
    slope, = torch.autograd.grad(entropy.mean(), agent.model_action.fc_mu.bias)
    assert slope.item() == (pytest.approx(-2 * math.copysign(1, far), rel=1e-5) if returns else 0)
    x = torch.tensor([far], dtype=torch.double, requires_grad=True)
    exact, = torch.autograd.grad((1 - x.tanh() ** 2).log().sum(), x)
    assert exact.item() == pytest.approx(-2 * math.copysign(1, far), rel=0.2)


def density_integral(agent):
    """Integral over torque / 2 of exp(log pi), by the trapezoidal rule over 200,000 torques in order, for four states."""
    state = batch(4)[0]
    with torch.no_grad():
        action, entropy = agent.model_action.sample(state.double().float(), 200_000)
    action, order = (action.double() / 2).sort(dim=1)
    return torch.trapezoid(torch.exp(-entropy.double().gather(1, order)), action, dim=1)


def test_density_integrates_to_one_only_when_corrected():
    torch.manual_seed(0)
    agent = SAC()
    torch.testing.assert_close(density_integral(agent), torch.ones(4, dtype=torch.double), atol=5e-3, rtol=0)
    agent.model_action.as_printed = {"jacobian"}
    assert (density_integral(agent) < 0.95).all()


# ---- the penalty: each kind of torque estimates the same integral ----

@pytest.mark.parametrize("as_printed, right", [
    ((), [True, True, True]),
    (("sign",), [True, False, False]),
    (("range",), [False, False, False]),
    (("jacobian",), [True, False, False]),
    (tuple(ERRATA), [False, False, False]),
])
def test_weighted_terms_estimate_log_integral_of_exp_q(as_printed, right):
    torch.manual_seed(1)
    agent = CQL(as_printed)
    with torch.no_grad():              # a policy as wide as the range, so that 100,000 torques are enough
        agent.model_action.fc_mu.weight.mul_(0.1)
        agent.model_action.fc_std[0].weight.mul_(0.1)
        agent.model_action.fc_std[0].bias.fill_(0.5)
    state, _, _, next_state, _ = batch(4)
    n = 100_000
    torques, log_weights = (x.reshape(4, 3, n) for x in agent._get_torques(state, next_state, n))

    def q(torque):                     # steep enough that half of the range and a wrong weight show: [b, k] -> [b, k]
        return torch.sin(2 * torque) + 0.8 * torque + state[:, :1]

    grid = torch.linspace(-2, 2, 20_001).expand(4, -1)
    exact = torch.trapezoid(q(grid).exp(), grid).log()
    for kind in range(3):
        estimate = torch.logsumexp(q(torques[:, kind]) + log_weights[:, kind], dim=1) - math.log(n)
        error = (estimate - exact).abs()
        assert (error.max() < 0.02) if right[kind] else (error.min() > 0.05), ("rand curr next".split()[kind], error)


def test_penalty_is_logsumexp_over_the_fifteen_torques_minus_q_of_the_data(monkeypatch):
    agent = CQL(weight=3.0)
    state, action, _, next_state, _ = batch(7)
    torques = torch.empty(7, 15).uniform_(-2, 2)
    log_weights = torch.randn(7, 15)
    monkeypatch.setattr(agent, "_get_torques", lambda *_: (torques, log_weights))
    target = torch.randn(7, 1)
    for critic in (agent.model_value1, agent.model_value2):
        mse, gap = 0.0, 0.0
        for k in range(7):
            value = critic(state[k:k + 1], action[k:k + 1]).item()
            mse += (value - target[k].item()) ** 2 / 7
            terms = [math.exp(critic(state[k:k + 1], u.reshape(1, 1)).item()) * math.exp(d)
                     for u, d in zip(torques[k], log_weights[k])]
            gap += (math.log(sum(terms)) - value) / 7
        loss = agent._get_loss_value(critic, target, state, action, next_state)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(mse + 3.0 * gap, rel=1e-5)


def page_loss_value(self, model_value, target, state, action, next_state):
    """CQL._get_loss_value in the page's own lines; model_action is the page's too."""
    value = model_value(state, action)
    loss_value = torch.nn.functional.mse_loss(value, target)
    state = state.unsqueeze(1).repeat(1, 5, 1).reshape(-1, 3)
    next_state = next_state.unsqueeze(1).repeat(1, 5, 1).reshape(-1, 3)
    rand_action = torch.empty([len(state), 1]).uniform_(-1, 1)
    curr_action, curr_entropy = policy(self.model_action, state, 1, {"jacobian", "epsilon"})
    next_action, next_entropy = policy(self.model_action, next_state, 1, {"jacobian", "epsilon"})
    value_rand = model_value(state, rand_action).reshape(-1, 5, 1)
    value_curr = model_value(state, curr_action).reshape(-1, 5, 1)
    value_next = model_value(state, next_action).reshape(-1, 5, 1)
    value_rand = value_rand - math.log(0.5)
    value_curr = value_curr - curr_entropy.reshape(-1, 5, 1)
    value_next = value_next - next_entropy.reshape(-1, 5, 1)
    loss_cat = torch.logsumexp(torch.cat([value_rand, value_curr, value_next], dim=1), dim=1).mean()
    return loss_value + 5.0 * (loss_cat - value.mean())


@torch.no_grad()
def test_as_printed_penalty_is_the_pages_on_average():
    torch.manual_seed(2)
    printed, right = CQL(ERRATA), CQL()
    right.model_action.load_state_dict(printed.model_action.state_dict())
    state, action, _, next_state, _ = batch()
    arguments = printed.model_value1, torch.zeros(64, 1), state, action, next_state
    page = torch.stack([page_loss_value(printed, *arguments) for _ in range(300)])
    ours = torch.stack([printed._get_loss_value(*arguments) for _ in range(300)])
    corrected = torch.stack([right._get_loss_value(*arguments) for _ in range(300)])
    error = math.sqrt((page.var() + ours.var()) / 300)
    assert abs(page.mean() - ours.mean()) < 4 * error
    assert abs(page.mean() - corrected.mean()) > 20 * error


# ---- whole updates ----

class PlainUpdate:
    """SAC and CQL with nothing clever: two separate critics, torch.distributions, torch.optim.Adam, one loss after another.

    It draws its random numbers in the module's order: target, random torques, the policy's torques, actor."""

    def __init__(self, agent, as_printed, weight):
        self.as_printed, self.weight = as_printed, weight
        for name in ("model_action", "model_value1", "model_value2", "model_value_next1", "model_value_next2", "alpha"):
            setattr(self, name, copy.deepcopy(getattr(agent, name)))
        self.alpha = self.alpha.detach().clone().requires_grad_()
        self.optimizers = {name: torch.optim.Adam(parameters, lr=lr) for name, parameters, lr in (
            ("value1", self.model_value1.parameters(), 3e-3), ("value2", self.model_value2.parameters(), 3e-3),
            ("action", self.model_action.parameters(), 3e-4), ("alpha", [self.alpha], 3e-4))}

    def descend(self, name, loss):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def penalty(self, critic, state, action, random_torques, torques, entropy):
        limit = 1 if "range" in self.as_printed else 2
        unit = 0.0 if "range" in self.as_printed else math.log(2)
        sign = -1 if "sign" in self.as_printed else 1
        terms = [critic(state, u[:, None])[:, 0] + math.log(2 * limit) for u in random_torques.T]
        for k in range(10):                                     # five of the policy in state, five of it in next_state
            rows = slice(0, 64) if k < 5 else slice(64, 128)
            u, e = torques[rows, k % 5], entropy[rows, k % 5]
            terms.append(critic(state, u[:, None])[:, 0] + sign * (e + unit))
        return torch.stack(terms).exp().sum(dim=0).log().mean() - critic(state, action).mean()

    def train(self, state, action, reward, next_state, over):
        with torch.no_grad():
            next_action, entropy = policy(self.model_action, next_state, 1, self.as_printed)
            value = torch.min(self.model_value_next1(next_state, next_action), self.model_value_next2(next_state, next_action))
            target = (reward + 8) / 8 + 0.99 * (1 - over) * (value + self.alpha.exp() * entropy)
            if self.weight:
                limit = 1 if "range" in self.as_printed else 2
                random_torques = torch.empty(64, 5).uniform_(-limit, limit)
                sampled = policy(self.model_action, torch.cat([state, next_state]), 5, self.as_printed)
        for name in ("value1", "value2"):
            critic = getattr(self, f"model_{name}")
            loss = torch.nn.functional.mse_loss(critic(state, action), target)
            if self.weight:
                loss = loss + self.weight * self.penalty(critic, state, action, random_torques, *sampled)
            self.descend(name, loss)
        new_action, entropy = policy(self.model_action, state, 1, self.as_printed)
        value = torch.min(self.model_value1(state, new_action), self.model_value2(state, new_action))
        self.descend("action", (-self.alpha.exp() * entropy - value).mean())
        self.descend("alpha", ((entropy + 1).detach() * self.alpha.exp()).mean())
        with torch.no_grad():
            for k in "12":
                target, critic = getattr(self, f"model_value_next{k}"), getattr(self, f"model_value{k}")
                for old, new in zip(target.parameters(), critic.parameters()):
                    old.copy_(0.995 * old + 0.005 * new)


@pytest.fixture
def double():
    """Double precision, so that two orders of summation differ by 1e-15 and not by 1e-7, which Adam would magnify."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("make", [SAC, CQL])
@pytest.mark.parametrize("as_printed", EACH, ids=lambda names: "+".join(names) or "corrected")
def test_twenty_updates_equal_a_plain_reference(make, as_printed, double):
    torch.manual_seed(4)
    agent = make(as_printed)
    plain = PlainUpdate(agent, as_printed, getattr(agent, "weight", 0))
    for update in range(20):
        rows = [x.double() for x in batch(seed=update)]
        with_seed(update, agent.train, *rows)
        with_seed(update, plain.train, *rows)
    assert agent.alpha.item() == pytest.approx(plain.alpha.item(), rel=1e-12)
    for name in ("model_action", "model_value1", "model_value2", "model_value_next1", "model_value_next2"):
        for mine, reference in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters()):
            torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [SAC, CQL])
def test_replayed_gradients_are_autograds_to_the_last_bit(make):
    torch.manual_seed(4)
    agent = make()
    for update in range(3):                             # the first call records, the later ones replay other batches
        rows = batch(seed=update)
        for function, inputs in ((agent._get_gradients_value, rows), (agent._get_gradients_action, rows[:1])):
            replayed, direct = with_seed(update, agent._replay, function, *inputs), with_seed(update, function, *inputs)
            assert all(torch.equal(mine, autograds) for mine, autograds in zip(replayed, direct, strict=True))
        with torch.no_grad():                           # a record follows what changes in place, the temperature too
            for p in (agent.alpha, *agent.model_action.parameters(), *agent.values.parameters(), *agent.values_next.parameters()):
                p.mul_(1.1)


def test_a_copy_of_an_agent_learns_on_its_own():
    agent, rows = CQL(), batch()
    agent.train(*rows)
    other = copy.deepcopy(agent)
    before = [p.clone() for p in agent.values.parameters()]
    with_seed(1, other.train, *rows)
    assert all(torch.equal(old, new) for old, new in zip(before, agent.values.parameters()))
    with_seed(1, agent.train, *rows)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(agent.values.parameters(), other.values.parameters()))
    torch.testing.assert_close(other.values(*rows[:2])[1], other.model_value2(*rows[:2]))


def test_other_batch_sizes_train_too():
    agent = CQL()
    for b in (1, 64, 7, 64):
        agent.train(*batch(b))
    assert all(p.isfinite().all() for p in agent.values.parameters())


def test_target_stops_at_terminal_states_only():
    agent, (_, _, reward, next_state, over) = SAC(), batch()
    target = agent._get_target(reward, next_state, over)
    assert torch.equal(target[over == 1], reward[over == 1])
    assert (target[over == 0] != reward[over == 0]).all()


def test_adam_equals_torchs():
    mine, reference = torch.tensor([1.0, -2.0, 3.0]).requires_grad_(), torch.tensor([1.0, -2.0, 3.0]).requires_grad_()
    ours, theirs = Adam([mine], lr=0.1), torch.optim.Adam([reference], lr=0.1)
    for k in range(50):
        ours.step(torch.autograd.grad((mine ** 4 * (k % 3)).sum(), [mine]))
        theirs.zero_grad()
        (reference ** 4 * (k % 3)).sum().backward()
        theirs.step()
    torch.testing.assert_close(mine, reference)


def test_soft_update_moves_half_a_percent():
    agent = SAC()
    before = [p.clone() for p in agent.model_value_next1.parameters()]
    with torch.no_grad():
        for p in agent.model_value1.parameters():
            p.add_(1)
    agent._soft_update(agent.model_value1, agent.model_value_next1)
    for old, new in zip(before, agent.model_value_next1.parameters()):
        torch.testing.assert_close(new, old + 0.005)


def test_pair_is_its_two_critics_and_shares_their_weights():
    agent, (state, action, *_) = SAC(), batch()
    for _ in range(2):
        both = agent.values(state, action)
        assert both.shape == (2, 64, 1)
        torch.testing.assert_close(both[0], agent.model_value1(state, action))
        torch.testing.assert_close(both[1], agent.model_value2(state, action))
        agent.model_value2.load_state_dict(SAC().model_value2.state_dict())     # loading one critic changes the pair


@pytest.mark.parametrize("make", [SAC, CQL, Data])
def test_unknown_erratum_is_an_error_that_lists_them_all(make):
    with pytest.raises(UserError, match="jacobian, sign, range, timeout, epsilon"):
        make(as_printed={"sing"})
