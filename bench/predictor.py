"""The latency predictor against its peers: a ridge regression on one-hot operations and the network of Xu et al. 2020 on the same code.

    python bench/predictor.py [--quick] [--json] [--table nb201 curve full fbnet ofa hat speed] [--seeds 5] [--devices ...]
    python bench/predictor.py --table machine         measures 300 networks here, twice; on an idle machine only

Every row is one training: a device, n samples, a seed. Rows are appended to nbs/cost/predictor_bench.csv and not computed
again; --quick computes a few small ones and keeps none. Isomorphic networks (equal `Genotype.expression`) never stand on both
sides. `error`: mean relative error on up to 3,000 held-out networks; `connected`: on those of them that pass a signal. A ratio is
the better peer's mean error over ours, > 1 where we are better. `speed` is against 200,000 a second, and for the Gaussian process
also against its sum over centres as a plain formula.
Needs NAS_NB_DATA, except for `machine` and `speed`."""
import argparse, copy, json, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from sklearn.linear_model import RidgeCV
from nas_nb.core.data import data_home
from nas_nb.cost.encoding import LIVE, every_weights, feature_vector, table_columns
from nas_nb.cost.regress import fit_kind, fit_regressor
from nas_nb.cost.predictor import fit_predictor, spearman
from nas_nb.space.cells import nb201_space

STORE = Path(__file__).resolve().parent.parent/'nbs/cost/predictor_bench.csv'
KEY, FIELDS = ['table', 'device', 'n', 'seed', 'model'], ['error', 'connected', 'spearman', 'reading', 'kind']
SIZES = dict(nb201=(900,), curve=(50, 100, 300, 900, 5000), full=(30, 100, 300, 1000, 3000, 10000), fbnet=(100, 900), ofa=(100, 900),
             hat=(100, 900))
FULL = ('gold_6226', '1080ti_1', 'raspi4', 'pixel2')
HELD, STEPS = 3000, 300                  # networks to test; steps of the peer's network

class Data:
    """Latencies by device, what the peers read (`onehot` [N, d]), what we read (`X`: reading -> [N, D], with `columns`), classes of
    twins, and who passes a signal."""
    def __init__(self, latency, onehot, X, columns=None, groups=None, connected=None):
        self.latency, self.onehot, self.X, self.columns = latency, torch.as_tensor(onehot).float(), X, columns
        N = len(self.onehot)
        self.groups = np.arange(N) if groups is None else groups
        self.connected = np.ones(N, bool) if connected is None else connected

def classes(rows):
    "Number of the class of each of `rows`; equal rows are one class."
    return np.unique(np.asarray(rows).reshape(len(rows), -1), axis=0, return_inverse=True)[1].ravel()

def load_nb201(home):
    space, ops = nb201_space(), np.load(home/'nasbench201.npz')['ops'].astype(int)
    place = ops @ 5**np.arange(5, -1, -1)
    W = {'cell': every_weights(space)['cell'][torch.as_tensor(place)]}
    number = {}
    cells = [space.genotype({'cell': row}) for row in ops.tolist()]
    groups = np.array([number.setdefault(g.expression(), len(number)) for g in cells])
    X = {live: feature_vector(space, W, live) for live in LIVE}
    latency = np.load(home/'nb201_latency.npz')
    columns = {live: table_columns(space, live) for live in LIVE}
    return Data({k: latency[k] for k in latency.files}, W['cell'].flatten(1), X, columns, groups, np.array([g.connected for g in cells]))

def load_fbnet(home):
    z = np.load(home/'fbnet_latency.npz')
    x = torch.eye(9)[torch.as_tensor(z['ops'].astype(int))].flatten(1)
    return Data({k[4:]: z[k] for k in z.files if k.startswith('lat_')}, x, {'layers': x}, groups=classes(z['ops']))

def load_ofa(home):
    "Layers beyond the depth of their stage do not run; r, the resolution, enters as r², by itself or with every layer."
    z = np.load(home/'ofa_latency.npz')
    runs = torch.as_tensor(np.arange(4)[None, None] < z['d'][:, :, None]).flatten(1).float()
    choice = torch.eye(9)[torch.as_tensor((z['ks'].astype(int)//2 - 1)*3 + np.searchsorted([3, 4, 6], z['e']))]
    x, pixels = (choice*runs[..., None]).flatten(1), torch.as_tensor((z['r'].astype(float)/224)**2).float()[:, None]
    layers = torch.cat([x, runs, pixels], 1)
    return Data({k[4:]: z[k] for k in z.files if k.startswith('lat_')}, layers,
                {'layers': layers, 'layers by pixels': torch.cat([layers, x*pixels, runs*pixels], 1)}, groups=classes(layers))

def load_hat(home):
    "Each set has its own networks: a device is a set. Features as they are, and with their products."
    z, out = np.load(home/'hat_transformer_latency.npz'), {}
    names = list(z['columns'])
    for device in z.files:
        if device == 'columns': continue
        x = z[device][:, :10]/z[device][:, :10].max(0)
        i, j = np.triu_indices(10)
        x, products = torch.as_tensor(x).float(), torch.as_tensor(np.c_[x, x[:, i]*x[:, j]]).float()
        y = z[device][:, names.index('latency_mean_encoder')] + z[device][:, names.index('latency_mean_decoder')]
        out[device] = Data({device: y}, x, {'features': x, 'products': products}, groups=classes(x))
    return out

LOAD = dict(nb201=load_nb201, curve=load_nb201, full=load_nb201, fbnet=load_fbnet, ofa=load_ofa, hat=load_hat)

def split(data, y, n, seed, share):
    "Indices (train [n], test): a `share` of the classes is for training, and both sides are drawn at random."
    rng = np.random.default_rng(seed)
    ours = rng.random(data.groups.max() + 1) < share
    order = rng.permutation(np.flatnonzero(np.isfinite(y) & (y > 0)))
    side = ours[data.groups[order]]
    return order[side][:n], order[~side][:HELD]

def ridge(data, y, train, test, seed):
    model = RidgeCV(np.logspace(-5, 3, 17)).fit(data.onehot[train].double().numpy(), y[train])
    return np.maximum(model.predict(data.onehot[test].double().numpy()), y[train].min()/2), '', ''

def paper(data, y, train, test, seed, steps=STEPS):
    model = fit_kind('mlp', data.onehot[train], torch.as_tensor(y[train]), seed=seed, steps=steps)
    with torch.no_grad(): return model(data.onehot[test]).double().numpy(), '', 'mlp'

def ours(data, y, train, test, seed):
    model, report = fit_regressor({k: v[train] for k, v in data.X.items()}, y[train], 'auto', data.groups[train], data.columns, seed)
    with torch.no_grad(): return model(data.X[report['reading']][test]).double().numpy(), str(report['reading']), report['kind']

MODELS = dict(ridge=ridge, mlp=paper, ours=ours)

def one(data, device, n, seed, model, share=.5):
    "One row's fields."
    y = np.asarray(data.latency[device], dtype=float)
    train, test = split(data, y, n, seed, share)
    if len(train) < n: raise ValueError(f'n={n}: the training side of {device!r} has {len(train)}')
    predicted, reading, kind = MODELS[model](data, y, train, test, seed)
    error, signal = np.abs(predicted/y[test] - 1), data.connected[test]
    return dict(error=float(error.mean()), connected=float(error[signal].mean()), spearman=spearman(predicted, y[test]), reading=reading,
                kind=kind)

def stored():
    "The rows in the file, none where there is no file."
    if not STORE.exists(): return pd.DataFrame(columns=KEY + FIELDS)
    return pd.read_csv(STORE, keep_default_na=False, dtype=dict(device=str))

def append(row):
    "One line at the end of the file, in one write: several processes may work at once."
    text = ','.join(f'{row[k]:.6g}' if isinstance(row[k], float) else str(row[k]) for k in KEY + FIELDS) + '\n'
    with open(STORE, 'a') as f: f.write(text if f.tell() else ','.join(KEY + FIELDS) + '\n' + text)

def compute(table, devices, seeds, sizes, home, keep=True):
    "The rows of one table, those that are missing computed; a DataFrame."
    data, rows = LOAD[table](home), []
    name = 'nb201' if table == 'curve' else table                     # the same rows at more sizes
    parts = data if isinstance(data, dict) else {device: data for device in data.latency if table != 'full' or device in FULL}
    have = {tuple(map(str, r)): True for r in stored()[KEY].itertuples(index=False)} if keep else {}
    for seed in seeds:
        for device, part in parts.items():
            if devices and device not in devices: continue
            for n in sizes:
                for model in MODELS:
                    key = dict(table=name, device=device, n=n, seed=seed, model=model)
                    if tuple(map(str, key.values())) in have: continue
                    row = key | one(part, device, n, seed, model, share=.9 if table == 'full' else .5)
                    append(row) if keep else rows.append(row)
    frame = stored() if keep else pd.DataFrame(rows)
    frame = frame[(frame.table == name) & frame.n.isin(sizes) & frame.seed.isin(list(seeds))]
    return frame[frame.device.isin(devices)] if devices else frame

def summary(frame):
    "One row for a table, device and size: mean errors over seeds, the ratio to the better peer, Spearman."
    for (table, device, n), g in frame.groupby(['table', 'device', 'n'], sort=False):
        for which in ('error', 'connected'):
            mean = g.groupby('model')[which].mean()
            if which == 'connected' and np.allclose(mean, g.groupby('model').error.mean()): continue
            rank, mine = g.groupby('model').spearman.mean(), g[g.model == 'ours']
            peer = min(mean['ridge'], mean['mlp'])
            yield dict(name=f'{table}/{device}/{n}' + ('/connected' if which == 'connected' else ''), ours=mean['ours'], peer=peer,
                       ratio=peer/max(mean['ours'], 1e-9), unit='relative error', n=len(mine), ridge=mean['ridge'], mlp=mean['mlp'],
                       spearman=rank['ours'], spearman_ridge=rank['ridge'], spearman_mlp=rank['mlp'],
                       reading=mine.reading.mode()[0], kind=mine.kind.mode()[0])

def speed(quick):
    "Predictions a second on two threads from relaxed weights, gradient included; the Gaussian process also beside its plain formula."
    torch.set_num_threads(2)
    space, rng = nb201_space(in_shape=(1, 8, 8), C=4, stages=1, cells=1), np.random.default_rng(0)
    cells = [space.sample(rng) for _ in range(300)]
    y = [1 + len(g.canonical().cells[0].edges)**1.5*rng.uniform(.98, 1.02) for g in cells]
    fits = {kind: fit_predictor(space, cells, y, kind=kind, steps=20) for kind in ('table', 'table+gp', 'table+mlp')}
    w, runs = torch.randn(2048, 6, 5).softmax(-1).requires_grad_(), {k: (fit.model, fit.meta['graph']) for k, fit in fits.items()}
    runs['plain'] = copy.deepcopy(runs['table+gp'][0]), True
    gp = runs['plain'][0].part
    gp.forward = lambda x: (gp.bias + gp.kernel(x) @ gp.alpha.double()).to(x.dtype)
    times = {k: [] for k in runs}
    for _ in range(5 if quick else 60):                                     # interleaved: all meet the same machine
        for name, (model, graph) in runs.items():
            start = time.perf_counter()
            torch.autograd.grad(model(feature_vector(space, {'cell': w}, True, graph)).sum(), w)
            times[name].append(time.perf_counter() - start)
    rate = {k: len(w)/np.median(t) for k, t in times.items()}
    rows = [(f'speed/{kind}', rate[kind], 2e5) for kind in fits]
    for name, ours, peer in [*rows, ('speed/table+gp against its plain formula', rate['table+gp'], rate['plain'])]:
        yield dict(name=name, ours=ours, peer=peer, ratio=ours/peer, unit='predictions/s', n=len(times['plain']))

def machine(networks, rounds):
    "`networks` measured here twice: held-out error of the predictor over five splits, and what two measurements of one network differ by."
    from nas_nb.cost.collect import sample_and_measure
    space = nb201_space(in_shape=(1, 8, 8), C=16, stages=2, cells=1)
    a, b = (sample_and_measure(space, networks, rounds=rounds, progress=False) for _ in range(2))
    first, again = (t['latency_ms'].to_numpy() for t in (a, b))
    cells = [space.from_str(s) for s in a['genotype']]
    fits = [fit_predictor(space, cells, first, seed=s, conditions=a.attrs['conditions']) for s in range(5)]
    twice = float(np.abs(again/first - 1).mean())
    error, linear, rank = (float(np.mean([getattr(f, k) for f in fits])) for k in ('mean_rel_err', 'linear_mean_rel_err', 'spearman'))
    yield dict(name='machine/held-out', ours=error, peer=.05, ratio=.05/error, unit='relative error', n=networks, linear=linear,
               spearman=rank, kind=fits[0].meta['kind'])
    yield dict(name='machine/two measurements', ours=twice, unit='relative difference', n=networks, floor=twice/2**.5)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    parser.add_argument('--table', nargs='+', choices=[*SIZES, 'speed', 'machine'], default=[*SIZES, 'speed'])
    parser.add_argument('--seeds', type=int, default=5); parser.add_argument('--first', type=int, default=0, help='first seed')
    parser.add_argument('--devices', nargs='+'); parser.add_argument('--sizes', nargs='+', type=int)
    parser.add_argument('--networks', type=int, default=300, help='of --table machine')
    args = parser.parse_args()
    home = data_home()
    quick = dict(nb201=('gold_6226', 'raspi4'), fbnet=('gold_6240',), ofa=('v100_64',), hat=('wmt14ende_gpu_titanxp',))
    for table in args.table:
        if table == 'speed': rows = speed(args.quick)
        elif table == 'machine': rows = machine(20 if args.quick else args.networks, 3 if args.quick else 30)
        elif home is None: raise SystemExit('set NAS_NB_DATA to the folder of the tables')
        elif args.quick and table not in quick: continue
        else:
            torch.set_num_threads(1)
            seeds = range(1) if args.quick else range(args.first, args.first + args.seeds)
            devices = quick[table] if args.quick else args.devices
            rows = summary(compute(table, devices, seeds, (300,) if args.quick else args.sizes or SIZES[table], home, keep=not args.quick))
        for row in rows:
            row = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()}
            text = '  '.join(f'{k} {v}' if k != 'name' else f'{v:<42}' for k, v in row.items())
            print(json.dumps(row) if args.json else text, flush=True)

if __name__ == '__main__': main()
