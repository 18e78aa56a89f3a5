"""The networks have as many parameters as their papers' implementations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import (
    DSCNN,
    EfficientNetLite0,
    LeNet5,
    MLPMixer,
    MobileNetV1,
    MobileNetV2,
    ResNet8,
    ResNet18,
    ResNet20,
    ResNet50,
    RowLSTM,
    VisionTransformer,
)


# LeNet-5: 61,470 weights and 214 biases. ResNet-20 with projections as shortcuts.
@pytest.mark.parametrize(
    ("model", "image", "count"),
    [
        (EfficientNetLite0(), (224, 224, 3), 4_652_008),
        (LeNet5(), (32, 32, 1), 61_684),
        (ResNet8(), (32, 32, 3), 78_186),
        (MobileNetV1(), (96, 96, 3), 216_322),
        (DSCNN(), (49, 10, 1), 22_604),
        (ResNet20(), (32, 32, 3), 272_474),
        (ResNet18(cifar_stem=False, num_classes=1000), (224, 224, 3), 11_689_512),
        (ResNet50(cifar_stem=False, num_classes=1000), (224, 224, 3), 25_557_032),
        (VisionTransformer(), (224, 224, 3), 22_050_664),
        (MLPMixer(), (224, 224, 3), 18_528_264),
        (RowLSTM(), (32, 32, 1), 4 * (4 * 32 + 64 + 1) * 64 + 65 * 10),
        (MobileNetV2(cifar_stem=False, num_classes=1000), (224, 224, 3), 3_504_872),
    ],
)
def test_number_of_parameters(model: nn.Module, image: tuple[int, ...], count: int) -> None:
    images = jnp.zeros((1, *image))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(variables["params"])) == count
    assert jax.eval_shape(model.apply, variables, images).shape == (1, model.num_classes)


def test_a_shortcut_has_parameters_only_where_shapes_differ() -> None:
    params = jax.eval_shape(ResNet50().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    blocks = [f"BottleneckBlock_{i}" for i in range(16)]
    assert set(params) == {"conv_stem", "norm_stem", "Dense_0", *blocks}
    projected = [i for i, block in enumerate(blocks) if "conv_shortcut" in params[block]]
    assert projected == [0, 3, 7, 13]
    inside = {f"{kind}_{i}" for kind in ("Conv", "BatchNorm") for i in range(3)}
    assert set(params[blocks[1]]) == inside
    assert set(params[blocks[0]]) == inside | {"conv_shortcut", "norm_shortcut"}
