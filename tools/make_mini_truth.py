"""Train every network of the mini space and write nas_nb/space/mini_truth.csv.

    OMP_NUM_THREADS=1 python tools/make_mini_truth.py [--jobs 2] [--out FILE]

Genotypes with the same `canonical()` build the same network: same modules in the same order, so the same seed
gives the same weights, batches and result, bit for bit (tests/test_spaces.py checks it). One of each of the 85
classes is therefore trained, with each of 3 seeds, and its row is written for all members of the class. Every
finished training is kept at once in FILE.partial: a killed run goes on where it was."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import json, sys
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pandas as pd
import torch
from fastcore.script import call_parse
from joblib import Parallel, delayed
from nas_nb.space.mini import mini_space, train_mini

SEEDS = (0, 1, 2)

def train(text, seed):
    torch.set_num_threads(1)
    return text, seed, train_mini(mini_space().from_str(text), seed)

@call_parse
def main(jobs: int = 1,                                        # trainings at the same time, one thread each
         out: str = str(ROOT/'nas_nb'/'space'/'mini_truth.csv')):  # table to write
    "Train every network of the mini space, resumable"
    space, partial = mini_space(), Path(out + '.partial')
    done = {(r['genotype'], r['seed']): r['accuracy']
            for r in map(json.loads, partial.read_text().splitlines())} if partial.exists() else {}
    first = {}                                                 # canonical -> text of the member that is trained
    for g in space.enumerate(): first.setdefault(g.canonical(), space.to_str(g))
    todo = [(text, seed) for seed in SEEDS for text in first.values() if (text, seed) not in done]
    print(f'{len(first)} classes, {len(done)} trainings done, {len(todo)} to do', flush=True)
    with open(partial, 'a') as log:
        for text, seed, accuracy in Parallel(n_jobs=jobs, return_as='generator')(delayed(train)(*job) for job in todo):
            done[text, seed] = accuracy
            log.write(json.dumps(dict(genotype=text, seed=seed, accuracy=accuracy)) + '\n'); log.flush()
    rows = [[space.to_str(g), *(done[first[g.canonical()], seed] for seed in SEEDS)] for g in space.enumerate()]
    table = pd.DataFrame(rows, columns=['genotype', *(f'seed{s}' for s in SEEDS)])
    table['mean'] = table[[f'seed{s}' for s in SEEDS]].mean(axis=1)
    table.round(4).to_csv(out + '.new', index=False)
    os.replace(out + '.new', out)
    partial.unlink()
    print(table['mean'].describe())
