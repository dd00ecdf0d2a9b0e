"""The main job on handwritten digits, as ``make demo`` runs it: each command as it would be typed, then a table."""

import sys

from zsq.api import read_metrics
from zsq.cli import main

RUNS = "runs/demo"
METHODS = ("nearest", "genie")
SETTINGS = "--bits w4a4 --protocol ptq-8bit-ends --effort fast --data digits"  # one protocol, or it compares nothing


def run(command: str) -> None:
    print(f"$ zsq {command}", flush=True)
    if code := main(command.split()):
        sys.exit(code)
    print(flush=True)


run("evaluate zoo:digits-resnet --data digits")
for method in METHODS:
    run(f"quantize zoo:digits-resnet --method {method} {SETTINGS} --out {RUNS}/{method}")

print("digits-resnet   bits    top-1     drop")
for method in METHODS:
    metrics = read_metrics(f"{RUNS}/{method}")
    accuracy = metrics["accuracy"]
    if method == METHODS[0]:
        print(f"{'float':14}  W32A32  {accuracy['float']['top1']:5.2f} %")
    top1, drop = accuracy["quantized"]["top1"], accuracy["drop"]
    print(f"{method:14}  {metrics['bits']:6}  {top1:5.2f} %  {drop:5.2f}")
