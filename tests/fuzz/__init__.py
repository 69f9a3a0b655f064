"""Random cases, each determined by one seed, compared with backpropagation through the whole past; see ``run.py``."""
