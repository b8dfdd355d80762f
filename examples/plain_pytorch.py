"""Factor Transfer in plain PyTorch: a teacher's paraphraser is trained, then a student with its translator."""

import torch
import torch.nn.functional as F
from digits import loaders, network, train_classifier

from ftfast import FactorTransfer, FeatureTap, FrozenTeacher, Translator, train_paraphraser

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
loader, test_loader = loaders()

teacher = FrozenTeacher(train_classifier(network(32), device=device), "features")
paraphraser = train_paraphraser(teacher, loader, rate=0.25)
head = FactorTransfer(paraphraser, Translator(8, paraphraser.factor_channels), weight=125.0).to(device)
student = FeatureTap(network(8), "features").to(device)

optimizer, losses = torch.optim.Adam([*student.parameters(), *head.translator.parameters()], lr=3e-3), []
for images, labels in (batch for _ in range(10) for batch in loader):
    images, labels = images.to(device), labels.to(device)
    logits, features = student(images)
    loss = F.cross_entropy(logits, labels) + head(features, teacher(images).features)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())

print(f"student loss {torch.stack(losses[:10]).mean():.4f} -> {torch.stack(losses[-10:]).mean():.4f}")
hits = [student(images.to(device))[0].argmax(1).cpu() == labels for images, labels in test_loader]
print(f"student accuracy {torch.cat(hits).float().mean():.3f}")
