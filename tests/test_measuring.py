"""Measuring and collecting as a user meets them: several quantities, damaged tables, a cluster of pinned workers."""
import os, warnings
import joblib, pytest
import torch
from torch import nn
from nas_nb.cost.collect import COLUMNS, read_measurements, sample_and_measure, save_measurements
from nas_nb.cost.core import Quantity
from nas_nb.cost.measure import BACKENDS, measure
from nas_nb.cost.meter import METERS, Unmeasurable, meter_networks, unmeasurable
from nas_nb.ops.conv import NB201_OPS
from nas_nb.space.cells import CellSpace

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')

@pytest.fixture(scope='module')
def space(): return CellSpace('three', NB201_OPS, nodes=3, in_shape=(1, 8, 8), n_classes=10, C=4, stages=1)

@pytest.fixture
def net(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())

# ---- a cluster
def test_two_pinned_workers_measure_through_dask(space, tmp_path):
    distributed = pytest.importorskip('distributed', reason='pip install nas_nb[cluster]')
    if len(os.sched_getaffinity(0)) < 2: pytest.skip('needs two cores')
    from nas_nb.cost.collect import pin_workers
    path, before = tmp_path/'table.csv', os.sched_getaffinity(0)
    alone = sample_and_measure(space, 4, path=path, chunk=2, rounds=3, progress=False)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        with pytest.raises(ValueError, match='cores'): pin_workers(client, threads=1 + len(before))
        given = pin_workers(client)
        seen = client.run(lambda dask_worker: (dask_worker.name, sorted({c for t in os.listdir('/proc/self/task') for c in os.sched_getaffinity(int(t))})))
        assert {name: cores for name, cores in seen.values()} == given
        assert len({tuple(c) for c in given.values()}) == 2 and all(len(c) == 1 for c in given.values())
        with joblib.parallel_config('dask'): table = sample_and_measure(space, 16, path=path, chunk=3, rounds=3, progress=False)
        ran = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert min(ran.values()) >= 1                                     # both worked
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
    with pytest.raises(ValueError, match="device_name='another processor'"): sample_and_measure(space, 4, path=path, rounds=3, progress=False)

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
    x, missing = torch.randn(2, 1, 8, 8), unmeasurable()
    for q in METERS:
        if q in missing:
            with pytest.raises(Unmeasurable) as e: meter_networks({'net': net}, x, [q])
            assert str(e.value) == missing[q]
        else: assert isinstance(meter_networks({'net': net}, x, [q], rounds=3, seconds=.01)['net'][q], Quantity)

def test_statistics_gradients_and_flags_are_left_alone(net):
    net = nn.Sequential(net, nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    what = [q for q in METERS if q not in unmeasurable()]
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
