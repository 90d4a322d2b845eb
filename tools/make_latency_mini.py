"""Latency-aware searches of the mini space under a price list, several λ, budgets and seeds (nbs/search/latency_mini.csv).

    python tools/make_latency_mini.py            about 6 minutes on one core; rows that are already there are kept"""
from dataclasses import replace
from pathlib import Path
import pandas as pd
import torch
from nas_nb.core.data import Split
from nas_nb.core.run import atomic_write
from nas_nb.cost.expected import LUTCost
from nas_nb.search.driver import Budget
from nas_nb.search.latency import la_search
from nas_nb.search.select import Within
from nas_nb.space.mini import mini_space, mini_task, mini_truth

ASKED = [dict(lam=v) for v in (0., 0.01, 0.03, 0.1, 0.3)] + [dict(limit=v) for v in ('0.3ms', '0.5ms', '0.7ms', '0.9ms')]

def price_list(space):
    "A made-up latency in ms of each operation of the mini space."
    prices = dict(none=0., skip_connect=0.02, nor_conv_1x1=0.1, nor_conv_3x3=0.3, avg_pool_3x3=0.2)
    return LUTCost({g: torch.tensor([prices[op] for op in space.op_names]).repeat(len(e), 1) for g, e in space.groups.items()}, space,
                   unit='ms', constant=0.2)

def one(seed, ask):
    "One search: what was asked, the genotype, its price and ground truth; for λ = 0 also what selection alone finds within each budget."
    space, task, truth = mini_space(), mini_task(), mini_truth().set_index('genotype')['mean']
    task = replace(task, train=Split(torch.cat([task.train.x, task.val.x]), torch.cat([task.train.y, task.val.y])))
    price = price_list(space)
    result = la_search(space.supernet(seed), task, price, **ask, budget=Budget(15, 16), seed=seed)
    row = lambda kind, asked, g: dict(kind=kind, asked=asked, seed=seed, genotype=space.to_str(g), price=price.of(g),
                                      truth=truth[space.to_str(g)])
    if 'limit' in ask: return [row('budget', ask['limit'], result.genotype)]
    rows = [row('lam', str(ask['lam']), result.genotype)]
    if ask['lam'] == 0: rows += [row('selection only', a['limit'], Within(price, a['limit'])(result.state)) for a in ASKED if 'limit' in a]
    return rows

if __name__ == '__main__':
    torch.set_num_threads(1)
    path = Path(__file__).resolve().parent.parent/'nbs/search/latency_mini.csv'
    rows = pd.read_csv(path, dtype={'asked': str}).to_dict('records') if path.exists() else []
    done = {(r['kind'], r['asked'], r['seed']) for r in rows}
    for seed in range(3):
        for ask in ASKED:
            if (('budget', ask['limit'], seed) if 'limit' in ask else ('lam', str(ask['lam']), seed)) in done: continue
            rows += one(seed, ask)
            atomic_write(path, pd.DataFrame(rows).to_csv(index=False, float_format='%.4f'))
            print(rows[-1], flush=True)
