"""The search wing from outside: resume, mutation and composition tests that need several modules at once. Small networks, seconds."""
import copy
import inspect
from dataclasses import replace
from itertools import product
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from nas_nb.core.data import load_task
from nas_nb.core.protocol import Protocol
from nas_nb.core.run import Checkpoints, load_state, save_state
from nas_nb.cost.expected import LUTCost
from nas_nb.relax.choice import Gumbel
from nas_nb.relax.core import Cosine, EntropyAdaptive, Exponential, Linear
from nas_nb.relax.paths import BinaryGate
from nas_nb.relax.sparse import SparseNoisySoftmax
from nas_nb.search import driver, hypergrad, implicit, rarts
from nas_nb.search.driver import Budget, Constraint, Plugin, SearchRecipe, Soft, run_search
from nas_nb.search.hypergrad import FirstOrder, HyperGrad, Unrolled, closure
from nas_nb.search.implicit import Implicit
from nas_nb.search.latency import LatencyBudget, check_limit, la_search, pareto_sweep, reachable
from nas_nb.search.rarts import Split
from nas_nb.search.retrain import Recipe, train_from_scratch
from nas_nb.search.select import Within, by_probability
from nas_nb.space.cells import nb201_space
from nas_nb.space.fast import accelerate
from nas_nb.space.mini import mini_space, mini_task

BUDGET = Budget(epochs=3, batch_size=20)

@pytest.fixture(scope='module')
def task(): return load_task('digits', limit=200)

@pytest.fixture(scope='module')
def space(): return nb201_space(in_shape=(1, 8, 8), n_classes=10, C=4, stages=2, cells=1)

@pytest.fixture(scope='module')
def price(space):
    prices = dict(none=0., skip_connect=0.01, nor_conv_1x1=0.1, nor_conv_3x3=0.3, avg_pool_3x3=0.2)
    return LUTCost({'cell': torch.tensor([prices[op] for op in space.op_names]).repeat(6, 1)}, space, unit='ms', constant=0.1)

class SampledCost(LUTCost):
    "A cost that draws: one sampled network, straight-through, from a generator of its own"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(3)
    def __call__(self, W):
        return super().__call__({k: Gumbel(hard=True)(w.clamp_min(1e-9).log(), generator=self.generator) for k, w in W.items()})

class Count(Plugin):
    "Keeps a number in the checkpoint"
    steps = 0
    def after_w(self, s): self.steps += 1
    def state_dict(self): return dict(steps=self.steps)
    def load_state_dict(self, tree): self.steps = tree['steps']

class Killed(Exception): pass

class KillIn(Plugin):
    "Raises in the middle of an epoch"
    def __init__(self, epoch): self.epoch = epoch
    def after_a(self, s):
        if s.epoch == self.epoch and s.step % 2: raise Killed

def same(a, b):
    for (name, x), y in zip(a.state.net.state_dict().items(), b.state.net.state_dict().values()): assert torch.equal(x, y), name
    assert a.genotype == b.genotype and len(a.history) == len(b.history)
    for x, y in zip(a.history, b.history):
        assert {k: v for k, v in x.items() if k != 'weights'} == {k: v for k, v in y.items() if k != 'weights'}
        assert all(torch.equal(v, y['weights'][k]) for k, v in x['weights'].items())

# --- resume -------------------------------------------------------------------------------------------------------------------------

def settings(name, space, price):
    sampled = SampledCost(price.table, space, 'ms', 0.1)
    return {'softmax': dict(), 'one level': dict(level='one'),
            'gumbel': dict(relax=Gumbel(), schedules=dict(temperature=Exponential(3., 0.3))), 'hard gumbel': dict(relax=Gumbel(hard=True)),
            'budget': dict(constraint=LatencyBudget(price, '0.5ms'), select=Within(price, '0.5ms')),
            'sampled cost': dict(objective=Soft(sampled, 0.5), schedules=dict(lam=Cosine(0.1, 0.5))),
            'entropy': dict(schedules=dict(temperature=EntropyAdaptive(Linear(.9, .3), start=.02))),
            'annealed noise': dict(relax=SparseNoisySoftmax(Linear(2., 0.))), 'gates': dict(relax=BinaryGate()),
            'two gates': dict(relax=BinaryGate('two')),
            'noise per sample': dict(relax=Gumbel(), recipe=SearchRecipe(per_sample=True)),
            'autocast': dict(recipe=SearchRecipe(autocast=True)),
            'two gates, autocast': dict(relax=BinaryGate('two'), recipe=SearchRecipe(autocast=True))}[name]

@pytest.mark.parametrize('name',
                         ['softmax', 'one level', 'gumbel', 'hard gumbel', 'budget', 'sampled cost', 'entropy', 'annealed noise', 'gates',
                          'two gates', 'noise per sample', 'autocast', 'two gates, autocast'])
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(name, space, price, task, tmp_path):
    run = lambda kill, **k: run_search(space.supernet(1), task, budget=BUDGET, seed=1, plugins=[Count(), KillIn(kill)],
                                       **settings(name, space, price), **k)
    whole = run(99)
    after = 2 if name != 'one level' else 1
    with pytest.raises(Killed): run(after, ckpt=tmp_path)
    assert Checkpoints(tmp_path, 'search').latest()[1]['state']['epoch'] == after
    resumed = run(99, ckpt=tmp_path, resume=True)
    same(whole, resumed)
    assert resumed.state.parts[2].steps == whole.state.parts[2].steps == 3 * len(whole.state.sources['train'])
    same(whole, run(99, ckpt=tmp_path, resume=True))          # resuming what is finished changes nothing

def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(space, task, tmp_path):
    run = lambda **k: run_search(space.supernet(0), task, budget=BUDGET, **k)
    whole = run(ckpt=tmp_path)
    newest = sorted(tmp_path.glob('search-*'))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=newest.name): resumed = run(ckpt=tmp_path, resume=True)
    same(whole, resumed)

def test_retraining_resumes_bitwise_and_a_search_leaves_no_trace(space, task, tmp_path):
    g, recipe = space.sample(np.random.default_rng(0)), Recipe(epochs=3)
    whole = train_from_scratch(space.build(g, seed=0), task, recipe)
    run_search(space.supernet(0), task, budget=Budget(1, 20))                  # between: nothing global may have moved
    class Stop(Checkpoints):
        def save(self, step, tree):
            super().save(step, tree)
            raise Killed
    with pytest.raises(Killed): train_from_scratch(space.build(g, seed=0), task, recipe, ckpt=Stop(tmp_path, 'retrain'))
    resumed = train_from_scratch(space.build(g, seed=4), task, recipe, ckpt=tmp_path, resume=True)
    for a, b in zip(whole.network.state_dict().values(), resumed.network.state_dict().values()): assert torch.equal(a, b)
    assert whole.history == resumed.history and task.test.opened == 0

def test_a_sweep_resumes_point_by_point(space, price, task, tmp_path):
    run = lambda **k: pareto_sweep(space, task, price, lams=(0., 5.), budget=BUDGET, warm_epochs=1, **k)
    whole = run(ckpt=tmp_path)
    for path in tmp_path.glob('sweep-1-*'): path.unlink()                       # as if killed before the second point
    resumed = run(ckpt=tmp_path, resume=True)
    for a, b in zip(whole, resumed): same(a.result, b.result)

# --- mutations: what must change nothing, and what must change something -------------------------------------------------------------

def test_lambda_zero_is_bitwise_the_run_without_cost(space, price, task):
    plain = run_search(space.supernet(0), task, budget=BUDGET, relax=Gumbel())
    for cost in (price, SampledCost(price.table, space, 'ms', 0.1)):
        zero = la_search(space.supernet(0), task, cost, budget=BUDGET, relax=Gumbel())
        for a, b in zip(plain.state.net.state_dict().values(), zero.state.net.state_dict().values()): assert torch.equal(a, b)
    assert la_search(space.supernet(0), task, price, lam=5., budget=BUDGET,
                     relax=Gumbel()).history[-1]['cost'] < float(price(plain.history[-1]['weights']))

def test_a_plugin_that_only_looks_changes_nothing(space, task):
    class Look(Plugin):
        def after_a(self, s):
            with torch.no_grad(), hypergrad.frozen_statistics(s.norms): s.loss('val', s.sample())
    same(run_search(space.supernet(0), task, budget=BUDGET, relax=Gumbel()),
         run_search(space.supernet(0), task, budget=BUDGET, relax=Gumbel(), plugins=[Look()]))

@pytest.mark.parametrize('change', [dict(seed=1), dict(recipe=SearchRecipe(a_lr=1e-2)), dict(relax=Gumbel()),
                                    dict(schedules=dict(temperature=Cosine(1., 0.2))), dict(level='one'), dict(budget=Budget(3, 10))])
def test_what_should_matter_matters(change, space, task):
    base = run_search(space.supernet(0), task, budget=BUDGET)
    other = run_search(space.supernet(0), task, **(dict(budget=BUDGET) | change))
    assert not torch.equal(base.state.a[0], other.state.a[0])

# --- seams that later papers need ----------------------------------------------------------------------------------------------------

class Twice(HyperGrad):
    "Finite differences of L_val in the weights' direction: three forward passes, extra state, nothing left behind"
    calls = 0
    def start(self, s): self.norm = None
    def __call__(self, L_val, L_train, w, arch, xi, w_opt):
        first = L_val()
        assert torch.equal(first.detach(), L_val().detach()) and torch.equal(L_train().detach(), L_train().detach())
        grads = torch.autograd.grad(first, [*arch, *w], allow_unused=True)
        direct, step = grads[:len(arch)], [torch.zeros_like(p) if g is None else g for p, g in zip(w, grads[len(arch):])]
        saved = [p.detach().clone() for p in w]
        with torch.no_grad(): torch._foreach_add_(w, step, alpha=-xi)
        moved = torch.autograd.grad(L_train(), arch)
        with torch.no_grad():
            for p, v in zip(w, saved): p.copy_(v)
        self.calls += 1
        return [d - 0.01 * m for d, m in zip(direct, moved)]
    def state_dict(self): return dict(calls=self.calls)
    def load_state_dict(self, tree): self.calls = tree['calls']

def test_a_hypergradient_with_several_passes_and_a_state(space, task, tmp_path):
    whole = run_search(space.supernet(0), task, budget=BUDGET, hyper=Twice(), relax=Gumbel())
    run = lambda kill, **k: run_search(space.supernet(0), task, budget=BUDGET, hyper=Twice(), relax=Gumbel(), plugins=[KillIn(kill)], **k)
    with pytest.raises(Killed): run(1, ckpt=tmp_path)
    resumed = run(9, ckpt=tmp_path, resume=True)
    same(whole, resumed)
    assert resumed.state.hyper.calls == whole.state.hyper.calls == resumed.state.step

HYPER = {'unrolled fd': Unrolled, 'unrolled exact': lambda: Unrolled('exact', steps=2),
         'neumann': lambda: Implicit(steps=2), 'cg': lambda: Implicit('cg', steps=2, damping=.1),
         'split': lambda: Split(lam=2., beta=Linear(.1, 1.)), 'split, jacobi': lambda: Split(order='jacobi')}

@pytest.fixture(scope='module')
def mini(): return replace(mini_task(), train=mini_task().train.subset(range(120)))

@pytest.mark.parametrize('name', HYPER)
def test_a_search_with_any_hypergradient_resumes_bitwise(name, mini, tmp_path):
    common = dict(relax=Gumbel(), budget=BUDGET, seed=2)
    run = lambda kill, **k: run_search(mini_space().supernet(2), mini, hyper=HYPER[name](), plugins=[KillIn(kill)], **common, **k)
    whole = run(99)
    with pytest.raises(Killed): run(1, ckpt=tmp_path)
    same(whole, run(99, ckpt=tmp_path, resume=True))
    first = run_search(mini_space().supernet(2), mini, plugins=[KillIn(99)], **common)
    assert not torch.equal(whole.state.a[0], first.state.a[0])                # it is not first order under another name

@pytest.mark.parametrize('name', HYPER)
def test_a_hypergradient_leaves_weights_buffers_optimizer_and_architecture_alone(name, mini):
    s = run_search(mini_space().supernet(0), mini, hyper=HYPER[name](), budget=Budget(1, 20)).state
    s.net.train(); s.step = 0; s.begin_step()
    val, train = (closure(s.net, s.w, lambda half=half: s.loss(half, s.sample())) for half in ('val', 'train'))
    before = {k: v.clone() for k, v in s.net.state_dict().items()}, copy.deepcopy(s.w_opt.state_dict())
    with hypergrad.frozen_statistics(s.norms): grads = s.hyper(val, train, s.w, s.a, 0.05, s.w_opt)
    assert [g.shape for g in grads] == [a.shape for a in s.a] and not any(g.requires_grad for g in grads)
    assert all(torch.equal(before[0][k], v) for k, v in s.net.state_dict().items()) and all(p.grad is None for p in s.net.parameters())
    old, new = before[1]['state'], s.w_opt.state_dict()['state']
    assert old.keys() == new.keys() and all(torch.equal(old[k]['momentum_buffer'], new[k]['momentum_buffer']) for k in old)

def test_a_look_ahead_meets_the_penalties_of_the_weights_it_uses():
    net = mini_space().supernet(0)
    net.penalty = lambda: sum(p.square().sum() for p in net.weight_parameters())
    w, protocol = net.weight_parameters(), Protocol(net)
    loss = closure(net, w, lambda: protocol.penalty(torch.zeros(())))
    assert loss() > 0 and torch.allclose(loss([2 * p for p in w]), 4 * loss())

def test_the_module_protocol_is_spoken_in_search_and_retraining(task):
    class Ball(nn.Linear):
        def penalty(self): return 1e-3 * self.weight.square().sum()
        @torch.no_grad()
        def project_(self): self.weight.clamp_(-0.02, 0.02)
        def progress_(self, t): self.time = t
    class Space(type(nb201_space())):
        def head(self, C, n_classes): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Ball(C, n_classes))
    from nas_nb.ops.conv import NB201_OPS
    space = Space('balls', NB201_OPS, 3, None, (1, 8, 8), 10, 4, 1, 1)
    net = run_search(space.supernet(0), task, budget=BUDGET).state.net
    assert net.head[2].weight.abs().max() <= 0.02 and 0 < net.head[2].time < 1
    net = train_from_scratch(space.build(space.sample(np.random.default_rng(0))), task, Recipe(epochs=1)).network
    assert net.head[2].weight.abs().max() <= 0.02

def test_a_constraint_that_owns_the_update_may_leave_the_architecture_alone(space, task):
    class Frozen(Constraint):
        def update(self, s, grads): pass
    net = space.supernet(0)
    before = net.arch['cell'].detach().clone()
    run_search(net, task, constraint=Frozen(), budget=BUDGET)
    assert torch.equal(before, net.arch['cell'])

def test_states_of_all_parts_can_be_stored(space, price, tmp_path):
    for i, part in enumerate([Plugin(), Constraint(), Soft(price, 1.), LatencyBudget(price, '0.5ms'), FirstOrder()]):
        save_state(tmp_path/f'{i}', part.state_dict())
        part.load_state_dict(load_state(tmp_path/f'{i}'))

# --- selection -----------------------------------------------------------------------------------------------------------------------

def test_selection_against_brute_force(space, price):
    logp = {'cell': torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).log_softmax(-1)}
    best = sorted(product(range(5), repeat=6), key=lambda picks: -sum(float(logp['cell'][r, i]) for r, i in enumerate(picks)))[:300]
    assert [space.genotype({'cell': list(picks)}) for picks in best] == [g for (g, _), _ in zip(by_probability(logp, space), range(300))]

def test_the_result_is_within_the_budget_for_any_limit(space, price, task):
    least, most = reachable(price, space)
    for limit in np.linspace(least * 1.001, most, 3):
        result = la_search(space.supernet(0), task, price, limit=f'{limit}ms', budget=Budget(1, 40))
        assert price.of(result.genotype) <= limit and result.genotype.connected
    with pytest.raises(ValueError, match='reachable are'): la_search(space.supernet(0), task, price, limit=f'{least * 0.9}ms')
    with pytest.raises(ValueError, match='reachable are'): pareto_sweep(space, task, price, limits=('1ms', f'{least * 0.9}ms'))
    with pytest.raises(ValueError, match='exactly one'): pareto_sweep(space, task, price)
    assert str(check_limit(price, '700us', space)) == '0.7 ms'

# --- relaxations and schedules that the driver talks to ----------------------------------------------------------------------------------

def test_the_temperature_follows_the_entropy(space, task):
    "The recorded entropy keeps to the target, where a constant temperature does not; rolled back, the temperature goes back too."
    target = Linear(.9, .3)
    class Back(Plugin):
        "Once, after epoch 4, back to the end of epoch 2"
        kept, times = None, 0
        def epoch_end(self, s):
            if s.epoch == 2: self.kept = s.snapshot()
            if s.epoch == 4 and not self.times: self.times = 1; s.restore(self.kept)
    run = lambda temperature, *plugins: run_search(space.supernet(0), task, budget=Budget(8, 20), plugins=plugins,
                                                   schedules=dict(temperature=temperature))
    adaptive = EntropyAdaptive(target, start=.02, limit=4.)
    a, b = run(adaptive), run(adaptive, Back())
    assert [r['temperature'] for r in a.history] == [r['temperature'] for r in b.history] and adaptive.temperature == .02
    off = lambda result: np.mean([abs(r['entropy'] - target.value((r['epoch'] - 1)/8)) for r in result.history[3:]])
    assert off(a) < .1 < off(run(Exponential(.02, .02)))
    assert len({r['temperature'] for r in a.history}) == 8

def test_noise_is_annealed_within_a_search(space, task):
    sizes = []
    class Look(Plugin):
        def after_w(self, s): sizes.append(s.relax.size)
    run_search(space.supernet(0), task, budget=Budget(2, 20), relax=SparseNoisySoftmax(Linear(1., 0.)), plugins=[Look()])
    assert sizes == pytest.approx([1 - i/len(sizes) for i in range(len(sizes))])

def test_a_gated_search_moves_only_what_ran(space, task):
    """Bit for bit, the weight step leaves operations alone that were not drawn;
    with pairs, other probabilities stay in spite of Adam and decay."""
    class Look(Plugin):
        def after_a(self, s):
            old, new = self.logits.softmax(-1), s.net.arch['cell'].detach().softmax(-1)
            if s.relax.mode == 'two': assert (old - new)[~s.W['cell'].paths[1]].abs().max() < 3e-7
            assert not torch.equal(old, new)
            self.before = {k: v.clone() for k, v in s.net.state_dict().items()}
        def after_w(self, s):
            drawn = tuple(f'choices.{row}.ops.{space.op_names[i]}.' for row, i in enumerate(s.W['cell'].argmax(-1).tolist()))
            moved = [k for k, v in s.net.state_dict().items() if '.choices.' in k and not torch.equal(v, self.before[k])]
            assert all(any(d in k for d in drawn) for k in moved)
            self.epoch_start(s)
        def epoch_start(self, s): self.logits = s.net.arch['cell'].detach().clone()
    for mode in ('recompute', 'two'): run_search(space.supernet(0), task, budget=Budget(2, 20), relax=BinaryGate(mode), plugins=[Look()])

@pytest.mark.parametrize('path', ['plain', 'fast'])
def test_autocast_is_bfloat16_within_and_float32_outside(path, space, task):
    maps = set()
    class Look(Plugin):
        def w_loss(self, s, loss, batch): assert batch.logits.dtype == loss.dtype == torch.float32; return loss
    net = space.supernet(0)
    if path == 'fast': accelerate(net)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda m, args, out: maps.add(out.dtype))
    result = run_search(net, task, budget=Budget(1, 20), plugins=[Look()], recipe=SearchRecipe(autocast=True))
    assert maps == {torch.bfloat16} and np.isfinite(result.history[-1]['train_loss'])
    assert {t.dtype for t in net.state_dict().values() if torch.is_tensor(t) and t.is_floating_point()} == {torch.float32}

def test_costs_see_the_mean_of_noise_per_sample(space, price, task):
    result = run_search(space.supernet(0), task, budget=Budget(1, 20), relax=Gumbel(), recipe=SearchRecipe(per_sample=True),
                        objective=Soft(price, 1.), constraint=LatencyBudget(price, '0.5ms'))
    assert price.bounds()[0] <= result.history[-1]['cost'] <= price.bounds()[1]
    with pytest.raises(ValueError, match='W must hold'):                  # halves of fewer images than a batch
        run_search(space.supernet(0), task, budget=Budget(1, 100), relax=Gumbel(), recipe=SearchRecipe(per_sample=True))

# --- the house rule ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('module', [driver, hypergrad, implicit, rarts], ids=lambda m: m.__name__)
def test_a_module_stays_readable_in_one_sitting(module):
    text = Path(inspect.getfile(module)).read_text()
    size = len(' '.join(line.strip() for line in text.splitlines() if line.strip() and not line.startswith('#')))
    assert size <= 16_000, f'{size} characters (250 lines of 64): a paper belongs into a plug-in'      # wherever its lines are broken

def test_the_driver_knows_no_method_of_hypergradients():
    text = Path(inspect.getfile(driver)).read_text()
    assert not any(name in text for name in ('Unrolled', 'Implicit', 'Split(', 'unrolled', 'implicit'))
