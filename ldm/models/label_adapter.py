"""Labels for a pre-trained diffusion model: the way to classifier-free guidance."""

from typing import Any, Literal

import torch
from torch import Tensor

from ldm.checkpoint import load_model, require_given
from ldm.diffusion.samplers import EpsFn
from ldm.errors import UserError
from ldm.models.diffusion import LatentDiffusion
from ldm.modules.ema import EMA


class LabelAdapter(LatentDiffusion):
    """A pre-trained diffusion model that learns labels from few labelled tiles.

    An embedding of the label is added to that of the time step. It starts at 0, where every
    prediction is the pre-trained one, and is trained with label dropout: a share of the images
    comes without label (-1), for which nothing is added. So one network predicts with and without
    a label, which is what classifier-free guidance needs (Ho & Salimans 2022).

    UNet, autoencoder, latent scale and noise schedule are the pre-trained model's.

    Args:
        pretrained: Diffusion checkpoint to start from.
        pretrained_ema: Start from its averaged weights.
        label_dropout: Share of the training images without label, in [0, 1).
        tune: "embedding" trains the label embedding alone, "all" the UNet with it.
        embedding_rate: Learning rate of the embedding, in multiples of the UNet's: it starts at 0
            beside weights that are nearly where they should be.
        loss_type: As for `LatentDiffusion`; None for the pre-trained model's. What the network
            predicts, and how losses are weighted, are the pre-trained model's.
        scheduler_config, use_ema, ema_decay, weight_decay, monitor: As for `LatentDiffusion`.
        diffusion: Parameters of `LatentDiffusion` that rebuild the model without `pretrained`, from
            its own checkpoint.
    """

    conditional = True

    def __init__(
        self,
        pretrained: str | None = None,
        pretrained_ema: bool = True,
        label_dropout: float = 0.1,
        tune: Literal["embedding", "all"] = "embedding",
        embedding_rate: float = 10.0,
        loss_type: Literal["l1", "l2"] | None = None,
        scheduler_config: dict | None = None,
        use_ema: bool = True,
        ema_decay: float = 0.999,
        weight_decay: float = 0.01,
        monitor: str | None = None,
        diffusion: dict | None = None,
    ):
        source = _pretrained(pretrained) if diffusion is None else None
        params = dict(diffusion or source.rebuild_config()["params"])
        if loss_type is not None:
            params["loss_type"] = loss_type
        # A model that is to be trained gets its average with its labels, in `use_classes`.
        params |= {"use_ema": use_ema and source is None, "ema_decay": ema_decay}
        super().__init__(
            **params, scheduler_config=scheduler_config, weight_decay=weight_decay, monitor=monitor
        )
        self.outputs = self.unet.num_classes
        self.label_dropout, self.tune = label_dropout, tune
        self.embedding_rate, self.use_ema = embedding_rate, use_ema
        if source is not None:
            self.unet.load_state_dict(source.network(pretrained_ema).state_dict())
            self.first_stage_model.load_state_dict(source.first_stage_model.state_dict())
            self.scale_factor.copy_(source.scale_factor)

    def use_classes(self, classes: list[str]) -> None:
        """Make the label embedding for these classes, and the average of the weights."""
        self.require_labels(classes, "a label adapter")
        self.unet.add_labels(len(classes))
        settings = {**self.unet_config["params"], "num_classes": len(classes)}
        self.unet_config = {**self.unet_config, "params": settings}
        if self.use_ema:
            self.ema = EMA(self.unet, self.ema_decay)
        self.unet.requires_grad_(self.tune == "all").label_emb.requires_grad_(True)

    def rebuild_config(self) -> dict[str, Any]:
        params = super().rebuild_config()["params"]
        average = {name: params.pop(name) for name in ("use_ema", "ema_decay")}
        return {
            "target": "ldm.models.label_adapter.LabelAdapter",
            "params": {"diffusion": params, **average},
        }

    def metrics(self) -> set[str]:
        return super().metrics() | {"val/label_gain"}

    def parameter_groups(self) -> list[dict[str, Any]]:
        embedding = self.unet.label_emb.weight
        others = [p for p in self.unet.parameters() if p is not embedding and p.requires_grad]
        groups = [{"params": [embedding], "lr": self.embedding_rate * self.learning_rate}]
        return [*groups, {"params": others}] if others else groups

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """The labels; in training -1 for the images whose label is dropped."""
        y = batch["label"]
        if not self.training:
            return y
        dropped = self.draw(torch.rand, (len(y),)) < self.label_dropout
        return torch.where(dropped, -1, y)

    def validation_losses(
        self, z_0: Tensor, t: Tensor, eps: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """Losses with the right label, and `val/label_gain`: by how much it lowers the loss.

        The gain is that of the averaged weights where there are any, at equal time steps and noise.
        """
        values = super().validation_losses(z_0, t, eps, y)
        with_label = values["val/loss_simple" if self.ema is None else "val/loss_simple_ema"]
        without_label = self.simple_loss(self.network(), z_0, t, eps).mean()
        return {**values, "val/label_gain": without_label - with_label}

    def preview_eps(self, count: int) -> EpsFn:
        """The classes in turn."""
        net, y = self.eps_model(), torch.arange(count, device=self.device) % len(self.classes)
        return lambda z_t, t: net(z_t, t, y)


def _pretrained(path: str | None) -> LatentDiffusion:
    """The unconditional model to start from."""
    require_given(path, "model.params.pretrained", "HISTO_DIFFUSION")
    source = load_model(path, "diffusion", what="model.params.pretrained")
    if source.conditional:
        raise UserError(
            f"model.params.pretrained: {path} is a label adapter already; give the diffusion model "
            "that it started from, or go on with `resume`"
        )
    return source
