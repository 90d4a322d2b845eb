"""Latency-aware searches of the pooled space on digits, one for each λ, every cell found retrained (nbs/search/latency_sweep.csv).

    python tools/make_latency_sweep.py          about 4 minutes on one core

The predictor is fitted to 200 cells measured on the machine that runs this. A row: lam in 1/ms, genotype, predicted_ms, search_acc (of the
supernet, on the half of the architecture), val_acc (of the cell, trained from scratch)."""
from pathlib import Path
import pandas as pd, torch
from nas_nb.core.data import load_task
from nas_nb.core.run import atomic_write
from nas_nb.cost.collect import sample_and_measure
from nas_nb.cost.predictor import PredictorCost, fit_predictor
from nas_nb.search.job import RECIPE
from nas_nb.search.latency import la_search
from nas_nb.search.plugin import Budget
from nas_nb.search.retrain import Recipe, accuracy, train_from_scratch
from nas_nb.space.pooled import pooled_space

LAMS = (0., 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.)

if __name__ == '__main__':
    torch.set_num_threads(1)
    path, task = Path(__file__).resolve().parent.parent/'nbs/search/latency_sweep.csv', load_task('digits')
    space = pooled_space(task.shape, task.n_classes)
    table = sample_and_measure(space, 200, progress=False)
    cost = PredictorCost(fit_predictor(space, [space.from_str(s) for s in table.genotype], table.latency_ms), space)
    print('reachable', cost.reachable(), 'error', cost.fit.mean_rel_err, flush=True)
    rows, trained = [], {}
    for lam in LAMS:
        result = la_search(space.supernet(0), task, cost, lam=lam, budget=Budget(20), recipe=RECIPE, seed=0)
        g = result.genotype.canonical()
        if g not in trained: trained[g] = train_from_scratch(space.build(result.genotype), task, Recipe(epochs=20), seed=0).val_acc
        rows.append(dict(lam=lam, genotype=space.to_str(result.genotype), predicted_ms=cost.of(result.genotype),
                         search_acc=accuracy(result.state.net, result.state.sources['val'].split), val_acc=trained[g]))
        print(rows[-1], flush=True)
        atomic_write(path, pd.DataFrame(rows).to_csv(index=False, float_format='%.4f'))
