"""Measuring and collecting as a user meets them: several quantities, damaged tables, a cluster of pinned workers."""
import math, os, warnings
from unittest.mock import patch
import joblib, pytest
import torch
from torch import nn
from nas_nb.cost.collect import COLUMNS, read_measurements, sample_and_measure, save_measurements
from nas_nb.core.check import check_cost
from nas_nb.core.run import DamagedFile
from nas_nb.cost.core import Affine, MaxCost, Quantity
from nas_nb.cost.expected import DepthCost
from nas_nb.cost.lut import LatencyTable, fit_affine, load_fbnet_lut, load_lut, lut_keys, measure_lut
from nas_nb.cost.measure import BACKENDS, measure
from nas_nb.cost.meter import METERS, UnmeasurableError, meter_networks, missing_meters
from nas_nb.ops.conv import NB201_OPS
from nas_nb.ops.mbconv import mbconv
from nas_nb.space.cells import CellSpace
from nas_nb.space.chains import ChainSpace, elastic_chain, fbnet_space, stage

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')

@pytest.fixture(scope='module')
def space(): return CellSpace('three', NB201_OPS, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=1)

@pytest.fixture
def net(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())

# ---- a cluster
def page_faults():
    "Faults per block while blocks of 1 MB are taken, written and freed in turn."
    import resource
    def use(n):
        for _ in range(n): torch.empty(1 << 20, dtype=torch.uint8).fill_(1)
    use(5); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(50)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)/50

@pytest.fixture
def own_environment():
    "Dask sets its workers' variables in the process that starts them: they are not to reach later tests."
    with patch.dict(os.environ): yield

def test_two_pinned_workers_measure_through_dask(space, tmp_path, own_environment):
    distributed = pytest.importorskip('distributed', reason='pip install nas_nb[cluster]')
    if len(os.sched_getaffinity(0)) < 2: pytest.skip('needs two cores')
    from nas_nb.cost.collect import pin_workers
    path, before = tmp_path/'table.csv', os.sched_getaffinity(0)
    alone = sample_and_measure(space, 4, path=path, chunk=2, rounds=3, progress=False)
    local = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with local as cluster, distributed.Client(cluster) as client:
        with pytest.raises(ValueError, match='cores'): pin_workers(client, threads=1 + len(before))
        given = pin_workers(client)
        seen = client.run(lambda dask_worker: (dask_worker.name,
                                               sorted({c for t in os.listdir('/proc/self/task') for c in os.sched_getaffinity(int(t))})))
        assert {name: cores for name, cores in seen.values()} == given
        assert len({tuple(c) for c in given.values()}) == 2 and all(len(c) == 1 for c in given.values())
        with joblib.parallel_config('dask'): table = sample_and_measure(space, 16, path=path, chunk=3, rounds=3, progress=False)
        ran = client.run(lambda dask_worker: dask_worker.state.executed_count)
        faults = client.run(page_faults)
    assert min(ran.values()) >= 1                                     # both worked
    assert max(faults.values()) < 5                                   # and kept their memory, as this process does
    assert len(table) == 16 and table['genotype'].is_unique and (table['latency_ms'] > 0).all()
    assert table[:4].equals(alone) and read_measurements(path)[:4].equals(alone)
    assert os.sched_getaffinity(0) == before
    local = sample_and_measure(space, 16, path=path, chunk=3, rounds=3, progress=False)
    assert local.equals(table)                                        # nothing is measured twice, wherever it was measured

# ---- tables
def test_a_damaged_row_is_named_and_measured_again(space, tmp_path):
    path = tmp_path/'table.csv'
    table = sample_and_measure(space, 6, path=path, chunk=3, rounds=3, progress=False)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'eager', b'ea"ger,')
    path.write_bytes(b''.join(lines))
    with pytest.warns(UserWarning, match='line 4 is damaged'): again = sample_and_measure(space, 6, path=path, rounds=3, progress=False)
    rest = [0, 1, 3, 4, 5]
    assert again.iloc[rest].equals(table.iloc[rest]) and again['genotype'].equals(table['genotype'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_measurements(path)) == 6
    assert (tmp_path/'table.csv.damaged').read_bytes() == lines[3]

def test_a_table_of_another_processor_is_refused(space, tmp_path):
    path = tmp_path/'table.csv'
    table = sample_and_measure(space, 2, path=path, rounds=3, progress=False)
    path.write_text(path.read_text().replace(table['device_name'][0], 'another processor'))
    with pytest.raises(ValueError, match="device_name='another processor'"):
        sample_and_measure(space, 4, path=path, rounds=3, progress=False)

def test_parquet_holds_what_the_table_holds(space, tmp_path):
    pytest.importorskip('pyarrow', reason='pip install nas_nb[parquet]')
    table = sample_and_measure(space, 3, path=tmp_path/'t.parquet', rounds=3, progress=False)
    back = read_measurements(tmp_path/'t.parquet')
    assert back.equals(table) and tuple(back.columns) == COLUMNS and read_measurements(tmp_path/'t.csv').equals(table)
    save_measurements(back, tmp_path/'u.csv')
    assert read_measurements(tmp_path/'u.csv').equals(table)

def test_without_parquet_the_extra_is_named_before_work(space, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
    monkeypatch.setitem(__import__('sys').modules, 'fastparquet', None)
    with pytest.raises(ImportError, match=r'nas_nb\[parquet\]'): sample_and_measure(space, 3, path=tmp_path/'t.parquet', rounds=3)
    assert not list(tmp_path.iterdir())

# ---- quantities and backends
def test_every_quantity_is_given_or_refused_by_name(net):
    x, missing = torch.randn(2, 1, 8, 8), missing_meters()
    for q in METERS:
        if q in missing:
            with pytest.raises(UnmeasurableError) as e: meter_networks({'net': net}, x, [q])
            assert str(e.value) == missing[q]
        else: assert isinstance(meter_networks({'net': net}, x, [q], rounds=3, seconds=.01)['net'][q], Quantity)

def test_statistics_gradients_and_flags_are_left_alone(net):
    net = nn.Sequential(net, nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    what = [q for q in METERS if q not in missing_meters()]
    meter_networks({'net': net}, torch.randn(2, 1, 8, 8), what, rounds=3, seconds=.01)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and all(p.grad is None for p in net.parameters())

def test_a_latency_names_its_backend(net):
    x = torch.randn(1, 1, 8, 8)
    assert measure({'net': net}, x, rounds=3)['net'].env['backend'] == 'eager'
    with pytest.raises(ValueError, match="allowed is 'cuda'"): measure({'net': net}, x, backend='cudagraph')
    with pytest.raises(ValueError, match=', '.join(BACKENDS)): measure({'net': net}, x, backend='tensorrt')

@CUDA
@pytest.mark.parametrize('backend', ['eager', 'cudagraph'])
def test_cuda_events_and_loop_agree(backend):
    net, x = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(6)]), torch.randn(32, 64, 64, 64)
    events, loop = (measure({'net': net}, x, rounds=10, device='cuda', backend=backend, clock=c)['net'] for c in ('events', 'loop'))
    assert events.ms == pytest.approx(loop.ms, rel=.2) and events.env['backend'] == backend

@CUDA
def test_a_recorded_graph_computes_the_same(net):
    from nas_nb.cost.measure import _graph_call
    net, x = net.cuda().eval(), torch.randn(2, 1, 8, 8, device='cuda')
    call = _graph_call(net, x)
    x.mul_(2); call(None); torch.cuda.synchronize()
    with torch.no_grad(): torch.testing.assert_close(call.__defaults__[0][1], net(x))

# ---- tables of a chain
@pytest.fixture(scope='module')
def chain():
    return elastic_chain(((4, 1), (6, 2)), depth=(1, 2), er=(1, 2), k=(3,), se=(0.,), stem=(4, 1), first=None, head=8,
                         in_shape=(1, 8, 8), n_classes=4)

@pytest.fixture(scope='module')
def made_up(chain):
    keys = sorted({k for row in lut_keys(chain).values() for k in row if k})
    return LatencyTable({k: .1 + .013*i for i, k in enumerate(keys)}, 'ms', dict(backend='eager', threads=1, batch=1), 1.2, .05)

def relaxed(space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g: torch.randn(1, len(names), dtype=torch.float64, generator=generator).softmax(-1) for g, names in space.candidates.items()}

def test_a_tables_cost_keeps_the_laws(chain, made_up):
    cost, other = made_up.cost(chain), DepthCost({g: torch.rand(1, len(n)) for g, n in chain.candidates.items()}, chain, 'ms')
    check_cost(cost, chain)
    for c in (cost, cost + other, Affine(cost, 2, .1), cost.to('us')):
        W, networks = relaxed(chain), list(chain.enumerate())
        chances = [math.prod(float(W[g][0, i]) for g, (i,) in chain.indices(h).items()) for h in networks]
        assert float(c(W)) == pytest.approx(sum(p*c.of(h) for p, h in zip(chances, networks)), rel=1e-9)
        picks = torch.multinomial(torch.tensor(chances), 2000, replacement=True, generator=torch.Generator().manual_seed(1))
        values = torch.tensor([c.of(h) for h in networks], dtype=torch.float64)[picks]
        assert abs(float(values.mean()) - float(c(W))) < 3*float(values.std())/math.sqrt(2000)
    both = MaxCost(cost, other)
    assert all(both.of(h) == max(cost.of(h), other.of(h)) for h in chain.enumerate())
    assert both(relaxed(chain)) == max(cost(relaxed(chain)), other(relaxed(chain)))

@pytest.mark.parametrize('other', [dict(backend='onnxruntime'), dict(threads=2), dict(batch=8), dict(backend='eager', device='cuda')])
def test_a_table_of_other_conditions_is_refused(chain, made_up, other):
    assert made_up.cost(chain, backend='eager', threads=1, batch=1).unit == 'ms'
    name, value = list(other.items())[-1]
    with pytest.raises(ValueError, match=f'{name}=.* asked is {name}={value!r}'): made_up.cost(chain, **other)

def test_every_missing_entry_is_listed(chain, made_up):
    gone = list(made_up.entries)[:3]
    with pytest.raises(ValueError) as e:
        LatencyTable({k: v for k, v in made_up.entries.items() if k not in gone}, 'ms', {}).cost(chain)
    assert 'lacks 3 operations' in str(e.value) and all(k in str(e.value) for k in gone)

def test_a_table_survives_its_file(chain, made_up, tmp_path):
    made_up.save(tmp_path/'t.json')
    back = load_lut(tmp_path/'t.json')
    assert back.__dict__ == made_up.__dict__ and back.unit == 'ms'
    text = (tmp_path/'t.json').read_text()
    for cut in range(0, len(text) - 1, 97):
        (tmp_path/'cut.json').write_text(text[:cut])
        with pytest.raises(DamagedFile): load_lut(tmp_path/'cut.json')

def test_a_table_is_measured_with_whole_networks(chain):
    table = measure_lut(chain, rounds=3)
    assert table.check['n'] == 20 and len(table.check['residuals']) == 20 and table.slope > 0 and min(table.entries.values()) >= 0
    cost = table.cost(chain, backend='eager', threads=1, batch=1, device='cpu')
    assert [cost.of(chain.from_str(s)) for s in table.check['genotypes']] == pytest.approx(table.check['predicted'])

@pytest.mark.parametrize('sums, measured, why',
                         [([1.]*25, range(1, 26), 'sums'), (range(25), [3.]*25, 'all 25'), (range(25), range(25), r'values\[0\]=0'),
                          (range(25), range(25, 0, -1), 'slope'), (range(19), range(1, 20), 'at least 20')])
def test_corrections_that_mean_nothing(sums, measured, why):
    with pytest.raises(ValueError, match=why): fit_affine(list(sums), list(measured))

def test_a_column_of_unknown_operations_and_a_damaged_line(tmp_path):
    space = fbnet_space('imagenet', skip='everywhere')
    head = 'layer,ir_k3_e1,ir_k3_s2,ir_k3_e3,ir_k3_e6,ir_k5_e1,ir_k5_s2,ir_k5_e3,ir_k5_e6,skip'
    lines = [','.join(map(str, (i, *range(100*i + 10, 100*i + 19)))) for i in range(22)]
    (tmp_path/'t.csv').write_text('\n'.join([head, *lines]))
    cost = load_fbnet_lut(space, tmp_path/'t.csv')
    assert cost.unit == 'us' and cost.table['stage1_block1'][0].tolist() == [*range(10, 19)]
    assert cost.of(space.genotype({g: [3] for g in space.groups})) == sum(100*i + 13 for i in range(22))
    (tmp_path/'t.csv').write_text('\n'.join([head, *lines[:4], lines[4].replace('411', 'fast'), *lines[5:]]))
    with pytest.warns(UserWarning, match='line 6 is damaged'), pytest.raises(ValueError, match='lacks 9 operations.*stage2_block4: k3_e1'):
        load_fbnet_lut(space, tmp_path/'t.csv')
    with pytest.warns(UserWarning, match='line 6'), pytest.raises(ValueError, match='stage1_block1: k3_e0'):
        load_fbnet_lut(proxyless_like(), tmp_path/'t.csv')

def proxyless_like():
    "22 layers of operations that the table does not know."
    return ChainSpace('other', [stage(16, 16, 22, 1, {'k3_e0': mbconv(3, None)})], (3, 32, 32), 10)
