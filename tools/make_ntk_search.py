"""Score all 125 networks of the mini space without training, three draws of weights: nbs/study/ntk_search_mini.csv.

    python tools/make_ntk_search.py            about 3 minutes on one core; rows that are there are kept

Batch: the first 32 training images of `mini_task()`, standardised as there. `trace`, `effective_rank` and
`alignment` are of the tangent kernel of that batch, summed over outputs, norms holding the statistics of
the batch; `ntk` is minus the logarithm of its condition number."""
import csv
from pathlib import Path
import math
import torch
from torch.nn import functional as F
from nas_nb.lens.ntk import NTKSpectrum, ntk
from nas_nb.lens.proxy import PROXIES, score_networks, with_batch_statistics
from nas_nb.space.mini import mini_space, mini_task

PATH = Path(__file__).resolve().parent.parent/'nbs/study/ntk_search_mini.csv'

def kernel(net, x): return ntk(with_batch_statistics(net, x), x, outputs='trace')

def spectral(net, x, y):
    "What one kernel says: condition, trace, effective rank, and its alignment with the kernel of equal labels, both centred."
    K = kernel(net, x).double()
    spectrum, H = NTKSpectrum(K.to(x.dtype)), torch.eye(len(x), dtype=K.dtype) - 1/len(x)
    labels, centred = H @ F.one_hot(y).double() @ F.one_hot(y).double().T @ H, H @ K @ H
    alignment = (centred*labels).sum()/(centred.norm()*labels.norm()) if centred.norm() > 0 else 0.
    return dict(ntk=-math.log(spectrum.condition), trace=math.log(max(spectrum.trace, 1e-30)), effective_rank=spectrum.effective_rank,
                alignment=float(alignment))

if __name__ == '__main__':
    torch.set_num_threads(1)
    space, task, others = mini_space(), mini_task(), [p for p in PROXIES if p != 'ntk']
    x, y = task.train.x[:32], task.train.y[:32]
    done = {(int(r['number']), int(r['seed'])) for r in csv.DictReader(PATH.open())} if PATH.exists() else set()
    for seed in range(3):
        for number in range(space.size()):
            if (number, seed) in done: continue
            g = space.at(number)
            scores = score_networks(space.build, [g], x, y, others, seeds=(seed,)).iloc[0].to_dict()
            row = dict(number=number, seed=seed) | {k: f'{v:.7g}' for k, v in (spectral(space.build(g, seed), x, y) | scores).items()}
            new = not PATH.exists()
            with PATH.open('a', newline='') as f:
                writer = csv.DictWriter(f, row, lineterminator='\n')
                if new: writer.writeheader()
                writer.writerow(row)
