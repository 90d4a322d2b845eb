"""One thread for torch in the tests: small tensors are fastest so, and a process that forks must not have started a pool of threads
(a child that then enters a parallel region waits for ever for threads that it does not have)."""
import os
from dataclasses import replace
os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest
import torch
torch.set_num_threads(1)

@pytest.fixture(scope='module')
def task():
    "Digits, 80 of them to search with; a module may have a task of its own."
    from nas_nb.core.data import load_task
    task = load_task('digits', limit=200)
    return replace(task, train=task.train.subset(range(80)))

@pytest.fixture(scope='module')
def space():
    "The smallest space of cells; a module may have a space of its own."
    from nas_nb.space.cells import CellSpace, nb201_space
    return CellSpace('tiny', nb201_space().ops, 3, None, (1, 8, 8), 10, C=2, stages=1, cells=1)
