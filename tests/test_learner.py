"""What a learner does to the classes acts at the next update; accelerate changes no bit of it."""
import copy
import functools
import random
import sys

import numpy as np
import pytest
import torch

import test_formulas
from cql_pendulum import CQL, ERRATA, SAC, UserError, accelerate, load_agent, save_agent


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
    agent, calls = update(SAC(), 0, 2), []
    forward = SAC.ModelValue.forward

    def counting(self, state, action):
        calls.append(state.shape)
        return forward(self, state, action)

    monkeypatch.setattr(SAC.ModelValue, "forward", counting)
    update(agent, 2, 5)
    assert calls == 3 * 6 * [(64, 3)]           # two for the target, the loss, the actor


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


def test_a_layer_norm_in_the_critic_trains():
    agent = LayerNorm()
    for critic in (agent.model_value1, agent.model_value2, agent.model_value_next1):
        before = [p.clone() for p in critic.sequential[1].parameters()]
        update(agent, 0, 3)
        assert len(before) == 2
        assert not any(map(torch.equal, before, critic.sequential[1].parameters()))


def test_a_replaced_critic_is_the_one_that_is_used():
    agent, other = twins()
    other.model_value1 = SAC.ModelValue()
    seen = []
    other.model_value1.register_forward_hook(lambda *_: seen.append(1))
    assert not same(update(agent, 3), update(other, 3))
    assert len(seen) == 2                       # the loss and the actor's


@pytest.mark.parametrize("make", [SAC, CQL])
def test_a_frozen_critic_keeps_its_weights(make):
    agent = make()
    agent.model_value1.requires_grad_(False)
    frozen, free = weights(agent.model_value1), weights(agent.model_value2)
    update(agent, 0, 3)
    assert torch.equal(weights(agent.model_value1), frozen)
    assert not torch.equal(weights(agent.model_value2), free)


def test_a_critic_frozen_half_way_keeps_its_weights():
    agent = update(CQL(), 0, 3)
    agent.model_value1.requires_grad_(False)
    frozen = weights(agent.model_value1)
    update(agent, 3, 6)
    assert torch.equal(weights(agent.model_value1), frozen)


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


def test_an_annealed_weight_acts_at_every_update():
    agent, other = Annealed(), CQL()
    vars(other).update(copy.deepcopy(vars(agent)))
    update(agent, 0, 3)
    assert agent.weight == 0.625
    for k, other.weight in enumerate((2.5, 1.25, 0.625)):
        update(other, k)
    assert same(agent, other)


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


# ---- files ----

class Mine(CQL):
    class ModelValue(CQL.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.append(torch.nn.Linear(1, 1))


def test_a_subclass_is_loaded_as_itself(tmp_path):
    agent = Mine({"sign"}, weight=2.0)
    update(agent, 0, 3)
    save_agent(tmp_path / "mine.pt", agent)
    loaded, _ = load_agent(tmp_path / "mine.pt")
    assert type(loaded) is Mine and loaded.weight == 2 and loaded.as_printed == {"sign"}
    assert same(loaded, agent)
    assert same(update(loaded, 3, 6), update(agent, 3, 6))


def test_an_unknown_class_is_named(tmp_path):
    agent = type("Yours", (Mine,), {})()
    save_agent(tmp_path / "yours.pt", agent)
    type(agent).__name__ = "Ours"               # the class may live on until garbage is collected
    with pytest.raises(UserError, match="yours.pt: holds a Yours; define or import") as error:
        load_agent(tmp_path / "yours.pt")
    assert "\n" not in str(error.value)


# ---- accelerate ----

def run(make, train, between=None, updates=12):
    """The agent after these updates, and what each generator draws next."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    agent = make()
    train = train(agent)
    for k in range(updates):
        if between:
            between(agent, k)
        train(*batch(seed=k))
    return agent, (torch.randn(3).tolist(), random.random(), np.random.random())


def plainly(agent):
    return agent.train


def accelerated_is_plain(make, capsys, notes=0, between=None, updates=12):
    """Both ways to the last bit, and this many lines of notice; returns the accelerated agent."""
    plain, drawn = run(make, plainly, between, updates)
    assert capsys.readouterr().err == ""
    fast, drawn_too = run(make, accelerate, between, updates)
    lines = capsys.readouterr().err.splitlines()
    assert same(plain, fast)
    assert drawn == drawn_too
    assert len(lines) == notes and all(line.startswith("note: ") for line in lines), lines
    assert vars(plain).keys() == vars(fast).keys()
    return fast


@pytest.mark.parametrize("make, names", [
    (SAC, []), (SAC, [*ERRATA]), (CQL, []), (CQL, ["jacobian"]), (CQL, ["sign"]), (CQL, ["range"]),
    (CQL, [*ERRATA])])
def test_forty_accelerated_updates_are_the_plain_ones(make, names, capsys):
    accelerated_is_plain(lambda: make(names), capsys, updates=40)


def test_an_accelerated_update_runs_without_python_until_something_changes(capsys):
    seen = []
    agent = with_loss(lambda *_: seen.append(1))()
    train = accelerate(agent)
    train(*batch())
    recorded = len(seen)
    for k in range(3):
        train(*batch(seed=k))
    assert recorded > 0 and len(seen) == recorded
    train(*batch(7))
    assert len(seen) == recorded + 2
    train(*batch())
    assert len(seen) == recorded + 2
    agent.weight = 0
    train(*batch())
    assert len(seen) == recorded + 4
    assert capsys.readouterr().err == ""


def draws_from_random(loss, target):
    return loss * random.random()


def draws_from_numpy(loss, target):
    return loss * np.random.random()


def uses_item(loss, target):
    return loss / max(1.0, target.mean().abs().item())


def branches(loss, target):
    return loss / 2 if (loss > 50).any() else loss


@pytest.mark.parametrize("look", [draws_from_random, draws_from_numpy, uses_item, branches])
def test_a_loss_that_cannot_be_recorded_runs_plain_after_a_notice(look, capsys):
    accelerated_is_plain(with_loss(look, SAC), capsys, notes=1)


class KeepsLoss(SAC):
    def _get_loss_value(self, *inputs):
        self.last = super()._get_loss_value(*inputs)
        return self.last


class CountsCalls(SAC):
    calls = 0

    def _get_loss_value(self, *inputs):
        self.calls += 1
        return super()._get_loss_value(*inputs)


class LayerNormSAC(SAC):
    ModelValue = LayerNorm.ModelValue


class BatchNorm(SAC):
    class ModelValue(SAC.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.insert(1, torch.nn.BatchNorm1d(128))


class Dropout(SAC):
    class ModelValue(SAC.ModelValue):
        def __init__(self):
            super().__init__()
            self.sequential.insert(2, torch.nn.Dropout(0.1))


class DefaultAdam(SAC):
    def __init__(self):
        super().__init__()
        self.optimizer_value = torch.optim.Adam(critics(self), lr=3e-3)
        actions = [*self.model_action.parameters(), self.alpha]
        self.optimizer_action = torch.optim.Adam(actions, lr=3e-4)


class Scheduled(SAC):
    def __init__(self):
        super().__init__()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer_value, 2, gamma=0.5)

    def train(self, *rows):
        super().train(*rows)
        self.scheduler.step()


class Clipped(SAC):
    def train(self, state, action, reward, next_state, over):
        self._backward_value(state, action, reward, next_state, over)
        torch.nn.utils.clip_grad_norm_(critics(self), 0.5)
        self.optimizer_value.step()
        self._backward_action(state)
        torch.nn.utils.clip_grad_norm_(self.model_action.parameters(), 0.01)
        self.optimizer_action.step()
        self._soft_update(self.model_value1, self.model_value_next1)
        self._soft_update(self.model_value2, self.model_value_next2)


class Replaced(SAC):
    """One critic is new after the optimizer was made: it never learns."""

    def __init__(self):
        super().__init__()
        self.model_value1 = self.ModelValue()


class FrozenCritic(SAC):
    def __init__(self):
        super().__init__()
        self.model_value2.requires_grad_(False)


@pytest.mark.parametrize("make, notes", [
    (LayerNormSAC, 1), (BatchNorm, 1), (Dropout, 0), (DefaultAdam, 0), (Scheduled, 0),
    (Clipped, 0), (Replaced, 0), (FrozenCritic, 0), (Annealed, 1), (KeepsLoss, 1),
    (CountsCalls, 1)])
def test_an_edited_class_accelerates_or_says_so(make, notes, capsys):
    """torch 2.13's recorder knows no normalizations: these run plain."""
    accelerated_is_plain(make, capsys, notes)


def annealed_weight(agent, k):
    agent.weight = agent.weight if k < 4 else agent.weight * 0.5 if k < 8 else 0


def another_critic(agent, k):
    if k == 4:
        agent.model_value1 = copy.deepcopy(agent.model_value2)
        agent.optimizer_value = torch.optim.SGD(critics(agent), lr=1e-3)


def other_errata(agent, k):
    if k == 4:
        agent.as_printed = set(ERRATA)


def another_learning_rate(agent, k):
    agent.optimizer_value.param_groups[0]["lr"] = 1e-3 / (1 + k)


class Scaled(SAC):
    factor = 1.0

    def _get_loss_value(self, *inputs):
        return self.factor * super()._get_loss_value(*inputs)


def covered_class_attribute(agent, k):
    if k == 4:
        agent.factor = 0.5


def another_method(agent, k):
    if k == 4:
        agent._get_loss_value = lambda *inputs: 2 * SAC._get_loss_value(agent, *inputs)


@pytest.mark.parametrize("make, between", [
    (CQL, annealed_weight), (SAC, another_critic), (SAC, other_errata),
    (SAC, another_learning_rate), (Scaled, covered_class_attribute), (SAC, another_method)])
def test_a_change_half_way_acts_at_once(make, between, capsys):
    fast = accelerated_is_plain(make, capsys, between=between)
    untouched, _ = run(make, plainly)
    assert not torch.equal(weights(fast.model_value1), weights(untouched.model_value1))


class LateLoss(SAC):
    """Halves its critics' loss from the sixth update on, by an attribute that train sets."""

    def __init__(self):
        super().__init__()
        self.seen, self.factor = [], 1.0

    def train(self, *rows):
        self.seen.append(1)
        if len(self.seen) == 6:
            self.factor = 0.5
        super().train(*rows)

    def _get_loss_value(self, *inputs):
        return self.factor * super()._get_loss_value(*inputs)


def test_an_attribute_that_train_changes_acts_at_that_update(capsys):
    accelerated_is_plain(LateLoss, capsys)


def test_batches_of_other_sizes_run_plain(capsys):
    def in_parts(train):
        return lambda agent: lambda *rows: [step(*(x[:b] for x in rows)) for step in [train(agent)]
                                            for b in (64, 7, 64, 1, 33)]

    fast, plain = (run(SAC, in_parts(train), updates=1) for train in (accelerate, plainly))
    assert same(fast[0], plain[0]) and fast[1] == plain[1]
    assert capsys.readouterr().err == ""


def test_an_accelerated_agent_refuses_a_wrong_batch_and_its_copy_is_its_own():
    agent = SAC()
    train = accelerate(agent)
    train(*batch())
    other, kept = copy.deepcopy(agent), set(vars(agent))
    with pytest.raises(ValueError, match="a batch is finite"):
        train(*(torch.full_like(x, torch.nan) if x.is_floating_point() else x for x in batch()))
    assert same(agent, other) and set(vars(agent)) == kept
    torch.manual_seed(2)
    train(*batch())
    assert not same(agent, other)
    torch.manual_seed(2)
    other.train(*batch())
    assert same(agent, other)
