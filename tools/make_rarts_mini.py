"""Search the mini space with every hypergradient, and on one level, with five seeds each;
what was found and its truth: nbs/search/rarts_mini.csv.

    python tools/make_rarts_mini.py            about 15 minutes on one core; rows that are already there are kept"""
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.hypergrad import FirstOrder, Unrolled
from nas_nb.search.implicit import Implicit
from nas_nb.search.rarts import Split
from nas_nb.space.mini import mini_space, mini_truth

SETTINGS = {'first order': FirstOrder, 'one level': None, 'split': Split, 'split, jacobi': lambda: Split(order='jacobi'),
            'unrolled fd': Unrolled, 'unrolled exact': lambda: Unrolled('exact'), 'implicit': Implicit}

def one(setting, seed):
    "One search: softmax weights, 240 steps, batches of 50, the 800 training images split 400/400 (on one level: whole)."
    space, truth, task = mini_space(), mini_truth().set_index('genotype')['mean'], whole_task()
    hyper = SETTINGS[setting]
    how = dict(level='one', budget=Budget(15, 50)) if hyper is None else dict(hyper=hyper(), budget=Budget(30, 50))      # 240 steps each
    result = run_search(space.supernet(seed), task, **how, seed=seed)
    g, last = space.to_str(result.genotype), result.history[-1]
    return dict(setting=setting, seed=seed, genotype=g, truth=truth[g], train_loss=last['train_loss'], val_loss=last.get('val_loss'),
                cut=sum(row.get('implicit_cut', 0) for row in result.history))

if __name__ == '__main__': fill(Path(__file__).resolve().parent.parent/'nbs/search/rarts_mini.csv', SETTINGS, one)
