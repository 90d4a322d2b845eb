"""Search the small FBNet chain on digits for three weights of the multiply-adds and three seeds, train what was found and random chains
of equal multiply-adds, and write both (nbs/space/chains_mini.csv).

    python tools/make_chain_mini.py            about 6 minutes on one core; rows that are already there are kept"""
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from nas_nb.core.data import load_task
from nas_nb.core.run import atomic_write
from nas_nb.cost.expected import LUTCost
from nas_nb.search.driver import Budget, SearchRecipe, Soft, run_search
from nas_nb.search.retrain import Recipe, train_from_scratch
from nas_nb.space.chains import fbnet_space

LAMS, SEEDS, RANDOM = (.1, .3, 1.), (0, 1, 2), 5   # weight of a million multiply-adds; seeds of search; random chains for each found one

def searched(space, task, cost, lam, seed):
    "The genotype that ten epochs of first-order search find."
    return run_search(space.supernet(seed), task, objective=Soft(cost.to('MMACs'), lam), budget=Budget(10, 64), seed=seed,
                      recipe=SearchRecipe(a_lr=.02)).genotype

def like(space, cost, g, rng, tolerance=.1):
    "A random chain whose multiply-adds are those of `g` within `tolerance`."
    while True:
        h = space.sample(rng)
        if abs(cost.of(h)/cost.of(g) - 1) < tolerance: return h

def validated(space, task, g):
    "Accuracy on the validation part, which no search and no training sees: mean of three trainings."
    return float(np.mean([train_from_scratch(space.build(g, seed=s), task, Recipe(epochs=10), seed=s).val_acc for s in range(3)]))

if __name__ == '__main__':
    torch.set_num_threads(1)
    path = Path(__file__).resolve().parent.parent/'nbs/space/chains_mini.csv'
    rows = pd.read_csv(path).to_dict('records') if path.exists() else []
    space, task = fbnet_space('small'), load_task('digits')
    prices, frame = space.table()
    cost = LUTCost(prices, space, 'MACs', frame)
    for lam in LAMS:
        for seed in SEEDS:
            if any((r['lam'], r['seed']) == (lam, seed) for r in rows): continue
            g, rng = searched(space, task, cost, lam, seed), np.random.default_rng(seed)
            for kind, h in [('found', g), *(('random', like(space, cost, g, rng)) for _ in range(RANDOM))]:
                accuracy = validated(space, task, h)
                rows.append(dict(lam=lam, seed=seed, kind=kind, genotype=space.to_str(h), macs=cost.of(h), accuracy=accuracy))
            atomic_write(path, pd.DataFrame(rows).to_csv(index=False, float_format='%.4f'))
            print(pd.DataFrame(rows[-RANDOM - 1:]).groupby('kind')[['macs', 'accuracy']].mean())
