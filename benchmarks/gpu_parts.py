"""What benchmarks/gpu.py needs besides its clock: sizes, the device's own speed, and FLOPs of
a training step.
"""

import platform
import statistics
import time
from dataclasses import dataclass, field

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from sparsecut.profiling.sizes import read_backbone_config


@dataclass
class BenchedPlan:
    """A plan's model with what was measured of it, by section, and why a section is missing."""

    model: torch.nn.Module
    results: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def exclusive_bytes(self) -> int:
        """Bytes that only this plan has on the device: its fusion and the moments of AdamW."""
        tensors = list(self.model.fusion.parameters())
        for state in self.optimizer.state.values() if self.optimizer else ():
            tensors += [x for x in state.values() if torch.is_tensor(x)]
        return sum(x.numel() * x.element_size() for x in tensors)


def step_flops(counted, language, parts: tuple[str, ...]) -> int:
    """FLOPs of one row's training step: the encoder forward only, trained weights three times,
    frozen ones passed twice.
    """
    head = (
        2 * language.hidden_size * language.vocab_size * (counted.num_prompt_tokens - 1)
    )  # counted at one position
    decoder = (3 if "language" in parts else 2) * (counted.language_prefill_flops + head)
    return (
        counted.encoder_coarse_flops
        + counted.encoder_fine_flops
        + 3 * counted.fusion_flops
        + decoder
    )


def matmul_rate(device: torch.device, tiny: bool) -> float:
    """FLOPs per second of a square matrix product in bfloat16: the best median over some
    sizes.
    """
    rates = []
    for side in (128,) if tiny else (4096, 8192, 12288):
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        times = []
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) / 4)
        rates.append(2 * side**3 / statistics.median(times[5:]))
    return max(rates)


def machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
    }


def size_of(config) -> str:
    """Depth and width in words."""
    return f"{config.num_hidden_layers} layers x {config.hidden_size}"


def configs(tiny: bool):
    """Configurations of encoder and language model: CLIP-L/336 and a 7B Llama, or tiny ones as
    deep.
    """
    if not tiny:
        return read_backbone_config("clip-l-336", "vision"), read_backbone_config(
            "llama-7b", "language"
        )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, num_hidden_layers=24, image_size=28, patch_size=14)
    return vision, LlamaConfig(**small, num_hidden_layers=32, vocab_size=64)
