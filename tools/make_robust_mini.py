"""Weight decay against sharpness where every edge is noise or a convolution: nbs/search/robust_noise.csv, and the truth of
the 8 cells, robust_truth.csv.

    python tools/make_robust_mini.py [seeds]            about 5 minutes on one core; rows that are already there are kept"""
import sys
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.ops.conv import NB201_OPS
from nas_nb.ops.separable import Noise
from nas_nb.search.driver import Budget, SearchRecipe, run_search
from nas_nb.search.retrain import Recipe, accuracy, train_from_scratch
from nas_nb.search.robust import EigenMonitor
from nas_nb.space.cells import CellSpace
from nas_nb.space.mini import MiniSpace, mini_task

NBS = Path(__file__).resolve().parent.parent/'nbs/search'
LEVELS = (3e-4, 9e-4, 27e-4, 81e-4)

class NoiseOrConv(MiniSpace):
    """The mini space's frame and edges with two candidates on each edge, as in the space S4: noise that ignores its input,
    and a 3x3 convolution."""
    def __init__(self):
        ops = {'noise': Noise, 'nor_conv_3x3': NB201_OPS['nor_conv_3x3']}
        CellSpace.__init__(self, 'noise-or-conv', ops, nodes=3, in_shape=(1, 12, 12), n_classes=10, C=8, stages=2, cells=1)

def train(number, seed):
    "One of the eight cells, trained on all 800 images by the recipe of the mini table (12 epochs, batches of 50): test accuracy."
    space = NoiseOrConv()
    g = space.at(number)
    trained = train_from_scratch(space.build(g, seed=seed), whole_task(), Recipe(epochs=12, batch_size=50), seed)
    test_acc, name = accuracy(trained.network, whole_task().test.open()), space.to_str(g)
    return dict(setting=number, seed=seed, genotype=name, noise=name.count('noise'), test_acc=test_acc)

def one(level, seed):
    """One search at a weight decay, 640 images split 320/320, 240 steps; what was found, its accuracy on 160 more images after a short
    retraining on the 640, and the eigenvalues."""
    space, task, monitor = NoiseOrConv(), mini_task(), EigenMonitor(images=100)
    recipe = SearchRecipe(w_decay=level)
    found = run_search(space.supernet(seed), task, plugins=[monitor], budget=Budget(40, 50), recipe=recipe, seed=seed)
    g, last, values = space.to_str(found.genotype), found.history[-1], [value for _, value in monitor.trace]
    short = train_from_scratch(space.build(found.genotype, seed=seed), task, Recipe(epochs=10), seed).val_acc
    return dict(setting=level, seed=seed, genotype=g, noise=g.count('noise'), val_acc=short, largest=max(map(abs, values)),
                last=values[-1], train_loss=last['train_loss'], val_loss=last['val_loss'], trace=' '.join(f'{v:.4f}' for v in values))

if __name__ == '__main__':
    fill(NBS/'robust_truth.csv', range(8), train, seeds=3)
    fill(NBS/'robust_noise.csv', LEVELS, one, seeds=int(sys.argv[1]) if len(sys.argv) > 1 else 3)
