"""The wing `cost` as a user meets it: the exported modules, across each other, on a mini-sized space with made-up and with measured
values."""
import math, os, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from torch import nn
from nas_nb.cost.collect import COLUMNS, read_measurements, sample_and_measure, sample_genotypes
from nas_nb.cost.core import Affine, Cost, Quantity, as_number, parse_quantity, unit_factor
from nas_nb.cost.expected import LUTCost, Multilinear, fit_lut
from nas_nb.cost.measure import Latency, measure
from nas_nb.cost.predictor import Fit, LatencyPredictor, PredictorCost, encode, fit_predictor
from nas_nb.core.run import DamagedFile
from nas_nb.ops.conv import NB201_OPS
from nas_nb.space.cells import CellSpace, nb201_space
from nas_nb.space.core import Space

ROOT = Path(__file__).resolve().parent.parent
PRICE = {'nor_conv_3x3': .2, 'nor_conv_1x1': .1, 'avg_pool_3x3': .15}

def price(g): return .3 + sum(PRICE.get(op, 0.) for c in g.canonical().cells for _, _, op in c.edges)**1.1

@pytest.fixture(scope='module')
def space(): return CellSpace('three', NB201_OPS, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=1)

@pytest.fixture(scope='module')
def every(space): return list(space.enumerate())

@pytest.fixture(scope='module')
def fit(space, every):
    return fit_predictor(space, every, [price(g) for g in every], steps=60, conditions=dict(backend='eager', threads=1, batch=1))

@pytest.fixture
def weights(): return {'cell': torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)}

def all_costs(space, fit):
    lut = LUTCost({'cell': torch.rand(3, 5, generator=torch.Generator().manual_seed(1))}, space, 'ms', .1)
    return [lut, Multilinear(price, space, 'ms'), Affine(lut, 2, .5), lut + Multilinear(price, space, 'ms'), lut.to('s'),
            *[PredictorCost(fit, space, mode, generator=torch.Generator().manual_seed(0)) for mode in ('exact', 'sample', 'mean')]]

# ---- units and the law
@pytest.mark.parametrize('text', ['0.8', '1 parsec', '-1ms', '0ms', '', 'ms', '1e400s', '1..2ms', 'nan ms'])
def test_quantities_that_are_refused(text):
    with pytest.raises(ValueError, match='quantity'): parse_quantity(text)

def test_quantities_convert_and_refuse_bare_numbers():
    assert parse_quantity('0.8ms') == parse_quantity('800us') == Quantity(8e-4, 's')
    assert unit_factor('GB', 'MB') == 1000
    for wrong in (lambda q: q < 1, lambda q: q + 1, lambda q: q == 1, lambda q: 1 + q, lambda q: 1 > q, lambda q: q/True*1 < 2):
        with pytest.raises(TypeError): wrong(Quantity(1, 'ms'))
    with pytest.raises(ValueError, match='memory'): Quantity(1, 'ms') + Quantity(1, 'MB')
    with pytest.raises(TypeError, match='no unit'): as_number(.8, 'ms')

def test_every_cost_keeps_the_law_and_has_a_gradient(space, fit, every, weights):
    for cost in all_costs(space, fit):
        for g in every[::7]: assert float(cost(space.one_hot(g))) == pytest.approx(cost.of(g), rel=1e-6), cost
        a = weights['cell'].log().requires_grad_()
        grad, = torch.autograd.grad(cost({'cell': a.softmax(-1)}), a)
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, cost
        for wrong in (lambda: cost + 1, lambda: cost < 1):
            with pytest.raises(TypeError): wrong()

def test_units_meet_only_their_own(space, fit):
    lut = all_costs(space, fit)[0]
    with pytest.raises(ValueError, match='cannot be added'): lut + LUTCost(lut.table, space, 's')
    assert (lut.to('s') + LUTCost(lut.table, space, 's')).unit == 's'
    assert lut.number(parse_quantity('2s')) == 2000
    with pytest.raises(NotImplementedError): Cost()({})

# ---- expectations
def test_exact_is_the_enumerated_expectation(space, fit, every, weights):
    rows = torch.tensor([space.indices(g)['cell'] for g in every])
    p = weights['cell'][torch.arange(3), rows].prod(-1)
    assert float(p.sum()) == pytest.approx(1)
    for cost in (Multilinear(price, space, 'ms'), PredictorCost(fit, space)):
        values = torch.tensor([cost.of(g) for g in every], dtype=torch.float64)
        assert float(cost(weights)) == pytest.approx(float(p @ values), abs=1e-6)
        n = 3000
        picks = torch.multinomial(p, n, replacement=True, generator=torch.Generator().manual_seed(0))
        assert abs(float(values[picks].mean()) - float(p @ values)) < 3*float(values[picks].std())/math.sqrt(n)

def test_sampled_mean_within_three_standard_errors(space, fit, weights):
    exact = float(PredictorCost(fit, space)(weights))
    sampled = PredictorCost(fit, space, 'sample', n=8, generator=torch.Generator().manual_seed(3))
    values = torch.tensor([float(sampled(weights)) for _ in range(400)])
    assert abs(float(values.mean()) - exact) < 3*float(values.std())/20

def test_same_generator_same_draws_and_the_global_one_is_left_alone(space, fit, weights):
    before = torch.random.get_rng_state()
    a, b = (float(PredictorCost(fit, space, 'sample', generator=torch.Generator().manual_seed(5))(weights)) for _ in range(2))
    assert a == b and torch.equal(before, torch.random.get_rng_state())

def test_gradients_are_those_of_finite_differences(space, fit, weights):
    a = weights['cell'].log().requires_grad_()
    for mode in ('mean', 'exact'):
        cost = PredictorCost(fit, space, mode)
        assert torch.autograd.gradcheck(lambda a: cost({'cell': a.softmax(-1)}), (a,))

def test_exact_on_nb201_is_fast():
    space = nb201_space(in_shape=(1, 8, 8), C=4, stages=1, cells=1)
    genotypes = sample_genotypes(space, 60)
    cost = PredictorCost(fit_predictor(space, genotypes, [price(g) for g in genotypes], steps=5), space)
    a, times = torch.zeros(6, 5, requires_grad=True), []
    for _ in range(30):
        start = time.perf_counter(); torch.autograd.grad(cost({'cell': a.softmax(-1)}), a); times.append(time.perf_counter() - start)
    assert min(times) < 5e-3

def test_reachable_is_over_connected_networks_only(space, fit, every):
    low, high = PredictorCost(fit, space).reachable()
    values = [PredictorCost(fit, space).of(g) for g in every if g.connected]
    assert (low, high) == pytest.approx((min(values), max(values)))
    assert PredictorCost(fit, space, 'mean').reachable() == pytest.approx((low, high))

def test_lookup_table_recovers_what_is_additive(space, every):
    truth = LUTCost({'cell': torch.rand(3, 5)}, space, 'ms', 1.)
    found = fit_lut(space, every, [truth.of(g) for g in every], 'ms')
    assert max(abs(found.of(g) - truth.of(g)) for g in every) < 1e-5
    with pytest.raises(ValueError, match='more than 0'): LUTCost({'cell': -torch.ones(3, 5)}, space, 'ms').log_safe()

def test_tables_that_do_not_fit(space):
    with pytest.raises(ValueError, match='shape'): LUTCost({'cell': torch.ones(3, 4)}, space, 'ms')
    with pytest.raises(ValueError, match='shape'): Multilinear(torch.ones(5, 5), space, 'ms')
    with pytest.raises(ValueError, match='one group'):
        Multilinear(price, Space('two', ('none', 'conv'), {'a': ((0, 1),), 'b': ((0, 1),)}, {'a': (1, (1,)), 'b': (1, (1,))}, (1, 4, 4),
                                 2), 'ms')

# ---- encoding and predictor
def test_live_encoding_is_that_of_the_canonical_network(space, every):
    for g in every:
        assert torch.equal(encode(space, g), encode(space, g.canonical(), live=False))
        assert torch.equal(encode(space, g, 'read')[10:15], encode(space, g, False)[10:15])     # edge 1→2 ends in the output

def test_encoding_takes_leading_dimensions(space, every):
    W = {'cell': torch.stack([space.one_hot(g)['cell'] for g in every[:6]]).view(2, 3, 3, 5)}
    assert torch.equal(encode(space, W).view(6, 15), torch.stack([encode(space, g) for g in every[:6]]))

def test_two_inputs_and_several_outputs():
    darts = Space('darts', ('none', 'conv'), {'cell': ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))}, {'cell': (2, (2, 3))}, (1, 4, 4), 2)
    for g in darts.enumerate(): assert torch.equal(encode(darts, g), encode(darts, g.canonical(), live=False))

def test_fit_reports_and_survives_the_file(space, every, fit, tmp_path):
    assert fit.n_train + fit.n_test == 125 and fit.mean_rel_err < .05 and fit.spearman > .9
    assert set(fit.summary()) >= {'n_train', 'n_test', 'mean_rel_err', 'spearman', 'linear_mean_rel_err', 'linear_spearman'}
    train = {g.canonical() for g in every} - {space.from_str(s).canonical() for s in fit.test['genotype']}
    assert len(train) + len({space.from_str(s).canonical() for s in fit.test['genotype']}) == len({g.canonical() for g in every})
    fit.save(tmp_path/'fit.safetensors')
    back = Fit.load(tmp_path/'fit.safetensors')
    assert back.summary() == fit.summary() and back.test.equals(fit.test)
    assert [PredictorCost(back, space).of(g) for g in every] == [PredictorCost(fit, space).of(g) for g in every]
    data = bytearray((tmp_path/'fit.safetensors').read_bytes()); data[len(data)//2] ^= 1
    (tmp_path/'fit.safetensors').write_bytes(data)
    with pytest.raises(DamagedFile): Fit.load(tmp_path/'fit.safetensors')

def test_fit_depends_on_its_seed_only(space, every):
    values = [price(g) for g in every]
    state = torch.random.get_rng_state()
    a = fit_predictor(space, every, values, steps=5)
    torch.rand(3)
    b = fit_predictor(space, every, values, steps=5)
    assert a.test.equals(b.test) and not torch.equal(state, torch.random.get_rng_state())
    assert not a.test.equals(fit_predictor(space, every, values, steps=5, seed=1).test)

@pytest.mark.parametrize('change, why', [(lambda g, y: (g[:19], y[:19]), 'at least 20'), (lambda g, y: (g, [0., *y[1:]]),
        r'latencies_ms\[0\]'), (lambda g, y: (g, y[1:]), 'equal lengths'),
                                         (lambda g, y: (g, [math.inf, *y[1:]]), 'above 0')])
def test_bad_samples(space, every, change, why):
    with pytest.raises(ValueError, match=why): fit_predictor(space, *change(every, [price(g) for g in every]))

def test_a_fit_refuses_other_conditions_and_other_spaces(space, fit):
    assert fit.require(backend='eager', threads=1, batch=1, in_shape=(1, 8, 8)) is fit
    for other in (dict(backend='compiled'), dict(threads=2), dict(batch=8), dict(in_shape=(1, 16, 16)), dict(phase='full')):
        with pytest.raises(ValueError, match=next(iter(other))): fit.require(**other)
    with pytest.raises(ValueError, match='belongs to'): PredictorCost(fit, nb201_space())
    for bad in (dict(mode='all'), dict(n=0)):
        with pytest.raises(ValueError): PredictorCost(fit, space, **bad)
    with pytest.raises(ValueError): LatencyPredictor(0)

# ---- measurement
def test_measure_leaves_everything_as_it_was_even_on_failure():
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout()), torch.randn(2, 1, 6, 6)
    buffers = [b.clone() for b in net.buffers()]
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    def fails(x): raise KeyError('inside')
    with pytest.raises(RuntimeError, match="'f' failed"): measure({'net': net, 'f': fails}, x, rounds=3)
    found = measure({'net': net, 'f': lambda x: x + 1}, x, rounds=4, threads=2, canary=False)
    assert net.training and torch.get_num_threads() == threads and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers()))
    assert all(isinstance(l, Latency) and l.rounds_used == 4 and l.env['threads'] == 2 and math.isnan(l.env['canary_ms'])
               for l in found.values())
    assert found['f'].calls > 1                                 # too short for one call a sample

def test_a_machine_that_is_disturbed_nearly_always_is_rescaled():
    readings = iter(range(10**9))
    def burn(ms):
        end = time.perf_counter() + ms/1e3
        while time.perf_counter() < end: pass
    # after 5 calls to warm up, a reading is the fastest of three calls: every second reading is three times slower, so no stretch is clean
    found = measure({'a': lambda x: burn(.3)}, torch.ones(1, 1), rounds=6, canary=lambda: burn(.1 if (next(readings) + 1)//3 % 2
            else .3))['a']
    assert found.rescaled and found.rounds_used == found.discarded == 12
    assert found.ms == pytest.approx(.15, rel=.2)               # 0.3 ms on a machine that is on average twice as slow

# ---- collection
def test_a_killed_collection_continues(space, tmp_path):
    path = tmp_path/'table.csv'
    script = ('import sys\nfrom nas_nb.ops.conv import NB201_OPS\nfrom nas_nb.space.cells import CellSpace\nfrom nas_nb.cost.collect '
              'import sample_and_measure\n'
              "space = CellSpace('three', NB201_OPS, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=1)\n"
              'sample_and_measure(space, 60, path=sys.argv[1], chunk=3, progress=False)')
    process = subprocess.Popen([sys.executable, '-c', script, str(path)], env={**os.environ, 'PYTHONPATH': str(ROOT)})
    while process.poll() is None and len(read_measurements(path)) < 6: time.sleep(.02)
    process.kill(); process.wait()
    with open(path, 'ab') as f: f.write(b'|torn~0|')
    before = read_measurements(path)
    table = sample_and_measure(space, 20, path=path, rounds=3, progress=False)
    assert len(before) >= 6 and len(table) == 20 and table['genotype'].is_unique and tuple(table.columns) == COLUMNS
    assert read_measurements(path)[:len(before)].equals(before)
    assert [space.from_str(s) for s in table['genotype']] == sample_genotypes(space, 20)
    with pytest.raises(ValueError, match='batch'): sample_and_measure(space, 20, path=path, batch=4, progress=False)
    assert table.attrs['conditions']['backend'] == 'eager'
