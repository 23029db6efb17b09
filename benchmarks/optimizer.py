"""An optimiser step on the 53.8M-parameter model: min-trust LAMB beside torch's Adam.

python benchmarks/optimizer.py
"""

import torch
from omegaconf import OmegaConf
from timing import arguments, compare, describe_machine

from fairseq_sha.models.sha_rnn import SHARNNConfig, SHARNNDecoder
from fairseq_sha.ops.oracles import min_trust_lamb_reference
from fairseq_sha.optim.min_trust_lamb import MinTrustLAMB


def parameters(dictionary, device):
    """Parameters of the paper's model with one head, and a gradient for each."""
    torch.manual_seed(1)
    decoder = SHARNNDecoder(OmegaConf.structured(SHARNNConfig()), dictionary)
    params = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in decoder.parameters()]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


class LoopOverTensors:
    """The definition, tensor by tensor."""

    def __init__(self, params):
        self.params = params
        self.state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]

    @torch.no_grad()
    def step(self):
        for i, p in enumerate(self.params):
            w, *self.state[i], _ = min_trust_lamb_reference(
                p.detach(), p.grad, *self.state[i], 2e-3, 0.9, 0.999, 1e-6, 0.0, 0.25
            )
            p.copy_(w)


def main(argv=None):
    args = arguments(__doc__).parse_args(argv)
    torch.set_num_threads(args.threads)
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    for i in range(205 - len(dictionary)):
        dictionary.add_symbol(str(i))
    params = parameters(dictionary, args.device)
    count = sum(p.numel() for p in params)
    print(f"{describe_machine(args.device)}; {count:,} parameters in {len(params)} tensors\n")
    optimizers = {
        "Adam, foreach": torch.optim.Adam(params, foreach=True),
        "Adam, fused": torch.optim.Adam(parameters(dictionary, args.device), fused=True),
        "min-trust LAMB": MinTrustLAMB(parameters(dictionary, args.device), min_trust=0.25),
        "min-trust LAMB, a loop over tensors": LoopOverTensors(parameters(dictionary, args.device)),
    }
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    compare(steps, args.repeats, baseline="Adam, foreach")


if __name__ == "__main__":
    main()
