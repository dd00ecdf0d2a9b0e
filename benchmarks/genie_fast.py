"""Seconds and memory of a whole ``genie --effort fast``.

python benchmarks/genie_fast.py zoo:resnet20-cifar10 --bits w4a4 --threads 2
"""

import argparse

import torch

import zsq
from zsq.allocator import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    metrics = zsq.quantize(args.model, "genie", args.bits, effort="fast").metrics
    for stage, seconds in metrics["seconds"].items():
        print(f"{stage:20} {seconds:8.1f} s")
    print(f"{'in all':20} {sum(metrics['seconds'].values()):8.1f} s, peak {metrics['peak_memory_mb']} MB")


if __name__ == "__main__":
    main()
