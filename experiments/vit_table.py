"""What images are worth to vision transformers: sources of images under two protocols at three bit-widths.

    python experiments/vit_table.py --train cifar10-train.zip --data cifar10-test.zip --keep FOLDER

Top-1 of ``zoo:vit-cifar10`` on the 2,000 test images of ``cards_vit.py``, with ranges from 32 images each: unit
Gaussian noise, made by PSAQ-ViT and by SMI (effort fast), and real training images, the upper bound. ``--keep`` holds
images; every cell is kept in ``experiments/results`` as it is found, and the same call continues. The table is of all
that are there.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

import torch
from cards_vit import Bench

import zsq
from zsq.allocator import keep_freed_memory
from zsq.core import Batch
from zsq.evaluate import Images, read_images

SOURCES = ("noise", "psaq-vit", "smi", "real")
PROTOCOLS = ("minmax-vit", "repq-vit")
BITS = ("w8a8", "w4a8", "w4a4")
RESULTS = Path(__file__).parent / "results"


def images(source: str, seed: int, bench: Bench, training: Images) -> Batch:
    """32 images of a kind, normalised (N, C, H, W)."""
    if source == "noise":
        return Batch(bench.noise(seed))
    if source == "real":
        drawn = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:32]
        few = Images(training.pixels[drawn], training.labels[drawn])
        return Batch(next(few.batches(bench.network.mean, bench.network.std))[0])
    return bench.made(zsq.METHODS[source].preset("fast"), seed)


def table(rows: dict[str, dict[str, float]], exact: float) -> None:
    """Means over the seeds, with the spread."""
    print(f"\nfloat {exact:.2f} %\n\n| protocol | images | {' | '.join(BITS).upper()} |\n|{'---|' * 5}")
    for protocol in PROTOCOLS:
        for source in SOURCES:
            cells = []
            for bits in BITS:
                found = [top1 for key, top1 in rows[f"{protocol} {source} {bits}"].items() if key != "seconds"]
                spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
                cells.append(f"{fmean(found):.2f}{spread}" if found else "-")
            print(f"| `{protocol}` | {source} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    network = zsq.load_network("zoo:vit-cifar10")
    bench = Bench(network, read_images(args.data, network.input_shape), [0], args.keep)
    exact = zsq.evaluate.evaluate(network.module, bench.test, mean=network.mean, std=network.std).top1
    training = read_images(args.train, network.input_shape)
    path = RESULTS / "vit-cifar10-images.json"
    rows: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for seed in args.seeds:
        for source in SOURCES:
            cells = [(protocol, bits) for protocol in PROTOCOLS for bits in BITS]
            cells = [(p, b) for p, b in cells if str(seed) not in rows.get(f"{p} {source} {b}", {})]
            if not cells:
                continue
            batch = images(source, seed, bench, training)
            bench.seeds = [seed]
            for protocol, bits in cells:
                recipe = zsq.resolve("psaq-vit", effort="fast", protocol=protocol)
                top1 = bench.top1(recipe, bits, [batch])
                rows.setdefault(f"{protocol} {source} {bits}", {})[str(seed)] = round(top1, 2)
                print(f"{source}, seed {seed}, {protocol}, {bits}: {top1:.2f}", flush=True)
                path.write_text(json.dumps(rows, indent=1) + "\n")
    table(rows, exact)


if __name__ == "__main__":
    main()
