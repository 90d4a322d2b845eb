"""Search the mini space with three settings and five seeds, and write what was found beside its ground truth (nbs/search/driver_mini.csv).

    python tools/make_search_mini.py            about 4 minutes on one core; rows that are already there are kept"""
from dataclasses import replace
from pathlib import Path
import pandas as pd
import torch
from nas_nb.core.data import Split
from nas_nb.core.run import atomic_write
from nas_nb.relax.choice import Gumbel, Softmax
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.retrain import accuracy
from nas_nb.space.mini import mini_space, mini_task, mini_truth

SETTINGS = {'softmax': (Softmax(), Budget(30, 50)), 'softmax, batch 16': (Softmax(), Budget(15, 16)), 'gumbel': (Gumbel(), Budget(30, 50))}

def whole_task():
    "All 800 training images of the mini task as training part: the search splits them 400/400."
    task = mini_task()
    return replace(task, train=Split(torch.cat([task.train.x, task.val.x]), torch.cat([task.train.y, task.val.y])))

def one(setting, seed):
    "One search: the genotype, its ground truth, the supernet's accuracy on the architecture's half and that of the network cut out of it."
    space, truth, (relax, budget) = mini_space(), mini_truth().set_index('genotype')['mean'], SETTINGS[setting]
    result = run_search(space.supernet(seed), whole_task(), relax=relax, budget=budget, seed=seed)
    net, half, g = result.state.net, result.state.sources['val'].split, space.to_str(result.genotype)
    return dict(setting=setting, seed=seed, genotype=g, truth=truth[g], supernet=accuracy(net, half),
                discretised=accuracy(net.discretize(result.genotype), half))

def fill(path, settings, one, seeds=5):
    "Add the rows that the table at `path` lacks, a search for each setting and seed, written as they come."
    torch.set_num_threads(1)
    rows = pd.read_csv(path).to_dict('records') if path.exists() else []
    for seed in range(seeds):
        for setting in settings:
            if any((r['setting'], r['seed']) == (setting, seed) for r in rows): continue
            rows.append(one(setting, seed))
            atomic_write(path, pd.DataFrame(rows).to_csv(index=False, float_format='%.4f'))
            print(rows[-1])

if __name__ == '__main__': fill(Path(__file__).resolve().parent.parent/'nbs/search/driver_mini.csv', SETTINGS, one)
