"""Factor Transfer as a task of timm's: its optimiser, schedule, moving average and checkpoints, two of its models."""

import tempfile
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, accuracy
from torch.utils.data import DataLoader, TensorDataset

from ftfast.compat.timm import FactorTransferTask

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
colours = torch.arange(256) % 4  # pictures of noise in four tints, which are their labels
pictures = 0.5 * torch.randn(256, 3, 64, 64) + torch.randn(4, 3, 1, 1)[colours]
loader = DataLoader(TensorDataset(pictures, colours), batch_size=32, shuffle=True)

student, teacher = (timm.create_model("test_resnet", num_classes=4).to(device) for _ in range(2))
# Yours would be trained, or a name: FactorTransferTask(student, "resnet50", ...) takes timm's weights for it.
task = FactorTransferTask(student, teacher, input_size=(3, 64, 64), device=device)
task.train_paraphraser(loader)

task.setup_ema(decay=0.9)  # before task.compile(), which comes before task.prepare_distributed()
optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=2e-3, weight_decay=0.02)
scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=4)
with tempfile.TemporaryDirectory() as folder:
    saver = CheckpointSaver(task.get_eval_model(), optimizer, task=task, checkpoint_dir=folder)
    for epoch in range(epochs):
        task.train()
        losses = []
        for images, labels in loader:
            result = task(images.to(device), labels.to(device))
            optimizer.zero_grad()
            result["loss"].backward()
            torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
            optimizer.step()
            task.update_ema()
            losses.append(result["loss"].detach())
        with torch.no_grad():
            top1 = accuracy(task.get_eval_model().eval()(pictures.to(device)), colours.to(device))[0]
        scheduler.step(epoch + 1, top1)
        saver.save_checkpoint(epoch, metric=float(top1))
        print(f"student epoch {epoch} loss {torch.stack(losses).mean():.4f}")
    print("in the checkpoint:", ", ".join(torch.load(Path(folder) / "last.pth.tar", weights_only=True)))
print(f"student accuracy {float(top1) / 100:.3f}")
