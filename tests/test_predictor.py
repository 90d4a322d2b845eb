"""The regressors behind `fit_predictor`: every kind as a fit, as a file and as a cost, on made-up latencies whose truth is known."""
import importlib.util, math
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from nas_nb.cost.collect import conditions_of, sample_and_measure, space_key
from nas_nb.cost.encoding import connection, encode, feature_vector, genotype_weights, graph_features, table_columns
from nas_nb.cost.predictor import Fit, PredictorCost, fit_predictor
from nas_nb.cost.measure import measure
from nas_nb.cost.regress import KINDS, GaussianPart, _CentreSum, _kernel, fit_regressor, out_of_fold, relative_table
from nas_nb.ops.conv import NB201_OPS
from nas_nb.space.cells import CellSpace, nb201_space
from nas_nb.space.core import Space
from nas_nb.search.job import Job, JobConfig

ROOT = Path(__file__).resolve().parent.parent
TIME = {'skip_connect': .02, 'nor_conv_1x1': .1, 'nor_conv_3x3': .25, 'avg_pool_3x3': .15}

@pytest.fixture(scope='module')
def space(): return CellSpace('three', NB201_OPS, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=1)

@pytest.fixture(scope='module')
def every(space): return list(space.enumerate())

def additive(g): return .3 + sum(TIME.get(op, 0.) for c in g.canonical().cells for _, _, op in c.edges)
def product(g): return additive(g)*(1.5 if sum('conv' in op for c in g.canonical().cells for _, _, op in c.edges) > 1 else 1.)

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_a_fit_a_file_and_a_cost(space, every, kind, tmp_path):
    conditions = dict(backend='eager', threads=1, batch=1)
    fit = fit_predictor(space, every, [product(g) for g in every], kind=kind, steps=40, conditions=conditions)
    assert fit.meta['kind'] == kind == fit.summary()['kind'] and fit.n_train + fit.n_test == 125
    fit.save(tmp_path/'fit'); back = Fit.load(tmp_path/'fit')
    assert back.predict(space, every).equals(fit.predict(space, every)) and back.summary() == fit.summary()
    with pytest.raises(ValueError, match="backend='eager'.*backend='compiled'"): back.require(backend='compiled')
    w = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    for mode in ('exact', 'sample', 'mean'):
        if mode == 'mean' and not fit.model.differentiable: continue
        cost = PredictorCost(back, space, mode, generator=torch.Generator().manual_seed(0))
        for g in every[::9]: assert float(cost(space.one_hot(g))) == pytest.approx(cost.of(g), rel=1e-6)
        grad, = torch.autograd.grad(cost({'cell': w}), w)
        assert torch.isfinite(grad).all() and grad.abs().max() > 0

def test_the_sum_over_centres_is_its_formula_and_twice_differentiable():
    r = torch.Generator().manual_seed(0)
    z, Z = torch.randn(7, 4, dtype=torch.float64, generator=r).requires_grad_(), torch.randn(5, 4, dtype=torch.float64, generator=r)
    alpha, length = 1e3*torch.randn(5, dtype=torch.float64, generator=r), torch.tensor(2., dtype=torch.float64)
    def ours(z): return _CentreSum.apply(z, Z, alpha, length)[0]
    def plain(z): return _kernel(z, Z, length) @ alpha
    torch.testing.assert_close(ours(z), plain(z), rtol=1e-12, atol=1e-10)
    assert torch.autograd.gradcheck(ours, (z,)) and torch.autograd.gradgradcheck(ours, (z,))
    for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(f(lambda z: ours(z).sin().sum(), z), f(lambda z: plain(z).sin().sum(), z), rtol=1e-9, atol=1e-8)

def test_a_gaussian_part_takes_any_shape_and_dtype():
    X = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    part = GaussianPart(3, 20).fit(X, X.sum(1).sin())
    assert part(X.view(5, 4, 3, 3)).shape == (5, 4, 3) and part(X[0]).shape == () and part(X).dtype == torch.float32
    torch.testing.assert_close(part(X), (part.bias + part.kernel(X) @ part.alpha.double()).float())
    two = part(X.view(20, 3, 3))
    assert torch.equal(two.flatten(), part(X))

def test_measurements_and_fits_meet_under_the_same_conditions(space, tmp_path):
    table = sample_and_measure(space, 21, rounds=3, progress=False)
    cells = [space.from_str(s) for s in table.genotype]
    fit = fit_predictor(space, cells, table.latency_ms, kind='table')
    assert conditions_of(table) == table.attrs['conditions'] == fit.meta['conditions']
    assert fit.meta['conditions']['space'] == space_key(space)
    fit.save(tmp_path/'fit'); fit = Fit.load(tmp_path/'fit')
    again = {s: space.build(space.from_str(s)) for s in table.genotype[:3]}
    found = measure(again, space.example(), rounds=3)
    assert fit.require(found) is fit and list(fit.compare(space, found).genotype) == list(again)
    assert len(fit.compare(space, table)) == 21 and PredictorCost(fit, space, measured=table).unit == 'ms'
    others = [measure(again, space.example(2), rounds=3), *(table.assign(**{k: v}) for k, v in (('threads', 2), ('backend', 'onnx')))]
    both_named = ('batch=1, asked is batch=2', 'threads=1, asked is threads=2', "backend='eager', asked is backend='onnx'")
    for other, both in zip(others, both_named):
        for refused in (lambda: fit.require(other), lambda: PredictorCost(fit, space, measured=other), lambda: fit.compare(space, other)):
            with pytest.raises(ValueError, match=both): refused()
    wide = CellSpace('three', NB201_OPS, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=8, stages=1)
    with pytest.raises(ValueError, match=f'{space_key(space)}.*{space_key(wide)}'):
        fit_predictor(wide, [wide.from_str(s) for s in table.genotype], table.latency_ms)
    unknown = fit_predictor(space, cells, list(table.latency_ms), kind='table')
    with pytest.raises(ValueError, match='no condition in common'): unknown.require(table)
    with pytest.raises(ValueError, match='threads=1 and with threads=2'): conditions_of(pd.concat([table, others[1]]))

@pytest.mark.parametrize('name, there', [('backend', 'onnx'), ('threads', 2), ('batch', 8), ('space', 'other-1')])
def test_the_main_job_refuses_a_fit_of_other_conditions(tmp_path, name, there):
    with Job(JobConfig(samples=20, space='nb201', budget=None), tmp_path/'run') as job:
        mine = dict(space=space_key(job.space), backend='eager', threads=1, batch=1, device='cpu')
        cells = [job.space.sample(np.random.default_rng(k)) for k in range(30)]
        fit = fit_predictor(job.space, cells, [additive(g) for g in cells], kind='table', conditions=mine)
        fit.save(job.folder.file('predictor.safetensors')); job.stage('predict', fit.summary)
        assert job.cost().unit == 'ms'
        fit.meta['conditions'] = mine | {name: there}; fit.save(job.folder.file('predictor.safetensors'))
        with pytest.raises(ValueError, match=f'fitted with {name}={there!r}, asked is {name}={mine[name]!r}'): job.cost()

def test_trees_refuse_the_mean_and_sample_without_bias(space, every):
    fit = fit_predictor(space, every, [product(g) for g in every], kind='table+trees')
    with pytest.raises(ValueError, match="mode='mean'.*table\\+trees"): PredictorCost(fit, space, 'mean')
    exact, sampled = PredictorCost(fit, space), PredictorCost(fit, space, 'sample', n=40, generator=torch.Generator().manual_seed(1))
    w = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(-1).requires_grad_()
    want, = torch.autograd.grad(exact({'cell': w}), w)
    got = torch.stack([torch.autograd.grad(sampled({'cell': w}), w)[0] for _ in range(30)])
    assert ((got.mean(0) - want).abs() <= 4*got.std(0)/30**.5 + 1e-6).all()

def test_cross_validation_chooses_what_the_truth_is(space, every):
    rng = np.random.default_rng(0)
    cells = [nb201_space().sample(rng) for _ in range(260)]
    noise = np.exp(.02*rng.standard_normal(260))
    assert fit_predictor(nb201_space(), cells, np.array([additive(g) for g in cells])*noise, steps=20).meta['kind'] == 'table'
    fit = fit_predictor(nb201_space(), cells, np.array([product(g) for g in cells])*noise, steps=20)
    assert fit.meta['kind'] != 'table' and fit.mean_rel_err < .8*fit.linear_mean_rel_err

def test_the_reading_of_the_machine_is_found():
    space, rng = nb201_space(), np.random.default_rng(1)
    cells = [space.sample(rng, connected=False) for _ in range(300)]
    W = genotype_weights(space, cells)
    t = torch.tensor([0., .02, .1, .25, .15]).repeat(6)
    for live in (False, 'read', True):
        y = (.5 + encode(space, W, live) @ t).double().numpy()*np.exp(.01*rng.standard_normal(300))
        assert fit_predictor(space, cells, y, kind='table', live='auto').meta['live'] == live

def test_what_is_dead_costs_next_to_nothing_where_it_is_dropped():
    "No network without a signal was among the samples, yet they are not predicted to take the time of the others."
    space, rng = nb201_space(), np.random.default_rng(2)
    cells = [space.sample(rng) for _ in range(150)]
    W, t = genotype_weights(space, cells), torch.tensor([0., .02, .1, .25, .15]).repeat(6)
    fit = fit_predictor(space, cells, (2 + encode(space, W, 'read') @ t).numpy(), kind='table', live='read')
    dead = space.genotype({'cell': [3, 3, 0, 0, 0, 0]})
    assert float(connection(space, space.one_hot(dead))) == 0 and fit.predict(space, [dead]).predicted[0] < .1
    assert fit_predictor(space, cells, (2 + encode(space, W, 'read') @ t).numpy(), kind='table').predict(space, [dead]).predicted[0] > 1.5

@pytest.mark.parametrize('values, why', [([2.]*40, 'all 2.0'), ([-1.]*40, 'above 0'), ([1.]*39, 'equal lengths')])
def test_values_that_cannot_be_latencies(space, every, values, why):
    with pytest.raises(ValueError, match=why): fit_predictor(space, every[:40], values)

def test_arguments_that_are_unknown(space, every):
    y = [additive(g) for g in every]
    for wrong in (dict(kind='forest'), dict(live='maybe')):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))): fit_predictor(space, every, y, **wrong)
    with pytest.raises(ValueError, match='forest'): fit_regressor(torch.rand(30, 3), np.arange(1., 31), 'forest')

def test_a_fit_belongs_to_the_size_of_its_networks(space, every):
    fit = fit_predictor(space, every, [additive(g) for g in every], kind='table')
    for change, both in ((dict(C=8), ('C=8', 'C=4')), (dict(stages=2), ('stages=2', 'stages=1'))):
        other = CellSpace('three', NB201_OPS, **{**dict(nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=1), **change})
        with pytest.raises(ValueError) as e: PredictorCost(fit, other)
        assert all(b in str(e.value) for b in both), e.value

def test_twins_never_tell_on_each_other():
    "A table that could only be known from a twin: with twins in one fold the error is that of not knowing."
    rng = np.random.default_rng(0)
    X, y, groups = torch.eye(40).repeat_interleave(2, 0), np.repeat(rng.uniform(1, 3, 40), 2), np.repeat(np.arange(40), 2)
    apart, together = (out_of_fold('table', X, torch.as_tensor(y), g)[0].mean() for g in (np.arange(80), groups))
    assert apart < .6*together

def test_a_table_of_times_is_robust_and_exact():
    rng = np.random.default_rng(3)
    X = np.eye(4)[rng.integers(0, 4, (200, 5))].reshape(200, 20); t = rng.uniform(.1, 1, 20)
    y = .4 + X @ t
    c, b = relative_table(X, np.where(rng.random(200) < .15, 5*y, y))
    assert np.abs((c + X @ b)/y - 1).max() < .02

def test_features_of_two_groups():
    two = Space('two', ('none', 'conv'), {g: ((0, 1), (0, 2), (1, 2)) for g in 'ab'}, {g: (1, (2,)) for g in 'ab'}, (1, 4, 4), 2)
    cells = list(two.enumerate())
    F = graph_features(two, genotype_weights(two, cells))
    assert F[:, 0].tolist() == [float(g.connected) for g in cells]
    # operations, on paths, paths, series, parallel, depth of each group
    assert F.shape[1] == 13 and F[-1].tolist() == [1, *[3, 3, 2, 1, 2, 2]*2]
    assert len(table_columns(two)[0]) == feature_vector(two, cells[0]).shape[-1] == 25

def test_bench_knows_its_rows(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location('bench_predictor', ROOT/'bench/predictor.py')
    bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, 'STORE', tmp_path/'rows.csv')
    rng = np.random.default_rng(0)
    X = torch.eye(4)[torch.tensor(rng.integers(0, 4, (300, 5)))].flatten(1)
    latency = (.5 + X.numpy() @ rng.uniform(.1, 1, 20))*np.exp(.02*rng.standard_normal(300))
    data = bench.Data({'made up': latency}, X, {'x': X}, groups=bench.classes(X))
    monkeypatch.setitem(bench.LOAD, 'fbnet', lambda home: data)
    frame = bench.compute('fbnet', None, range(2), (40,), None)
    before = bench.STORE.read_text()
    assert len(frame) == 6 and bench.compute('fbnet', None, range(2), (40,), None).equals(frame) and bench.STORE.read_text() == before
    row, = bench.summary(frame)
    assert row['n'] == 2 and row['ratio'] == pytest.approx(row['peer']/row['ours']) and math.isfinite(row['spearman'])
    train, test = bench.split(data, data.latency['made up'], 100, 0, .5)
    assert len(train) == 100 and not set(data.groups[train]) & set(data.groups[test])
