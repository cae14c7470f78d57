"""Deletes CUDA libraries that PyTorch does not use on machines without a GPU, for the CPU variant of the image.

PyTorch's wheels are linked to some of these libraries, so they can't all be removed. The others are loaded only
when a GPU is first used.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STEP = """
import torch, torch.distributed, torchvision
model = torchvision.models.vgg11(num_classes=2)
model(torch.rand(2, 3, 32, 32)).sum().backward()
torch.linalg.svd(torch.rand(4, 4))
"""


def main() -> None:
    """Run a training step, delete all libraries that it has not mapped, and run it again as a check."""
    exec(STEP)  # here, so that its libraries are in this process
    mapped = {
        line.split(maxsplit=5)[-1].strip()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/nvidia/" in line
    }
    import nvidia

    freed = 0
    for root in nvidia.__path__:
        for path in Path(root).rglob("*.so*"):
            if str(path) not in mapped:
                freed += path.stat().st_size
                path.unlink()
    print(f"kept {len(mapped)} CUDA libraries, deleted {freed / 1e6:,.0f} MB of others")
    subprocess.run([sys.executable, "-c", STEP], check=True)


if __name__ == "__main__":
    main()
