"""Factor Transfer in plain PyTorch: a teacher's paraphraser is trained, then a student with its translator."""

import torch
import torch.nn.functional as F
from digits import loaders, network, train_classifier

from ftfast import FactorTransfer, FeatureTap, Paraphraser, Translator

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
loader, test_loader = loaders()
teacher = train_classifier(network(32), device=device)
teacher_map = FeatureTap(teacher, "features", features_only=True)


def train(title, loss_of, parameters, epochs):
    optimizer, losses = torch.optim.Adam(parameters, lr=3e-3), []
    for images, labels in (batch for _ in range(epochs) for batch in loader):
        loss = loss_of(images.to(device), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    print(f"{title} loss {torch.stack(losses[:10]).mean():.4f} -> {torch.stack(losses[-10:]).mean():.4f}")


paraphraser = Paraphraser(32, rate=0.25).to(device)


def reconstruction(images, _):
    features = teacher_map(images)
    return F.mse_loss(paraphraser(features), features)


train("paraphraser", reconstruction, paraphraser.parameters(), epochs=5)

student = FeatureTap(network(8), "features").to(device)
head = FactorTransfer(paraphraser, Translator(8, paraphraser.factor_channels), weight=125.0).to(device)


def distillation(images, labels):
    logits, features = student(images)
    return F.cross_entropy(logits, labels) + head(features, teacher_map(images))


train("student", distillation, [*student.parameters(), *head.translator.parameters()], epochs=10)
hits = [student(images.to(device))[0].argmax(1).cpu() == labels for images, labels in test_loader]
print(f"student accuracy {torch.cat(hits).float().mean():.3f}")
