"""Delete the CUDA libraries that PyTorch does not map on a machine without a GPU: for the image's CPU variant.

PyTorch's wheels link to some of them, so they can't go altogether; the others are opened on a GPU's first use.
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
    """Take a training step, delete what it has not mapped, take another one."""
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
