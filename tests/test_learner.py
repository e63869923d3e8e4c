"""A learner's first experiments: whatever is edited, set or looked at acts at every update."""
import copy
import functools
import math
import sys

import numpy as np
import pytest
import torch

import cql_pendulum
import test_formulas
from cql_pendulum import (
    BC, CQL, ERRATA, SAC, Data, UserError, env, load_agent, read_agent, restore_agent, save_agent,
    train_teacher)

batch = functools.cache(test_formulas.batch)


def update(agent, first, last=None):
    """The updates of these numbers, each with its own batch and seed."""
    for k in range(first, first + 1 if last is None else last):
        torch.manual_seed(k)
        agent.train(*batch(seed=k))
    return agent


def numbers(agent):
    """Copies of every tensor of an agent: weights, buffers, alpha, the optimizers' states."""
    found = []
    for _, part in sorted(vars(agent).items()):
        if isinstance(part, torch.nn.Module):
            found += part.state_dict().values()
        if isinstance(part, torch.optim.Optimizer):
            found += [x for state in part.state.values() for x in state.values()]
        if torch.is_tensor(part):
            found.append(part)
    return [torch.as_tensor(x).detach().clone() for x in found]


def same(mine, theirs):
    return all(torch.equal(x, y) for x, y in zip(numbers(mine), numbers(theirs), strict=True))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def twins(make=CQL, updates=3):
    """Two agents with the same numbers, after some updates."""
    agent = update(make(), 0, updates)
    other = copy.deepcopy(agent)
    assert same(agent, other)
    return agent, other


# ---- the networks ----

def test_an_edited_critic_acts_at_the_next_update(monkeypatch):
    """The method of the class replaced, as in a notebook, between two updates."""
    agent, other = twins()
    forward = SAC.ModelValue.forward
    monkeypatch.setattr(SAC.ModelValue, "forward", lambda *inputs: 2 * forward(*inputs))
    update(agent, 3)
    monkeypatch.undo()
    assert not same(agent, update(other, 3))


@pytest.mark.parametrize("method", ["_get_target", "_get_loss_action", "_soft_update"])
def test_an_edited_method_acts_at_every_update(method):
    calls = []

    def edited(self, *inputs):
        calls.append(1)
        return getattr(SAC, method)(self, *inputs)

    agent = type("Edited", (CQL,), {method: edited})()
    for k in range(1, 4):
        update(agent, k)
        assert len(calls) == k * (2 if method == "_soft_update" else 1)


@pytest.mark.parametrize("make", [SAC, CQL])
def test_another_activation_gives_other_numbers_at_the_next_update(make):
    agent, other = twins(make)
    other.model_value1.sequential[1] = torch.nn.Tanh()
    assert same(agent, other)
    assert not same(update(agent, 3), update(other, 3))


class LayerNorm(CQL):
    class ModelValue(CQL.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.insert(1, torch.nn.LayerNorm(128))


class Wider(CQL):
    class ModelAction(CQL.ModelAction):
        def __init__(self):
            super().__init__()
            self.fc_state = torch.nn.Sequential(
                torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 128), torch.nn.ReLU())


@pytest.mark.parametrize("make, name, layers", [
    (LayerNorm, "model_value1", 4), (LayerNorm, "model_value2", 4),
    (LayerNorm, "model_value_next1", 4), (Wider, "model_action", 4)])
def test_every_part_of_another_network_trains(make, name, layers):
    agent = make()
    model = getattr(agent, name)
    before = [p.clone() for p in model.parameters()]
    update(agent, 0, 3)
    assert len(before) == 2 * layers
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_replaced_critic_is_the_one_that_is_used():
    agent, other = twins()
    torch.manual_seed(9)
    other.model_value1 = SAC.ModelValue()
    before = weights(other.model_value1)
    assert not same(update(agent, 3), update(other, 3))
    assert torch.equal(weights(other.model_value1), before)     # the optimizer has the old one


FREE = {"model_value1": "model_value2", "model_value2": "model_action",
        "model_action": "model_value1"}


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("make", [SAC, CQL])
@pytest.mark.parametrize("name", FREE)
def test_a_frozen_network_keeps_its_weights_and_the_others_learn(name, make, trained):
    """Frozen from the start, and after three updates have filled Adam's averages."""
    agent = update(make(), 0, trained)
    model, other = getattr(agent, name), getattr(agent, FREE[name])
    model.requires_grad_(False)
    frozen, free = weights(model), weights(other)
    update(agent, 3, 6)
    assert torch.equal(weights(model), frozen)
    assert not torch.equal(weights(other), free)
    model.requires_grad_(True)
    update(agent, 6, 8)
    assert not torch.equal(weights(model), frozen)


def test_a_frozen_temperature_stays():
    agent = update(SAC(), 0, 2)
    agent.alpha.requires_grad_(False)
    alpha, policy = agent.alpha.item(), weights(agent.model_action)
    update(agent, 2, 4)
    assert agent.alpha.item() == alpha
    assert not torch.equal(weights(agent.model_action), policy)


def test_a_forward_hook_acts():
    agent, other = twins()
    other.model_value2.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not same(update(agent, 3), update(other, 3))


# ---- the loss ----

class Weightless(CQL):
    """CQL's loss and SAC's, from the same random numbers."""

    def _get_loss_value(self, *inputs):
        loss = super()._get_loss_value(*inputs)
        sac = SAC._get_loss_value(self, *inputs)
        self.losses = getattr(self, "losses", []) + [(loss.item(), sac.item())]
        return loss


def test_a_changed_weight_acts_at_the_next_update():
    agent, other = update(Weightless(), 0, 5), update(CQL(), 0, 5)
    assert all(abs(loss - sac) > 1 for loss, sac in agent.losses)
    agent.losses, agent.weight = [], 0
    update(agent, 5, 8)
    for loss, sac in agent.losses:
        assert loss == pytest.approx(sac, rel=1e-6)
    assert len(agent.losses) == 6
    update(other, 5, 8)
    assert not torch.equal(weights(agent.model_value1), weights(other.model_value1))


class Annealed(CQL):
    def train(self, *rows):
        self.weight *= 0.5
        super().train(*rows)


def copy_numbers(agent, other):
    """Give another agent all numbers of this one; each keeps its class."""
    vars(other).update(copy.deepcopy(vars(agent)))


def test_an_annealed_weight_acts_at_every_update():
    agent, other = Annealed(), CQL()
    copy_numbers(agent, other)
    update(agent, 0, 3)
    assert agent.weight == 0.625
    for k, other.weight in enumerate((2.5, 1.25, 0.625)):
        update(other, k)
    assert same(agent, other)


class WarmUp(CQL):
    """A counter that keeps the weight 0 for the first six losses, that is for three updates."""
    count = 0

    def _get_loss_value(self, *inputs):
        self.count += 1
        self.weight = 0.0 if self.count <= 6 else 5.0
        return super()._get_loss_value(*inputs)


def test_a_counter_in_the_loss_counts_every_loss():
    agent, other, never = WarmUp(), CQL(weight=0.0), CQL(weight=0.0)
    copy_numbers(agent, other)
    copy_numbers(agent, never)
    other.weight = never.weight = 0.0
    update(agent, 0, 3), update(other, 0, 3), update(never, 0, 3)
    assert agent.count == 6 and same_networks(agent, other)
    other.weight = 5.0
    update(agent, 3, 6), update(other, 3, 6), update(never, 3, 6)
    assert agent.count == 12 and same_networks(agent, other)
    assert not same_networks(agent, never)


def same_networks(mine, theirs):
    return all(torch.equal(weights(getattr(mine, name)), weights(getattr(theirs, name)))
               for name in test_formulas.NETWORKS)


@pytest.mark.parametrize("names", ["jacobian", "sign", "range", [*ERRATA]])
def test_errata_changed_half_way_act_at_the_next_update(names):
    agent, other = twins()
    other.as_printed = names
    assert same(agent, other)
    assert not same(update(agent, 3), update(other, 3))
    agent, other = twins()
    other.as_printed = names
    other.as_printed = ()
    assert same(update(agent, 3), update(other, 3))


def with_loss(look, make=CQL):
    """A subclass of CQL that looks at each loss and target."""
    class Watched(make):
        def _get_loss_value(self, model_value, target, state, action, next_state):
            loss = super()._get_loss_value(model_value, target, state, action, next_state)
            other = look(loss, target)
            return loss if other is None else other
    return Watched


@pytest.mark.parametrize("make", [SAC, CQL])
def test_prints_counters_and_breakpoints_act_at_every_update(make, capsys, monkeypatch):
    seen, stops = [], []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(len(seen)))

    def look(loss, target):
        print("mean", target.mean().item(), "loss", loss.item(), bool((loss > 50).any()))
        breakpoint()
        seen.append(loss.detach())
        if (loss > 50).any():
            print("large")

    agent, other = with_loss(look, make)(), make()
    vars(other).update(copy.deepcopy(vars(agent)))
    update(agent, 0, 4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line != "large"]
    assert [float(words[3]) for words in lines] == [loss.item() for loss in seen]
    assert stops == [*range(8)] and len({loss.item() for loss in seen}) == 8
    assert same(agent, update(other, 0, 4))     # looking changes nothing


def test_a_list_of_losses_gets_every_loss():
    losses = []
    agent = with_loss(lambda loss, target: losses.append(loss.item()))()
    update(agent, 0, 50)
    assert len(losses) == len(set(losses)) == 100


def test_a_branch_on_a_tensor_acts():
    calls = []

    def look(loss, target):
        calls.append((loss > 0).item())
        if (loss > 0).any():
            return loss * 0

    agent = with_loss(look)()
    before = weights(agent.model_value1)
    update(agent, 0, 2)
    assert calls == 4 * [True]
    torch.testing.assert_close(weights(agent.model_value1), before, rtol=0, atol=0)


# ---- the optimizers ----

def critics(agent):
    return [*agent.model_value1.parameters(), *agent.model_value2.parameters()]


def test_the_default_adam_gives_the_same_numbers_to_rounding():
    agent = CQL()
    other = copy.deepcopy(agent)
    other.optimizer_value = torch.optim.Adam(critics(other), lr=3e-3)
    update(agent, 0), update(other, 0)
    torch.testing.assert_close(weights(other.model_value1), weights(agent.model_value1))


def test_sgd_moves_against_its_own_gradient():
    agent = CQL()
    agent.optimizer_value = torch.optim.SGD(critics(agent), lr=1e-2)
    before = [p.detach().clone() for p in critics(agent)]
    update(agent, 0)
    for old, p in zip(before, critics(agent)):
        torch.testing.assert_close(p.detach(), old - 1e-2 * p.grad)


def test_a_scheduler_of_the_learning_rate_acts():
    agent, other = twins()
    scheduler = torch.optim.lr_scheduler.StepLR(other.optimizer_value, 1, gamma=0.0)
    assert same(update(agent, 3), update(other, 3))
    scheduler.step()
    before = weights(other.model_value1)
    update(agent, 4), update(other, 4)
    assert torch.equal(weights(other.model_value1), before)
    assert not torch.equal(weights(agent.model_value1), before)


def test_a_changed_learning_rate_scales_the_step():
    agent, other = twins()
    other.optimizer_value.param_groups[0]["lr"] *= 2
    before = weights(agent.model_value1)
    update(agent, 3), update(other, 3)
    steps = [weights(x.model_value1).sub(before) for x in (agent, other)]
    torch.testing.assert_close(steps[1], 2 * steps[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [SAC, CQL])
def test_another_batch_size_at_each_update(make):
    agent = make()
    for b in (1, 64, 7, 200, 64, 1):
        before = weights(agent.model_value1)
        agent.train(*batch(b))
        assert not torch.equal(weights(agent.model_value1), before)
    assert all(x.isfinite().all() for x in numbers(agent))


# ---- constants ----

SMALL = [("WEIGHT", 0.5), ("GAMMA", 0.5), ("TAU", 0.5), ("SCALE", 2), ("SAMPLES", 2),
         ("TARGET_ENTROPY", 3.0), ("TORQUE", 1.0)]


@pytest.mark.parametrize("name, value", SMALL[1:])
def test_a_changed_constant_acts_at_the_next_update(name, value, monkeypatch):
    agent, other = twins()
    update(agent, 3)
    monkeypatch.setattr(cql_pendulum, name, value)
    assert not same(agent, update(other, 3))


def test_a_changed_weight_constant_is_the_next_agents(monkeypatch):
    old = CQL()
    monkeypatch.setattr(cql_pendulum, "WEIGHT", 0.5)
    assert (old.weight, CQL().weight, CQL(weight=2.0).weight) == (5.0, 0.5, 2.0)
    assert CQL(weight=0).weight == 0


def test_a_changed_gamma_is_in_the_target(monkeypatch):
    agent, (_, _, reward, next_state, _) = SAC(), batch()
    over = torch.zeros(64, 1, dtype=torch.long)
    futures = []
    for gamma in (0.99, 0.5):
        monkeypatch.setattr(cql_pendulum, "GAMMA", gamma)
        torch.manual_seed(0)
        futures.append((agent._get_target(reward, next_state, over) - reward) / gamma)
    torch.testing.assert_close(*futures, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_a_changed_tau_is_how_far_the_targets_follow(tau, monkeypatch):
    monkeypatch.setattr(cql_pendulum, "TAU", tau)
    agent = SAC()
    before = weights(agent.model_value_next2)
    update(agent, 0)
    expected = (1 - tau) * before + tau * weights(agent.model_value2)
    torch.testing.assert_close(weights(agent.model_value_next2), expected)
    assert not torch.equal(weights(agent.model_value2), before)


@pytest.mark.parametrize("make", [SAC, CQL, BC])
def test_a_changed_width_is_every_layers(make, monkeypatch):
    monkeypatch.setattr(cql_pendulum, "WIDTH", 16)
    agent = make()
    assert len(weights(agent.model_action)) == 3 * 16 + 16 + 2 * (16 + 1)
    assert len(weights(SAC().model_value1)) == 4 * 16 + 16 + 16 * 16 + 16 + 16 + 1
    before = weights(agent.model_action)
    update(agent, 0, 2)
    assert not torch.equal(weights(agent.model_action), before)


def test_a_changed_temperature_is_the_next_agents(monkeypatch):
    assert SAC().alpha.exp().item() == pytest.approx(0.01)
    monkeypatch.setattr(cql_pendulum, "TEMPERATURE", 0.2)
    assert SAC().alpha.exp().item() == pytest.approx(0.2)


@pytest.mark.parametrize("name, model, others", [
    ("LR_VALUE", "model_value2", "model_action"), ("LR_ACTION", "model_action", "model_value2")])
def test_a_changed_learning_rate_is_the_length_of_adams_first_step(
        name, model, others, monkeypatch):
    def step(part):
        torch.manual_seed(0)
        agent = SAC()
        before = weights(getattr(agent, part))
        return (weights(getattr(update(agent, 0), part)) - before).abs().max().item()

    other_step = step(others)
    monkeypatch.setattr(cql_pendulum, name, 0.05)
    assert step(model) == pytest.approx(0.05, rel=1e-2)
    assert step(others) == pytest.approx(other_step, rel=0.5)
    assert other_step < 0.01


class Still:
    def get_action(self, state):
        return 0.0


def test_a_changed_batch_is_drawn(monkeypatch):
    data = Data()
    data.update_data(Still())
    for rows in (16, 200):
        monkeypatch.setattr(cql_pendulum, "BATCH", rows)
        assert [len(x) for x in data.get_sample()] == [rows] * 5
        SAC().train(*data.get_sample())
    monkeypatch.setattr(cql_pendulum, "BATCH", 201)
    with pytest.raises(ValueError, match="200 rows; a batch draws 201"):
        data.get_sample()


def test_a_changed_capacity_is_how_much_is_kept(monkeypatch):
    monkeypatch.setattr(cql_pendulum, "CAPACITY", 300)
    data = Data()
    sizes = []
    for _ in range(3):
        data.update_data(Still())
        sizes.append(len(data))
    assert sizes == [200, 300, 300]
    assert data.rows[:, 9].nonzero()[0].tolist() == [99, 299]      # the newest: half, and whole


class NoRun:
    """A run that tests nothing."""

    def remaining(self, total):
        return range(total)

    def test(self, step):
        pass


@pytest.mark.parametrize("updates", [1, 7])
def test_changed_updates_follow_each_episode(updates, monkeypatch):
    monkeypatch.setattr(cql_pendulum, "UPDATES", updates)
    losses = []
    train_teacher(with_loss(lambda loss, _: losses.append(1), SAC)(), Data(), 2, NoRun())
    assert len(losses) == 2 * 2 * updates


def test_a_changed_torque_is_the_policys_and_the_penaltys(monkeypatch):
    monkeypatch.setattr(cql_pendulum, "TORQUE", 0.5)
    agent, asked = CQL(), []
    state, action, _, next_state, _ = batch()

    def q(state, torque):
        asked.append(torque)
        return torque

    agent._get_loss_value(q, action, state, action, next_state)
    torques = asked[0].reshape(64, 16)[:, 1:]
    assert 0.45 < torques[:, :5].abs().max() <= 0.5 and torques[:, 5:].abs().max() <= 0.5
    assert all(abs(agent.get_action([1.0, 0.0, 0.0])) <= 0.5 for _ in range(50))


# ---- files ----

class Mine(CQL):
    class ModelValue(CQL.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.append(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("make", [SAC, CQL, BC])
def test_a_saved_agent_is_loaded_and_learns_on_as_if_nothing_had_happened(make, tmp_path):
    agent = update(make({"sign"}), 0, 3)
    if make is CQL:
        agent.weight = 0.3
    save_agent(tmp_path / "agent.pt", agent)
    loaded = load_agent(tmp_path / "agent.pt")
    assert type(loaded) is make and loaded.as_printed == {"sign"}
    assert same(loaded, agent)
    assert same(update(loaded, 3, 6), update(agent, 3, 6))


def test_an_agent_of_a_class_of_ones_own_is_restored(tmp_path):
    agent = Mine({"sign"}, weight=2.0)
    update(agent, 0, 3)
    save_agent(str(tmp_path / "mine.pt"), agent)
    restored = Mine()
    restore_agent(restored, read_agent(tmp_path / "mine.pt"))
    assert restored.weight == 2 and restored.as_printed == {"sign"}
    assert same(restored, agent)
    assert same(update(restored, 3, 6), update(agent, 3, 6))
    with pytest.raises(UserError, match="mine.pt"):
        load_agent(tmp_path / "mine.pt")


# ---- classes of one's own ----

class KeepsLoss(SAC):
    def _get_loss_value(self, *inputs):
        self.last = super()._get_loss_value(*inputs)
        return self.last


def test_a_kept_loss_is_the_last_updates():
    agent, losses = KeepsLoss(), []
    for k in range(3):
        update(agent, k)
        losses.append(agent.last.item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("weight", [0.5, np.float64(0.5), np.float32(0.5), 2, np.int64(2)])
def test_a_weight_of_any_kind_of_number_is_saved(weight, tmp_path):
    save_agent(tmp_path / "a.pt", CQL(weight=weight))
    assert load_agent(tmp_path / "a.pt").weight == weight


def test_a_kept_loss_does_not_stop_a_file(tmp_path):
    """A tensor, a list and a number that a learner keeps on the agent."""
    agent = KeepsLoss()
    agent.losses, agent.count = [], 0
    update(agent, 0, 2)
    agent.losses.append(agent.last.item())
    agent.count += 2
    save_agent(tmp_path / "agent.pt", agent)
    restored = KeepsLoss()
    restore_agent(restored, read_agent(tmp_path / "agent.pt"))
    assert restored.count == 2
    assert same(update(restored, 2, 4), update(agent, 2, 4))


class Deeper(SAC.ModelAction):
    """One more layer: the policy's network edited in one place."""

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(3, 3)

    def gaussian(self, state, n=1):
        return super().gaussian(torch.tanh(self.extra(state)), n)


@pytest.mark.parametrize("make", [SAC, CQL, BC])
def test_a_policy_edited_in_one_place_acts_everywhere(make):
    """Its new layer learns, and the torques depend on it."""
    agent = type("Mine", (make,), {"ModelAction": Deeper})()
    before = weights(agent.model_action.extra)
    update(agent, 0, 2)
    assert (weights(agent.model_action.extra) != before).all()
    state = [1.0, 0.0, 0.5]
    torch.manual_seed(0)
    torque = agent.get_action(state)
    agent.model_action.extra.bias.data.add_(1)
    torch.manual_seed(0)
    assert agent.get_action(state) != torque


class BatchNorm(SAC):
    class ModelValue(SAC.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.insert(1, torch.nn.BatchNorm1d(128))


def test_a_batch_norm_follows_every_batch():
    agent = BatchNorm()
    means = [agent.model_value1.sequential[1].running_mean.clone()]
    for k in range(3):
        update(agent, k)
        means.append(agent.model_value1.sequential[1].running_mean.clone())
    assert not any(map(torch.equal, means[:-1], means[1:]))


class Dropout(SAC):
    class ModelValue(SAC.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.insert(2, torch.nn.Dropout(0.1))


def test_dropout_drops_and_can_be_put_to_rest():
    agent, (state, action, *_) = update(Dropout(), 0, 3), batch()
    value = agent.model_value1
    assert not torch.equal(value(state, action), value(state, action))
    value.eval()
    assert torch.equal(value(state, action), value(state, action))


class ClippedOptimizer(torch.optim.SGD):
    """Clips the gradient's norm before each step."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        return super().step()


def test_clipped_gradients_bound_the_step():
    agent = CQL()
    agent.optimizer_value = ClippedOptimizer(critics(agent), lr=1.0)
    before = torch.cat([weights(agent.model_value1), weights(agent.model_value2)])
    update(agent, 0)
    after = torch.cat([weights(agent.model_value1), weights(agent.model_value2)])
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_a_method_set_on_one_agent_acts_at_once():
    agent, other = twins()
    other._get_loss_value = lambda *inputs: 0 * SAC._get_loss_value(other, *inputs)
    other.optimizer_value = torch.optim.SGD(critics(other), lr=1.0)
    before = weights(other.model_value1)
    update(agent, 3), update(other, 3)
    assert torch.equal(weights(other.model_value1), before)
    assert not torch.equal(weights(agent.model_value1), before)


def test_a_shaped_reward_acts():
    """A learner's own train that changes the batch."""
    class Halved(SAC):
        def train(self, state, action, reward, next_state, over):
            super().train(state, action, reward / 2, next_state, over)

    agent, other = Halved(), SAC()
    copy_numbers(agent, other)
    state, action, reward, next_state, over = batch()
    torch.manual_seed(0)
    agent.train(state, action, reward, next_state, over)
    torch.manual_seed(0)
    other.train(state, action, reward / 2, next_state, over)
    assert same(agent, other)


def test_an_agent_of_ones_own_fills_the_data_and_is_tested():
    class Swing(SAC):
        def get_action(self, state):
            return math.copysign(2.0, state[2])

    agent, data = Swing(), Data()
    env.reset(seed=1)
    data.update_data(agent)
    env.reset(seed=1)
    assert set(data.rows[:, 3].tolist()) == {-2.0, 2.0}
    assert agent.test(play=False) == pytest.approx(float(data.rows[:, 4].sum()), rel=1e-4)
