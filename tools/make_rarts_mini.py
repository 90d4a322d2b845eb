"""Search the mini space with every hypergradient, and on one level, with five seeds each; what was found and its truth: nbs/search/rarts_mini.csv.

    python tools/make_rarts_mini.py            about 15 minutes on one core; rows that are already there are kept"""
from dataclasses import replace
from pathlib import Path
import pandas as pd
import torch
from nas_nb.core.data import Split as Images
from nas_nb.core.run import atomic_write
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.hypergrad import FirstOrder, Unrolled
from nas_nb.search.implicit import Implicit
from nas_nb.search.rarts import Split
from nas_nb.space.mini import mini_space, mini_task, mini_truth

SETTINGS = {'first order': FirstOrder, 'one level': None, 'split': Split, 'split, jacobi': lambda: Split(order='jacobi'),
            'unrolled fd': Unrolled, 'unrolled exact': lambda: Unrolled('exact'), 'implicit': Implicit}

def one(setting, seed):
    "One search: softmax weights, 240 steps, batches of 50, the 800 training images split 400/400 (on one level: whole)."
    space, truth, task = mini_space(), mini_truth().set_index('genotype')['mean'], mini_task()
    task = replace(task, train=Images(torch.cat([task.train.x, task.val.x]), torch.cat([task.train.y, task.val.y])))
    hyper = SETTINGS[setting]
    how = dict(level='one', budget=Budget(15, 50)) if hyper is None else dict(hyper=hyper(), budget=Budget(30, 50))      # 240 steps each
    result = run_search(space.supernet(seed), task, **how, seed=seed)
    g, last = space.to_str(result.genotype), result.history[-1]
    return dict(setting=setting, seed=seed, genotype=g, truth=truth[g], train_loss=last['train_loss'], val_loss=last.get('val_loss'),
                cut=sum(row.get('implicit_cut', 0) for row in result.history))

if __name__ == '__main__':
    torch.set_num_threads(1)
    path = Path(__file__).resolve().parent.parent/'nbs/search/rarts_mini.csv'
    rows = pd.read_csv(path).to_dict('records') if path.exists() else []
    for seed in range(5):
        for setting in SETTINGS:
            if any((r['setting'], r['seed']) == (setting, seed) for r in rows): continue
            rows.append(one(setting, seed))
            atomic_write(path, pd.DataFrame(rows).to_csv(index=False, float_format='%.4f'))
            print(rows[-1])
