"""Factor Transfer whose whole step a GPU replays as one CUDA graph; on a CPU the same step runs as it is."""

import torch
import torch.nn.functional as F
from digits import loaders, network, train_classifier
from torch import Tensor

from ftfast import FactorTransfer, FeatureTap, FrozenTeacher, Translator, capture_step, train_paraphraser

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
loader, test_loader = loaders()

teacher = FrozenTeacher(train_classifier(network(32), device=device), "features")
paraphraser = train_paraphraser(teacher, loader, rate=0.25)
head = FactorTransfer(paraphraser, Translator(8, paraphraser.factor_channels), weight=125.0).to(device)
student = FeatureTap(network(8), "features").to(device)
parameters = [*student.parameters(), *head.translator.parameters()]
optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, fused=True)


def learn(images: Tensor, labels: Tensor) -> Tensor:
    """One whole step, from a batch on the device to its loss there; nothing in it waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    logits, features = student(images)
    loss = F.cross_entropy(logits, labels) + head(features, teacher(images).features)
    loss.backward()
    optimizer.step()
    return loss.detach()


step = capture_step(learn, optimizers=optimizer, frozen=[teacher, paraphraser])
batches, losses = [batch for _ in range(10) for batch in loader], []
for number, (images, labels) in enumerate(batches):
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * (1 - number / len(batches))  # a number, which reaches the graph as a tensor
    losses.append(step(images.to(device), labels.to(device)).clone())  # the next step writes to it

print(f"the step runs {step.explain()}")
print(f"student loss {torch.stack(losses[:10]).mean():.4f} -> {torch.stack(losses[-10:]).mean():.4f}")
hits = [student(images.to(device))[0].argmax(1).cpu() == labels for images, labels in test_loader]
print(f"student accuracy {torch.cat(hits).float().mean():.3f}")
