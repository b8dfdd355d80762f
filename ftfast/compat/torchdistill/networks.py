"""torchdistill's paraphraser and translator (``models/wrapper.py``)."""

from torch import Tensor, nn

from ftfast.compat.networks import (
    NEGATIVE_SLOPE,
    ConvolutionSequence,
    PeerNetwork,
    check_channels,
    truncated_channels,
)


class Paraphraser4FactorTransfer(PeerNetwork):
    """Encoder and decoder of the teacher's features.

    Args:
        k: the paraphrase rate; the factor has ``int(num_input_channels * k)`` channels.
        num_input_channels: the channels of the teacher's features.
        kernel_size, stride, padding: of every convolution; all but the default 3, 1 and 1 run on torch's.
        uses_bn: batch norm after every convolution.
        uses_decoder: whether :meth:`forward` gives reconstructions or factors; an attribute that may be changed.

    Keys: ``encoder.{0,2,4}.*`` and ``decoder.{0,2,4}.*``; with batch norm ``{0,3,6}`` and ``{1,4,7}``.
    """

    def __init__(
        self,
        k: float,
        num_input_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        uses_bn: bool = True,
        uses_decoder: bool = True,
    ) -> None:
        super().__init__()
        m, mk = num_input_channels, truncated_channels("num_input_channels", num_input_channels, k)
        options = (kernel_size, stride, padding, uses_bn)
        self.paraphrase_rate = k
        self.encoder: nn.Sequential = ConvolutionSequence(
            *self.make_enc_modules(m, m, *options),
            *self.make_enc_modules(m, mk, *options),
            *self.make_enc_modules(mk, mk, *options),
        )
        self.decoder: nn.Sequential = ConvolutionSequence(
            *self.make_dec_modules(mk, mk, *options),
            *self.make_dec_modules(mk, m, *options),
            *self.make_dec_modules(m, m, *options),
        )
        self.uses_decoder = uses_decoder

    def forward(self, z: Tensor) -> Tensor:
        """Features ``[N, num_input_channels, H, W]`` to their reconstruction, or to factors without the decoder."""
        factor = self.encoder(z)
        return self.decoder(factor) if self.uses_decoder else factor

    @staticmethod
    def make_tail_modules(num_output_channels: int, uses_bn: bool) -> list[nn.Module]:
        """What stands behind a convolution."""
        norm: list[nn.Module] = [nn.BatchNorm2d(num_output_channels)] if uses_bn else []
        return [*norm, nn.LeakyReLU(NEGATIVE_SLOPE)]

    @classmethod
    def make_enc_modules(
        cls,
        num_input_channels: int,
        num_output_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        uses_bn: bool,
    ) -> list[nn.Module]:
        """A convolution of an encoder or a translator and what stands behind it."""
        convolution = nn.Conv2d(num_input_channels, num_output_channels, kernel_size, stride=stride, padding=padding)
        return [convolution, *cls.make_tail_modules(num_output_channels, uses_bn)]

    @classmethod
    def make_dec_modules(
        cls,
        num_input_channels: int,
        num_output_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        uses_bn: bool,
    ) -> list[nn.Module]:
        """A transposed convolution of a decoder and what stands behind it."""
        convolution = nn.ConvTranspose2d(
            num_input_channels, num_output_channels, kernel_size, stride=stride, padding=padding
        )
        return [convolution, *cls.make_tail_modules(num_output_channels, uses_bn)]


class Translator4FactorTransfer(PeerNetwork, ConvolutionSequence):
    """Student features to factors; an ``nn.Sequential``.

    Args:
        num_input_channels: the channels of the student's features.
        num_output_channels: the factor's channels.
        kernel_size, stride, padding: of every convolution; all but the default 3, 1 and 1 run on torch's.
        uses_bn: batch norm after every convolution.

    Keys: ``{0,2,4}.*``; with batch norm ``{0,3,6}.*`` and ``{1,4,7}.*``.
    """

    def __init__(
        self,
        num_input_channels: int,
        num_output_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        uses_bn: bool = True,
    ) -> None:
        check_channels(num_input_channels=num_input_channels, num_output_channels=num_output_channels)
        options = (kernel_size, stride, padding, uses_bn)
        make = Paraphraser4FactorTransfer.make_enc_modules
        super().__init__(
            *make(num_input_channels, num_input_channels, *options),
            *make(num_input_channels, num_output_channels, *options),
            *make(num_output_channels, num_output_channels, *options),
        )
