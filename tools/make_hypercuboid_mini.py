"""Search a small hypercuboid on translated digits with softmax and Max-W weights, three seeds each, and retrain what was found,
the path that doubles its channels, the widest, and random ones (nbs/space/hypercuboid_mini.csv).

    python tools/make_hypercuboid_mini.py            about 20 minutes on one core; rows that are already there are kept"""
from pathlib import Path
import numpy as np
from make_search_mini import fill, whole_task
from nas_nb.cost.expected import LUTCost
from nas_nb.relax.choice import Softmax
from nas_nb.relax.sparse import MaxW
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.retrain import Recipe, accuracy, train_from_scratch
from nas_nb.space.hypercuboid import LongestPath, hypercuboid_space

RELAX = {'softmax': Softmax(), 'Max-W': MaxW()}
SPACE = hypercuboid_space((4, 8, 16), blocks=2, in_shape=(1, 12, 12))

def chosen(setting, seed):
    "The path of a setting: 240 steps of search, batches of 50, the 800 training images split 400/400; or without a search."
    if setting == 'random': return SPACE.sample(np.random.default_rng(seed))
    by_hand = {'doubling': (4, 4, 8, 8, 16), 'widest': (16,)*5}
    if setting in by_hand: return SPACE.along(by_hand[setting], ('sharp_conv_3x3',)*4)
    how = dict(relax=RELAX[setting], budget=Budget(30, 50), select=LongestPath())
    return run_search(SPACE.supernet(seed), whole_task(), seed=seed, **how).genotype

def one(setting, seed, runs=3):
    "One path and its accuracy on the 997 test images, trained on all 800 others: mean of `runs` trainings, whose seeds are no other row's."
    g, task, recipe = chosen(setting, seed), whole_task(), Recipe(epochs=12, batch_size=50)
    nets = [train_from_scratch(SPACE.build(g, seed=s), task, recipe, seed=s).network for s in range(runs*seed, runs*(seed + 1))]
    return dict(setting=setting, seed=seed, genotype=SPACE.to_str(g), macs=LUTCost(SPACE.table(), SPACE, 'MACs').of(g),
                accuracy=float(np.mean([accuracy(net, task.test.open()) for net in nets])))

if __name__ == '__main__':
    fill(Path(__file__).resolve().parent.parent/'nbs/space/hypercuboid_mini.csv', (*RELAX, 'doubling', 'widest', 'random'), one, seeds=3)
