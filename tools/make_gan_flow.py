"""Particle flows on eight Gaussians with seven kernels and three losses: energy distance and Sinkhorn divergence on the way,
in nbs/lens/ntk_gan_flow.csv.

    python tools/make_gan_flow.py            about 8 minutes on one core; rows that are already there are kept"""
import math, warnings
from pathlib import Path
import pandas as pd
import torch
from nas_nb.lens.ntk_gan import EmpiricalKernel, energy_distance, gaussian_kernel, infinite_kernel, particle_flow, sinkhorn_divergence
from nas_nb.lens.ntk_infinite import InfiniteNet, finite_network

FILE = Path(__file__).resolve().parent.parent/'nbs/lens/ntk_gan_flow.csv'
KERNELS = {'Gaussian': gaussian_kernel, 'ReLU': infinite_kernel, 'ReLU, no bias': lambda: infinite_kernel(sigma_b=0.),
           **{f'finite {name}': lambda act=act: EmpiricalKernel(finite_network(InfiniteNet(act, 3, 1., (1., 1., 1., 0.)), 2, 128))
              for name, act in (('ReLU', 'relu'), ('GELU', 'gelu'))},
           'erf': lambda: infinite_kernel('erf'), 'ReLU, NNGP': lambda: infinite_kernel(kind='nngp')}
RUNS = [(k, 'ipm') for k in KERNELS] + [('ReLU', 'vanilla'), ('ReLU', 'lsgan')]
# a claim rests on three seeds; the other rows are for the eye
SEEDS = {run: 3 if i < 5 else 1 for i, run in enumerate(RUNS)}

def eight_gaussians(n, generator):
    "n points around 8 centres on a circle of radius 5, standard deviation 0.5."
    angle = torch.randint(8, (n,), generator=generator)*(math.pi/4)
    return 5*torch.stack([angle.cos(), angle.sin()], 1) + .5*torch.randn(n, 2, generator=generator)

def one(kernel, loss, seed):
    g = torch.Generator().manual_seed(seed)
    real = eight_gaussians(200, g); fake = torch.randn(200, 2, generator=g)
    path = particle_flow(fake, real, KERNELS[kernel](), loss, eta=1000., steps=400, every=50)
    return [dict(kernel=kernel, loss=loss, seed=seed, step=50*i, energy=energy_distance(x, real), sinkhorn=sinkhorn_divergence(x, real))
            for i, x in enumerate(path)]

if __name__ == '__main__':
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    rows = pd.read_csv(FILE).to_dict('records') if FILE.exists() else []
    for seed in range(3):
        for kernel, loss in RUNS:
            if seed >= SEEDS[kernel, loss] or any((r['kernel'], r['loss'], r['seed']) == (kernel, loss, seed) for r in rows): continue
            rows += one(kernel, loss, seed)
            pd.DataFrame(rows).to_csv(FILE, index=False, float_format='%.6g')
            print(seed, kernel, loss, rows[-1]['energy'], flush=True)
