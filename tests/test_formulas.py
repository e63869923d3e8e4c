"""Every formula against an independent reference: torch.distributions, quadrature, a plain update
in double precision, or the page's own lines."""
import copy
import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import linear, mse_loss, relu, softplus

import cql_pendulum
from cql_pendulum import BC, CQL, ERRATA, SAC, Data

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


def mean_and_spread(model, state):
    """The policy's network, written out: mu and std before the tanh, [b, 1] each."""
    parts = dict(model.named_parameters())
    hidden = relu(linear(state, parts["fc_state.0.weight"], parts["fc_state.0.bias"]))
    mu = linear(hidden, parts["fc_mu.weight"], parts["fc_mu.bias"])
    std = softplus(linear(hidden, parts["fc_std.0.weight"], parts["fc_std.0.bias"]))
    return mu, std


def critic_value(model, state, action):
    """The critic's network, written out, [b, 1]."""
    w1, b1, w2, b2, w3, b3 = model.parameters()
    hidden = relu(linear(torch.cat([state, action], dim=1), w1, b1))
    return linear(relu(linear(hidden, w2, b2)), w3, b3)


def policy(model, state, n, as_printed=()):
    """The page's forward by torch.distributions: n torques and their entropies, [b, n]."""
    mu, std = mean_and_spread(model, state)
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
    for make in (SAC, CQL, BC, Data):
        assert make().as_printed == make(None).as_printed == frozenset()
        assert make("timeout").as_printed == make(["timeout"]).as_printed == {"timeout"}
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


def test_layers_and_their_sizes_are_the_pages():
    agent = SAC()
    shapes = [tuple(p.shape) for p in agent.model_action.parameters()]
    assert shapes == [(128, 3), (128,), (1, 128), (1,), (1, 128), (1,)]
    for critic in (agent.model_value1, agent.model_value2, agent.model_value_next1):
        shapes = [tuple(p.shape) for p in critic.parameters()]
        assert shapes == [(128, 4), (128,), (128, 128), (128,), (1, 128), (1,)]


@torch.no_grad()
def test_critic_is_three_layers_with_two_relus():
    """With weights that are large enough for another activation to show."""
    agent, (state, action, *_) = SAC(), batch()
    for critic in (agent.model_value1, agent.model_value2):
        for p in critic.parameters():
            p.mul_(3)
        value = critic(state, action)
        assert value.shape == (64, 1) and value.std() > 1
        torch.testing.assert_close(value, critic_value(critic, state, action))


@torch.no_grad()
def test_torques_are_two_tanh_of_a_gaussian():
    """20,000 torques of each of three states: their quantiles are the Gaussian's."""
    agent, (state, *_) = SAC(), batch(3)
    agent.model_action.fc_std[0].bias.fill_(-1.0)       # few torques where float32's tanh is 1
    agent.model_action.fc_std[0].weight.mul_(0.1)
    torques, _ = agent.model_action(state, 20_000)
    assert torques.abs().max() <= 2
    mu, std = mean_and_spread(agent.model_action, state)
    for level in (0.1, 0.5, 0.9):
        expected = 2 * torch.tanh(Normal(mu, std).icdf(torch.tensor(level)))
        found = torques.quantile(level, dim=1, keepdim=True)
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@torch.no_grad()
def test_entropy_is_the_average_of_minus_the_log_density():
    """Its mean over many torques against quadrature over torque / 2."""
    agent, (state, *_) = SAC(), batch(3)
    _, entropy = agent.model_action(state, 100_000)
    mu, std = mean_and_spread(agent.model_action, state)
    x = mu + std * torch.linspace(-8, 8, 20_001)
    density = Normal(mu, std).log_prob(x).exp()
    log_slope = TanhTransform().log_abs_det_jacobian(x, x.tanh())
    exact = torch.trapezoid(density * (log_slope - Normal(mu, std).log_prob(x)), x, dim=1)
    torch.testing.assert_close(entropy.mean(dim=1), exact, atol=0.02, rtol=0)


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
        action, entropy = agent.model_action(batch(4)[0], 100_000)
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


def test_the_penalty_may_be_negative():
    """A critic that is right, and has the data's torque far above all others."""
    agent = CQL()
    state, _, _, next_state, _ = batch(7)
    agent.model_action = lambda state, n: (torch.full([14, 5], -2.0), torch.zeros(14, 5))
    action = torch.full([7, 1], 3.0)            # more than 1 from every other torque

    def q(state, torque):
        return -20 * (torque - 3).abs()

    torch.manual_seed(0)
    loss = agent._get_loss_value(q, torch.zeros(7, 1), state, action, next_state)
    torch.manual_seed(0)
    torques = torch.empty(7, 5).uniform_(-1, 1) * 2
    terms = torch.cat([2 * q(state, torques).exp(), torch.full([7, 10], math.exp(-100))], dim=1)
    assert loss.item() == pytest.approx(5 * terms.sum(dim=1).log().mean().item(), rel=1e-5)
    assert loss < -50


def test_no_gradient_of_the_critics_loss_reaches_the_policy():
    agent, (state, action, _, next_state, _) = CQL(), batch()
    agent._get_loss_value(agent.model_value1, action, state, action, next_state).backward()
    assert all(p.grad is None for p in agent.model_action.parameters())
    assert all(p.grad is not None for p in agent.model_value1.parameters())


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

NOTEBOOK = {"GAMMA": 0.99, "TAU": 0.005, "TEMPERATURE": 0.01, "TARGET_ENTROPY": -1.0, "SCALE": 8,
            "SAMPLES": 5, "WEIGHT": 5.0, "LR_VALUE": 3e-3, "LR_ACTION": 3e-4}


class PlainUpdate:
    """SAC and CQL with nothing shared: torch.distributions, an optimizer for each part, one loss
    after another, one term after another, every constant as the notebook has it.

    It draws in the module's order: target; random torques and policy for each critic; actor."""

    def __init__(self, agent, as_printed=(), constants=()):
        self.as_printed = as_printed
        self.c = NOTEBOOK | dict(constants)
        self.penalty = isinstance(agent, CQL)
        for name in NETWORKS:
            setattr(self, name, copy.deepcopy(getattr(agent, name)))
        self.alpha = torch.tensor(math.log(self.c["TEMPERATURE"]), requires_grad=True)
        self.optimizers = {}
        for name, parameters, lr in (
                ("value1", self.model_value1.parameters(), "LR_VALUE"),
                ("value2", self.model_value2.parameters(), "LR_VALUE"),
                ("action", self.model_action.parameters(), "LR_ACTION"),
                ("alpha", [self.alpha], "LR_ACTION")):
            self.optimizers[name] = torch.optim.Adam(parameters, lr=self.c[lr])

    def descend(self, name, loss):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[name].step()

    @torch.no_grad()
    def torques(self, state, next_state):
        """Torques of each kind for each state and minus the log of their densities, [64, 3 n]."""
        n = self.c["SAMPLES"]
        limit = 1 if "range" in self.as_printed else 2
        sign = -1 if "sign" in self.as_printed else 1
        random_torques = torch.empty(64, n).uniform_(-limit, limit)
        states = torch.cat([state, next_state])
        torques, entropy = policy(self.model_action, states, n, self.as_printed)
        return (torch.cat([random_torques, torques[:64], torques[64:]], dim=1),
                torch.cat([torch.full([64, n], math.log(2)), sign * entropy[:64],
                           sign * entropy[64:]], dim=1))

    def loss_value(self, critic, target, state, action, next_state):
        loss = ((critic_value(critic, state, action) - target) ** 2).mean()
        if not self.penalty:
            return loss
        torques, log_weights = self.torques(state, next_state)
        terms = [critic_value(critic, state, u[:, None])[:, 0] + w
                 for u, w in zip(torques.T, log_weights.T)]
        highest = torch.stack(terms).exp().sum(dim=0).log().mean()
        return loss + self.c["WEIGHT"] * (highest - critic_value(critic, state, action).mean())

    def train(self, state, action, reward, next_state, over):
        scale = self.c["SCALE"]
        with torch.no_grad():
            next_action, entropy = policy(self.model_action, next_state, 1, self.as_printed)
            value = torch.min(critic_value(self.model_value_next1, next_state, next_action),
                              critic_value(self.model_value_next2, next_state, next_action))
            value = value + self.alpha.exp() * entropy
            target = (reward + scale) / scale + self.c["GAMMA"] * (1 - over) * value
        losses = [self.loss_value(critic, target, state, action, next_state)
                  for critic in (self.model_value1, self.model_value2)]
        self.descend("value1", losses[0])
        self.descend("value2", losses[1])
        torque, entropy = policy(self.model_action, state, 1, self.as_printed)
        value = torch.min(critic_value(self.model_value1, state, torque),
                          critic_value(self.model_value2, state, torque))
        temperature = self.alpha.exp()
        loss_alpha = ((entropy.detach() - self.c["TARGET_ENTROPY"]) * temperature).mean()
        self.descend("action", (-temperature.detach() * entropy - value).mean())
        self.descend("alpha", loss_alpha)
        tau = self.c["TAU"]
        with torch.no_grad():
            for k in "12":
                critic, target_critic = (getattr(self, f"model_value{k}"),
                                         getattr(self, f"model_value_next{k}"))
                for new, old in zip(critic.parameters(), target_critic.parameters()):
                    old.copy_((1 - tau) * old + tau * new)


def agrees_with_the_plain_update(agent, plain, updates):
    for update in range(updates):
        rows = [x.double() for x in batch(seed=update)]
        with_seed(update, agent.train, *rows)
        with_seed(update, plain.train, *rows)
    assert agent.alpha.item() == pytest.approx(plain.alpha.item(), rel=1e-12)
    for name in NETWORKS:
        pairs = zip(getattr(agent, name).parameters(), getattr(plain, name).parameters())
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("as_printed", EACH)
@pytest.mark.parametrize("make", [SAC, CQL])
def test_train_is_the_plain_update(make, as_printed, double):
    agent = make(as_printed)
    agrees_with_the_plain_update(agent, PlainUpdate(agent, as_printed), updates=10)


@pytest.mark.parametrize("name, value", [
    ("GAMMA", 0.8), ("TAU", 0.1), ("TEMPERATURE", 0.5), ("TARGET_ENTROPY", 0.5), ("SCALE", 2),
    ("SAMPLES", 3), ("WEIGHT", 0.7), ("LR_VALUE", 1e-2), ("LR_ACTION", 1e-2)])
def test_a_changed_constant_acts_where_the_plain_update_has_it(name, value, double, monkeypatch):
    monkeypatch.setattr(cql_pendulum, name, value)
    agent = CQL()
    agrees_with_the_plain_update(agent, PlainUpdate(agent, constants={name: value}), updates=3)


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


def constant_critics(agent, low, high):
    """Critics that answer low and high in all states, target critics likewise."""
    with torch.no_grad():
        for name in NETWORKS[1:]:
            for p in getattr(agent, name).parameters():
                p.zero_()
            getattr(agent, name).sequential[-1].bias.fill_(low if name[-1] == "1" else high)


@pytest.mark.parametrize("low, high", [(-3.0, 7.0), (7.0, -3.0)])
def test_target_has_the_smaller_critic_and_the_entropy_bonus(low, high):
    """By hand, for constant critics and a temperature of 2; whichever critic is the smaller one."""
    agent, (_, _, reward, next_state, over) = SAC(), batch()
    constant_critics(agent, low, high)
    agent.alpha.data.fill_(math.log(2))
    target = with_seed(4, agent._get_target, reward, next_state, over)
    _, entropy = with_seed(4, policy, agent.model_action, next_state, 1)
    expected = reward + 0.99 * (1 - over) * (-3 + 2 * entropy)
    assert not target.requires_grad
    torch.testing.assert_close(target, expected.detach())


@pytest.mark.parametrize("low, high", [(-3.0, 7.0), (7.0, -3.0)])
def test_the_actor_asks_the_smaller_critic_and_likes_entropy(low, high):
    agent, (state, *_) = SAC(), batch()
    constant_critics(agent, low, high)
    agent.alpha.data.fill_(math.log(2))
    loss, entropy = with_seed(4, agent._get_loss_action, state)
    assert loss.item() == pytest.approx((-2 * entropy).mean().item() + 3, rel=1e-5)


def test_target_stops_at_terminal_states_only():
    agent, (_, _, reward, next_state, over) = SAC(), batch()
    target = agent._get_target(reward, next_state, over)
    assert torch.equal(target[over == 1], reward[over == 1])
    assert (target[over == 0] != reward[over == 0]).all()


def test_no_reward_of_pendulum_is_worth_more_than_one_or_much_less_than_minus_one():
    """Terminal states, so that the target is the scaled reward alone: (reward + 8) / 8."""
    seen = []

    class Watching(SAC):
        def _get_loss_value(self, model_value, target, *rows):
            seen.append(target)
            return super()._get_loss_value(model_value, target, *rows)

    state, action, _, next_state, _ = batch(3)
    reward = torch.tensor([[0.0], [-8.0], [-16.2736]])
    Watching().train(state, action, reward, next_state, torch.ones(3, 1, dtype=torch.long))
    torch.testing.assert_close(seen[0], torch.tensor([[1.0], [0.0], [-1.0342]]))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("spread, rises", [(-8.0, True), (0.5, False)])
def test_temperature_rises_when_the_policy_is_narrow_and_falls_when_it_is_wide(spread, rises):
    agent = SAC()
    with torch.no_grad():
        agent.model_action.fc_std[0].weight.zero_()
        agent.model_action.fc_std[0].bias.fill_(spread)
        agent.model_action.fc_mu.weight.mul_(0.1)
    before = agent.alpha.item()
    assert before == pytest.approx(math.log(0.01))
    agent.train(*batch())
    assert (agent.alpha.item() > before) == rises
    assert abs(agent.alpha.item() - before) == pytest.approx(3e-4, rel=1e-2)   # Adam's first step


def test_the_target_critics_follow_at_half_a_percent():
    agent = SAC()
    before = copy.deepcopy(agent.model_value_next1)
    with torch.no_grad():
        for p in agent.model_value1.parameters():
            p.add_(1)
    source = copy.deepcopy(agent.model_value1)
    agent._soft_update(agent.model_value1, agent.model_value_next1)
    pairs = zip(before.parameters(), agent.model_value_next1.parameters())
    for old, new in pairs:
        torch.testing.assert_close(new, old + 0.005)
    assert all(map(torch.equal, source.parameters(), agent.model_value1.parameters()))


def test_no_gradient_of_the_actors_loss_stays_in_the_critics():
    """What a learner who prints gradients after an update sees is the critics' own loss."""
    agent = CQL()
    other = copy.deepcopy(agent)
    other._get_loss_action = lambda state: (
        other.model_action(state)[0].sum() * 0, torch.zeros(64, 1))
    with_seed(0, agent.train, *batch())
    with_seed(0, other.train, *batch())
    pairs = zip(agent.model_value1.parameters(), other.model_value1.parameters())
    for mine, theirs in pairs:
        assert torch.equal(mine.grad, theirs.grad)


# ---- behaviour cloning ----

def test_cloning_climbs_the_log_density_of_the_datas_torques(double):
    """Against torch.distributions' squashed Gaussian and an Adam of its own."""
    agent = BC()
    model = copy.deepcopy(agent.model_action)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    before = copy.deepcopy(vars(agent))
    for k in range(5):
        state, action, *rest = (x.double() for x in batch(seed=k))
        action[0], action[1], action[2] = 2.0, -2.0, 1.9995
        agent.train(state, action, *rest)
        tanh = (action / 2).clamp(-0.9999, 0.9999)      # the density is zero at 2 N m
        squashed = torch.distributions.TransformedDistribution(
            Normal(*mean_and_spread(model, state)), TanhTransform())
        loss = -squashed.log_prob(tanh).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(agent.model_action.parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert agent.alpha == before["alpha"]
    for name in NETWORKS[1:]:
        assert all(map(torch.equal, before[name].parameters(), getattr(agent, name).parameters()))


def test_a_clone_promises_nothing():
    state, action, *_ = batch(4)
    value = BC().model_value1(state, action)
    assert value.shape == (4, 1) and value.isnan().all()
