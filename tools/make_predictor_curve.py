"""Fit a table of times to 20 ... 500 of the 15,625 cells that HELP measured on a Xeon (gold_6226) and write its errors on 1000 others.

    python tools/make_predictor_curve.py        needs nb201_latency.npz and nasbench201.npz in $NAS_NB_DATA; about 20 seconds on one core

Writes nbs/cost/predictor_curve.csv (the mean relative error, five draws of the samples; `constant`: of the samples' median as the prediction
for all) and nbs/cost/predictor_points.csv (120 of the held-out cells, predicted by the first draw)."""
from pathlib import Path
import numpy as np, pandas as pd, torch
from nas_nb.core.data import data_home
from nas_nb.core.run import atomic_write
from nas_nb.cost.predictor import fit_predictor
from nas_nb.space.cells import nb201_space

SAMPLES, DRAWS, HELD, POINTS = (20, 30, 45, 60, 80, 110, 150, 220, 350, 500), 5, 1000, 120

if __name__ == '__main__':
    torch.set_num_threads(1)
    folder, home = data_home(), Path(__file__).resolve().parent.parent/'nbs/cost'
    if folder is None: raise SystemExit('set NAS_NB_DATA to the folder of nb201_latency.npz and nasbench201.npz')
    latency, ops = np.load(folder/'nb201_latency.npz')['gold_6226'], np.load(folder/'nasbench201.npz')['ops'].astype(int)
    space = nb201_space()
    cells = [space.genotype({'cell': row}) for row in ops.tolist()]
    usable = np.flatnonzero(np.isfinite(latency) & np.array([g.connected for g in cells]))
    rows, points = [], {}
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(usable)
        held, rest = order[:HELD], order[HELD:]
        truth = latency[held].astype(float)
        for n in SAMPLES:
            train = rest[:n + 1]                    # fit_predictor wants a test sample of its own: one more
            fit = fit_predictor(space, [cells[i] for i in train], latency[train], test=1, live=False, seed=draw, kind='table')
            predicted = fit.predict(space, [cells[i] for i in held]).predicted.to_numpy()
            error, constant = (float(np.abs(p/truth - 1).mean()) for p in (predicted, np.median(latency[train])))
            rows.append(dict(samples=n, draw=draw, error=error, constant=constant))
            print(rows[-1], flush=True)
            if draw == 0: points |= {'measured': truth[:POINTS], str(n): predicted[:POINTS]}
    atomic_write(home/'predictor_curve.csv', pd.DataFrame(rows).to_csv(index=False, float_format='%.5f'))
    atomic_write(home/'predictor_points.csv', pd.DataFrame(points).to_csv(index=False, float_format='%.4g'))
