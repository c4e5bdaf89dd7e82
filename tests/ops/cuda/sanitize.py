"""Every CUDA kernel of the model once at small shapes, for compute-sanitizer (`make sanitize-gpu`).

With the argument `racecheck` the rings of the scans take their turns at mbarriers, which that tool
follows, instead of at named barriers.
"""

import sys

import torch

from visionmamba import VimConfig, optimize
from visionmamba.models.mixer import BidirectionalMixer
from visionmamba.ops.cuda import build, driver

SHAPES = [(2, 75), (1, 300), (1, 9)]  # batch and tokens: rings, chunks, less than a ring


def train_mixer(batch: int, length: int) -> None:
    mixer = BidirectionalMixer(192, dt_rank=12).cuda()
    hidden = torch.randn(batch, length, 192, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        out = mixer(hidden.requires_grad_())
    torch.autograd.backward(out.float().sum())


def run_model() -> None:
    config = VimConfig(image_size=48, patch_size=16, d_model=192, depth=2, num_classes=5)
    model = config.build().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(torch.randn(2, 3, 48, 48, device="cuda"))
    torch.autograd.backward(logits.float().sum())
    optimized = optimize(model, dtype=torch.bfloat16, cuda_graphs=False)
    for batch, height, width in ((2, 48, 48), (1, 160, 160), (1, 1024, 1040)):
        optimized(torch.randn(batch, 3, height, width, device="cuda"))


def main() -> None:
    if sys.argv[1:] == ["racecheck"]:
        build.OPTIONS = (*build.OPTIONS, "--define-macro=TURNS_BY_MBARRIER")
    torch.manual_seed(0)
    for shape in SHAPES:
        train_mixer(*shape)
    run_model()
    torch.cuda.synchronize()
    # As if the GPU were full: a warp for each sequence instead of a ring of four.
    driver.kernels("scan", torch.device("cuda", 0)).num_multiprocessors = 1
    for shape in SHAPES:
        train_mixer(*shape)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
