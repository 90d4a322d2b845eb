"""Weight decay against sharpness where every edge is noise or a convolution: nbs/search/robust_noise.csv, and the truth of the 8 cells, robust_truth.csv.

    python tools/make_robust_mini.py [seeds]            about 15 minutes on one core; rows that are already there are kept"""
import sys
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.ops.conv import NB201_OPS
from nas_nb.ops.separable import Noise
from nas_nb.search.driver import Budget, SearchRecipe, run_search
from nas_nb.search.retrain import Recipe, accuracy, train_from_scratch
from nas_nb.search.robust import AdaptiveReg, EarlyStop, EigenMonitor
from nas_nb.space.cells import CellSpace
from nas_nb.space.mini import MiniSpace, mini_task

NBS = Path(__file__).resolve().parent.parent/'nbs/search'
LEVELS = (3e-4, 9e-4, 27e-4, 81e-4)

class NoiseOrConv(MiniSpace):
    "The mini space's frame and edges with two candidates on each edge, as in the space S4: noise that ignores its input, and a 3x3 convolution."
    def __init__(self):
        CellSpace.__init__(self, 'noise-or-conv', {'noise': Noise, 'nor_conv_3x3': NB201_OPS['nor_conv_3x3']}, nodes=3, in_shape=(1, 12, 12), n_classes=10,
                           C=8, stages=2, cells=1)

def train(number, seed):
    "One of the eight cells, trained on all 800 images by the recipe of the mini table (12 epochs, batches of 50): test accuracy."
    space = NoiseOrConv()
    g = space.at(number)
    trained = train_from_scratch(space.build(g, seed=seed), whole_task(), Recipe(epochs=12, batch_size=50), seed)
    return dict(setting=number, seed=seed, genotype=space.to_str(g), noise=space.to_str(g).count('noise'), test_acc=accuracy(trained.network, whole_task().test.open()))

SHORT, LONG = (Budget(40, 50), {}), (Budget(120, 50), dict(a_lr=1e-2))
WATCH = {'stop': EarlyStop, 'adaptive': AdaptiveReg}
SETTINGS = [f'short: {level}' for level in LEVELS] + [f'long: {how}' for how in (LEVELS[0], LEVELS[3], *WATCH, *LEVELS[1:3])]

def one(setting, seed):
    """One search, 640 images split 320/320, at a weight decay, or at the smallest with a plug-in that watches; what was found, its accuracy on 160 more
    images after a short retraining on the 640, and the eigenvalues. Short: 240 steps. Long: 720 steps, the architecture three times faster."""
    length, how = setting.split(': ')
    space, task, (budget, faster) = NoiseOrConv(), mini_task(), SHORT if length == 'short' else LONG
    watch = WATCH[how](images=100) if how in WATCH else EigenMonitor(images=64)
    recipe = SearchRecipe(w_decay=LEVELS[0] if how in WATCH else float(how), **faster)
    found = run_search(space.supernet(seed), task, plugins=[watch], budget=budget, recipe=recipe, seed=seed)
    g, last = space.to_str(found.genotype), found.history[-1]
    short = train_from_scratch(space.build(found.genotype, seed=seed), task, Recipe(epochs=10), seed).val_acc
    values = [value for _, value in watch.trace]
    return dict(setting=setting, seed=seed, length=length, how=how, genotype=g, noise=g.count('noise'), val_acc=short, largest=max(map(abs, values)), last=values[-1],
                epoch=found.state.epoch, w_decay=found.state.w_opt.param_groups[0]['weight_decay'], restarts=' '.join(map(str, getattr(watch, 'restarts', []))),
                train_loss=last['train_loss'], val_loss=last['val_loss'], trace=' '.join(f'{v:.4f}' for v in values))

if __name__ == '__main__':
    fill(NBS/'robust_truth.csv', range(8), train, seeds=3)
    fill(NBS/'robust_noise.csv', SETTINGS, one, seeds=int(sys.argv[1]) if len(sys.argv) > 1 else 3)
