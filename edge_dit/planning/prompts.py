"""The prompts that a loop bundle holds, see `edge_dit.contract.loop`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_dit.contract.loop import DrawFacts
from edge_dit.pictures.captions import clean
from edge_dit.pictures.dataset import captions_of, survey
from edge_dit.planning.job import Job


@dataclass(frozen=True)
class LoopPrompts:
    """Prompts to be encoded.

    Attributes:
        texts: of training pictures and paintings, each once.
        previews: numbers of those that are painted while training.
        caption: of pictures that have none of their own.
        negative: what paintings are guided away from; None for the family's own.
        draws: what becomes of captions.
    """

    texts: list[str]
    previews: list[int]
    caption: str | None = None
    negative: str | None = None
    draws: DrawFacts = field(default_factory=DrawFacts)

    @property
    def all(self) -> list[str]:
        """Every text."""
        return self.texts + ([] if self.negative is None else [self.negative])


def job_prompts(job: Job, captions: Sequence[Sequence[str]]) -> list[str]:
    """What the draws of a job are prompted with: its pictures' captions, the empty prompt where
    they are dropped, the prior's.

    Args:
        job: from job.toml.
        captions: of each of its pictures.
    """
    own = [text for texts in captions for text in texts]
    prior = [clean(text) for text in job.prior.prompt]
    return list(dict.fromkeys([*own, *[""] * bool(job.data.caption_dropout), *prior]))


def loop_prompts(job: Job, captions: Sequence[Sequence[str]] | None = None) -> LoopPrompts:
    """A job's prompts: its draws', `[data] prompt`, then `[export] prompts`. The latter are painted
    while training; without any, the first caption is.

    Args:
        job: from job.toml.
        captions: of each of its pictures; None to read them.

    Raises:
        BadInput: the folder of pictures cannot be read, or a picture has no caption.
    """
    if captions is None:
        captions = [
            texts
            for subject in job.data.folders()
            for texts in captions_of(survey(subject.images, subject.recursive), subject)
        ]
    caption = clean(job.data.prompt or "") or None
    painted = list(dict.fromkeys(clean(text) for text in job.export.prompts))
    first = job.data.folders()[0]
    known = [*job_prompts(job, captions), *(() if caption is None else first.captions(caption))]
    texts = list(dict.fromkeys([*known, *painted]))
    previews = [texts.index(text) for text in painted] or [0]
    kept = job.data.model_dump(include=set(DrawFacts.model_fields))
    draws = DrawFacts.model_validate(kept)
    return LoopPrompts(texts, previews, caption, job.export.negative_prompt, draws)
