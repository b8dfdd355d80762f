"""Factor Transfer from one of timm's vision transformers to a smaller one: the patches' tokens are the feature map."""

import torch
import torch.nn.functional as F
from digits import loaders, train_classifier
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ftfast import FactorTransfer, FeatureTap, Translator, train_paraphraser

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
loader, test_loader = loaders()


def transformer(width: int, depth: int) -> nn.Module:
    # The classifier reads the patches' tokens: where it reads the class token alone, they may be alike for all images.
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "global_pool": "avg"}
    return VisionTransformer(**size, embed_dim=width, depth=depth, num_heads=width // 16).to(device)


def as_map(tokens: Tensor) -> Tensor:
    """Tokens ``[N, 1 + 4 * 4, C]`` without the class token, as a map ``[N, C, 4, 4]``; no copy."""
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


teacher = train_classifier(transformer(64, depth=3), device=device)
teacher_tokens, student = (
    FeatureTap(teacher, "blocks", features_only=True),
    FeatureTap(transformer(32, depth=2), "blocks"),
)
paraphraser = train_paraphraser(
    torch.cat([as_map(teacher_tokens(images.to(device))) for images, _ in loader]), rate=0.25
)
head = FactorTransfer(paraphraser, Translator(32, paraphraser.factor_channels), weight=177.0).to(device)

optimizer, losses = torch.optim.Adam([*student.parameters(), *head.translator.parameters()], lr=2e-3), []
for images, labels in (batch for _ in range(30) for batch in loader):
    images, labels = images.to(device), labels.to(device)
    logits, tokens = student(images)
    loss = F.cross_entropy(logits, labels) + head(as_map(tokens), as_map(teacher_tokens(images)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())

print(f"student loss {torch.stack(losses[:10]).mean():.4f} -> {torch.stack(losses[-10:]).mean():.4f}")
hits = [student.eval()(images.to(device))[0].argmax(1).cpu() == labels for images, labels in test_loader]
print(f"student accuracy {torch.cat(hits).float().mean():.3f}")
