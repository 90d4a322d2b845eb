"""One thread for torch in the tests: small tensors are fastest so, and a process that forks must not have started a pool of threads
(a child that then enters a parallel region waits for ever for threads that it does not have)."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
torch.set_num_threads(1)
