"""Classify a PNG with an exported file, by onnxruntime and numpy alone: python classify.py FILE.onnx IMAGE.png."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime


def read_png(path: str) -> np.ndarray:
    """The pixels (H, W, C) of a PNG of 8 bits a channel, without palette and not interlaced."""
    data, at, parts = Path(path).read_bytes(), 8, {b"IHDR": b"", b"IDAT": b""}
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        parts[kind] = parts.get(kind, b"") + data[at + 8 : at + 8 + size]
        at += size + 12
    width, height, (depth, colour, _, _, interlaced) = *np.frombuffer(parts[b"IHDR"], ">u4", 2), parts[b"IHDR"][8:]
    if depth != 8 or colour == 3 or interlaced:
        sys.exit(f"{path}: only PNGs of 8 bits a channel, without palette and not interlaced are read here")
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1).astype(int)
    pixels = np.zeros((height + 1, width + 1, channels), int)  # behind a border of zeros, which the filters read
    for y, x in np.ndindex(height, width):
        near = np.stack([pixels[y + 1, x], pixels[y, x + 1], pixels[y, x]])  # left, above, both
        paeth = np.take_along_axis(near, abs(near[0] + near[1] - near[2] - near).argmin(0)[None], 0)[0]
        guess = (0, near[0], near[1], (near[0] + near[1]) // 2, paeth)[rows[y, 0]]
        pixels[y + 1, x + 1] = (rows[y, 1 + x * channels : 1 + (x + 1) * channels] + guess) % 256
    return pixels[1:, 1:, : channels - 1 + channels % 2]  # without alpha


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items() if text[0] in "[{"}
image = ((read_png(sys.argv[2]) / 255 - about["zsq.mean"]) / about["zsq.std"]).astype(np.float32).transpose(2, 0, 1)
logits = session.run(None, {"images": image[None]})[0][0]
shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for label in shares.argsort()[::-1][:3]:
    print(f"{100 * shares[label]:5.1f} %  {about.get('zsq.labels', range(len(shares)))[label]}")
