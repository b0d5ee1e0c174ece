"""Before torch is imported: one thread, since tiny tensors on shared cores lose far more to threads than they gain."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
