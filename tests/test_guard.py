"""IdentityGuard around a tiny real pipeline: the same pictures, an honest account, nothing left behind."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nearid_personalize.errors import InputError
from nearid_personalize.guard.guard import IdentityGuard
from nearid_personalize.guard.policy import FixedSchedule, RacingPolicy, StoppingPolicy
from nearid_personalize.guard.result import GuardResults, NothingAcceptedWarning, RaceProgress
from nearid_personalize.scorer.scorer import IdentityScorer

STEPS = 3

pytestmark = pytest.mark.filterwarnings("ignore::nearid_personalize.guard.result.NothingAcceptedWarning")


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_dir) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scorer(tiny_nearid_dir) -> IdentityScorer:
    return IdentityScorer.from_pretrained(str(tiny_nearid_dir))


@pytest.fixture
def guard(pipe, scorer, photo_dir) -> IdentityGuard:
    """One that runs every candidate to the end."""
    return IdentityGuard(pipe, scorer, scorer.enroll(photo_dir), policy=None)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def with_threshold(guard: IdentityGuard, threshold: float) -> IdentityGuard:
    subject = dataclasses.replace(guard.subject, threshold=threshold)
    return IdentityGuard(guard.pipe, guard.scorer, subject, guard.max_batch_size, guard.policy)


@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_candidate_k_is_the_plain_pipelines_picture(guard, pipe, max_batch_size):
    guard = IdentityGuard(pipe, guard.scorer, guard.subject, max_batch_size, policy=None)
    kwargs = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "negative_prompt": "blurry"}
    result = guard("sks dog", num_images=1, num_candidates=3, seed=5, **kwargs)
    assert [candidate.seed for candidate in result.candidates] == [5, 6, 7]
    for candidate in result.candidates:
        plain = pipe("sks dog", generator=torch.Generator().manual_seed(candidate.seed), **kwargs).images[0]
        assert np.abs(pixels(candidate.image) - pixels(plain)).max() <= 1
    assert np.abs(pixels(result.candidates[0].image) - pixels(result.candidates[1].image)).max() > 1


def test_scores_and_split_follow_the_scorer(guard):
    first = guard("sks dog", num_images=2, num_candidates=4, num_inference_steps=STEPS)
    scores = guard.scorer.score([candidate.image for candidate in first.candidates], guard.subject)
    assert [candidate.score for candidate in first.candidates] == pytest.approx(scores.tolist(), abs=1e-5)

    ordered = sorted((candidate.score for candidate in first.candidates), reverse=True)
    result = with_threshold(guard, (ordered[2] + ordered[3]) / 2)(
        "sks dog", num_images=2, num_candidates=4, num_inference_steps=STEPS
    )
    assert [candidate.score for candidate in result.accepted] == ordered[:3]
    assert [candidate.score for candidate in result.rejected] == ordered[3:]
    assert "below threshold" in result.rejected[0].reason and result.accepted[0].reason == ""
    assert [id(image) for image in result.images] == [id(candidate.image) for candidate in result.accepted[:2]]
    assert result.best == result.accepted[0]


def test_raising_the_threshold_never_accepts_more(guard):
    counts = []
    for threshold in (-1.0, 0.0, 0.5, 1.1):
        result = with_threshold(guard, threshold)("sks dog", num_images=1, num_candidates=3, num_inference_steps=1)
        counts.append(len(result.accepted))
    assert counts == sorted(counts, reverse=True) and counts[0] == 3 and counts[-1] == 0
    assert result.images == [] and result.best.status == "rejected"


@pytest.mark.parametrize(("guidance_scale", "rows_per_step"), [(1.0, 1), (3.0, 2)])
def test_cost_counts_denoiser_rows(guard, guidance_scale, rows_per_step):
    guard.max_batch_size = 2
    result = guard("sks dog", num_images=1, num_candidates=3, num_inference_steps=STEPS, guidance_scale=guidance_scale)
    assert result.cost.denoiser_rows == result.cost.denoiser_rows_best_of_n == 3 * STEPS * rows_per_step
    assert set(result.cost.seconds) == {"generate", "preview", "score"} and result.cost.seconds["preview"] == 0


def test_four_candidates_per_image_by_default(guard):
    assert len(guard("sks dog", num_images=1, num_inference_steps=1).candidates) == 4


def test_hooks_come_off_also_on_an_exception(guard, pipe):
    def fail(pipe, step, timestep, kwargs):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        guard("sks dog", num_inference_steps=STEPS, callback_on_step_end=fail)
    guard("sks dog", num_images=1, num_candidates=1, num_inference_steps=1)
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("generator", {"generator": torch.Generator()}),
        ("latents", {"latents": torch.zeros(1)}),
        ("num_images_per_prompt", {"num_images_per_prompt": 2}),
        ("output_type", {"output_type": "jpeg"}),
        ("return_dict", {"return_dict": False}),
        ("num_images", {"num_images": 0}),
        ("num_candidates", {"num_images": 4, "num_candidates": 3}),
        ("seed", {"seed": -1}),
        ("budget", {"budget": 0.5}),
        ("budget", {"budget": float("inf")}),
        ("budget", {"budget": float("nan")}),
        ("denoising_end", {"denoising_end": 0.8}),
        ("negative_prompt", {"negative_prompt": ["blurry"]}),
        ("negative_prompt", {"prompt": ["a dog", "a cat"], "negative_prompt": ["blurry"] * 3}),
        ("prompt", {"prompt": None}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": torch.zeros(2, 3, 32)}),
    ],
)
def test_impossible_calls_are_refused_by_name(guard, argument, kwargs):
    with pytest.raises(InputError, match=f"^{argument} "):
        guard(**{"prompt": "sks dog", **kwargs})


def test_reserved_arguments_that_ask_for_nothing_are_harmless(guard):
    call = {"num_images": 1, "num_candidates": 1, "num_inference_steps": 1}
    nothing = {"generator": None, "latents": None, "num_images_per_prompt": 1}
    plain, same = guard("sks dog", **call), guard("sks dog", **call, **nothing)
    assert np.array_equal(pixels(plain.candidates[0].image), pixels(same.candidates[0].image))


def test_unusable_pipelines_and_batch_sizes_are_refused(guard, pipe):
    with pytest.raises(InputError, match="unet nor a transformer"):
        IdentityGuard(object(), guard.scorer, guard.subject)
    with pytest.raises(InputError, match="max_batch_size"):
        IdentityGuard(pipe, guard.scorer, guard.subject, max_batch_size=0)


# --- racing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def halving(guard) -> IdentityGuard:
    """A guard that runs all candidates to half-way and the better half of them to the end."""
    return IdentityGuard(guard.pipe, guard.scorer, guard.subject, policy=FixedSchedule({0.5: 0.5}))


@pytest.mark.parametrize("max_batch_size", [3, 8])
def test_candidates_that_go_on_are_those_of_the_plain_pipeline(halving, pipe, max_batch_size):
    halving.max_batch_size = max_batch_size
    result = halving("sks dog", num_images=1, num_candidates=6, seed=3, num_inference_steps=4, guidance_scale=2.0)
    stopped = [candidate for candidate in result.candidates if candidate.status == "stopped"]
    assert 2 <= len(stopped) <= 3 and len(result.candidates) == 6
    for candidate in result.candidates:
        assert list(candidate.previews) == [0.5]
        if candidate.status == "stopped":
            assert candidate.stopped_at_step == 2 and candidate.image is None
            assert "after step 2 of 4" in candidate.reason
            assert candidate.score == candidate.previews[0.5]
            continue
        generator = torch.Generator().manual_seed(candidate.seed)
        plain = pipe("sks dog", generator=generator, num_inference_steps=4, guidance_scale=2.0).images[0]
        assert np.abs(pixels(candidate.image) - pixels(plain)).max() <= 1
    assert result.cost.denoiser_rows == 2 * (4 * 6 - 2 * len(stopped))
    assert result.cost.denoiser_rows_best_of_n == 2 * 4 * 6
    assert result.cost.seconds["preview"] > 0


def test_a_guard_learns_from_prompt_to_prompt_and_from_call_to_call(halving):
    call = {"num_images": 1, "num_candidates": 6, "num_inference_steps": 4}
    assert halving.profile is None
    halving(["sks dog", "a cat"], **call)
    assert halving.profile.step_fractions == (0.5,) and halving.profile.freedom == (4.0,)  # 3 finished of each
    halving("a dog", **call)
    assert halving.profile.freedom == (6.0,)


def test_the_better_half_by_preview_goes_on(halving):
    result = halving("sks dog", num_images=1, num_candidates=6, num_inference_steps=4)
    on = [c.previews[0.5] for c in result.candidates if c.status != "stopped"]
    assert len(on) == 3 and min(on) >= max(c.score for c in result.candidates if c.status == "stopped")


def test_who_watches_sees_the_race_and_changes_nothing(halving):
    """Steps in order, previews of those in the race, and in the end what the result holds."""
    glimpses: list[RaceProgress] = []
    plain = halving("a dog", num_images=1, num_candidates=4, num_inference_steps=4)
    watched = halving("a dog", num_images=1, num_candidates=4, num_inference_steps=4, watch=glimpses.append)
    assert [(c.seed, c.score, c.status) for c in watched.candidates] == [
        (c.seed, c.score, c.status) for c in plain.candidates
    ]
    for progress in glimpses:
        racing, over = set(progress.looks), {candidate.seed for candidate in progress.candidates}
        assert not racing & over and progress.step <= progress.num_steps == 4
    stopped = {c.seed for c in plain.candidates if c.status == "stopped"}
    middle = next(g for g in glimpses if g.candidates)
    assert {c.seed for c in middle.candidates} == stopped and middle.step < 4
    assert all(image is not None and np.isfinite(score) for image, score in middle.looks.values())
    assert {(c.seed, c.status) for c in glimpses[-1].candidates} == {(c.seed, c.status) for c in plain.candidates}


def test_who_watches_can_end_the_race(halving, pipe):
    class Enough(Exception):
        pass

    def end(progress: RaceProgress) -> None:
        if progress.step == 2:
            raise Enough

    before = pixels(pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])
    with pytest.raises(Enough):
        halving("a dog", num_candidates=4, num_inference_steps=4, watch=end)
    after = pixels(pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])
    assert (before == after).all()


def test_a_budget_begins_new_seeds_with_what_stopping_saves(halving):
    halving.max_batch_size = 4
    result = halving("sks dog", num_images=1, num_candidates=4, budget=6, num_inference_steps=4, guidance_scale=1.0)
    assert [candidate.seed for candidate in result.candidates] == list(range(len(result.candidates)))
    assert len(result.candidates) > 6 and result.cost.denoiser_rows <= 6 * 4


def test_no_more_are_begun_once_enough_are_accepted(guard):
    guard.max_batch_size = 2
    call = {"num_images": 2, "num_candidates": 6, "until_accepted": True, "num_inference_steps": 1}
    assert len(with_threshold(guard, -1.0)("sks dog", **call).candidates) == 2
    nothing = with_threshold(guard, 1.1)("sks dog", **call)
    assert len(nothing.candidates) == 6 and nothing.images == [] and nothing.best.image is not None
    assert len(with_threshold(guard, 1.1)("sks dog", **{**call, "budget": 3}).candidates) == 3


@pytest.mark.parametrize("fits", [2, 1, 0])
def test_a_batch_that_does_not_fit_is_halved_and_nobody_is_lost(guard, pipe, fits):
    def fails_above(module, args, kwargs):
        if len(args[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    call = {"num_images": 1, "num_candidates": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    whole = guard("sks dog", **call)
    handle = pipe.unet.register_forward_pre_hook(fails_above, with_kwargs=True)
    try:
        if fits == 0:
            with pytest.raises(torch.OutOfMemoryError):
                guard("sks dog", **call)
            return
        result = guard("sks dog", **call)
    finally:
        handle.remove()
    assert guard.max_batch_size == fits
    assert [candidate.seed for candidate in result.candidates] == [0, 1, 2, 3, 4]
    for candidate, other in zip(result.candidates, whole.candidates, strict=True):
        assert np.abs(pixels(candidate.image) - pixels(other.image)).max() <= 1


@dataclasses.dataclass(frozen=True)
class BrightnessFloor:
    """Refuses pictures darker than `least`, the mean of 8-bit pixels."""

    least: float

    def judge(self, images, prompt):
        means = [pixels(image).mean() for image in images]
        return ["" if mean >= self.least else f"brightness {mean:.0f} below {self.least:.0f}" for mean in means]


def test_a_floor_refuses_what_identity_accepts(guard):
    every = with_threshold(guard, -1.0)
    call = {"num_images": 2, "num_candidates": 4, "num_inference_steps": 1}
    brightness = sorted(pixels(c.image).mean() for c in every("sks dog", **call).candidates)
    every.floors = (BrightnessFloor((brightness[1] + brightness[2]) / 2),)
    result = every("sks dog", **call)
    assert len(result.accepted) == len(result.rejected) == 2
    assert all(candidate.reason.startswith("brightness ") for candidate in result.rejected)
    assert min(pixels(c.image).mean() for c in result.accepted) > max(pixels(c.image).mean() for c in result.rejected)


def test_of_pictures_that_look_the_same_the_best_is_accepted(guard):
    every = with_threshold(guard, -1.0)
    every.duplicate_limit = -1.0  # everything looks like everything
    result = every("sks dog", num_images=2, num_candidates=3, num_inference_steps=1)
    assert [candidate.status for candidate in result.ranked] == ["accepted", "duplicate", "duplicate"]
    assert result.ranked[0].score == max(c.score for c in result.candidates)
    assert result.ranked[1].reason == f"looks like seed {result.ranked[0].seed}"


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("pt", torch.Tensor, (2, 3, 32, 32)), ("np", np.ndarray, (2, 32, 32, 3)), ("latent", torch.Tensor, (2, 4, 8, 8))],
)
def test_images_come_in_the_output_type_asked_for(guard, output_type, kind, shape):
    every = with_threshold(guard, -1.0)
    call = {"num_images": 2, "num_candidates": 3, "num_inference_steps": 2}
    result, as_pil = every("sks dog", output_type=output_type, **call), every("sks dog", **call)
    assert isinstance(result.images, kind) and tuple(result.images.shape) == shape
    for candidate, other in zip(result.candidates, as_pil.candidates, strict=True):
        assert candidate.score == pytest.approx(other.score, abs=1e-3)
        assert np.abs(pixels(candidate.image) - pixels(other.image)).max() <= 1


def test_a_list_of_prompts_gives_a_result_for_each(guard):
    every = with_threshold(guard, -1.0)
    call = {"num_images": 1, "num_candidates": 2, "num_inference_steps": 1, "guidance_scale": 2.0}
    results = every(["sks dog", "a cat"], negative_prompt=["blurry", "dark"], **call)
    assert isinstance(results, GuardResults) and len(results.images) == 2
    alone = every("a cat", negative_prompt="dark", **call)
    assert results[1].prompt == "a cat" and np.array_equal(pixels(results[1].images[0]), pixels(alone.images[0]))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_images_of_several_prompts_are_flat_whatever_their_number(guard, output_type):
    """One prompt keeps two of three images, the other one."""
    call = {"num_images": 3, "num_candidates": 3, "num_inference_steps": 1, "output_type": output_type}
    prompts = ["sks dog", "a cat"]
    scores = [sorted(c.score for c in guard(prompt, **call).candidates) for prompt in prompts]
    lowest, next_lowest, *_ = sorted(score for own in scores for score in own)
    threshold = (lowest + next_lowest) / 2
    results = with_threshold(guard, threshold)(prompts, **call)
    counts = [len(result.images) for result in results]
    assert counts == [sum(score >= threshold for score in own) for own in scores] and set(counts) == {2, 3}
    assert len(results.images) == sum(counts)
    singles = [image for result in results for image in result.images]
    for image, single in zip(results.images, singles, strict=True):
        assert (np.asarray(image) == np.asarray(single)).all()
    with pytest.warns(NothingAcceptedWarning):
        nothing = with_threshold(guard, 1.1)(prompts, **call).images
    assert len(nothing) == 0 and type(nothing) is type(results.images)


def test_names_of_tensors_are_not_dealt_out_to_prompts(guard):
    """Two names and two prompts: the names are the callback's, for each of the prompts."""
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tuple(tensors))
        return {}

    names = ["latents", "prompt_embeds"]
    call = {"num_images": 1, "num_candidates": 1, "num_inference_steps": 1}
    guard(["sks dog", "a cat"], callback_on_step_end=note, callback_on_step_end_tensor_inputs=names, **call)
    assert seen == [tuple(names)] * 2


def test_one_warning_when_nothing_is_accepted(guard):
    call = {"num_images": 1, "num_candidates": 2, "num_inference_steps": 1}
    strict = with_threshold(guard, 1.1)
    with pytest.warns(NothingAcceptedWarning, match="none of 2 candidates was accepted, .* below threshold") as caught:
        strict("sks dog", **call)
    assert [w.filename for w in caught if w.category is NothingAcceptedWarning] == [__file__]
    with pytest.warns(NothingAcceptedWarning, match="accepted for 2 of 2 prompts") as caught:
        strict(["sks dog", "a cat"], **call)
    assert [w.filename for w in caught if w.category is NothingAcceptedWarning] == [__file__]


def test_no_warning_when_something_is_accepted(guard, recwarn):
    with_threshold(guard, -1.0)("sks dog", num_images=1, num_candidates=1, num_inference_steps=1)
    assert not [w for w in recwarn if w.category is NothingAcceptedWarning]


def test_prompt_embeddings_stand_in_for_a_prompt(guard, pipe):
    embeds, _ = pipe.encode_prompt("sks dog", "cpu", 1, False)
    call = {"num_images": 1, "num_candidates": 2, "num_inference_steps": 1, "guidance_scale": 1.0}
    by_embeds, by_text = guard(prompt_embeds=embeds, **call), guard("sks dog", **call)
    assert np.array_equal(pixels(by_embeds.candidates[1].image), pixels(by_text.candidates[1].image))


def test_a_callback_of_the_users_own_is_called(halving):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors)))
        return {}

    call = {"num_images": 1, "num_candidates": 4, "num_inference_steps": 4}
    result = halving("sks dog", callback_on_step_end=note, **call)
    assert seen == [(step, ("latents",)) for step in range(4)]
    assert [c.status for c in result.candidates].count("stopped") == 2


def test_a_pipeline_outside_the_tested_list_is_scored_at_the_end_only(guard):
    class Unknown(StableDiffusionPipeline):
        pass

    pipe = Unknown(**guard.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="Unknown with DPMSolverMultistepScheduler is not among"):
        other = IdentityGuard(pipe, guard.scorer, guard.subject, policy=FixedSchedule({0.5: 0.5}))
    result = other("sks dog", num_images=1, num_candidates=4, num_inference_steps=2)
    assert all(candidate.image is not None for candidate in result.candidates)


def test_a_scheduler_swapped_later_is_noticed(guard, tiny_pipeline_dir):
    from diffusers import IPNDMScheduler

    pipe = StableDiffusionPipeline(**guard.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    halving = IdentityGuard(pipe, guard.scorer, guard.subject, policy=FixedSchedule({0.5: 0.5}))
    call = {"num_images": 1, "num_candidates": 2, "num_inference_steps": 2}
    tested, pipe.scheduler = pipe.scheduler, IPNDMScheduler()
    with pytest.warns(UserWarning, match="StableDiffusionPipeline with IPNDMScheduler is not among") as caught:
        result = halving("sks dog", **call)
        halving("sks dog", **call)
    assert [w.category for w in caught if w.category is UserWarning] == [UserWarning], "told once"
    assert all(candidate.image is not None for candidate in result.candidates)
    pipe.scheduler = tested
    statuses = [candidate.status for candidate in halving("sks dog", **call).candidates]
    assert statuses.count("stopped") == 1


# --- previews --------------------------------------------------------------------------------------------------------


class AsksAlways(StoppingPolicy):
    """A policy of one's own: it stops nobody, and counts how often it is asked."""

    step_fractions = (0.5,)

    def __init__(self) -> None:
        self.asked = 0

    def decide(self, step_fraction, preview_scores, num_images):
        self.asked += 1
        return ~preview_scores.isnan()


@pytest.mark.parametrize("policy", [RacingPolicy(), FixedSchedule({0.5: 0.5})])
def test_previews_that_can_stop_nobody_are_not_decoded(guard, policy):
    racing = IdentityGuard(guard.pipe, guard.scorer, guard.subject, max_batch_size=1, policy=policy)
    call = {"num_images": 1, "num_candidates": 2, "num_inference_steps": 4}
    for result in (racing("sks dog", **call), racing("sks dog", **{**call, "num_images": 2})):
        assert [candidate.previews for candidate in result.candidates] == [{}, {}]
        assert result.cost.seconds["preview"] == 0
    racing.max_batch_size = 8
    assert racing("sks dog", **{**call, "num_images": 2}).cost.seconds["preview"] == 0  # both are wanted
    assert racing("sks dog", **call).cost.seconds["preview"] > 0


def test_previews_are_decoded_for_whoever_may_want_them(guard):
    """For somebody who watches, and for a policy that does not say that it keeps one."""
    racing = IdentityGuard(guard.pipe, guard.scorer, guard.subject, policy=FixedSchedule({0.5: 0.5}))
    call = {"num_images": 1, "num_candidates": 1, "num_inference_steps": 2}
    assert racing("sks dog", **call, watch=lambda progress: None).cost.seconds["preview"] > 0
    racing.policy = AsksAlways()
    racing("sks dog", **call)
    assert racing.policy.asked == 1


def test_a_preview_that_is_no_picture_stops_nobody(halving, monkeypatch):
    """A VAE in half precision may overflow on an early prediction, and decode the finished latents well."""
    call = {"num_images": 1, "num_candidates": 4, "num_inference_steps": 4}
    plain = halving("sks dog", **call)
    worst = min((c for c in plain.candidates if c.status == "stopped"), key=lambda c: c.score)
    decode = type(halving.pipe.vae).decode

    def overflowing(vae, latents, **kwargs):
        decoded = decode(vae, latents, **kwargs)
        if len(latents) == 4:  # the preview of all; two go on
            decoded[0][worst.seed] = float("nan")
        return decoded

    monkeypatch.setattr(type(halving.pipe.vae), "decode", overflowing)
    result = halving("sks dog", **call)
    unseen = result.candidates[worst.seed]
    assert unseen.status != "stopped" and unseen.previews == {} and np.isfinite(unseen.score)
    assert [c.status for c in result.candidates].count("stopped") == 1
    assert result.cost.denoiser_rows == 2 * (2 * 4 + 2 * 3), "both halves of guidance; it is not begun a second time"


@pytest.mark.parametrize(
    ("num_candidates", "max_batch_size", "waves"), [(17, 8, [6, 6, 5]), (9, 8, [5, 4]), (16, 8, [8, 8]), (3, 8, [3])]
)
def test_waves_are_even(guard, num_candidates, max_batch_size, waves):
    guard.max_batch_size = max_batch_size
    seen = []
    handle = guard.pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    try:
        guard("a", num_images=1, num_candidates=num_candidates, num_inference_steps=1, guidance_scale=1.0)
    finally:
        handle.remove()
    assert seen == waves
