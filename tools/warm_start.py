#!/usr/bin/env python3
"""Write first weights for a model from another with a different attention, for ``cxv train --init``:

    python tools/warm_start.py cpv-5/4 cltv-5/4 first.safetensors
    cxv train --model cpv-5/4 --init first.safetensors …

Stem, convolutions, norms, MLPs, the classifier and the maps of q, k and v are taken. What the other model lacks is
random: the projection of CPV, the residual convolution of CNV. CNV drops the biases of q, k and v.
"""

import argparse

import torch

import cxv
from cxv.training import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of the new model")
    parser.add_argument("source", help="a pretrained model, a run or a file")
    parser.add_argument("output", help="the .safetensors file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the random values (default: 1)")
    args = parser.parse_args()
    source, saved = load_model(args.source)
    torch.manual_seed(args.seed)
    model = cxv.create_model(args.model, **saved["model_kwargs"])
    theirs, weights, random = source.state_dict(), model.state_dict(), []
    for name, values in weights.items():
        if name.endswith(".qkv.weight") and name not in theirs:
            weights[name] = torch.cat([theirs[name.replace("qkv", part)].flatten(1) for part in "qkv"])
        elif name in theirs and theirs[name].numel() == values.numel():
            weights[name] = theirs[name].view_as(values)  # of a 1×1 convolution, or of a linear layer
        else:
            random.append(name)
    model.load_state_dict(weights)
    cxv.save_safetensors(model, args.output, model_name=args.model, classes=saved["classes"])
    print(f"{args.output}: random are {', '.join(random) or 'none'}")


if __name__ == "__main__":
    main()
