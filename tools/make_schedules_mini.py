"""Search the mini space with small temperatures, and train one network with several learning-rate schedules.

    python tools/make_schedules_mini.py        about 12 minutes on one core; rows that are already there are kept

schedules_mini.csv: a row for each setting and seed of the searches.
schedules_power.csv: a row for each exponent and seed of the training."""
from pathlib import Path
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from make_search_mini import fill, whole_task
from nas_nb.core.data import translated_digits
from nas_nb.core.run import atomic_write
from nas_nb.relax.choice import Softmax
from nas_nb.relax.core import Constant, EntropyAdaptive, Exponential, Linear
from nas_nb.relax.sparse import SparseNoisySoftmax
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.schedules import CosinePowerLR, supernet_gap
from nas_nb.space.mini import mini_space, mini_truth

def noisy(): return SparseNoisySoftmax(Linear(1., 0.))
SETTINGS = {'softmax, t = 1': (Softmax(), Constant(1.)), 'softmax, t = 0.01': (Softmax(), Constant(.01)),
            'softmax, t 1 to 0.01': (Softmax(), Exponential(1., .01)), 'noisy, t = 0.01': (noisy(), Constant(.01)),
            'noisy, t 1 to 0.01': (noisy(), Exponential(1., .01)),
            'noisy, entropy 0.95 to 0.05': (noisy(), EntropyAdaptive(Linear(.95, .05)))}

def one(setting, seed):
    "One search of 240 steps: what was found, its truth, the gap, how far each logit moved, and the entropy of the weights at the end."
    space, truth, (relax, temperature) = mini_space(), mini_truth().set_index('genotype')['mean'], SETTINGS[setting]
    net = space.supernet(seed)
    start = net.arch['cell'].detach().clone()
    result = run_search(net, whole_task(), relax=relax, schedules=dict(temperature=temperature), budget=Budget(30, 50), seed=seed)
    g, (soft, hard) = space.to_str(result.genotype), supernet_gap(result.state, result.genotype)
    return dict(setting=setting, seed=seed, genotype=g, truth=truth[g], supernet=soft, cut=hard,
                moved=(net.arch['cell'].detach() - start).abs().mean().item(), entropy=result.history[-1]['entropy'],
                temperature=result.history[-1]['temperature'])

def train(p, seed, epochs=12, batch=50):
    "Training loss and test accuracy of three 3x3 convolutions after `epochs` on the 800 training images."
    space = mini_space()
    net = space.build(space.from_str('|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|'), seed=seed)
    (x, y), generator = map(torch.from_numpy, translated_digits()), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), .1, momentum=.9, nesterov=True, weight_decay=5e-4)
    scheduler = CosinePowerLR(optimizer, epochs * 800 // batch, p=p)
    for _ in range(epochs):
        for i in torch.randperm(800, generator=generator).view(-1, batch):
            optimizer.zero_grad()
            cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
            scheduler.step()
    net.eval()
    with torch.no_grad(): return cross_entropy(net(x[:800]), y[:800]).item(), (net(x[800:]).argmax(1) == y[800:]).float().mean().item()

if __name__ == '__main__':
    torch.set_num_threads(1)
    folder = Path(__file__).resolve().parent.parent/'nbs/search'
    if not (folder/'schedules_power.csv').exists():
        rows = [dict(p=p, seed=seed, **dict(zip(('loss', 'test_acc'), train(p, seed)))) for seed in range(5) for p in (1., 2., 10.)]
        atomic_write(folder/'schedules_power.csv', pd.DataFrame(rows).to_csv(index=False, float_format='%.5f'))
    fill(folder/'schedules_mini.csv', SETTINGS, one)
