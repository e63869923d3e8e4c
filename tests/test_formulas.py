"""Every formula against an independent reference: torch.distributions, quadrature, a plain update
in double precision, or the page's own lines."""
import copy
import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import linear, mse_loss, softplus

import cql_pendulum
from cql_pendulum import CQL, ERRATA, SAC, Data

EACH = [(), *((name,) for name in ERRATA), tuple(ERRATA)]
NETWORKS = ("model_action", "model_value1", "model_value2", "model_value_next1",
            "model_value_next2")


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
    """The page's forward by torch.distributions: n torques and their entropies, [b, n]."""
    hidden = linear(state, model.fc_state[0].weight, model.fc_state[0].bias).clamp(min=0)
    mu = hidden @ model.fc_mu.weight.T + model.fc_mu.bias
    std = softplus(hidden @ model.fc_std[0].weight.T + model.fc_std[0].bias)
    dist = Normal(mu.expand(-1, n), std.expand(-1, n))
    sample = dist.mean + dist.stddev * torch.randn(len(state), n)
    action = torch.tanh(sample)
    if "jacobian" in as_printed:
        log_slope = (1 - action.tanh() ** 2).log()
    else:
        log_slope = TanhTransform().log_abs_det_jacobian(sample, action)
    return 2 * action, -(dist.log_prob(sample) - log_slope)


def with_seed(seed, function, *arguments):
    torch.manual_seed(seed)
    return function(*arguments)


@pytest.fixture
def double():
    """Two orders of summation then differ by 1e-15 and not by 1e-7, which Adam would magnify."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


# ---- the errata ----

def test_there_are_four_errata_and_the_default_restores_none():
    assert list(ERRATA) == ["jacobian", "sign", "range", "timeout"]
    assert all(make().as_printed == frozenset() for make in (SAC, CQL, Data))
    assert CQL("sign").as_printed == CQL(["sign"]).as_printed == {"sign"}
    assert CQL(ERRATA).as_printed == CQL(ERRATA).model_action.as_printed == set(ERRATA)


@pytest.mark.parametrize("make", [SAC, CQL, Data])
def test_unknown_erratum_is_an_error_that_lists_them_all(make):
    with pytest.raises(ValueError, match="sing; there are jacobian, sign, range, timeout$"):
        make(as_printed={"sing"})


def test_a_wrong_change_of_errata_changes_none():
    agent = CQL("sign")
    with pytest.raises(ValueError, match="epsilon"):
        agent.as_printed = {"epsilon"}
    assert agent.as_printed == agent.model_action.as_printed == {"sign"}


# ---- the policy ----

@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("as_printed", [(), ("jacobian",)])
def test_policy_agrees_with_torch_distributions(as_printed, n):
    agent, (state, *_) = SAC(as_printed), batch()
    action, entropy = with_seed(3, agent.model_action, state, n)
    expected = with_seed(3, policy, agent.model_action, state, n, as_printed)
    assert action.shape == entropy.shape == (64, n)
    torch.testing.assert_close((action, entropy), expected)


def test_the_pages_1e_7_never_acts():
    """As printed its argument is a tanh: the slope is at least 0.41."""
    tanh = torch.linspace(-1, 1, 10_001)
    page = (1 - tanh.tanh() ** 2 + 1e-7).log()
    torch.testing.assert_close(page, (1 - tanh.double().tanh() ** 2).log().float())


@pytest.mark.parametrize("far", [-17.0, 12.0])
def test_a_saturated_policy_is_pulled_back(far):
    """Where float32's tanh is 1, d log(1 - tanh(x)^2) / dx is still -2 tanh(x)."""
    agent, (state, *_) = SAC(), batch()
    with torch.no_grad():
        agent.model_action.fc_mu.weight.zero_()
        agent.model_action.fc_mu.bias.fill_(far)
        agent.model_action.fc_std[0].bias.fill_(-3.0)
    action, entropy = with_seed(0, agent.model_action, state)
    assert (action.abs() == 2).all()
    slope, = torch.autograd.grad(entropy.mean(), agent.model_action.fc_mu.bias)
    assert slope.item() == pytest.approx(-2 * math.copysign(1, far), rel=1e-5)
    x = torch.tensor([far], dtype=torch.double, requires_grad=True)
    exact, = torch.autograd.grad((1 - x.tanh() ** 2).log().sum(), x)
    assert exact.item() == pytest.approx(-2 * math.copysign(1, far), rel=0.2)


def density_integral(agent):
    """The density's integral over torque / 2, for four states, by the trapezoidal rule."""
    with torch.no_grad():
        action, entropy = agent.model_action(batch(4)[0], 200_000)
    action, order = (action.double() / 2).sort(dim=1)
    return torch.trapezoid(torch.exp(-entropy.double().gather(1, order)), action, dim=1)


def test_density_integrates_to_one_only_when_corrected():
    agent, ones = SAC(), torch.ones(4, dtype=torch.double)
    torch.testing.assert_close(density_integral(agent), ones, atol=5e-3, rtol=0)
    agent.as_printed = {"jacobian"}
    assert (density_integral(agent) < 0.95).all()


# ---- the penalty ----

@pytest.mark.parametrize("as_printed, right", [
    ((), [True, True, True]),
    (("sign",), [True, False, False]),
    (("range",), [False, True, True]),
    (("jacobian",), [True, False, False]),
    (("timeout",), [True, True, True]),
    (tuple(ERRATA), [False, False, False]),
])
def test_each_kind_of_torque_estimates_the_log_integral_of_exp_q(as_printed, right, monkeypatch):
    """The logsumexp's 3 n terms for a Q known in closed form and n = 100,000, by quadrature."""
    n, found = 100_000, []
    torch.manual_seed(1)
    agent = CQL(as_printed)
    with torch.no_grad():                   # a policy as wide as the range: n torques are enough
        agent.model_action.fc_mu.weight.mul_(0.1)
        agent.model_action.fc_std[0].weight.mul_(0.1)
        agent.model_action.fc_std[0].bias.fill_(0.5)
    state, action, _, next_state, _ = batch(4)

    def q(state, torque):                   # steep: half of the range and a wrong weight show
        return torch.sin(2 * torque) + 0.5 * torque ** 2 + state[..., :1]

    def logsumexp(terms, dim):
        found.append(terms)
        return terms.exp().sum(dim).log()

    monkeypatch.setattr(cql_pendulum, "SAMPLES", n)
    monkeypatch.setattr(torch, "logsumexp", logsumexp)
    agent._get_loss_value(q, torch.zeros(4, 1), state, action, next_state)
    terms, = found
    assert terms.shape == (4, 3 * n)
    torque = torch.linspace(-2, 2, 20_001)
    exact = torch.trapezoid(q(state, torque).exp(), torque / 2).log()      # per unit of tanh
    for kind, kinds_terms, is_right in zip(["rand", "curr", "next"], terms.split(n, dim=1), right):
        error = (kinds_terms.exp().mean(dim=1).log() - exact).abs()
        assert (error.max() < 0.02) if is_right else (error.min() > 0.05), (kind, error)


@pytest.mark.parametrize("weight", [0.0, 3.0, None])
def test_penalty_is_logsumexp_of_the_fifteen_minus_q_of_the_data(weight):
    """Written out with the math module, term by term; no weight given is the page's 5."""
    agent = CQL() if weight is None else CQL(weight=weight)
    state, action, _, next_state, _ = batch(7)
    torques, entropies = torch.empty(14, 5).uniform_(-2, 2), torch.randn(14, 5)
    target = torch.randn(7, 1)
    asked = []

    def model_action(state, n):
        asked.append((state, n))
        return torques, entropies

    agent.model_action = model_action
    for critic in (agent.model_value1, agent.model_value2):
        loss = with_seed(0, agent._get_loss_value, critic, target, state, action, next_state)
        random_torques = 2 * with_seed(0, torch.empty(7, 5).uniform_, -1, 1)
        mse, gap = 0.0, 0.0
        for k in range(7):
            def value(u):
                return critic(state[k:k + 1], torch.as_tensor(u).reshape(1, 1)).item()
            mse += (value(action[k]) - target[k].item()) ** 2 / 7
            terms = [math.exp(value(u)) / 0.5 for u in random_torques[k]]
            for row in (k, 7 + k):          # the policy's torques in the state and in the next
                terms += [math.exp(value(u)) / math.exp(-entropy)
                          for u, entropy in zip(torques[row], entropies[row])]
            gap += (math.log(sum(terms)) - value(action[k])) / 7
        assert loss.shape == ()
        weight = 5.0 if weight is None else weight
        assert loss.item() == pytest.approx(mse + weight * gap, rel=1e-5)
    for state_and_next, n in asked:
        assert n == 5 and torch.equal(state_and_next, torch.cat([state, next_state]))


def test_no_gradient_of_the_critics_loss_reaches_the_policy():
    agent, (state, action, _, next_state, _) = CQL(), batch()
    agent._get_loss_value(agent.model_value1, action, state, action, next_state).backward()
    assert all(p.grad is None for p in agent.model_action.parameters())
    assert all(p.grad is not None for p in agent.model_value1.parameters())


@pytest.mark.parametrize("weight", [-1, math.inf, math.nan])
def test_an_impossible_weight_is_an_error(weight):
    with pytest.raises(ValueError, match=f"weight {weight}"):
        CQL(weight=weight)


def page_loss_value(self, model_value, target, state, action, next_state):
    """CQL._get_loss_value in the page's own lines; model_action is the page's too."""
    value = model_value(state, action)
    loss_value = mse_loss(value, target)
    state = state.unsqueeze(1).repeat(1, 5, 1).reshape(-1, 3)
    next_state = next_state.unsqueeze(1).repeat(1, 5, 1).reshape(-1, 3)
    rand_action = torch.empty([len(state), 1]).uniform_(-1, 1)
    curr_action, curr_entropy = page_model_action(self.model_action, state)
    next_action, next_entropy = page_model_action(self.model_action, next_state)
    value_rand = model_value(state, rand_action).reshape(-1, 5, 1)
    value_curr = model_value(state, curr_action).reshape(-1, 5, 1)
    value_next = model_value(state, next_action).reshape(-1, 5, 1)
    curr_entropy = curr_entropy.detach().reshape(-1, 5, 1)
    next_entropy = next_entropy.detach().reshape(-1, 5, 1)
    value_rand -= math.log(0.5)
    value_curr -= curr_entropy
    value_next -= next_entropy
    value_cat = torch.cat([value_rand, value_curr, value_next], dim=1)
    loss_cat = torch.logsumexp(value_cat, dim=1).mean()
    loss_value += 5.0 * (loss_cat - value.mean())
    return loss_value


def page_model_action(self, state):
    """ModelAction.forward in the page's own lines."""
    state = self.fc_state(state)
    mu = self.fc_mu(state)
    std = self.fc_std(state)
    dist = torch.distributions.Normal(mu, std)
    sample = dist.rsample()
    action = torch.tanh(sample)
    log_prob = dist.log_prob(sample)
    entropy = log_prob - (1 - action.tanh()**2 + 1e-7).log()
    entropy = -entropy
    return action * 2, entropy


@torch.no_grad()
def test_as_printed_penalty_is_the_pages(double):
    """The same torques are drawn in the same order, so one seed gives both the same number."""
    printed, right = CQL(ERRATA), CQL()
    for name in NETWORKS:
        getattr(right, name).load_state_dict(getattr(printed, name).state_dict())
    state, action, _, next_state, _ = (x.double() for x in batch())
    arguments = printed.model_value1, torch.zeros(64, 1), state, action, next_state
    for seed in range(5):
        page = with_seed(seed, page_loss_value, printed, *arguments).item()
        assert with_seed(seed, printed._get_loss_value, *arguments).item() == pytest.approx(page)
        assert abs(with_seed(seed, right._get_loss_value, *arguments).item() - page) > 1
    page = with_seed(0, page_model_action, printed.model_action, state)
    torch.testing.assert_close(with_seed(0, printed.model_action, state), page, atol=1e-6, rtol=0)


# ---- whole updates ----

class PlainUpdate:
    """SAC and CQL with nothing shared: torch.distributions, an optimizer for each part, one loss
    after another, one term after another, every constant as the notebook has it.

    It draws in the module's order: target; random torques and policy for each critic; actor."""

    def __init__(self, agent, as_printed, weight):
        self.as_printed, self.weight = as_printed, weight
        for name in NETWORKS:
            setattr(self, name, copy.deepcopy(getattr(agent, name)))
        self.alpha = torch.tensor(math.log(0.01), requires_grad=True)
        self.optimizers = {name: torch.optim.Adam(parameters, lr=lr) for name, parameters, lr in (
            ("value1", self.model_value1.parameters(), 3e-3),
            ("value2", self.model_value2.parameters(), 3e-3),
            ("action", self.model_action.parameters(), 3e-4), ("alpha", [self.alpha], 3e-4))}

    def descend(self, name, loss):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[name].step()

    @torch.no_grad()
    def torques(self, state, next_state):
        """Fifteen torques for each state and minus the log of their densities, [64, 15]."""
        limit, sign = 1 + ("range" not in self.as_printed), 1 - 2 * ("sign" in self.as_printed)
        random_torques = torch.empty(64, 5).uniform_(-limit, limit)
        states = torch.cat([state, next_state])
        torques, entropy = policy(self.model_action, states, 5, self.as_printed)
        return (torch.cat([random_torques, torques[:64], torques[64:]], dim=1),
                torch.cat([torch.full([64, 5], math.log(2)), sign * entropy[:64],
                           sign * entropy[64:]], dim=1))

    def loss_value(self, critic, target, state, action, next_state):
        loss = ((critic(state, action) - target) ** 2).mean()
        if not self.weight:
            return loss
        torques, log_weights = self.torques(state, next_state)
        terms = [critic(state, u[:, None])[:, 0] + w for u, w in zip(torques.T, log_weights.T)]
        highest = torch.stack(terms).exp().sum(dim=0).log().mean()
        return loss + self.weight * (highest - critic(state, action).mean())

    def train(self, state, action, reward, next_state, over):
        with torch.no_grad():
            next_action, entropy = policy(self.model_action, next_state, 1, self.as_printed)
            value = torch.min(self.model_value_next1(next_state, next_action),
                              self.model_value_next2(next_state, next_action))
            value = value + self.alpha.exp() * entropy
            target = (reward + 8) / 8 + 0.99 * (1 - over) * value
        for name in ("value1", "value2"):
            critic = getattr(self, f"model_{name}")
            self.descend(name, self.loss_value(critic, target, state, action, next_state))
        new_action, entropy = policy(self.model_action, state, 1, self.as_printed)
        value = torch.min(self.model_value1(state, new_action),
                          self.model_value2(state, new_action))
        self.descend("action", (-self.alpha.detach().exp() * entropy - value).mean())
        self.descend("alpha", ((entropy + 1).detach() * self.alpha.exp()).mean())
        with torch.no_grad():
            for k in "12":
                old, new = getattr(self, f"model_value_next{k}"), getattr(self, f"model_value{k}")
                for p, q in zip(old.parameters(), new.parameters()):
                    p.copy_(0.995 * p + 0.005 * q)


@pytest.mark.parametrize("make", [SAC, CQL])
@pytest.mark.parametrize("as_printed", EACH, ids=lambda names: "+".join(names) or "corrected")
def test_twenty_updates_equal_a_plain_reference(make, as_printed, double):
    agent = make(as_printed)
    plain = PlainUpdate(agent, as_printed, 5.0 if make is CQL else 0)
    for update in range(20):
        rows = [x.double() for x in batch(seed=update)]
        with_seed(update, agent.train, *rows)
        with_seed(update, plain.train, *rows)
    assert agent.alpha.item() == pytest.approx(plain.alpha.item(), rel=1e-12)
    for name in NETWORKS:
        pairs = zip(getattr(agent, name).parameters(), getattr(plain, name).parameters())
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_targets_begin_as_their_critics_and_the_critics_differ():
    agent = SAC()
    for k in "12":
        critic, target = getattr(agent, f"model_value{k}"), getattr(agent, f"model_value_next{k}")
        for p, q in zip(critic.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, q) and p is not q
    pairs = zip(agent.model_value1.parameters(), agent.model_value2.parameters())
    assert all(not torch.equal(p, q) for p, q in pairs)


def test_a_copy_of_an_agent_learns_on_its_own():
    agent, rows = CQL(), batch()
    agent.train(*rows)
    other = copy.deepcopy(agent)
    before = [p.clone() for p in agent.model_value1.parameters()]
    with_seed(1, other.train, *rows)
    assert all(map(torch.equal, before, agent.model_value1.parameters()))
    with_seed(1, agent.train, *rows)
    assert all(map(torch.equal, other.model_value1.parameters(), agent.model_value1.parameters()))


def test_the_actors_loss_gives_the_critics_no_gradient():
    agent, (state, *_) = SAC(), batch()
    agent._backward_action(state)
    critics = [*agent.model_value1.parameters(), *agent.model_value2.parameters()]
    assert all(p.grad is None for p in critics)
    assert all(p.grad is not None for p in (agent.alpha, *agent.model_action.parameters()))


def test_target_stops_at_terminal_states_only():
    agent, (_, _, reward, next_state, over) = SAC(), batch()
    target = agent._get_target(reward, next_state, over)
    assert not target.requires_grad
    assert torch.equal(target[over == 1], reward[over == 1])
    assert (target[over == 0] != reward[over == 0]).all()


def test_soft_update_moves_half_a_percent():
    agent = SAC()
    before = [p.clone() for p in agent.model_value_next1.parameters()]
    with torch.no_grad():
        for p in agent.model_value1.parameters():
            p.add_(1)
    agent._soft_update(agent.model_value1, agent.model_value_next1)
    for old, new in zip(before, agent.model_value_next1.parameters()):
        torch.testing.assert_close(new, old + 0.005)
