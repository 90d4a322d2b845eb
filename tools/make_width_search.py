"""Widths of a small network on digits: searched with the split method, first order and on one level, pruned by filter norms, and
uniform, at equal multiply-adds, three seeds (nbs/search/width_search.csv).

    python tools/make_width_search.py            about 6 minutes on one core; rows that are already there are kept"""
import functools
from pathlib import Path
from make_search_mini import fill
from torch import nn
from nas_nb.core.data import load_task
from nas_nb.search.driver import Budget, SearchRecipe, run_search
from nas_nb.search.hypergrad import FirstOrder
from nas_nb.search.rarts import Split
from nas_nb.search.retrain import Recipe, accuracy, train_from_scratch
from nas_nb.search.width import ChannelSpace, Factors, Strongest, WidthSearch, filter_norms, strongest_channels, uniform_scores

MU, SHARES = .03, (.25, .06)
SEARCHES = {'split': dict(hyper=Split), 'first order': dict(hyper=FirstOrder), 'one level': dict(level='one')}
WHOLE, TUNE = Recipe(epochs=20, batch_size=50), Recipe(epochs=10, batch_size=50, lr=.02)

def plain(affine=True, widths=(16, 32, 32)):
    "Three 3x3 convolutions with batch norm and ReLU, the second with stride 2; the mean over positions; a linear layer."
    def convolution(a, b, stride): return nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b, affine=affine), nn.ReLU()
    body = [m for a, b, stride in zip((1, *widths), widths, (1, 2, 1)) for m in convolution(a, b, stride)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

@functools.cache
def digits():
    "The task, 898 images to train and 719 to test, and the space of the channels of `plain`."
    task = load_task('digits', val=.1, test=.4)
    return task, ChannelSpace(plain, task.shape, task.n_classes)

def searched(method, seed):
    "The supernet after 340 steps: 40 epochs of the weights' half, or, on one level, 20 epochs of both halves."
    (task, space), how = digits(), SEARCHES[method]
    how, budget = ({'hyper': how['hyper']()}, Budget(40, 50)) if 'hyper' in how else (how, Budget(20, 50))
    return run_search(space.supernet(seed), task, relax=Factors(), constraint=WidthSearch(MU, by_work=True), budget=budget, seed=seed,
                      select=Strongest(1.), recipe=SearchRecipe(a_lr=.01, a_decay=0.), **how).state.net

@functools.cache
def scored(method, seed):
    "Scores of the channels, and a function: the genotype -> the network with the weights that the method leaves (None: it leaves none)."
    task, space = digits()
    if method == 'uniform': return uniform_scores(space), None
    if method in SEARCHES:
        net = searched(method, seed)
        return net.arch['channels'].detach()[:, 0], net.folded
    supernet = space.supernet()
    supernet.scaled.model = train_from_scratch(space.build(space.kept(range(space.n)), seed), task, WHOLE, seed=seed).network
    return filter_norms(space, supernet.scaled.model), supernet.discretize

def one(setting, seed):
    "One method at one share of the multiply-adds: widths, test accuracy trained from scratch (mean of two), and trained on."
    method, share = setting.split(', ')
    (task, space), (scores, cut) = digits(), scored(method, seed)
    g, test = strongest_channels(space, scores, float(share)), task.test.open()
    scratch = [train_from_scratch(space.build(g, seed=s), task, WHOLE, seed=s).network for s in (2*seed, 2*seed + 1)]
    tuned = train_from_scratch(cut(g), task, TUNE, seed=seed).network if cut else None
    return dict(setting=setting, seed=seed, method=method, share=float(share), widths='-'.join(map(str, space.widths(g))),
                macs=float(space.expected(space.one_hot(g))), zero=float((scores <= 0).float().mean()),
                scratch=sum(accuracy(net, test) for net in scratch)/2, tuned=accuracy(tuned, test) if cut else None)

if __name__ == '__main__':
    settings = [f'{method}, {share}' for share in SHARES for method in (*SEARCHES, 'filter norms', 'uniform')]
    fill(Path(__file__).resolve().parent.parent/'nbs/search/width_search.csv', settings, one, seeds=3)
