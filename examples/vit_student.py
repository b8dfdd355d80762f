"""ftfast.distill in one call: a convolutional teacher, and vision transformers as students, which learn with AdamW."""

import statistics

import torch
from digits import loaders, network, train_classifier
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Subset

import ftfast

STUDENT_IMAGES, EPOCHS, SEEDS = 300, 40, 3


def transformer(seed: int) -> nn.Module:
    """8x8 images in 4x4 patches' tokens; the classifier reads their mean."""
    torch.manual_seed(seed)
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "global_pool": "avg"}
    return VisionTransformer(**size, embed_dim=32, depth=2, num_heads=2)


torch.manual_seed(0)
train, test = loaders()
teacher = train_classifier(network(32))
paraphraser = ftfast.train_paraphraser(teacher, train, "features", progress=False)
few = DataLoader(Subset(train.dataset, range(STUDENT_IMAGES)), batch_size=32, shuffle=True)
test = DataLoader(test.dataset, batch_size=len(test.dataset))

accuracies: dict[str, list[float]] = {"none": [], "ft": []}
for method, reached in accuracies.items():
    for seed in range(SEEDS):
        found = ftfast.distill(
            teacher,
            transformer(seed),
            few,
            test,
            teacher_layer="features",
            student_layer="blocks",  # tokens, compared as a map
            method=method,
            paraphraser=paraphraser,
            epochs=EPOCHS,
            optimizer="adamw",
            learning_rate=5e-3,
            warm_up=4,
            dtype=torch.float32,  # for networks this small, casts cost more than they save
            seed=seed,
            progress=False,
        )
        reached.append(found.accuracy or 0.0)
    losses = [sum(found.history[epoch].losses.values()) for epoch in (0, -1)]
    print(f"{method} loss {losses[0]:.4f} -> {losses[1]:.4f}")
    print(f"{method}: {statistics.mean(reached):.2f} ± {statistics.stdev(reached):.2f} % of the test images")

gains = [ft - none for none, ft in zip(*accuracies.values(), strict=True)]
print(f"gain of ft over none, by seed: {', '.join(f'{gain:+.2f}' for gain in gains)}")
print(f"student accuracy {statistics.mean(accuracies['ft']) / 100:.3f}")
