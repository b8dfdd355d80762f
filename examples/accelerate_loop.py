"""Factor Transfer in an Accelerate loop; ``accelerate launch`` runs it on many GPUs."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import loaders, network, train_classifier
from torch.optim import Adam

from ftfast import FactorTransfer, FeatureTap, Paraphraser, Translator

set_seed(0)
accelerator = Accelerator()
loader, test_loader = accelerator.prepare(*loaders())
# The teacher stays as it is, not prepared: what is frozen has no gradients to share.
teacher = train_classifier(network(32), device=accelerator.device)
teacher_map = FeatureTap(teacher, "features", features_only=True)


def train(title, loss_of, optimizer, epochs):
    losses = []
    for images, labels in (batch for _ in range(epochs) for batch in loader):
        loss = loss_of(images, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    losses = accelerator.reduce(torch.stack(losses), "mean")
    accelerator.print(f"{title} loss {losses[:10].mean():.4f} -> {losses[-10:].mean():.4f}")


def reconstruction(images, _):
    features = teacher_map(images)
    return F.mse_loss(prepared(features), features)


paraphraser = Paraphraser(32, rate=0.25)
prepared, optimizer = accelerator.prepare(paraphraser, Adam(paraphraser.parameters(), lr=3e-3))
train("paraphraser", reconstruction, optimizer, epochs=5)


def distillation(images, labels):
    logits, features = student(images)
    return F.cross_entropy(logits, labels) + head(features, teacher_map(images))


student, head = FeatureTap(network(8), "features"), FactorTransfer(paraphraser, Translator(8, 8), weight=125.0)
optimizer = Adam([*student.parameters(), *head.translator.parameters()], lr=3e-3)
student, head, optimizer = accelerator.prepare(student, head, optimizer)
train("student", distillation, optimizer, epochs=10)
hits = [accelerator.gather_for_metrics(student(images)[0].argmax(1) == labels) for images, labels in test_loader]
accelerator.print(f"student accuracy {torch.cat(hits).float().mean():.3f}")
