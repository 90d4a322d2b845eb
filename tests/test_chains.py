"""Chains and widths as a user meets them: searched by the driver under a cost, taken out of Python, on the published sizes, on a device."""
import importlib.util, itertools
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from nas_nb.core.data import load_task
from nas_nb.cost.expected import DepthCost, LUTCost
from nas_nb.cost.predictor import PredictorCost, fit_predictor
from nas_nb.ops.mbconv import multiply_adds
from nas_nb.relax.choice import Gumbel
from nas_nb.search.driver import Budget, SearchRecipe, Soft, run_search
from nas_nb.search.latency import la_search
from nas_nb.space.chains import ChainSupernet, elastic_chain, fbnet_space, proxyless_chain
from nas_nb.space.core import Choice
from nas_nb.space.width import WidthSpace

ROOT = Path(__file__).resolve().parent.parent
NARROW = dict(stem=(4, 2), first=4, head=8, in_shape=(1, 8, 8), n_classes=10)

@pytest.fixture(scope='module')
def task(): return load_task('digits')

def elastic(**more): return elastic_chain(((4, 1), (6, 1)), (1, 2), (1, 2), (3,), (0.,), **NARROW | more)
def proxyless(): return proxyless_chain((4, 6), (2, 2), (1, 1), (3,), (1, 2), **NARROW)
def small_fbnet(): return fbnet_space('small', widths=(4, 6), repeats=(1, 2), strides=(1, 1), stem=(4, 2), head=8)
def widths(): return WidthSpace([(2, 4, 8), (4, 8)], (2, 1), (1, 8, 8), 10)

def price(space):
    table, frame = space.table()
    return DepthCost(table, space, 'MACs', frame)

# --- the driver searches them -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', (elastic, proxyless, small_fbnet))
def test_a_price_makes_the_found_chain_cheap(make, task):
    "Under a price that outweighs everything the cheapest chain is found; the cost is recorded and selection is the argmax."
    space = make()
    cost = price(space)
    result = run_search(space.supernet(0), task, objective=Soft(cost.to('MMACs'), 1e5), budget=Budget(4, 128), recipe=SearchRecipe(a_lr=.3))
    assert cost.of(result.genotype) == pytest.approx(cost.bounds()[0], rel=1e-5)
    assert result.genotype == space.genotype({g: result.state.net.arch[g] for g in space.groups})
    costs = [row['cost'] for row in result.history]
    least = cost.bounds()[0]/1e6
    at_first = float(cost({g: torch.full((1, len(names)), 1/len(names)) for g, names in space.candidates.items()}))/1e6
    assert costs == sorted(costs, reverse=True) and costs[-1] - least < .2*(at_first - least)

def test_a_budget_on_a_chain(task):
    "A limit is checked against what is reachable, without enumeration, and the found chain keeps it."
    space = fbnet_space('small', widths=(4, 6, 8), repeats=(1, 3, 3), strides=(1, 1, 1), stem=(4, 2), head=8)
    cost = price(space)
    assert space.size() > 100_000
    least, most = cost.bounds()
    limit = f'{least + .3*(most - least):.0f} MACs'
    found = la_search(space.supernet(0), task, cost, limit=limit, budget=Budget(3, 128), recipe=SearchRecipe(a_lr=.1)).genotype
    assert least <= cost.of(found) <= least + .3*(most - least) + 1
    with pytest.raises(ValueError, match='reachable are'): la_search(space.supernet(0), task, cost, limit='1 MACs')

@pytest.mark.parametrize('make', (elastic, small_fbnet, widths))
def test_a_resumed_search_is_the_same(make, task, tmp_path):
    space, how = make(), dict(relax=Gumbel(), seed=3)
    whole = run_search(space.supernet(0), task, budget=Budget(2, 256), **how)
    class Killed(Exception): pass
    class Kill(Soft):
        def epoch_start(self, s):
            if s.epoch == 1: raise Killed
    with pytest.raises(Killed): run_search(space.supernet(0), task, budget=Budget(2, 256), objective=Kill(), ckpt=tmp_path, **how)
    class Spared(Soft): pass
    Spared.__name__ = 'Kill'                     # the checkpoint remembers the names of its parts
    again = run_search(space.supernet(0), task, budget=Budget(2, 256), objective=Spared(), ckpt=tmp_path, resume=True, **how)
    for a, b in zip(whole.state.net.state_dict().values(), again.state.net.state_dict().values()): assert torch.equal(a, b)

# --- costs --------------------------------------------------------------------------------------------------------------------------

def test_gradient_of_the_expected_cost_is_that_of_the_enumeration():
    space = elastic()
    generator, sizes = torch.Generator().manual_seed(0), {g: (1, len(names)) for g, names in space.candidates.items()}
    table = {g: torch.rand(size, dtype=torch.float64, generator=generator) for g, size in sizes.items()}
    logits = {g: torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_() for g, size in sizes.items()}
    W = {g: a.softmax(-1) for g, a in logits.items()}
    ours = torch.autograd.grad(space.expected(W, table), list(logits.values()))
    W = {g: a.softmax(-1) for g, a in logits.items()}
    mean = 0.
    for g in space.enumerate():
        p = torch.stack([W[k][0, i] for k, (i,) in space.indices(g).items()]).prod()
        mean = mean + p*float(space.expected(space.one_hot(g, torch.float64), table))
    for a, b in zip(ours, torch.autograd.grad(mean, list(logits.values()))): torch.testing.assert_close(a, b, atol=1e-9, rtol=0)

def test_a_lookup_table_would_charge_for_absent_layers():
    space = elastic()
    table, frame = space.table()
    shallow = space.from_str('depth_1:k3_e2,k3_e2|depth_1:k3_e2,k3_e2')
    honest, wrong = DepthCost(table, space, 'MACs', frame), LUTCost(table, space, 'MACs', frame)
    assert honest.of(shallow) == multiply_adds(space.build(shallow), space.in_shape) < wrong.of(shallow)

def test_the_same_candidate_has_a_price_for_each_place():
    table, _ = fbnet_space().table()
    early, late = (float(table[f'stage{i}_block2'][0, 3]) for i in (2, 6))           # k3_e6
    assert early != late and float(table['stage2_block2'][0, -1]) == 0                # a skip is free

def test_a_predictor_reads_ragged_groups():
    space, rng = elastic(), np.random.default_rng(0)
    cost, genotypes = price(space).to('KMACs'), list(dict.fromkeys(space.sample(rng) for _ in range(80)))
    fit = fit_predictor(space, genotypes[:60], [cost.of(g) for g in genotypes[:60]], kind='table+mlp', hidden=(16,), seed=0)
    predicted = PredictorCost(fit, space, mode='mean')
    W = {g: w.requires_grad_() for g, w in space.one_hot(genotypes[0]).items()}
    assert predicted(W).item() == pytest.approx(predicted.of(genotypes[0]), rel=1e-4)
    assert sum(g.abs().sum() for g in torch.autograd.grad(predicted(W), list(W.values()))) > 0

# --- networks -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', (elastic, proxyless, small_fbnet, widths))
def test_a_built_network_leaves_python(make, tmp_path):
    from safetensors.torch import load, save
    space, rng = make(), np.random.default_rng(0)
    g = space.sample(rng)
    a, b, x = space.build(g, seed=0).eval(), space.build(g, seed=1).eval(), space.example(2)
    b.load_state_dict(load(save(a.state_dict())))
    with torch.no_grad():
        torch.testing.assert_close(b(x), a(x), atol=0, rtol=0)
        torch.testing.assert_close(torch.export.export(a, (x,)).module()(x), a(x), atol=1e-5, rtol=0)

def test_a_chain_of_skips_is_stem_and_head():
    space = proxyless()
    g = space.genotype({k: [len(names) - 1] for k, names in space.candidates.items()})
    assert [op for _, op in space.path(g)] == ['k3_e2']                               # the one layer that changes the width
    first_only = fbnet_space('small', widths=(4,), repeats=(2,), strides=(1,), stem=(4, 1), head=8)
    net = first_only.build(first_only.from_str('skip_connect,skip_connect')).eval()
    x = first_only.example(2)
    assert len(net.body) == 0
    torch.testing.assert_close(net(x), net.head(net.stem(x)))

@pytest.mark.parametrize('make', (fbnet_space, proxyless_chain, elastic_chain))
def test_published_sizes_are_built(make):
    "The supernets, without memory; and one network run on a picture of 224 x 224 pixels."
    space = make()
    with torch.device('meta'): net = ChainSupernet(space)
    candidates = sum(len(layer.ops) for layer in space.layers.values())
    assert sum(len(c.ops) for c in net.modules() if isinstance(c, Choice)) == candidates
    assert len(net.arch_parameters()) == len(space.groups)
    with torch.no_grad(): assert space.build(space.sample(np.random.default_rng(0))).eval()(space.example(1)).shape == (1, 1000)

def test_a_stage_without_weight_on_any_depth_is_zero():
    space = elastic()
    net, W = space.supernet(0).eval(), space.one_hot(space.sample(np.random.default_rng(0)))
    W['stage2_depth'] = torch.zeros(1, 2)
    with torch.no_grad(): torch.testing.assert_close(net(space.example(2), W), net.head(torch.zeros(2, 6, 4, 4)))

def test_canonical_genotypes_build_one_network():
    space = proxyless()
    for form, members in itertools.groupby(sorted(space.enumerate(), key=lambda g: str(space.canonical(g))), space.canonical):
        x, members = space.example(2), list(members)
        with torch.no_grad():
            outputs = [space.build(g).eval()(x) for g in members[:3]]
        for out in outputs[1:]: torch.testing.assert_close(out, outputs[0], atol=0, rtol=0)
        assert space.canonical(form) == form

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('make', (elastic, proxyless, small_fbnet, widths))
def test_a_device_gives_the_same(make):
    space, rng = make(), np.random.default_rng(0)
    g, net, x = space.sample(rng), space.supernet(0).eval(), space.example(4)
    with torch.no_grad():
        want = [net(x), net(x, space.one_hot(g)), net.discretize(g)(x)]
        net, x = net.cuda(), x.cuda()
        got = [net(x), net(x, {k: w.cuda() for k, w in space.one_hot(g).items()}), net.discretize(g)(x)]
    for a, b in zip(want, got): torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-3)

# --- the table of searches ----------------------------------------------------------------------------------------------------------

def test_a_row_of_the_table_of_searches_is_what_its_script_makes(task):
    spec = importlib.util.spec_from_file_location('make_chain_mini', ROOT/'tools'/'make_chain_mini.py')
    script = importlib.util.module_from_spec(spec); spec.loader.exec_module(script)
    rows, space = pd.read_csv(ROOT/'nbs/space/chains_mini.csv'), fbnet_space('small')
    assert len(rows) == len(script.LAMS)*len(script.SEEDS)*(1 + script.RANDOM)
    row = rows[rows.kind == 'found'].iloc[-1]
    assert abs(script.validated(space, task, space.from_str(row.genotype)) - row.accuracy) < .02
