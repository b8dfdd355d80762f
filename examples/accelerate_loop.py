"""Factor Transfer in an Accelerate loop; ``accelerate launch`` runs it on many GPUs."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import loaders, network, train_classifier
from torch.optim import Adam

from ftfast import FactorTransfer, FeatureTap, FrozenTeacher, Translator, train_paraphraser

set_seed(0)
accelerator = Accelerator()
loader, test_loader = loaders()
# Teacher and paraphraser are made before the loaders are shared out, so that every process has the same ones; they are
# not prepared: what is frozen has no gradients to share.
teacher = FrozenTeacher(train_classifier(network(32), device=accelerator.device), "features")
paraphraser = train_paraphraser(teacher, loader, rate=0.25, progress=accelerator.is_main_process)

student, head = FeatureTap(network(8), "features"), FactorTransfer(paraphraser, Translator(8, 8), weight=125.0)
optimizer = Adam([*student.parameters(), *head.translator.parameters()], lr=3e-3)
student, head, optimizer, loader, test_loader = accelerator.prepare(student, head, optimizer, loader, test_loader)

losses = []
for images, labels in (batch for _ in range(10) for batch in loader):
    logits, features = student(images)
    loss = F.cross_entropy(logits, labels) + head(features, teacher(images).features)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    losses.append(loss.detach())

losses = accelerator.reduce(torch.stack(losses), "mean")
accelerator.print(f"student loss {losses[:10].mean():.4f} -> {losses[-10:].mean():.4f}")
hits = [accelerator.gather_for_metrics(student(images)[0].argmax(1) == labels) for images, labels in test_loader]
accelerator.print(f"student accuracy {torch.cat(hits).float().mean():.3f}")
