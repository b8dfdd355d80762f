"""Factor Transfer as a LightningModule; the teacher's paraphraser is trained beforehand."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from digits import loaders, network, train_classifier
from torch import nn

from ftfast import FactorTransfer, FeatureTap, FrozenTeacher, Paraphraser, Translator, train_paraphraser


class Distillation(pl.LightningModule):
    def __init__(self, student: nn.Module, channels: int, teacher: FrozenTeacher, paraphraser: Paraphraser):
        super().__init__()
        self.student, self.teacher = FeatureTap(student, "features"), teacher
        self.head = FactorTransfer(paraphraser, Translator(channels, paraphraser.factor_channels), weight=125.0)

    def configure_optimizers(self):
        return torch.optim.Adam([*self.student.parameters(), *self.head.translator.parameters()], lr=3e-3)

    def training_step(self, batch):
        images, labels = batch
        logits, features = self.student(images)
        loss = F.cross_entropy(logits, labels) + self.head(features, self.teacher(images).features)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        print(f"student epoch {self.current_epoch} loss {self.trainer.callback_metrics['loss']:.4f}")

    def test_step(self, batch):
        self.log("accuracy", (self.student(batch[0])[0].argmax(1) == batch[1]).float().mean())


if __name__ == "__main__":
    pl.seed_everything(0)
    loader, test_loader = loaders()
    # Frozen at its first images, where its model then is: Lightning moves a FrozenTeacher to no other device.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = FrozenTeacher(train_classifier(network(32), device=device), "features")
    module = Distillation(network(8), 8, teacher, train_paraphraser(teacher, loader, rate=0.25))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=10, **quiet)
    trainer.fit(module, loader)
    print(f"student accuracy {trainer.test(module, test_loader, verbose=False)[0]['accuracy']:.3f}")
