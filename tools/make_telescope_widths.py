"""Fill nbs/lens/telescope_widths.csv: effective parameters of networks of several widths trained on partly flipped labels.
Resumable, a row a network.

    python tools/make_telescope_widths.py [--seeds 3]"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd, torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn
from nas_nb.lens.telescope import TangentSmoother, effective_params

TABLE = Path(__file__).resolve().parent.parent/'nbs'/'lens'/'telescope_widths.csv'
N, N_TEST, NOISE, STEPS, LR = 60, 150, .2, 5000, .02

def data(seed):
    "Ten whitened components of the digits 3 and 5: training inputs, noisy labels, test inputs, clean labels."
    pixels, digit = load_digits(return_X_y=True)
    which = (digit == 3) | (digit == 5)
    X = torch.as_tensor(PCA(10, whiten=True, random_state=0).fit_transform(pixels[which]/16))
    y = torch.as_tensor(np.where(digit[which] == 3, 1., -1.))
    g = torch.Generator().manual_seed(seed)
    order, flipped = torch.randperm(len(X), generator=g), torch.rand(N, generator=g) < NOISE
    return X[order[:N]], torch.where(flipped, -1., 1.)*y[order[:N]], X[order[-N_TEST:]], y[order[-N_TEST:]]

def row(width, seed):
    x, y, x_test, y_test = data(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 1)).double()
    optimizer = torch.optim.SGD(net.parameters(), LR)
    smoother = TangentSmoother(net, x, x_test, optimizer, refresh=2)
    for _ in range(STEPS):
        smoother.before_step()
        optimizer.zero_grad()
        ((net(x)[:, 0] - y).square().mean()/2).backward()
        optimizer.step()
    with torch.no_grad(): f = net(torch.cat([x, x_test]))[:, 0]
    S, off = smoother.S, smoother.S@y + smoother.c - f
    return dict(width=width, seed=seed, train_mse=float((f[:N] - y).square().mean()), test_mse=float((f[N:] - y_test).square().mean()),
                p_train=effective_params(S[:N]), p_test=effective_params(S[N:]), error=float(off.abs().mean()/f.abs().mean()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=['width', 'seed'])
    for seed in range(args.seeds):
        for width in (2, 4, 8, 16, 32, 128):
            if ((table.width == width) & (table.seed == seed)).any(): continue
            table = pd.concat([table, pd.DataFrame([row(width, seed)])], ignore_index=True)
            table.round(6).to_csv(TABLE, index=False)
            print(table.iloc[-1].to_dict(), flush=True)

if __name__ == '__main__': main()
