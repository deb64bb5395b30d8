"""A diffusers custom pipeline: any text-to-image base that keeps only pictures of one subject.

    eye = {"scorer": "Aleksandar/nearid-siglip2", "references": "photos"}
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines", trust_remote_code=True, **eye)
    images = pipe("a photo of sks dog in space", num_images=4, num_inference_steps=30).images

What comes back is the base's own pipeline, say a `StableDiffusionXLPipeline`, whose call goes through `IdentityGuard`:
LoRA, schedulers, offloading and saving are those of the base. With a pipeline in hand, no custom one is needed:
`IdentityGuard(pipe, scorer, subject)` does the same.
"""

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from nearid_personalize import IdentityGuard, IdentityScorer, InputError
from nearid_personalize.guard.hooks import find_denoiser


class Guarded:
    """The call of a guarded pipeline; its other base class is the pipeline's own.

    scorer: compares pictures with the subject. subject: whom to keep, None: given with every call. guard_options: what
    `IdentityGuard` takes besides, e.g. `{"max_batch_size": 4}`. All three may be set at any time. A scorer that was
    given by name, and with it the floors among the options, works on the pipeline's device and in its precision; one
    that was given as a scorer stays as it is.
    """

    scorer: IdentityScorer
    subject: Any
    guard_options: dict[str, Any]
    _named_scorer: IdentityScorer | None

    def __call__(self, prompt: Any = None, *, subject: Any = None, references: Any = None, **arguments: Any) -> Any:
        """Draw candidates and return a `GuardResult`: `.images` are the accepted ones, `.candidates` all, `.cost`.

        Args:
            subject: for this call, from `scorer.enroll`; references: or its photos.
            arguments: those of `IdentityGuard.__call__` (`num_images`, `num_candidates`, `seed`, ...) and the base's.

        Raises InputError when no subject is known, or for arguments that cannot work.
        """
        self._scorer_follows()
        if references is not None:
            if subject is not None:
                raise InputError("references cannot be given beside subject; pass one of them")
            subject = self.scorer.enroll(references)
        subject = self.subject if subject is None else subject
        if subject is None:
            raise InputError("subject is not known; pass references= with photos, subject=, or set pipe.subject")
        guard = IdentityGuard(self.unguarded, self.scorer, subject, **self.guard_options)
        result = guard(prompt, **arguments)
        # What fitted into memory this time is where the next call begins
        self.guard_options = {**self.guard_options, "max_batch_size": guard.max_batch_size}
        return result

    def _scorer_follows(self) -> None:
        """Bring a scorer that was given by name, and the floors, to where the pipeline works by now."""
        if self.scorer is not self._named_scorer:
            return
        # Under offloading the weights lie elsewhere than where they work
        device, dtype = self._execution_device, find_denoiser(self).dtype
        if (self.scorer.model.device, self.scorer.model.backbone.dtype) == (device, dtype):
            return
        self.scorer.to(device, dtype)
        for floor in self.guard_options.get("floors", ()):
            if hasattr(floor, "to"):
                floor.to(device, dtype)

    @property
    def unguarded(self) -> DiffusionPipeline:
        """This pipeline under the base's own class; they share one state, so what is set on one is set on both."""
        _, base = type(self).__bases__
        pipe = object.__new__(base)
        pipe.__dict__ = self.__dict__
        return pipe


class IdentityGuardPipeline(DiffusionPipeline):
    """What `from_pretrained` finds here: it knows all components of all bases, and gives the base's guarded pipeline.

    Besides components: `scorer`, an `IdentityScorer` or what `IdentityScorer.from_pretrained` takes; `subject` or
    `references`, unless they come with every call; `guard_options`. `base`, the name of the pipeline's class, comes
    from the base's `model_index.json`.
    """

    _optional_components = [  # noqa: RUF012  as every pipeline's
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "unet",
        "transformer",
        "scheduler",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]

    # Components have no defaults: diffusers takes those that have some for plain options, and loads the base's own
    # component over one that was passed. They have no types: they are those of the base's class.
    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        text_encoder_3,
        tokenizer,
        tokenizer_2,
        tokenizer_3,
        unet,
        transformer,
        scheduler,
        safety_checker,
        feature_extractor,
        image_encoder,
        requires_safety_checker=None,
        force_zeros_for_empty_prompt=None,
        add_watermarker=None,
        is_distilled=None,
        base=None,
        scorer=None,
        subject=None,
        references=None,
        guard_options=None,
    ):
        """Only its signature is used, by `from_pretrained`: what `__new__` returns has been set up there."""

    def __new__(cls, base=None, scorer=None, subject=None, references=None, guard_options=None, **given):
        kind = getattr(diffusers, str(base), None)
        if kind is None:
            raise InputError(f"base {base!r} is no pipeline of diffusers; with your own, use IdentityGuard(pipe, ...)")
        wanted = inspect.signature(kind.__init__).parameters
        known = inspect.signature(cls.__init__).parameters
        if foreign := [name for name in wanted if name not in known]:
            raise InputError(
                f"base {base} has {', '.join(foreign)}, unknown here; use IdentityGuard(pipe, ...) instead"
            )
        named = not isinstance(scorer, IdentityScorer)
        if named:
            if scorer is None:
                raise InputError("scorer must be given: an IdentityScorer, or the folder or Hub id of a NearID encoder")
            scorer = IdentityScorer.from_pretrained(scorer)
        options = {name for name, parameter in known.items() if parameter.default is None}
        given = {name: value for name, value in given.items() if name in wanted}
        given = {name: value for name, value in given.items() if value is not None or name not in options}
        # Named as the base, it is saved as the base
        pipe = type(base, (Guarded, kind), {})(**given)
        pipe.scorer, pipe.guard_options = scorer, dict(guard_options or {})
        pipe._named_scorer = scorer if named else None
        pipe.subject = subject if references is None else scorer.enroll(references)
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As every pipeline's, and the name of the base's class."""
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return init | {"base": config_dict["_class_name"]}, unused, hidden
