"""The prompts that a loop bundle holds, see `edge_dit.contract.loop`."""

from __future__ import annotations

from dataclasses import dataclass

from edge_dit.pictures.captions import clean
from edge_dit.pictures.dataset import survey
from edge_dit.planning.job import Job


@dataclass(frozen=True)
class LoopPrompts:
    """Prompts to be encoded.

    Attributes:
        texts: of training pictures and paintings, each once.
        previews: numbers of those that are painted while training.
        caption: of pictures that have none of their own.
        negative: what paintings are guided away from; None for the family's own.
    """

    texts: list[str]
    previews: list[int]
    caption: str | None = None
    negative: str | None = None

    @property
    def all(self) -> list[str]:
        """Every text."""
        return self.texts + ([] if self.negative is None else [self.negative])


def loop_prompts(job: Job, captions: list[str] | None = None) -> LoopPrompts:
    """A job's prompts: its pictures' captions, `[data] prompt`, then `[export] prompts`. The latter
    are painted while training; without any, the first caption is.

    Args:
        job: from job.toml.
        captions: of its pictures; None to read them.

    Raises:
        BadInput: the folder of pictures cannot be read, or a picture has no caption.
    """
    if captions is None:
        captions = survey(job.data.images, job.data.recursive).prompts(job.data.prompt)
    caption = clean(job.data.prompt or "") or None
    painted = list(dict.fromkeys(clean(text) for text in job.export.prompts))
    known = [*captions, *([] if caption is None else [caption])]
    texts = list(dict.fromkeys([*known, *painted]))
    previews = [texts.index(text) for text in painted] or [0]
    return LoopPrompts(texts, previews, caption, job.export.negative_prompt)
