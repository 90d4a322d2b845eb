"""Score cells of NAS-Bench-201 without training, in small networks and some in full size: nbs/lens/proxy_nb201.csv, proxy_nb201_full.csv.

    python tools/make_proxy_nb201.py [--cells 725] [--full 60] [--draws 60]

0.6 s a cell on one core, 5 s in full size and for draws; rows that are there are kept.

The cells are those of the published table of proxies (nb201_zero_cost.npz) in an order drawn with seed 0; `cell` is the row of
nasbench201.npz. Batch: the first 32 images of cifar10_exact4k.npz. Small: 8 channels, one cell a stage; `entropy` and `n_layers` are
VKDNW's on 16 noise images of 16 x 16, seed 0; `jacov_again` has other weights (seed 1) and the next 32 images. Networks hold all
edges, also dead ones, as those of the tables do. proxy_nb201_draws.csv has the Jacobian covariance of full networks four times more:
`jacov_i` has weights of seed i and the images from 32*i on."""
import argparse, csv
from pathlib import Path
import numpy as np
import torch
from nas_nb.core.data import data_home
from nas_nb.lens.proxy import score_networks
from nas_nb.lens.vkdnw import kaiming_fan_in_, vkdnw
from nas_nb.space.cells import nb201_space

WHERE = Path(__file__).resolve().parent.parent/'nbs/lens'
FULL = 'nwot', 'jacov', 'synflow', 'snip', 'grad_norm', 'flops', 'params'
SMALL = 'ntk', *FULL

def batch(n=32, start=0):
    "n images from number `start` on, standardised by the means and deviations usual for CIFAR-10, and their labels."
    z = np.load(data_home()/'cifar10_exact4k.npz')
    x = torch.from_numpy(z['x'][start:start + n]).permute(0, 3, 1, 2)/255
    mean, std = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2470, .2435, .2616])
    return (x - mean[:, None, None])/std[:, None, None], torch.from_numpy(z['y'][start:start + n]).long()

def order():
    "Rows of nasbench201.npz that are to be scored, in order."
    return np.random.default_rng(0).permutation(np.load(data_home()/'nb201_zero_cost.npz')['arch_index'].astype(int))

def knowledge(g, seed=0):
    "Entropy and layers of VKDNW: 8 channels, one cell a stage, 16 noise images of 16 x 16."
    generator = torch.Generator().manual_seed(seed)
    net = kaiming_fan_in_(nb201_space(in_shape=(3, 16, 16), C=8, cells=1).build(g, live=False), generator).eval()
    known = vkdnw(net, torch.randn(16, 3, 16, 16, generator=generator))
    return dict(entropy=known.entropy, n_layers=known.n_layers)

def one(cell, space, proxies, small):
    g = space.from_str(np.load(data_home()/'nasbench201.npz')['arch'][cell].decode())
    build = lambda g, seed: space.build(g, seed, live=False)
    def score(names, data, seed): return score_networks(build, [g], *data, names, (seed,)).iloc[0].to_dict()
    again = dict(jacov_again=score(['jacov'], batch(start=32), 1)['jacov'], **knowledge(g)) if small else {}
    return dict(cell=cell, **score(proxies, batch(), 0), **again)

def draws(cell, space, count=4):
    "The Jacobian covariance of one cell with other weights and other images, `count` times."
    g = space.from_str(np.load(data_home()/'nasbench201.npz')['arch'][cell].decode())
    build = lambda g, seed: space.build(g, seed, live=False)
    score = lambda i: score_networks(build, [g], *batch(start=32*i), ['jacov'], (i,)).jacov[0]
    return dict(cell=cell, **{f'jacov_{i}': score(i) for i in range(1, count + 1)})

def fill(path, cells, *how, row_of=one):
    "Add the rows that the table at `path` lacks, written as they come."
    done = {int(r['cell']) for r in csv.DictReader(path.open())} if path.exists() else set()
    for cell in cells:
        if int(cell) in done: continue
        row = {k: v if k == 'cell' else f'{v:.7g}' for k, v in row_of(int(cell), *how).items()}
        new = not path.exists()
        with path.open('a', newline='') as f:
            writer = csv.DictWriter(f, row, lineterminator='\n')
            if new: writer.writeheader()
            writer.writerow(row)

if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--cells', type=int, default=725)
    parser.add_argument('--full', type=int, default=60)
    parser.add_argument('--draws', type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    fill(WHERE/'proxy_nb201_full.csv', order()[:asked.full], nb201_space(), FULL, False)
    fill(WHERE/'proxy_nb201_draws.csv', order()[:asked.draws], nb201_space(), row_of=draws)
    fill(WHERE/'proxy_nb201.csv', order()[:asked.cells], nb201_space(C=8, cells=1), SMALL, True)
