"""Sharpness, return and retry, voting teachers, perturbed choices: resume, rollback and bad input, on small searches."""
import numpy as np
import pytest
import torch
from nas_nb.core.data import load_task
from nas_nb.core.run import Checkpoints
from nas_nb.ops.separable import Noise
from nas_nb.relax.choice import Gumbel
from nas_nb.search import robust
from nas_nb.search.distill import VotingTeachers
from nas_nb.search.driver import Budget, Plugin, SearchRecipe, run_search
from nas_nb.search.hypergrad import Unrolled
from nas_nb.search.implicit import Implicit
from nas_nb.search.rarts import Split
from nas_nb.search.retrain import Recipe
from nas_nb.search.robust import (AdaptiveReg, DropPath, EarlyStop, EigenMonitor, ShortRetrain, Strengths, alpha_hessian,
                                  alpha_sharpness, arch_batch, arch_loss, lambda_max, r_darts, stop_epoch)
from nas_nb.search.smooth import AdversarialSmoothing, RandomSmoothing
from nas_nb.space.cells import CellSpace, nb201_space
from nas_nb.space.darts import darts_space
from nas_nb.space.fast import accelerate
from nas_nb.ops.conv import NB201_OPS

BUDGET = Budget(epochs=8, batch_size=20)
QUICK = dict(window=1, freq=1, delta=1, start=1, images=20)         # looks back one epoch

@pytest.fixture(scope='module')
def task(): return load_task('digits', limit=140)

@pytest.fixture(scope='module')
def space(): return nb201_space(in_shape=(1, 8, 8), n_classes=10, C=4, stages=2, cells=1)

class Killed(Exception): pass

class KillAt(Plugin):
    "Raises at the `n`-th update of the architecture in this process."
    def __init__(self, n): self.n = n
    def after_a(self, s):
        self.n -= 1
        if self.n == 0: raise Killed

class Decay(Plugin):
    "Sets the weights' decay after an epoch."
    def __init__(self, epoch, value): self.epoch, self.value = epoch, value
    def epoch_end(self, s):
        if s.epoch == self.epoch: s.w_opt.param_groups[0]['weight_decay'] = self.value

def same_net(a, b):
    theirs = b.state.net.state_dict()
    for name, x in a.state.net.state_dict().items(): assert torch.equal(x, theirs[name]), name

def same(a, b):
    same_net(a, b)
    assert a.genotype == b.genotype and a.stopped == b.stopped and len(a.history) == len(b.history)
    for x, y in zip(a.history, b.history):
        assert {k: v for k, v in x.items() if k != 'weights'} == {k: v for k, v in y.items() if k != 'weights'}

@pytest.fixture
def rising(monkeypatch):
    "Eigenvalues by script: they double from epoch 4 on, while the decay is small."
    def value(s, *args): return 2. ** max(s.epoch - 3, 0) if s.w_opt.param_groups[0]['weight_decay'] < 1e-3 else 1.
    monkeypatch.setattr(robust, 'lambda_max', value)

# --- resume --------------------------------------------------------------------------------------------------------------------------

PLUGINS = {'monitor': lambda: [EigenMonitor(freq=2, images=20)], 'stop': lambda: [EarlyStop(**QUICK | dict(factor=50.))],
           'drop path': lambda: [DropPath(.5)],
           'teachers': lambda: [VotingTeachers(k=2)],
           'bf16 teachers': lambda: [VotingTeachers(k=1, dtype=torch.bfloat16, vote='weighted')],
           'random': lambda: [RandomSmoothing()], 'adversarial': lambda: [AdversarialSmoothing(steps=2)],
           'many': lambda: [VotingTeachers(k=1, every=2), RandomSmoothing(), DropPath(.2), EigenMonitor(freq=1, images=20)]}

@pytest.mark.parametrize('name', PLUGINS)
def test_a_search_with_it_resumes_bitwise(name, space, task, tmp_path):
    common = dict(budget=Budget(4, 20), relax=Gumbel(), seed=1)
    run = lambda n, **k: run_search(space.supernet(1), task, plugins=[*PLUGINS[name](), KillAt(n)], **common, **k)
    whole = run(0)
    with pytest.raises(Killed): run(5, ckpt=tmp_path)
    assert Checkpoints(tmp_path, 'search').latest()[1]['state']['epoch'] == 2
    resumed = run(0, ckpt=tmp_path, resume=True)
    same(whole, resumed)
    for a, b in zip(whole.state.parts, resumed.state.parts): assert getattr(a, 'trace', 0) == getattr(b, 'trace', 0)

@pytest.mark.parametrize('n', [9, 13])
def test_adaptive_regularisation_resumes_bitwise(n, space, task, tmp_path, rising):
    run = lambda n, **k: run_search(space.supernet(1), task, plugins=[KillAt(n), AdaptiveReg(mul=2., **QUICK)], budget=BUDGET, seed=1, **k)
    whole = run(0)
    with pytest.raises(Killed): run(n, ckpt=tmp_path)
    resumed = run(0, ckpt=tmp_path, resume=True)
    same(whole, resumed)
    assert whole.state.parts[3].restarts == resumed.state.parts[3].restarts and whole.state.parts[3].trace == resumed.state.parts[3].trace

# --- going back ----------------------------------------------------------------------------------------------------------------------

def test_early_stop_ends_with_the_earlier_state(space, task, tmp_path, rising):
    stop, seen = EarlyStop(**QUICK), {}
    class See(Plugin):
        def epoch_end(self, s): seen[s.epoch] = {k: v.clone() for k, v in s.net.state_dict().items()}
    run = lambda **k: run_search(space.supernet(0), task, plugins=[See(), stop], budget=BUDGET, **k)
    found = run(ckpt=tmp_path)
    assert found.stopped == 'the loss has sharpened at epoch 4: back to epoch 3' and found.state.epoch == 3 and len(found.history) == 3
    assert all(torch.equal(v, seen[3][k]) for k, v in found.state.net.state_dict().items())
    assert not torch.equal(seen[3]['arch.logits.cell'], seen[4]['arch.logits.cell'])
    assert stop.trace == [(1, 1.), (2, 1.), (3, 1.), (4, 2.)] and not stop.kept
    same(found, run(ckpt=tmp_path, resume=True))                                   # it stays stopped

def test_adaptive_regularisation_is_the_run_whose_decay_was_raised_there(space, task, rising):
    plugin = AdaptiveReg(mul=2., **QUICK)
    found = run_search(space.supernet(0), task, plugins=[plugin], budget=BUDGET, relax=Gumbel())
    assert plugin.restarts == [(3, 4, 6e-4), (3, 4, 12e-4)] and [e for e, _ in plugin.trace] == list(range(1, 9))
    by_hand = run_search(space.supernet(0), task, plugins=[Decay(3, 12e-4)], budget=BUDGET, relax=Gumbel())
    same_net(found, by_hand)
    assert [row['w_decay'] for row in found.history] == [3e-4] * 3 + [12e-4] * 5
    assert found.state.w_opt.state_dict()['param_groups'][0]['weight_decay'] == 12e-4

def test_at_the_largest_decay_the_search_goes_on(space, task, monkeypatch):
    monkeypatch.setattr(robust, 'lambda_max', lambda s, *args: 2. ** s.epoch)
    plugin = AdaptiveReg(mul=10., max_wd=1e-3, **QUICK)
    found = run_search(space.supernet(0), task, plugins=[plugin], budget=BUDGET)
    assert plugin.restarts == [(1, 2, 1e-3)] and found.stopped is None and found.state.epoch == 8

def test_snapshots_do_not_hold_snapshots(space, task, tmp_path):
    sizes = {}
    for epochs in (4, 8):
        plugin = EarlyStop(**QUICK | dict(factor=1e9))
        run_search(space.supernet(0), task, plugins=[plugin, VotingTeachers(k=1)], budget=Budget(epochs, 20), ckpt=tmp_path/str(epochs))
        assert sorted(plugin.kept) == [epochs - 1, epochs]
        sizes[epochs] = max(p.stat().st_size for p in (tmp_path/str(epochs)).iterdir())
    assert sizes[8] < 1.2 * sizes[4]

# --- what only looks, and what must matter ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def noisy():
    ops = {'noise': Noise, 'nor_conv_3x3': NB201_OPS['nor_conv_3x3']}
    return CellSpace('noisy', ops, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=2, cells=1)

def test_measuring_changes_nothing_even_where_operations_draw(noisy, task):
    run = lambda *plugins: run_search(noisy.supernet(0), task, plugins=plugins, budget=Budget(3, 20))
    plain = run()
    for plugin in (EigenMonitor(freq=1, images=20), EigenMonitor(freq=1, images=20, statistics='running'), VotingTeachers(lam=0.),
                   EarlyStop(**QUICK | dict(factor=1e9))):
        same_net(plain, run(plugin))
    for plugin in (VotingTeachers(k=1), RandomSmoothing(), AdversarialSmoothing(steps=1), DropPath(.5)):
        other = run(plugin).state.net.state_dict()
        assert not torch.equal(plain.state.net.state_dict()['stem.0.weight'], other['stem.0.weight']), plugin
    same_net(plain, run(DropPath(0.)))

def test_hooks_are_gone_at_the_end(space, task):
    s = run_search(space.supernet(0), task, plugins=[DropPath(.5)], budget=Budget(1, 20)).state
    assert not any(m._forward_hooks for m in s.net.modules())

def test_lookahead_passes_see_one_mask(space, task):
    seen = []
    class Twice(Plugin):
        def after_a(self, s):
            with torch.no_grad(): seen.append([s.loss('train', s.sample()).item() for _ in range(2)])
    run_search(space.supernet(0), task, plugins=[DropPath(.5), Twice()], budget=Budget(2, 20), hyper=Unrolled())
    assert all(a == b for a, b in seen)

def test_both_groups_of_a_darts_space_jointly(task):
    space = darts_space(in_shape=(1, 8, 8), n_classes=10, C=4, cells=3, nodes=1)
    s = run_search(space.supernet(0), task, budget=Budget(1, 20)).state
    batch, n = arch_batch(s, 20), sum(a.numel() for a in s.a)
    H = alpha_hessian(s, batch)
    split = s.a[0].numel()
    assert len(s.a) == 2 and H.shape == (n, n) and H[:split, split:].abs().max() > 0
    values = torch.linalg.eigvalsh(H)
    dominant = float(values[values.abs().argmax()])
    assert abs(lambda_max(s, batch) - dominant) < 1e-4 * abs(dominant) + 1e-7

def test_one_level_has_a_batch_and_an_eigenvalue(space, task):
    monitor = EigenMonitor(freq=1, images=30)
    found = run_search(space.supernet(0), task, level='one', plugins=[monitor], budget=Budget(2, 20))
    assert [row['alpha_eigenvalue'] for row in found.history] == [value for _, value in monitor.trace]
    assert len(arch_batch(found.state, 30)[1]) == 30

# --- R-DARTS -------------------------------------------------------------------------------------------------------------------------

class ByStrength:
    "Picks another network after each search."
    def __call__(self, s):
        good = [g for g in s.net.space.enumerate() if g.connected]
        return good[-1 - 7 * round(100 * s.history[-1]['strength'])]

@pytest.mark.parametrize('kind, levels', [('l2', (0., .03)), ('dp', (0., .5))])
def test_r_darts_resumes_bitwise_and_chooses_the_best(kind, levels, space, task, tmp_path, monkeypatch):
    trained, real = [], robust.train_from_scratch
    def train(*args):
        if len(trained) == train.killed: raise Killed
        trained.append(real(*args).val_acc)
        return real(*args)
    monkeypatch.setattr(robust, 'train_from_scratch', train)
    def run(plugin, killed, **k):
        train.killed = killed
        return r_darts(space, task, kind, levels, Recipe(epochs=1, batch_size=20), ByStrength(), [plugin], budget=Budget(2, 20), **k)
    whole = run(KillAt(0), 9)
    assert whole.accuracy == max(row['accuracy'] for row in whole.table) and [row['level'] for row in whole.table] == list(levels)
    assert len(trained) == 2 and [row['strength'] for row in whole.result.history] == [whole.level] * 2
    for name, updates, trainings in [('first', 3, 9), ('second', 7, 9), ('selection', 0, 1)]:
        trained.clear()
        with pytest.raises(Killed): run(KillAt(updates), trainings, ckpt=tmp_path/name)
        for again in range(2):                                                      # the second time it is over already
            other = run(KillAt(0), 9, ckpt=tmp_path/name, resume=True)
            same(whole.result, other.result)
            assert other.table == whole.table and other.genotype == whole.genotype and len(trained) == 2

class Ends(Plugin):
    "Keeps the networks at the ends of searches."
    def __init__(self): self.seen = []
    def epoch_end(self, s):
        if s.epoch == s.budget.epochs: self.seen.append({k: v.clone() for k, v in s.net.state_dict().items()})

WAYS = dict(gumbel=lambda: dict(relax=Gumbel()), split=lambda: dict(hyper=Split()), implicit=lambda: dict(hyper=Implicit(steps=2)),
            one=lambda: dict(level='one'), plain=dict)

@pytest.mark.parametrize('kind, way', [*(('l2', way) for way in WAYS), ('dp', 'plain')])
def test_every_search_of_r_darts_is_the_separate_one(kind, way, space, task):
    ends, levels, search = Ends(), (.02, .5), WAYS[way]
    r_darts(space, task, kind, levels, Recipe(epochs=1), plugins=[ends], budget=Budget(2, 20), **search())
    for level, seen in zip(levels, ends.seen, strict=True):
        alone = dict(recipe=SearchRecipe(w_decay=level)) if kind == 'l2' else dict(plugins=[DropPath(level)])
        theirs = run_search(space.supernet(0), task, budget=Budget(2, 20), **alone, **search()).state.net.state_dict()
        for name, v in seen.items(): assert torch.equal(v, theirs[name]), (level, name)
    assert not torch.equal(ends.seen[0]['stem.0.weight'], ends.seen[1]['stem.0.weight'])

def test_a_search_of_r_darts_that_stops_early_is_followed_by_the_next(space, task, rising):
    how = dict(retrain=Recipe(epochs=1), select=ByStrength(), plugins=[EarlyStop(**QUICK)], budget=BUDGET)
    found = r_darts(space, task, levels=(3e-4, 3e-2), **how)
    assert len(found.result.history) == (3 if found.level == 3e-4 else 8) and len(found.table) == 2
    assert (found.result.stopped is None) == (found.level == 3e-2)

def test_drop_path_is_heard_by_an_accelerated_supernet(space, task):
    run = lambda net: run_search(net, task, plugins=[DropPath(.5)], budget=Budget(2, 20)).state.net
    plain, fast = run(space.supernet(0)), run(accelerate(space.supernet(0)))
    theirs = fast.state_dict()
    for name, a in plain.state_dict().items(): torch.testing.assert_close(a, theirs[name], atol=1e-4, rtol=1e-3)

# --- bad input -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make, text', [
    (lambda: EigenMonitor(freq=0), 'freq=0'), (lambda: EigenMonitor(images=0), 'images=0'),
    (lambda: EigenMonitor(method='qr'), "method='qr'"),
    (lambda: EigenMonitor(statistics='all'), "statistics='all'"), (lambda: EarlyStop(window=0), 'window=0'),
    (lambda: EarlyStop(delta=0), 'delta=0'),
    (lambda: EarlyStop(factor=1.), 'factor=1.0'), (lambda: EarlyStop(start=-1), 'start=-1'), (lambda: AdaptiveReg(mul=1.), 'mul=1.0'),
    (lambda: AdaptiveReg(max_wd=0.), 'max_wd=0.0'), (lambda: DropPath(1.), 'p=1.0'), (lambda: VotingTeachers(k=0), 'k=0'),
    (lambda: VotingTeachers(every=0), 'every=0'),
    (lambda: VotingTeachers(lam=-1.), 'lam=-1.0'), (lambda: VotingTeachers(tau=0.), 'tau=0.0'),
    (lambda: VotingTeachers(vote='loud'), "vote='loud'"),
    (lambda: VotingTeachers(dtype=torch.int8), 'torch.int8'), (lambda: RandomSmoothing(2.), 'radius=2.0'),
    (lambda: AdversarialSmoothing(steps=0), 'steps=0')])
def test_bad_settings_are_named(make, text):
    with pytest.raises(ValueError) as e: make()
    assert text in str(e.value)

@pytest.mark.parametrize('how, text', [
    (dict(plugins=[EarlyStop(), AdaptiveReg()]), 'two that go back'),
    (dict(plugins=[AdaptiveReg()], recipe=SearchRecipe(w_decay=0.)), 'w_decay=0.0'),
    (dict(plugins=[RandomSmoothing()], level='one'), "level='one'"), (dict(plugins=[Strengths()]), 'select=Magnitude with Strengths'),
    (dict(select=ShortRetrain()), 'exactly one'), (dict(plugins=[Strengths(), EigenMonitor()], select=ShortRetrain()), 'after Strengths'),
    (dict(plugins=[RandomSmoothing()], hyper=Split()), 'hyper=Split')])
def test_impossible_searches_are_refused_before_any_step(how, text, space, task):
    with pytest.raises(ValueError) as e: run_search(space.supernet(0), task, budget=Budget(1, 20), **how)
    assert text in str(e.value)

def test_bad_arguments_of_functions(space, task):
    s = run_search(space.supernet(0), task, budget=Budget(1, 20)).state
    for call, text in [(lambda: arch_loss(s, arch_batch(s), 'all'), "statistics='all'"),
                       (lambda: alpha_sharpness(s, arch_batch(s), 'flat'), "kind='flat'"),
                       (lambda: alpha_sharpness(s, arch_batch(s), 'perturb', radius=0.), 'radius=0.0'),
                       (lambda: lambda_max(s, arch_batch(s), 'qr'), "method='qr'"),
                       (lambda: r_darts(space, task, 'l1'), "kind='l1'"), (lambda: r_darts(space, task, levels=()), 'levels=()'),
                       (lambda: r_darts(space, task, levels=(-1.,)), 'levels=(-1.0,)')]:
        with pytest.raises(ValueError) as e: call()
        assert text in str(e.value)

def test_the_rule_against_a_plain_loop():
    "Window by window, by hand, on random series."
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, epochs = list(rng.exponential(size=rng.integers(1, 30))), list(range(2, 62, 2))
        got = stop_epoch(epochs[:len(values)], values, 5, 4, 1.3, 10)
        want, k = None, len(values) - 5                                             # k: first of the newest window
        if k >= 4 and epochs[k - 4 + 2] >= 10 and sum(values[k:k + 5]) > 1.3 * sum(values[k - 4:k + 1]): want = epochs[k - 4 + 2]
        assert got == want
