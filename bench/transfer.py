"""Few-shot transfer of latencies to a new device: `cost.transfer` against principal components, the nearest device, and no transfer.

    python bench/transfer.py [--quick] [--json]

Needs nb201_latency.npz, nasbench201.npz, fbnet_latency.npz, nb201_latency_subset1999.npz and nb201_latency_energy_pi5.npz in $NAS_NB_DATA.

Each device in turn is left out with all its batch sizes, and the prior is fitted to the others; its error bars are scaled there, again by
leaving out devices, so no latency of the device that is judged takes part. Then 10, 20 or 50 of its architectures are measured: drawn at
random, or chosen by the prior among 1,000 random ones. All methods see the same measurements and are judged by the rank correlation on all
architectures that were not measured and are no isomorphic twin of one that was. Five draws (--quick: one, on five devices).

Peers: `components`, ridge regression of the log-latency on the first six principal components of the known devices' standardised
log-latencies (penalty 0.1, of 0, 0.03, 0.1, 0.3 and 1 the best on these very tables at 20 random cells and within 0.001 of the best at 10;
without penalty 0.892 and 0.955); `nearest`, the known device with the best rank correlation on the measured architectures;
`scratch`, ridge regression with leave-one-out penalty on the features that the prior is given as well (NAS-Bench-201: one-hot operations,
live operations and graph features; FBNet: one-hot operations).
`fresh` are devices of other sources, with all 26 columns known; no constant of the method was tried on them. The removal of noise from
the known tables and the choice among three scales were tried on draws 0 and 1 of all 26 columns; draws 2 to 4, FBNet and `fresh` saw two
versions, of which the second has the same regression by scikit-learn.
A full run writes nbs/cost/transfer.csv."""
import argparse, json
from pathlib import Path
import numpy as np, pandas as pd, torch
from nas_nb.core.data import data_home
from nas_nb.core.run import atomic_write
from nas_nb.cost.encoding import encode, graph_features
from nas_nb.cost.predictor import spearman
from nas_nb.cost.transfer import DevicePrior
from nas_nb.space.cells import nb201_space

SIZES, SEEDS, POOL = (10, 20, 50), 5, 1000
QUICK = ('eyeriss', 'gold_6240', 'raspi4', 'samsung_a50', 'titan_rtx')
METHODS = ('ours', 'components', 'nearest', 'scratch')

def family(column):
    "The device of a column: its name without the batch size."
    name, _, batch = column.rpartition('_')
    return name if batch in ('1', '32', '64', '256') and name != 'essential_ph' else column

def standard(X):
    "Columns of `X` [n, d] with mean 0 and deviation 1; constant ones left out."
    return ((X - X.mean(0))/X.std(0).clip(1e-12))[:, X.std(0) > 1e-9]

def even(X):
    "`X` [n, d] in a unit in which its centred rows have mean squared length 1."
    return X/np.sqrt(X.var(0).sum())

def nb201(folder):
    "`(columns, latencies [n, D], features [n, d], twins [n, 2], numbers [n])` of the 12,500 cells that were measured on all devices."
    z, table = np.load(folder/'nb201_latency.npz'), np.load(folder/'nasbench201.npz')
    columns, ops, space = sorted(z.files), table['ops'].astype(int), nb201_space()
    number = {}
    canonical = [number.setdefault(space.genotype({'cell': row}).canonical(), len(number)) for row in ops.tolist()]
    hot = torch.eye(5)[torch.tensor(ops)]
    edges = [encode(space, {'cell': hot}, live).double().numpy() for live in (False, True)]
    features = np.concatenate([even(np.concatenate(edges, 1)), even(standard(graph_features(space, {'cell': hot}).double().numpy()))], 1)
    latencies = np.stack([z[c] for c in columns], 1).astype(float)
    whole = np.isfinite(latencies).all(1)
    return columns, latencies[whole], features[whole], np.stack([canonical, table['rep']], 1)[whole], np.flatnonzero(whole)

def fbnet(folder):
    "The same for 5,000 networks of the FBNet space; all are different."
    z = np.load(folder/'fbnet_latency.npz')
    columns = sorted(c for c in z.files if c.startswith('lat_'))
    ops = z['ops'].astype(int)
    return ([c[4:] for c in columns], np.stack([z[c] for c in columns], 1).astype(float), np.eye(9)[ops].reshape(len(ops), -1),
            np.unique(ops, axis=0, return_inverse=True)[1].reshape(-1, 1))

def fresh(folder, rows):
    "Columns and latencies [n, 15] (NaN where not measured) of devices from other sources, on the cells `rows`."
    z, p = np.load(folder/'nb201_latency_subset1999.npz'), np.load(folder/'nb201_latency_energy_pi5.npz')
    found = {c: np.full(15625, np.nan) for c in z.files if c != 'arch_index'}
    for c in found: found[c][z['arch_index']] = z[c]
    found |= {f'pi5_{r}': p[f'pi5_{r}_cifar100_latency_ms'].astype(float) for r in ('litert', 'onnx', 'torchmobile')}
    return list(found), np.stack(list(found.values()), 1)[rows]

def components(logs, number=6):
    "The first principal components [n, number] of standardised log-latencies, in units of the mean device."
    Z = standard(logs)
    values, vectors = np.linalg.eigh(Z.T @ Z/len(Z))
    return Z @ vectors[:, ::-1][:, :number]/np.sqrt(Z.shape[1])

def ridge(X, y, m, penalties):
    "Predictions [n] of ridge regression on the rows `m`, with the penalty of least leave-one-out error."
    mean, best = X[m].mean(0), None
    A, target = X[m] - mean, y - y.mean()
    for penalty in penalties:
        G = np.linalg.solve(A @ A.T + penalty*np.eye(len(m)), np.eye(len(m)))
        a = G @ target
        error = ((a/(np.diag(G) - G.sum(0)**2/G.sum()))**2).sum()        # G.sum: the constant is fitted in each fold too
        if best is None or error < best[0]: best = error, a
    return (X - mean) @ (A.T @ best[1])

def peers(known, logs, PC, features, m, y):
    "name -> score [n] that ranks the architectures, from latencies `y` of the rows `m`."
    near = np.nan_to_num([spearman(known[m, j], y) for j in range(known.shape[1])], nan=-1)
    return dict(components=ridge(PC, np.log(y), m, [.1]), nearest=known[:, int(np.argmax(near))],
                scratch=ridge(features, np.log(y), m, 10.**np.arange(-3, 3)))

def judge(prior, known, features, twins, latency, picks):
    "Rows method, spearman (and for ours error, within50, within90) of one device, for each of `picks` = [(k, design, seed, rows)]."
    logs, rows = np.log(known), []
    PC = components(logs)
    for k, design, seed, m in picks:
        y = latency[m]
        if y.min() == y.max(): continue                                    # whole milliseconds: nothing to learn
        tested = np.isfinite(latency) & ~np.any([np.isin(t, t[m]) for t in twins.T], 0)
        p, truth = prior.adapt(m, y), latency[tested]
        scores = dict(ours=p.median, **peers(known, logs, PC, features, m, y))
        own = dict(error=np.median(np.abs(p.median[tested]/truth - 1)))
        for q in (50, 90):
            low, high = p.interval(q/100)
            own[f'within{q}'] = np.mean((low[tested] <= truth) & (truth <= high[tested]))
        for name, s in scores.items():
            row = dict(measured=k, design=design, seed=seed, method=name, spearman=spearman(s[tested], truth))
            rows.append(row | (own if name == 'ours' else {}))
    return rows

def picks_of(prior, sizes, seeds, allowed):
    "[(k, design, seed, rows)]: random ones of `allowed`, and those that the prior chooses among `POOL` of them."
    out = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(allowed)
        best = prior.choose(max(sizes), candidates=order[-POOL:])
        out += [(k, design, seed, rows[:k]) for k in sizes for design, rows in (('random', order), ('chosen', best))]
    return out

def leave_out(table, columns, latencies, features, twins, quick):
    "Every device in turn; rows as `judge`, with table, device, spread."
    families, rows = np.array([family(c) for c in columns]), []
    for name in [f for f in dict.fromkeys(families) if not quick or f in QUICK]:
        keep = families != name
        prior = DevicePrior.fit(latencies[:, keep], features, groups=families[keep])
        picks = picks_of(prior, SIZES[:2] if quick else SIZES, 1 if quick else SEEDS, np.arange(len(latencies)))
        for j in np.flatnonzero(~keep):
            rows += [dict(table=table, device=columns[j], spread=prior.spread, **r)
                     for r in judge(prior, latencies[:, keep], features, twins, latencies[:, j], picks)]
    return rows

def strangers(folder, columns, latencies, features, twins, index):
    "The devices of `fresh`, with all of `columns` known."
    names, values = fresh(folder, index)
    prior, rows = DevicePrior.fit(latencies, features, groups=[family(c) for c in columns]), []
    for name, y in zip(names, values.T):
        picks = picks_of(prior, SIZES, SEEDS, np.flatnonzero(np.isfinite(y)))
        rows += [dict(table='fresh', device=name, spread=prior.spread, **r)
                 for r in judge(prior, latencies, features, twins, y, picks)]
    return rows

def summary(rows):
    "Mean over seeds and then devices: DataFrame table, measured, design, one column a method, and for ours error, within50, within90."
    keys, own = ['table', 'measured', 'design', 'method'], ['error', 'within50', 'within90']
    by = rows.groupby([*keys, 'device'])[['spearman', *own]].mean().groupby(level=keys).mean()
    return by.spearman.unstack()[list(METHODS)].join(by.xs('ours', level='method')[own]).reset_index()

def write(rows):
    "nbs/cost/transfer.csv: means over the draws."
    keys = ['table', 'device', 'measured', 'design', 'method']
    means = rows.groupby(keys)[['spread', 'spearman', 'error', 'within50', 'within90']].mean().reset_index()
    atomic_write(Path(__file__).resolve().parent.parent/'nbs/cost/transfer.csv', means.to_csv(index=False, float_format='%.4f'))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = data_home()
    if folder is None: raise SystemExit('set NAS_NB_DATA to the folder of nb201_latency.npz')
    first = nb201(folder)
    rows = leave_out('nb201', *first[:4], args.quick)
    if not args.quick: rows += leave_out('fbnet', *fbnet(folder), False) + strangers(folder, *first)
    rows = pd.DataFrame(rows)
    if not args.quick: write(rows)
    table = summary(rows)
    if not args.json: print(table.round(4).to_string(index=False)); return
    for row in table.to_dict('records'):
        name, n = f'transfer_{row["table"]}_{row["measured"]}_{row["design"]}', rows[rows.table == row['table']].device.nunique()
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(dict(name=name, unit='spearman', **row, peer=max(row[m] for m in METHODS[1:]), n=n)))

if __name__ == '__main__': main()
