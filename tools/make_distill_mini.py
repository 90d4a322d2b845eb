"""Voting teachers and perturbed choice weights against the plain search, on the mini space and on a part of it:
nbs/search/distill_mini.csv.

    python tools/make_distill_mini.py [seeds]           about 15 minutes on one core for 3 seeds; rows that are already there are kept"""
import sys
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.ops.conv import NB201_OPS
from nas_nb.search.distill import VotingTeachers
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.retrain import accuracy
from nas_nb.search.robust import alpha_sharpness, arch_batch
from nas_nb.search.smooth import AdversarialSmoothing, RandomSmoothing
from nas_nb.space.cells import CellSpace
from nas_nb.space.mini import MiniSpace, mini_truth

METHODS = {'plain': lambda: [], 'K=1': lambda: [VotingTeachers(k=1)], 'K=3': lambda: [VotingTeachers()],
           'random': lambda: [RandomSmoothing()], 'adversarial': lambda: [AdversarialSmoothing(steps=3)]}
SWEEP = {'K=3, lam 0.3': lambda: [VotingTeachers(lam=.3)], 'K=3, lam 3': lambda: [VotingTeachers(lam=3.)]}

class SkipOrConv(MiniSpace):
    """The mini space with two of its candidates, as in the space S2: skip and 3x3 convolution.
    Its cells are mini cells, in the table of truths."""
    def __init__(self):
        CellSpace.__init__(self, 'mini', {n: NB201_OPS[n] for n in ('skip_connect', 'nor_conv_3x3')}, nodes=3,
                           in_shape=(1, 12, 12), n_classes=10, C=8, stages=2, cells=1)

SPACES = {'mini': MiniSpace, 'skip or conv': SkipOrConv}
SETTINGS = [f'{space}: {method}' for space in SPACES for method in METHODS] + [f'mini: {method}' for method in SWEEP]

def one(setting, seed):
    """One search, 240 steps, batches of 50, the 800 training images split 400/400: what was found, its truth,
    and how flat the loss is at the end (200 images)."""
    name, method = setting.split(': ')
    space, truth = SPACES[name](), mini_truth().set_index('genotype')['mean']
    found = run_search(space.supernet(seed), whole_task(), plugins=(METHODS | SWEEP)[method](), budget=Budget(30, 50), seed=seed)
    s, g, last = found.state, space.to_str(found.genotype), found.history[-1]
    half, batch = s.sources['val'].split, arch_batch(s, 200)
    row = dict(setting=setting, seed=seed, space=name, method=method, genotype=g, truth=float(truth[g]), eig=alpha_sharpness(s, batch),
               rise=alpha_sharpness(s, batch, 'perturb', draws=32), supernet=accuracy(s.net, half),
               discretised=accuracy(s.net.discretize(found.genotype), half))
    return row | dict(entropy=last['entropy'], train_acc=last['train_acc'], train_loss=last['train_loss'], val_loss=last['val_loss'])

if __name__ == '__main__':
    fill(Path(__file__).resolve().parent.parent/'nbs/search/distill_mini.csv', SETTINGS, one,
         seeds=int(sys.argv[1]) if len(sys.argv) > 1 else 3)
