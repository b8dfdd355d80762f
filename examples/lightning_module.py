"""Factor Transfer as LightningModules, one for the paraphraser's phase and one for the student's."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from digits import loaders, network, train_classifier
from torch import nn

from ftfast import FactorTransfer, FeatureTap, Paraphraser, Translator


class Phase(pl.LightningModule):
    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=3e-3)

    def training_step(self, batch):
        loss = self.loss(*batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        print(f"{type(self).__name__} epoch {self.current_epoch} loss {self.trainer.callback_metrics['loss']:.4f}")


class ParaphraserPhase(Phase):
    def __init__(self, teacher_map: nn.Module, channels: int):
        super().__init__()
        self.teacher_map, self.paraphraser = teacher_map, Paraphraser(channels, rate=0.25)

    def loss(self, images, labels):
        features = self.teacher_map(images)
        return F.mse_loss(self.paraphraser(features), features)


class Distillation(Phase):
    def __init__(self, student: nn.Module, channels: int, teacher_map: nn.Module, paraphraser: Paraphraser):
        super().__init__()
        self.student, self.teacher_map = FeatureTap(student, "features"), teacher_map
        self.head = FactorTransfer(paraphraser, Translator(channels, paraphraser.factor_channels), weight=125.0)

    def loss(self, images, labels):
        logits, features = self.student(images)
        return F.cross_entropy(logits, labels) + self.head(features, self.teacher_map(images))

    def test_step(self, batch):
        self.log("accuracy", (self.student(batch[0])[0].argmax(1) == batch[1]).float().mean())


if __name__ == "__main__":
    pl.seed_everything(0)
    loader, test_loader = loaders()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    teacher_map = FeatureTap(train_classifier(network(32)), "features", features_only=True)
    first = ParaphraserPhase(teacher_map, 32)
    pl.Trainer(max_epochs=5, **quiet).fit(first, loader)
    second = Distillation(network(8), 8, teacher_map, first.paraphraser)
    trainer = pl.Trainer(max_epochs=10, **quiet)
    trainer.fit(second, loader)
    print(f"student accuracy {trainer.test(second, test_loader, verbose=False)[0]['accuracy']:.3f}")
