"""The kinds of model: one file each, with its config section, its network, and the class that its user holds."""

from __future__ import annotations

from cosmic_ray.registry.kinds.encoder import Encoder
from cosmic_ray.registry.kinds.img2seq import Img2Seq
from cosmic_ray.registry.kinds.seq2img import Seq2Img
from cosmic_ray.registry.kinds.transcriptome_encoder import TranscriptomeEncoder
from cosmic_ray.registry.model import Model

KINDS: dict[str, type[Model]] = {
    "encoder": Encoder,
    "transcriptome-encoder": TranscriptomeEncoder,
    "seq2img": Seq2Img,
    "img2seq": Img2Seq,
}
"""Kind -> what `load_model` makes of a model folder of that kind."""
