"""Long searches where every edge is noise or a separable convolution, watched by the eigenvalue: nbs/search/robust_long.csv, and the
truth of the 8 cells, robust_long_truth.csv.

    python tools/make_robust_long.py [seeds]    about 15 minutes on one core for 3 seeds; rows that are already there are kept

The mini space's frame and edges with two candidates on each edge, as in the space S4; 640 images of translated digits split
320/320, 120 epochs in batches of 50, architecture learning rate 0.01. Plain DARTS at four weight decays, among which R-DARTS
chooses; the early stop (es) and the adaptive decay (ada) at the smallest."""
import sys, time
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.ops.separable import DARTS_OPS, Noise
from nas_nb.search.driver import Budget, SearchRecipe, run_search
from nas_nb.search.retrain import Recipe, accuracy, train_from_scratch
from nas_nb.search.robust import AdaptiveReg, EarlyStop, EigenMonitor, ShortRetrain
from nas_nb.space.cells import CellSpace
from nas_nb.space.mini import MiniSpace, mini_task

NBS = Path(__file__).resolve().parent.parent/'nbs/search'
EPOCHS, START = 120, 24                                                  # the paper's rule begins at epoch 10 of 50, a fifth
PLUGINS = dict(plain=lambda: EigenMonitor(), es=lambda: EarlyStop(start=START), ada=lambda: AdaptiveReg(start=START))
SETTINGS = ['0.0003 plain', '0.0003 es', '0.0003 ada', '0.0009 plain', '0.0027 plain', '0.0081 plain']

class NoiseOrSep(MiniSpace):
    "The mini space's frame with two candidates on each edge: noise that ignores its input, and a separable 3x3 convolution."
    def __init__(self):
        ops = {'noise': Noise, 'sep_conv_3x3': DARTS_OPS['sep_conv_3x3']}
        CellSpace.__init__(self, 'mini-s4', ops, nodes=3, in_shape=(1, 12, 12), n_classes=10, C=8, stages=2, cells=1)

def one(setting, seed):
    """One search: what was found, its accuracy on the architecture's half after a short training on the other, the strongest operations
    after each epoch, and the eigenvalues."""
    decay, plugin = setting.split()
    space, watch, start = NoiseOrSep(), PLUGINS[plugin](), time.process_time()
    recipe = SearchRecipe(w_decay=float(decay), a_lr=.01)
    found = run_search(space.supernet(seed), mini_task(), plugins=[watch], budget=Budget(EPOCHS, 50), recipe=recipe, seed=seed)
    last, tops = found.history[-1], [row['weights']['cell'].argmax(-1).tolist() for row in found.history]
    return dict(setting=setting, seed=seed, genotype=space.to_str(found.genotype), stopped=found.stopped or '',
                restarts=' '.join(f'{back}:{now}:{new:g}' for back, now, new in getattr(watch, 'restarts', [])),
                accuracy=ShortRetrain(Recipe(epochs=EPOCHS//3)).accuracy(found.state, found.genotype),
                train_loss=last['train_loss'], val_loss=last['val_loss'], entropy=last['entropy'],
                seconds=time.process_time() - start, tops=' '.join(''.join(map(str, top)) for top in tops),
                trace=' '.join(f'{epoch}:{value:.4f}' for epoch, value in watch.trace))

def train(cell, seed):
    "A cell, trained on all 800 images by the recipe of the mini table (12 epochs, batches of 50): test accuracy."
    space = NoiseOrSep()
    network = space.build(space.from_str(cell), seed=seed)
    trained = train_from_scratch(network, whole_task(), Recipe(epochs=12, batch_size=50), seed)
    return dict(setting=cell, seed=seed, test_acc=accuracy(trained.network, whole_task().test.open()))

if __name__ == '__main__':
    fill(NBS/'robust_long_truth.csv', [NoiseOrSep().to_str(g) for g in NoiseOrSep().enumerate()], train, 3)
    fill(NBS/'robust_long.csv', SETTINGS, one, int(sys.argv[1]) if len(sys.argv) > 1 else 3)
