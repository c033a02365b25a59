"""Swap the attention of a trained vision transformer for a linear one: what it costs, and what fine-tuning repairs.

    python examples/replace_attention.py                                   # scikit-learn's digits, minutes on a CPU
    python examples/replace_attention.py --data cifar10 --img-size 32 --embed-dim 64 --depth 4

A small timm ViT is trained from scratch. For each mechanism a copy of it has its attention replaced, is tested,
fine-tuned and tested again; the ViT as it was is fine-tuned as long, for comparison. Needs timm and, for the digits,
scikit-learn: pip install 'cxv[baselines,train]'. docs/accelerate.md has what it printed.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cxv_kernels
from cxv.training import evaluate, load_data

SWAPS = {
    "softmax, as it was": None,
    "performer, ⌊D ln D⌋ features": {"mechanism": "performer", "eps": 0.0},
    "performer, 256 features": {"mechanism": "performer", "eps": 0.0, "num_features": 256},
    "nystrom, 16 landmarks": {"mechanism": "nystrom", "num_landmarks": 16},
    "linear, elu + 1": {"mechanism": "linear", "feature_map": "elu"},
    "linear, softmax": {"mechanism": "linear", "feature_map": "softmax"},
}


def fit(model: nn.Module, data, epochs: int, lr: float) -> None:
    """AdamW on batches of 64, the rate falling from ``lr`` by a cosine."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train)).split(64):
            optimizer.zero_grad()
            logits = model(data.train.images[rows] / 127.5 - 1)
            F.cross_entropy(logits, data.train.labels[rows]).backward()
            optimizer.step()
        schedule.step()


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Run it; gives the top-1 (per cent) after the swap and after fine-tuning, by what was swapped in."""
    parser = argparse.ArgumentParser(description="Swap a ViT's attention for a linear one.")
    parser.add_argument("--data", default="digits", help="digits, cifar10, cifar100 or folder, as in `cxv train`")
    parser.add_argument("--data-dir", help="where its files are")
    parser.add_argument("--img-size", type=int, default=16, help="side of the images in pixels")
    parser.add_argument("--patch-size", type=int, default=2, help="side of a token in pixels")
    parser.add_argument("--embed-dim", type=int, default=32, help="channels, a multiple of the 2 heads")
    parser.add_argument("--depth", type=int, default=2, help="layers")
    parser.add_argument("--epochs", type=int, default=40, help="of training from scratch")
    parser.add_argument("--finetune-epochs", type=int, default=8, help="after the swap")
    parser.add_argument("--limit-train", type=int, help="train on so many images")
    args = parser.parse_args(argv)

    data = load_data(args.data, args.data_dir, img_size=args.img_size, limit_train=args.limit_train)
    torch.manual_seed(0)
    trained = VisionTransformer(
        img_size=args.img_size,
        patch_size=args.patch_size,
        in_chans=data.in_chans,
        num_classes=len(data.classes),
        embed_dim=args.embed_dim,
        depth=args.depth,
        num_heads=2,
    )
    fit(trained, data, args.epochs, 2e-3)
    tokens = (args.img_size // args.patch_size) ** 2 + 1
    print(f"{args.data}: {len(data.train):,} training and {len(data.test):,} test images, {tokens} tokens\n")
    print(f"top-1 after {args.epochs} epochs from scratch: {evaluate(trained, data.test)[1]:.2f} %\n", flush=True)
    print(f"| attention | after the swap, % | {args.finetune_epochs} epochs later, % |\n|---|---:|---:|")
    results = {}
    for name, swap in SWAPS.items():
        model = copy.deepcopy(trained)
        if swap is not None:
            cxv_kernels.replace_attention(model, **swap)
        swapped = evaluate(model, data.test)[1]
        fit(model, data, args.finetune_epochs, 5e-4)
        results[name] = swapped, evaluate(model, data.test)[1]
        print(f"| {name} | {swapped:.2f} | {results[name][1]:.2f} |", flush=True)
    return results


if __name__ == "__main__":
    main()
